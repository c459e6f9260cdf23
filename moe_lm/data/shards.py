"""Token shards: the token ids of documents end to end in one memory-mapped file.

A shard NAME is three files: `NAME.tokens.bin` (ids, little-endian uint16 or uint32), `NAME.starts.npy` (int64 position
of each document's first token) and `NAME.domains.npy` (uint16 number of each document's domain). One of conversations
has `NAME.spans.npy` as well (int64 [n, 2]: tokens [begin, end) that are targets, which are the assistant's). Sizes,
checksums and the domains' names are in its header, which is kept by whoever wrote the shard (`chunks.py`). No sequence
length is in it: rows are cut when batches are made (`rows.py`).

Tokens are verified as they are used: the header has a SHA-256 of every MiB, and a block is compared with its own before
the first token of it is given out. So a set of terabytes opens at once, and a flipped bit is found all the same.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_lm.data.encode import Encoded, token_type
from moe_lm.errors import InputError
from moe_lm.files import atomic_file, sha256

BLOCK_BYTES = 2**20
"""Bytes that one checksum covers."""

MAX_DOMAINS = 2**16

REMEDY = "bring back a good copy, or delete its directory and prepare it again."


@dataclass
class TokenArray:
    """Documents end to end, in memory or mapped."""

    tokens: NDArray[np.uint16 | np.uint32]
    """Ids, the marks of every document included."""
    starts: NDArray[np.int64]
    """Position of each document's first token, its begin mark."""
    domains: NDArray[np.integer]
    """Number of each document's domain in `domain_names`."""
    domain_names: list[str]
    spans: NDArray[np.int64] | None = None
    """[n, 2] in order: tokens [begin, end) are targets. Null means all but each document's begin mark."""

    @property
    def num_tokens(self) -> int:
        """Tokens, the two marks of every document included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents."""
        return len(self.starts)

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted in one pass over all rows."""
        if self.spans is not None:
            return int((self.spans[:, 1] - self.spans[:, 0]).sum())
        return self.num_tokens - self.num_documents

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document."""
        return int(np.diff(np.append(self.starts, self.num_tokens)).max(initial=0))

    def check(self, first_P: NDArray[np.int64], last_P: NDArray[np.int64]) -> None:
        """Makes sure that tokens [first, last] of each piece may be used; in memory there is nothing to check."""


@dataclass(frozen=True)
class ShardHeader:
    """What is recorded of a shard, as JSON."""

    dtype: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    """Raw UTF-8 bytes of the documents, of conversations those that the assistant says: what bits per byte are counted
    over."""
    domain_names: list[str]
    domain_tokens: list[int]
    """Tokens of each domain, in the order of the names."""
    block_sha256: list[str]
    """Of each MiB of the tokens."""
    starts_sha256: str
    domains_sha256: str
    spans_sha256: str | None = None
    """Null where every token is a target."""
    num_targets: int | None = None
    """Tokens within the spans; null where there are none."""


class TokenShard(TokenArray):
    """A shard on disk; tokens are read where they lie, and verified before they are."""

    def __init__(self, directory: Path, name: str, header: ShardHeader) -> None:
        """Opens a shard.

        Raises:
            InputError: A file is missing, its size is not the recorded one, or the index is not what was written.
        """
        self.path, self.header = directory / f"{name}.tokens.bin", header
        try:
            starts = _load_index(directory / f"{name}.starts.npy", header.starts_sha256)
            domains = _load_index(directory / f"{name}.domains.npy", header.domains_sha256)
            spans = None
            if header.spans_sha256 is not None:
                spans = _load_index(directory / f"{name}.spans.npy", header.spans_sha256)
            size = self.path.stat().st_size
            expected_size = header.num_tokens * np.dtype(header.dtype).itemsize
            if size != expected_size:
                raise InputError(f"{self.path}: has {size} bytes instead of {expected_size}; {REMEDY}")
            # As a plain array: slicing numpy's own class of memory maps takes several times as long.
            tokens = np.memmap(self.path, dtype=header.dtype, mode="r") if size else np.empty(0, dtype=header.dtype)
            tokens = tokens.view(np.ndarray)
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{directory / name}: this token shard cannot be read ({error}); {REMEDY}") from None
        super().__init__(tokens, starts, domains, header.domain_names, spans)
        self._raw = tokens.view(np.uint8)
        self._tokens_per_block = BLOCK_BYTES // tokens.itemsize
        self._verified = np.zeros(len(header.block_sha256), dtype=bool)

    def check(self, first_P: NDArray[np.int64], last_P: NDArray[np.int64]) -> None:
        """Compares the blocks of tokens [first, last] of each piece with their checksums, each block once.

        Raises:
            InputError: The file is not what was written.
        """
        first_block_P, last_block_P = first_P // self._tokens_per_block, last_P // self._tokens_per_block
        near = (last_block_P - first_block_P <= 1).all()
        if near and self._verified[first_block_P].all() and self._verified[last_block_P].all():
            return
        for first, last in zip(first_block_P.tolist(), last_block_P.tolist()):
            for block in range(first, last + 1):
                if not self._verified[block]:
                    self._verify_block(block)

    def _verify_block(self, block: int) -> None:
        content = memoryview(self._raw[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES])  # type: ignore[arg-type]
        if hashlib.sha256(content).hexdigest() != self.header.block_sha256[block]:
            raise InputError(
                f"{self.path}: bytes {block * BLOCK_BYTES} to {block * BLOCK_BYTES + content.nbytes - 1} are not what "
                f"was written (checksum differs); {REMEDY}"
            )
        self._verified[block] = True


def _load_index(path: Path, expected_sha256: str) -> NDArray:
    if sha256(path) != expected_sha256:
        raise InputError(f"{path}: is not what was written (checksum differs); {REMEDY}")
    return np.load(path, allow_pickle=False)


class ShardWriter:
    """Writes one shard, batch of documents by batch. What is renamed into place counts once a header tells of it."""

    def __init__(self, directory: Path, name: str, vocab_size: int) -> None:
        """Opens the temporary file (the directory is made if missing)."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._name, self._dtype = directory, name, token_type(vocab_size)
        self._lengths: list[NDArray[np.int64]] = []
        self._domains: list[NDArray[np.uint16]] = []
        self._spans: list[NDArray[np.int64]] = []
        self._names: dict[str, int] = {}
        self._block, self._block_filled = hashlib.sha256(), 0
        self._blocks: list[str] = []
        self.num_tokens = self.num_bytes = 0
        self._closed = False
        self._opened = atomic_file(directory / f"{name}.tokens.bin")
        self._file = self._opened.__enter__()

    def add(self, encoded: Encoded, domains: list[str], num_bytes: int) -> None:
        """Appends documents.

        Args:
            encoded: Their tokens.
            domains: The domain of each.
            num_bytes: UTF-8 bytes of all of them.

        Raises:
            InputError: There are more domains than an index can tell apart.
        """
        assert encoded.tokens.dtype == self._dtype
        numbers = [self._names.setdefault(domain, len(self._names)) for domain in domains]
        if len(self._names) > MAX_DOMAINS:
            raise InputError(
                f"data.domain_field: has more than {MAX_DOMAINS} different values in a shard; name a field with fewer."
            )
        self._domains.append(np.array(numbers, dtype=np.uint16))
        self._lengths.append(encoded.lengths)
        if encoded.spans is not None:
            self._spans.append(encoded.spans + self.num_tokens)
        self.num_tokens += len(encoded.tokens)
        self.num_bytes += num_bytes
        content = memoryview(encoded.tokens.view(np.uint8))  # type: ignore[arg-type]
        self._file.write(content)
        while content.nbytes:
            piece, content = content[: BLOCK_BYTES - self._block_filled], content[BLOCK_BYTES - self._block_filled :]
            self._block.update(piece)
            self._block_filled += piece.nbytes
            if self._block_filled == BLOCK_BYTES:
                self._end_block()

    def _end_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block, self._block_filled = hashlib.sha256(), 0

    def finish(self) -> ShardHeader:
        """Renames the files into place."""
        if self._block_filled:
            self._end_block()
        empty = np.empty(0, dtype=np.int64)
        lengths = np.concatenate([empty, *self._lengths])
        starts = np.cumsum(lengths) - lengths
        domains = np.concatenate([np.empty(0, dtype=np.uint16), *self._domains])
        tokens = np.bincount(domains, weights=lengths, minlength=len(self._names)).astype(np.int64).tolist()
        self.close()
        hashes = {}
        indices = {"starts": starts, "domains": domains}
        if self._spans and self.num_tokens:  # an empty shard says nothing, whether it was given no text or an empty one
            indices["spans"] = np.concatenate(self._spans)
        for kind, index in indices.items():
            with atomic_file(self._directory / f"{self._name}.{kind}.npy") as file:
                np.save(file, index, allow_pickle=False)
            hashes[kind] = sha256(self._directory / f"{self._name}.{kind}.npy")
        return ShardHeader(
            dtype=self._dtype.str,
            num_tokens=self.num_tokens,
            num_documents=len(lengths),
            num_bytes=self.num_bytes,
            domain_names=list(self._names),
            domain_tokens=tokens,
            block_sha256=self._blocks,
            starts_sha256=hashes["starts"],
            domains_sha256=hashes["domains"],
            spans_sha256=hashes.get("spans"),
            num_targets=int(np.diff(indices["spans"]).sum()) if "spans" in indices else None,
        )

    def close(self, *exception: object) -> None:
        """Ends the temporary file, once: renamed into place, or gone after an exception."""
        if self._closed:
            return
        self._closed = True
        self._opened.__exit__(*(exception or (None, None, None)))  # type: ignore[arg-type]
