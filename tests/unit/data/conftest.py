"""Shared by the data tests: a small real tokenizer, a byte tokenizer, and shards of random documents."""

import itertools
import random
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from moe_lm.data.encode import encode
from moe_lm.data.shards import ShardWriter, TokenArray, TokenShard
from moe_lm.data.tokenizer_sentencepiece import SentencePieceTokenizer, train_tokenizer

STDLIB_SAMPLE = ("ast.py", "argparse.py", "typing.py", "inspect.py")


class ByteTokenizer:
    """Ids are bytes plus 4: tests can write down expected rows by hand."""

    fingerprint, vocab_size, bos_id, eos_id, pad_id = "bytes", 260, 1, 2, 3
    chat_template = None

    def encode(self, text: str) -> list[int]:
        """Bytes plus 4."""
        return [byte + 4 for byte in text.encode()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Bytes plus 4."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The inverse, without control ids."""
        return bytes(token - 4 for token in ids if token >= 4).decode(errors="replace")

    @property
    def generated_ids(self) -> list[int]:
        """Bytes and the end mark."""
        return [self.eos_id, *range(4, self.vocab_size)]


def verify(shard: TokenShard) -> None:
    """Compares every block of a shard with its checksum."""
    if shard.num_tokens:
        shard.check(np.array([0]), np.array([shard.num_tokens - 1]))


@pytest.fixture(scope="session")
def sample_texts() -> list[str]:
    """Some 400 kB of Python source."""
    root = Path(sysconfig.get_path("stdlib"))
    return [(root / name).read_text(encoding="utf-8") for name in STDLIB_SAMPLE]


@pytest.fixture(scope="session")
def tokenizer(sample_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    """A tokenizer of 1,500 ids trained on the sample."""
    return train_tokenizer(sample_texts, 1500, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make_shard(tmp_path: Path) -> Callable[..., TokenShard]:
    """Writes texts, all of one domain or each of its own, as a shard of bytes."""
    numbers = itertools.count()

    def make(texts: Sequence[str], domains: Sequence[str] | None = None) -> TokenShard:
        directory, name, tokenizer = tmp_path / "shards", f"shard{next(numbers)}", ByteTokenizer()
        writer = ShardWriter(directory, name, tokenizer.vocab_size)
        num_bytes = sum(len(text.encode()) for text in texts)
        writer.add(encode(tokenizer, texts), list(domains or ["text"] * len(texts)), num_bytes)  # type: ignore[arg-type]
        return TokenShard(directory, name, writer.finish())

    return make


@pytest.fixture(scope="session")
def make_array() -> Callable[..., TokenArray]:
    """Puts texts, all of one domain or each of its own, into an array of bytes in memory."""

    def make(texts: Sequence[str], domains: Sequence[str] | None = None) -> TokenArray:
        tokenizer = ByteTokenizer()
        tokens, lengths = encode(tokenizer, texts)[:2]  # type: ignore[arg-type]
        names = sorted(set(domains or ["text"]))
        numbers = np.array([names.index(domain) for domain in domains or ["text"] * len(texts)], dtype=np.uint16)
        return TokenArray(tokens, np.cumsum(lengths) - lengths, numbers, names)

    return make


@pytest.fixture(scope="session")
def random_texts() -> list[str]:
    """57 documents of 1 to 200 characters, from a fixed seed."""
    generator = random.Random(3)
    return ["".join(generator.choices("abcdé \n", k=generator.randint(1, 200))) for _ in range(57)]
