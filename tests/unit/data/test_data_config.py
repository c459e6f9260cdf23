"""Catches: a bad data setting that is accepted, or refused without naming field and value."""

from collections.abc import Callable
from typing import Any

import pytest

from moe_lm.data.config import DataConfig, DataSource, SourceConfig, TokenizerConfig
from moe_lm.errors import InputError

JSONL, PREPARED = {"source": DataSource.jsonl}, {"source": DataSource.prepared, "paths": ["set"]}


def of(**values: Any) -> SourceConfig:
    """A source of a mixture."""
    return SourceConfig(paths=["a.jsonl"], **values)


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
        (DataConfig, {**JSONL, "paths": ["a"], "domain_field": ""}, "data.domain_field='': give a name, or null"),
        (DataConfig, {**JSONL, "sources": {"a": of(domain="")}}, "data.sources.a.domain='': give a name, or null"),
        (DataConfig, {**JSONL, "sources": {"a b": of()}}, "data.sources.a b: name a source with letters, digits"),
        (DataConfig, {**JSONL, "sources": {"a" * 65: of()}}, "data.sources.a{65}: name a source with letters"),
        (
            DataConfig,
            {**JSONL, "sources": {"a": of(final_weight=2.0)}},
            "data.sources.a.final_weight=2.0: needs a weight to begin at",
        ),
        (
            DataConfig,
            {**JSONL, "sources": {"a": of(weight=1.0), "b": of()}},
            "data.sources.b.weight=null: data.sources.a has a weight, so every source needs one",
        ),
        (
            DataConfig,
            {**JSONL, "streaming": True, "sources": {"a": of(), "b": of()}},
            "data.sources.a.weight=null: a stream does not know its length; give every source a weight",
        ),
        (
            DataConfig,
            {**JSONL, "streaming": True, "paths": ["a.jsonl"], "domain_field": "lang"},
            "data.domain_field=lang: a stream can not look ahead; list every domain in data.domains",
        ),
        (
            DataConfig,
            {**PREPARED, "streaming": True},
            "data.streaming=true: data.source=prepared is tokenized already; leave one of them out",
        ),
        (
            DataConfig,
            {**PREPARED, "sources": {"a": of(weight=1.0)}},
            r"data.sources.a.paths=\['a.jsonl'\]: of a source in a prepared set only weight and final_weight can be",
        ),
        (
            DataConfig,
            {**JSONL, "sources": {"a": of(source=DataSource.prepared)}},
            "data.sources.a.source=prepared: prepared sets are not mixed with text; give data.source=prepared and",
        ),
        (
            DataConfig,
            {"source": DataSource.huggingface, "paths": ["a", "b"]},
            r"data.paths=\['a', 'b'\]: one name or directory of a data set; use data.sources to mix",
        ),
        (DataConfig, {"chat_template": ""}, "data.chat_template='': give a file, or null for the tokenizer's own"),
        (TokenizerConfig, {"vocab_size": 100}, "tokenizer.vocab_size=100: must be between 384"),
        (TokenizerConfig, {"training_bytes": 99}, "tokenizer.training_bytes=99: must be at least 100000"),
        (TokenizerConfig, {"path": ""}, "tokenizer.path=''"),
    ],
)
def test_bad_values_are_refused(build: Callable[..., Any], values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        build(**values)
