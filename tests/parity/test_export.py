"""An export against the installed transformers and sentencepiece: the same model, the same ids, the same text."""

import argparse
import ast
from pathlib import Path
from typing import NamedTuple

import pytest
import sentencepiece
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_lm.commands.model_source import load_model
from moe_lm.data.tokenizer import Tokenizer
from moe_lm.data.tokenizer_export import save_tokenizer_files
from moe_lm.data.tokenizer_sentencepiece import train_tokenizer
from moe_lm.evaluation.generation import generate
from moe_lm.hf.export import export
from moe_lm.hf.load import HuggingFaceSource
from moe_lm.model.config import ModelConfig, ModelFamily
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize
from tests.models import InMemory

SHAPE = {
    "vocab_size": 500,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
CONFIGS = {
    "mixture": ModelConfig(**SHAPE, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, rope_theta=1e4),
    "tied": ModelConfig(
        **SHAPE,
        num_key_value_heads=1,
        num_experts=8,
        num_experts_per_tok=3,
        tie_word_embeddings=True,
        sliding_window=9,
        rms_norm_eps=1e-3,
    ),
    "dense": ModelConfig(**SHAPE, family=ModelFamily.dense, num_key_value_heads=2, head_dim=10, rope_theta=3e4),
}
TEXTS = [
    "def f(x):\n    return x + 1\n",
    "text with <s> inside, and </s>, and <|user|> too",
    "<s>",
    "  two spaces, a tab\t, no-break\u00a0space, and \r\n",
    "ünïcödé 日本語 🎉 \u0301 \x00 \x7f",
    " ",
    "",
]


class Exported(NamedTuple):
    """One model three times: ours, its directory, and what transformers makes of that."""

    ours: CausalLM
    directory: Path
    theirs: nn.Module


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> tuple[Tokenizer, Path]:
    """A real tokenizer with transformers' files, trained on some Python source."""
    directory = tmp_path_factory.mktemp("tokenizer")
    texts = [Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, ast)]
    trained = train_tokenizer(texts, SHAPE["vocab_size"], directory)
    save_tokenizer_files(trained, directory, model_max_length=SHAPE["max_position_embeddings"])
    return trained, directory


@pytest.fixture(scope="module", params=list(CONFIGS))
def exported(request, tokenizer, tmp_path_factory) -> Exported:
    """A model with random weights, exported and loaded by transformers."""
    trained, _ = tokenizer
    ours = CausalLM(CONFIGS[request.param])
    initialize(ours, seed=11)
    directory = tmp_path_factory.mktemp(request.param) / "hf"
    export(InMemory(ours), trained, directory, torch.float32, lambda receipt: receipt.table())
    theirs, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return Exported(ours, directory, theirs.eval())


def _tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(2))


def test_transformers_reads_the_very_same_parameters(exported):
    """Catches a tensor that transformers converts, renames, re-initialises or leaves out: bit for bit, all of them."""
    ours, theirs = dict(exported.ours.named_parameters()), dict(exported.theirs.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.dtype == theirs[name].dtype and torch.equal(parameter, theirs[name]), name


@torch.no_grad()
def test_logits_are_the_same(exported):
    """Catches a field of config.json that transformers understands otherwise: rotary base, window, eps, top-k."""
    tokens = _tokens(3, 40)
    reference = exported.theirs(tokens).logits
    ours = exported.ours.logits(exported.ours(tokens).hidden_BSD)
    assert (ours - reference).norm() < 1e-5 * reference.norm()


def test_our_own_reader_gives_the_same_parameters(exported):
    """Catches a loader that differs from the exporter: bit for bit, and of the same configuration."""
    loaded = dict(load_model(HuggingFaceSource(exported.directory), torch.device("cpu")).named_parameters())
    assert loaded.keys() == dict(exported.ours.named_parameters()).keys()
    assert all(torch.equal(loaded[name], parameter) for name, parameter in exported.ours.named_parameters())


@torch.no_grad()
def test_greedy_text_is_the_same(exported):
    """Catches a key-value cache, position or window that drifts after the prompt."""
    prompt = _tokens(1, 7)
    (ours,) = generate(exported.ours, prompt.tolist(), 30)
    reference = exported.theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False, eos_token_id=None
    )
    assert ours == reference[0, prompt.shape[1] :].tolist()
    assert len(set(ours)) > 3  # a model that repeats one token would prove little


@torch.no_grad()
def test_greedy_text_of_many_prompts_is_the_same(exported):
    """Catches padding that a shorter prompt sees, positions that count it, and a row that goes on behind its end."""
    rows = [_tokens(1, length)[0].tolist() for length in (7, 2, 19, 1)]
    alone = [generate(exported.ours, [row], 25)[0] for row in rows]
    assert generate(exported.ours, rows, 25) == alone
    padded = torch.tensor([[0] * (19 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (19 - len(row)) + [1] * len(row) for row in rows])
    reference = exported.theirs.generate(
        padded, attention_mask=mask, max_new_tokens=25, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert alone == reference[:, 19:].tolist()
    end = alone[2][5]
    expected = [ids[: ids.index(end)] if end in ids else ids for ids in alone]
    assert generate(exported.ours, rows, 25, end_ids=[end]) == expected
    assert len({len(ids) for ids in expected}) > 1


@torch.no_grad()
def test_text_ends_where_transformers_ends_it(exported):
    """Catches an end token that is ignored or yielded: ours stops before it, transformers after it."""
    prompt = _tokens(1, 7)
    (endless,) = generate(exported.ours, prompt.tolist(), 12)
    end = endless[5]
    (ours,) = generate(exported.ours, prompt.tolist(), 12, end_ids=[end])
    reference = exported.theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=end
    )
    assert [*ours, end] == reference[0, prompt.shape[1] :].tolist()
    assert ours == endless[: endless.index(end)]


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_ids_are_those_of_sentencepiece(exported, tokenizer, text):
    """Catches a space put in front, a control string read as a control token, or an unknown character lost."""
    reader = AutoTokenizer.from_pretrained(exported.directory)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(exported.directory / "tokenizer.model"))
    ids = reader(text, add_special_tokens=False).input_ids
    assert ids == processor.encode(text) == tokenizer[0].encode(text)
    assert not {tokenizer[0].bos_id, tokenizer[0].eos_id, tokenizer[0].pad_id} & set(ids)
    assert reader.decode(ids) == text
    assert reader(text).input_ids == [tokenizer[0].bos_id, *ids]
