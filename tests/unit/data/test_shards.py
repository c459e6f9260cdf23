"""Catches: shards that do not hold the documents, and half-written or damaged ones whose tokens are given out."""

import dataclasses
import hashlib
import os
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from moe_lm.data.batch import make_batch
from moe_lm.data.config import Packing
from moe_lm.data.encode import Encoded, encode, token_type
from moe_lm.data.rows import RowSet
from moe_lm.data.shards import BLOCK_BYTES, ShardHeader, ShardWriter, TokenArray, TokenShard
from moe_lm.errors import InputError
from moe_lm.files import atomic_file
from tests.unit.data.conftest import verify

MakeShard = Callable[..., TokenShard]
PER_BLOCK = BLOCK_BYTES // 2
"""uint16 tokens of a block."""


def write(directory: Path, lengths: Sequence[int], vocab_size: int = 300, batches: int = 1) -> ShardHeader:
    """Writes documents of random tokens, some at a time."""
    generator = np.random.default_rng(len(lengths))
    writer = ShardWriter(directory, "s", vocab_size)
    for part in np.array_split(np.array(lengths, dtype=np.int64), batches):
        tokens = generator.integers(4, vocab_size, part.sum()).astype(token_type(vocab_size))
        writer.add(Encoded(tokens, part), ["text"] * len(part), int(part.sum()))
    return writer.finish()


def read_row(shard: TokenShard, row: int, length: int) -> NDArray:
    pieces = RowSet([shard], length, Packing.sequential).pieces(np.array([row]), np.array([0]))
    return make_batch(pieces, 1, length).input_ids[0].numpy()


def flip(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def test_shard_holds_each_document_between_marks(make_shard: MakeShard, random_texts: list[str]) -> None:
    domains = [f"d{len(text) % 3}" for text in random_texts]
    shard = make_shard(random_texts, domains)
    ends = [*shard.starts[1:], shard.num_tokens]
    tokens = dict.fromkeys(domains, 0)
    for text, domain, number, start, end in zip(random_texts, domains, shard.domains, shard.starts, ends, strict=True):
        ids = shard.tokens[start:end].tolist()
        assert ids[0] == 1
        assert ids[-1] == 2
        assert bytes(token - 4 for token in ids[1:-1]).decode() == text
        assert shard.domain_names[number] == domain
        tokens[domain] += len(ids)
    header = shard.header
    assert dict(zip(header.domain_names, header.domain_tokens, strict=True)) == tokens
    assert (header.num_tokens, header.num_documents) == (shard.num_tokens, len(random_texts))
    assert header.num_bytes == sum(len(text.encode()) for text in random_texts)
    assert shard.num_targets == header.num_bytes + len(random_texts)
    assert shard.tokens.dtype == np.uint16
    assert not shard.tokens.flags.writeable
    verify(shard)


@pytest.mark.parametrize("batches", [1, 2, 7])
def test_header_is_that_of_the_files_however_they_were_written(tmp_path: Path, batches: int) -> None:
    """Catches block checksums that depend on how many documents are written at a time, and a last block left out."""
    lengths = [PER_BLOCK - 1, 2, 1000, 2 * PER_BLOCK, *[5] * 50]
    header = write(tmp_path, lengths, batches=batches)
    content = (tmp_path / "s.tokens.bin").read_bytes()
    blocks = [content[start : start + BLOCK_BYTES] for start in range(0, len(content), BLOCK_BYTES)]
    assert header.block_sha256 == [hashlib.sha256(block).hexdigest() for block in blocks]
    assert header.num_tokens == sum(lengths) == len(content) // 2
    shard = TokenShard(tmp_path, "s", header)
    assert np.diff(np.append(shard.starts, shard.num_tokens)).tolist() == lengths
    verify(shard)


def test_a_shard_that_ends_with_a_block_has_no_checksum_too_many(tmp_path: Path) -> None:
    header = write(tmp_path, [2 * PER_BLOCK])
    assert len(header.block_sha256) == 2
    assert len(read_row(TokenShard(tmp_path, "s", header), 0, 2 * PER_BLOCK - 1)) == 2 * PER_BLOCK - 1


def test_an_empty_shard_opens(tmp_path: Path) -> None:
    """Catches a side of a chunk to which no document fell: an empty file can not be mapped."""
    shard = TokenShard(tmp_path, "s", ShardWriter(tmp_path, "s", 300).finish())
    assert (shard.num_tokens, shard.num_documents, shard.num_targets) == (0, 0, 0)
    verify(shard)
    for packing in Packing:
        assert RowSet([shard], 8, packing).num_rows == 0


def test_no_temporary_files_stay(make_shard: MakeShard, tmp_path: Path) -> None:
    """Catches temporary files left behind by success or failure, and a half-written file under its real name."""
    shard = make_shard(["a"])
    assert len(list(shard.path.parent.iterdir())) == 3
    with pytest.raises(TypeError), atomic_file(tmp_path / "file") as file:
        file.write("not bytes")  # type: ignore[call-overload]
    with suppress(RuntimeError), ExitStack() as stack:
        writer = ShardWriter(tmp_path / "broken", "s", 300)
        stack.push(writer.close)
        writer.add(Encoded(np.array([1, 2], np.uint16), np.array([2])), ["text"], 0)
        raise RuntimeError("the disk is gone")
    assert not (tmp_path / "file").exists()
    assert not list(tmp_path.glob(".file*"))
    assert not list((tmp_path / "broken").iterdir())


def test_damaged_files_are_refused_at_open(make_shard: MakeShard) -> None:
    """Catches a file cut short or grown, an index with a flipped bit, and files that are gone."""
    shard = make_shard(["some text", "more text"])
    directory, name = shard.path.parent, shard.path.name.removesuffix(".tokens.bin")

    def reopen() -> TokenShard:
        return TokenShard(directory, name, shard.header)

    content = shard.path.read_bytes()
    for wrong in (content[:-2], content[:-1], content + b"\0\0", b""):
        shard.path.write_bytes(wrong)
        with pytest.raises(InputError, match=rf"tokens.bin: has {len(wrong)} bytes instead of 44; bring back"):
            reopen()
    shard.path.write_bytes(content)
    for kind in ("starts", "domains"):
        index = directory / f"{name}.{kind}.npy"
        whole = index.read_bytes()
        for position in (0, 60, len(whole) - 1):
            flip(index, position)
            with pytest.raises(InputError, match=rf"{kind}.npy: is not what was written \(checksum differs\)"):
                reopen()
            flip(index, position)
        index.write_bytes(whole[:-1])
        with pytest.raises(InputError, match=rf"{kind}.npy: is not what was written"):
            reopen()
        index.write_bytes(whole)
        verify(reopen())
    for path in (shard.path, directory / f"{name}.starts.npy"):
        path.rename(directory / "away")
        with pytest.raises(InputError, match="this token shard cannot be read"):
            reopen()
        (directory / "away").rename(path)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_flipped_byte_is_found_before_its_block_is_used(tmp_path: Path, block: int) -> None:
    """Catches tokens of a damaged block given out, through whichever row reaches into it; other blocks still read."""
    header = write(tmp_path, [2 * PER_BLOCK + 5000])
    path = tmp_path / "s.tokens.bin"
    whole = np.fromfile(path, dtype="<u2")
    flip(path, block * BLOCK_BYTES + 7777)
    shard = TokenShard(tmp_path, "s", header)
    length = 1000
    refused = []
    for row in range(RowSet([shard], length, Packing.sequential).num_rows):
        first, last = row * length, min((row + 1) * length, len(whole) - 1)
        if first // PER_BLOCK <= block <= last // PER_BLOCK:
            refused.append(row)
            sentence = f"tokens.bin: bytes {block * BLOCK_BYTES} to .* are not what was written .checksum differs.; "
            for _ in range(2):  # and a block that failed is not taken for verified
                with pytest.raises(InputError, match=sentence):
                    read_row(shard, row, length)
        else:
            assert np.array_equal(read_row(shard, row, length)[: last - first], whole[first:last])
    assert refused
    with pytest.raises(InputError, match="not what was written"):
        verify(shard)
    with pytest.raises(InputError, match="not what was written"):  # a row that spans more than two blocks
        read_row(TokenShard(tmp_path, "s", header), 0, len(whole) - 1)


def test_a_row_longer_than_a_block_checks_what_lies_within(tmp_path: Path) -> None:
    """Catches a check of a long row's first and last block alone, when these are verified already."""
    header = write(tmp_path, [3 * PER_BLOCK])
    flip(tmp_path / "s.tokens.bin", BLOCK_BYTES + 5)
    shard = TokenShard(tmp_path, "s", header)
    for row in (0, 3 * PER_BLOCK // 100 - 1):
        read_row(shard, row, 100)
    with pytest.raises(InputError, match=f"bytes {BLOCK_BYTES} to"):
        read_row(shard, 0, 3 * PER_BLOCK - 1)


def test_a_label_in_a_damaged_block_is_checked(tmp_path: Path) -> None:
    """Catches a check of the inputs alone: the last label is the first token of the next block."""
    header = write(tmp_path, [2 * PER_BLOCK])
    flip(tmp_path / "s.tokens.bin", BLOCK_BYTES)
    shard = TokenShard(tmp_path, "s", header)
    with pytest.raises(InputError, match=f"bytes {BLOCK_BYTES} to {2 * BLOCK_BYTES - 1} are not"):
        read_row(shard, 0, PER_BLOCK)
    read_row(shard, 0, PER_BLOCK - 1)


def test_a_block_is_verified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a MiB hashed for every row."""
    shard = TokenShard(tmp_path, "s", write(tmp_path, [3 * PER_BLOCK]))
    verified: list[int] = []
    original = TokenShard._verify_block
    monkeypatch.setattr(
        TokenShard, "_verify_block", lambda self, block: (verified.append(block), original(self, block))[1]
    )
    order = random.Random(0).sample(range(1500), 400)
    for row in order:
        read_row(shard, row, 1000)
    assert sorted(verified) == [0, 1, 2]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_large_shard_is_not_read_into_memory(tmp_path: Path) -> None:
    """Catches a shard of 3 GB that is read, hashed or copied whole when it is opened or a row of it is asked for."""
    size, zeros = 3 * 2**30, hashlib.sha256(bytes(BLOCK_BYTES)).hexdigest()
    indices = {"starts": np.zeros(1, np.int64), "domains": np.zeros(1, np.uint16)}
    for kind, index in indices.items():
        np.save(tmp_path / f"s.{kind}.npy", index)
    with open(tmp_path / "s.tokens.bin", "wb") as file:
        file.truncate(size)
    header = ShardHeader(
        dtype="<u2",
        num_tokens=size // 2,
        num_documents=1,
        num_bytes=size,
        domain_names=["text"],
        domain_tokens=[size // 2],
        block_sha256=[zeros] * (size // BLOCK_BYTES),
        **{f"{kind}_sha256": hashlib.sha256((tmp_path / f"s.{kind}.npy").read_bytes()).hexdigest() for kind in indices},
    )
    before = resident_bytes()
    shard = TokenShard(tmp_path, "s", header)
    rows = RowSet([shard], 1024, Packing.sequential)
    for row in (0, 1, rows.num_rows // 3, rows.num_rows // 2, rows.num_rows - 1):
        batch = make_batch(rows.pieces(np.array([row]), np.array([0])), 1, 1024)
        assert int(batch.routing_mask.sum()) == (1023 if row == rows.num_rows - 1 else 1024)
    assert resident_bytes() - before < 100e6


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    """Catches ids above 65,535 that are cut, and blocks that are counted in tokens of two bytes."""

    class LargeTokenizer:
        vocab_size, bos_id, eos_id, pad_id = 100_000, 1, 2, 3

        def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
            return [[99_999] * len(text) for text in texts]

    writer = ShardWriter(tmp_path, "s", 100_000)
    encoded = encode(LargeTokenizer(), ["abc", "d" * (BLOCK_BYTES // 4)])  # type: ignore[arg-type]
    writer.add(encoded, ["text", "text"], 0)
    shard = TokenShard(tmp_path, "s", writer.finish())
    assert shard.tokens.dtype == np.uint32
    assert shard.tokens[:5].tolist() == [1, 99_999, 99_999, 99_999, 2]
    assert len(shard.header.block_sha256) == 2
    assert read_row(shard, 0, 4).tolist() == [1, 99_999, 99_999, 99_999]
    flip(shard.path, BLOCK_BYTES)
    assert read_row(shard, 65_534, 4)[-1] == 99_999
    with pytest.raises(InputError, match=f"bytes {BLOCK_BYTES} to"):
        read_row(shard, 65_535, 4)  # its last label


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_the_type_of_tokens_holds_the_last_id(vocab_size: int, dtype: str) -> None:
    assert token_type(vocab_size).str == dtype


def test_an_array_in_memory_and_its_shard_give_the_same_rows(
    make_shard: MakeShard, make_array: Callable[..., TokenArray], random_texts: list[str]
) -> None:
    """Catches streams that train on other rows than prepared shards of the same text."""
    domains = [f"d{len(text) % 3}" for text in random_texts]
    ids = {name: index for index, name in enumerate(sorted(set(domains)))}
    batches = []
    for array in (make_shard(random_texts, domains), make_array(random_texts, domains)):
        rows = RowSet([array], 32, Packing.best_fit)
        numbers = np.arange(rows.num_rows)
        batches.append(make_batch(rows.pieces(numbers, numbers), len(numbers), 32, domain_ids=ids))
    for field in dataclasses.fields(batches[0]):
        assert bool((getattr(batches[0], field.name) == getattr(batches[1], field.name)).all()), field.name
    assert len(batches[0].input_ids) > 100


def test_more_domains_than_an_index_can_tell_apart_are_refused(tmp_path: Path) -> None:
    """Catches domain numbers that wrap around."""
    count = 2**16 + 1
    writer = ShardWriter(tmp_path, "s", 300)
    tokens = np.tile(np.array([1, 2], np.uint16), count)
    with pytest.raises(InputError, match=r"data.domain_field: has more than 65536 different values"):
        writer.add(Encoded(tokens, np.full(count, 2)), [str(index) for index in range(count)], 0)
    writer.close()
