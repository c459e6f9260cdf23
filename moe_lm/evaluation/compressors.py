"""What general compressors make of a text, in bits per byte: a floor that a language model must get below."""

import lzma
import zlib
from collections.abc import Sequence

import numpy as np

from moe_lm.data.shards import TokenShard
from moe_lm.data.tokenizer import Tokenizer


def gzip_bits_per_byte(content: bytes) -> float:
    """Size under `gzip -9` without its header, in bits per byte of content."""
    compressor = zlib.compressobj(level=9, wbits=-15)
    return 8 * (len(compressor.compress(content)) + len(compressor.flush())) / len(content)


def xz_bits_per_byte(content: bytes) -> float:
    """Size under `xz -9`, in bits per byte of content."""
    return 8 * len(lzma.compress(content, preset=9)) / len(content)


def document_bytes(shards: Sequence[TokenShard], tokenizer: Tokenizer) -> bytes:
    """The documents of shards (of conversations, what the assistant says) end to end, decoded: the bytes that bits per
    byte are counted over.

    Exactly those of a text under a tokenizer of this package's own, unless it holds U+2581, which the format gives back
    as a space. Of conversations, with what the template puts into an answer; of tokenizers that normalise or do not
    know a character, as they give it back.
    """
    texts = []
    for shard in shards:
        parts = shard.spans
        if parts is None:  # without the two marks of each document
            parts = np.stack([shard.starts + 1, np.append(shard.starts[1:], shard.num_tokens) - 1], axis=1)
        texts += [tokenizer.decode(shard.tokens[begin:end].tolist()) for begin, end in parts]
    return "".join(texts).encode()
