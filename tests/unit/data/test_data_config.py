"""Catches: a bad data setting that is accepted, or refused without naming field and value."""

from collections.abc import Callable
from typing import Any

import pytest

from moe_lm.data.config import DataConfig, DataSource, TokenizerConfig
from moe_lm.errors import InputError


@pytest.mark.parametrize(
    ("build", "values", "sentence"),
    [
        (DataConfig, {"validation_fraction": 0.0}, "data.validation_fraction=0.0: must be above 0"),
        (DataConfig, {"validation_fraction": 0.6}, "data.validation_fraction=0.6: .* at most 0.5"),
        (DataConfig, {"validation_fraction": float("nan")}, "data.validation_fraction=nan"),
        (DataConfig, {"sequence_length": 1}, "data.sequence_length=1: must be at least 2"),
        (DataConfig, {"text_field": ""}, "data.text_field=''"),
        (DataConfig, {"paths": ["a.txt"]}, r"data.paths=\['a.txt'\]: data.source=stdlib reads no paths"),
        (DataConfig, {"validation_paths": ["a.txt"]}, r"data.validation_paths=\['a.txt'\]"),
        (DataConfig, {"source": DataSource.text}, r"data.paths=\[\]: data.source=text needs at least one"),
        (TokenizerConfig, {"vocab_size": 100}, "tokenizer.vocab_size=100: must be between 384"),
        (TokenizerConfig, {"training_bytes": 99}, "tokenizer.training_bytes=99: must be at least 100000"),
        (TokenizerConfig, {"path": ""}, "tokenizer.path=''"),
    ],
)
def test_bad_values_are_refused(build: Callable[..., Any], values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        build(**values)
