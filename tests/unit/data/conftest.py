"""Shared by the data tests: a small real tokenizer, a byte tokenizer, and shards of random documents."""

import random
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from moe_lm.data.corpus import Document

from moe_lm.data.shards import TokenShard, write_shard
from moe_lm.data.tokenizer import Tokenizer, train_tokenizer

STDLIB_SAMPLE = ("ast.py", "argparse.py", "typing.py", "inspect.py")


class ByteTokenizer:
    """Ids are bytes plus 4: tests can write down expected rows by hand."""

    vocab_size, bos_id, eos_id, pad_id = 260, 1, 2, 3

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Bytes plus 4."""
        return [[byte + 4 for byte in text.encode()] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The inverse, without control ids."""
        return bytes(token - 4 for token in ids if token >= 4).decode()


@pytest.fixture(scope="session")
def sample_texts() -> list[str]:
    """Some 400 kB of Python source."""
    root = Path(sysconfig.get_path("stdlib"))
    return [(root / name).read_text(encoding="utf-8") for name in STDLIB_SAMPLE]


@pytest.fixture(scope="session")
def tokenizer(sample_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of 1,500 ids trained on the sample."""
    return train_tokenizer(sample_texts, 1500, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make_shard(tmp_path: Path) -> Callable[[Sequence[str]], TokenShard]:
    """Writes texts as a shard of bytes."""

    def make(texts: Sequence[str]) -> TokenShard:
        documents = [Document(str(index), text) for index, text in enumerate(texts)]
        return write_shard(documents, ByteTokenizer(), tmp_path / "shards", f"shard{random.random()}")  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def random_texts() -> list[str]:
    """57 documents of 1 to 200 characters, from a fixed seed."""
    generator = random.Random(3)
    return ["".join(generator.choices("abcdé \n", k=generator.randint(1, 200))) for _ in range(57)]
