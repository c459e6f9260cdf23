"""Token shards: the token ids of documents end to end in one memory-mapped file.

A shard NAME is three files: `NAME.tokens.bin` (ids, little-endian uint16 or uint32), `NAME.documents.npy` (int64
position of each document's first token, the `<s>`) and `NAME.json` (sizes, checksums, the ids of the marks). No
sequence length is in it: rows are cut when batches are made (`batch.py`).
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_lm.data.corpus import Document
from moe_lm.data.tokenizer import Tokenizer
from moe_lm.errors import InputError
from moe_lm.files import atomic_file, sha256, write_json

ENCODE_CHARACTERS = 4_000_000
"""Text tokenized at a time: enough to keep the threads busy, little enough that Python lists of ids stay small."""


@dataclass(frozen=True)
class ShardHeader:
    """The content of `NAME.json`."""

    dtype: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    """Raw UTF-8 bytes of the documents: what bits per byte are counted over."""
    bos_id: int
    pad_id: int
    tokens_sha256: str
    documents_sha256: str


class TokenShard:
    """A shard on disk; tokens are read where they lie."""

    def __init__(self, directory: Path, name: str) -> None:
        """Opens a shard.

        Raises:
            InputError: A file is missing, or its size is not the recorded one.
        """
        self.directory, self.name = directory, name
        try:
            self.header = ShardHeader(**json.loads((directory / f"{name}.json").read_text()))
            self.tokens: NDArray[np.uint16 | np.uint32] = np.memmap(
                directory / f"{name}.tokens.bin", dtype=np.dtype(self.header.dtype), mode="r"
            )
            self.document_starts: NDArray[np.int64] = np.load(
                directory / f"{name}.documents.npy", mmap_mode="r", allow_pickle=False
            )
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{directory / name}: this token shard cannot be read ({error}); {REMEDY}") from None
        sizes = (len(self.tokens), len(self.document_starts))
        if sizes != (self.num_tokens, self.num_documents):
            raise InputError(
                f"{directory / name}: this token shard has {sizes[0]} tokens in {sizes[1]} documents, "
                f"but should have {self.num_tokens} in {self.num_documents}; {REMEDY}"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens, `<s>` and `</s>` of every document included."""
        return self.header.num_tokens

    @property
    def num_documents(self) -> int:
        """Documents."""
        return self.header.num_documents

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted in one pass over all rows: all but each document's `<s>`."""
        return self.num_tokens - self.num_documents

    @property
    def num_bytes(self) -> int:
        """Raw UTF-8 bytes of all documents."""
        return self.header.num_bytes

    @property
    def bos_id(self) -> int:
        """Id of `<s>`; it stands at the start of each document and nowhere else."""
        return self.header.bos_id

    @property
    def pad_id(self) -> int:
        """Id that fills the last row."""
        return self.header.pad_id

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """The document starts as a plain array: searching a memory map costs several times as much."""
        return np.asarray(self.document_starts)

    def verify(self) -> None:
        """Compares the files with their checksums.

        Raises:
            InputError: A file has changed since it was written.
        """
        for suffix, expected in (
            ("tokens.bin", self.header.tokens_sha256),
            ("documents.npy", self.header.documents_sha256),
        ):
            path = self.directory / f"{self.name}.{suffix}"
            if sha256(path) != expected:
                raise InputError(f"{path}: the content is not what was written (checksum differs); {REMEDY}")


REMEDY = "delete its directory and run the command again."


def write_shard(
    documents: Iterable[Document], tokenizer: Tokenizer, directory: Path, name: str, threads: int = 2
) -> TokenShard:
    """Tokenizes documents, wraps each in `<s> … </s>`, and writes a shard.

    Args:
        documents: The documents, in the order they shall lie in.
        tokenizer: Encodes them.
        directory: Where the shard's files go (made if missing).
        name: The shard's name.
        threads: Threads to tokenize with.
    """
    directory.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    lengths: list[int] = []
    num_bytes = 0
    digest = hashlib.sha256()
    with atomic_file(directory / f"{name}.tokens.bin") as file:
        for batch in _batches(documents):
            num_bytes += sum(len(document.text.encode()) for document in batch)
            for ids in tokenizer.encode_batch([document.text for document in batch], threads):
                data = np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype=dtype).tobytes()
                digest.update(data)
                file.write(data)
                lengths.append(len(ids) + 2)
    ends = np.cumsum(np.array(lengths, dtype=np.int64))
    starts = ends - np.array(lengths, dtype=np.int64)
    with atomic_file(directory / f"{name}.documents.npy") as file:
        np.save(file, starts, allow_pickle=False)
    header = ShardHeader(
        dtype=dtype.str,
        num_tokens=int(ends[-1]) if lengths else 0,
        num_documents=len(lengths),
        num_bytes=num_bytes,
        bos_id=tokenizer.bos_id,
        pad_id=tokenizer.pad_id,
        tokens_sha256=digest.hexdigest(),
        documents_sha256=sha256(directory / f"{name}.documents.npy"),
    )
    write_json(directory / f"{name}.json", asdict(header))
    return TokenShard(directory, name)


def _batches(documents: Iterable[Document]) -> Iterable[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= ENCODE_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
