"""Reading Hugging Face directories: everything accounted for, and each fault of the directory named."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_lm.commands.model_source import load_model
from moe_lm.errors import InputError
from moe_lm.hf.load import HuggingFaceSource
from moe_lm.hf.model_configuration import load_config

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def directory(exporter) -> Path:
    """An export of the small mixture."""
    exporter()
    return exporter.output


@pytest.fixture
def sharded(exporter) -> Path:
    """The same in several files."""
    exporter(max_shard_bytes=3000)
    return exporter.output


def _change_json(path: Path, **changes: object) -> None:
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not DROPPED}))


class DROPPED:
    """A value that stands for its absence."""


def _change_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    weights = {**load_file(directory / SINGLE), **changes}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, directory / SINGLE)


def _refused(directory: Path) -> str:
    with pytest.raises(InputError) as caught:
        HuggingFaceSource(directory)
    assert str(directory) in str(caught.value)
    return str(caught.value)


# What is good


@pytest.mark.parametrize("family", ["mixture", "tied", "dense"])
@pytest.mark.parametrize("shard_bytes", [3000, 10**9])
def test_a_model_comes_back_bit_for_bit(exporter, family, shard_bytes):
    """Catches a parameter that is misplaced, left as it was, or a field of the configuration that is lost."""
    model = exporter(family, max_shard_bytes=shard_bytes)
    config = load_config(exporter.output)
    for name in ("width_of_head", "rope_theta", "rms_norm_eps", "sliding_window", "tie_word_embeddings", "family"):
        assert getattr(config, name) == getattr(model.config, name), name
    loaded = dict(load_model(HuggingFaceSource(exporter.output), torch.device("cpu")).named_parameters())
    assert loaded.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(loaded[name], parameter) for name, parameter in model.named_parameters())


def test_a_tied_head_may_be_written_twice(exporter):
    """Catches a tied model whose head becomes a matrix of its own, as some exporters write it twice."""
    embedding = exporter("tied").lm_head.weight.detach().clone()
    _change_weights(exporter.output, **{"lm_head.weight": embedding})
    model = load_model(HuggingFaceSource(exporter.output), torch.device("cpu"))
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.any()


def test_a_tied_model_with_another_head_is_refused(exporter):
    """Catches a head that is left out in silence: transformers does not tie what differs, and computes with both."""
    embedding = exporter("tied").lm_head.weight.detach().clone()
    for head in (embedding.index_fill(0, torch.tensor([3]), 0.5), embedding[:, :8].clone(), embedding.bfloat16()):
        _change_weights(exporter.output, **{"lm_head.weight": head})
        assert "lm_head.weight is another matrix than model.embed_tokens.weight; set tie_word_embeddings to false" in (
            _refused(exporter.output)
        )


def test_older_configurations_are_read(directory):
    """Catches the wrong rotary base for a checkpoint of transformers 4, where rope_theta is a field of its own."""
    _change_json(directory / "config.json", rope_parameters=DROPPED, rope_theta=12345)
    assert load_config(directory).rope_theta == 12345.0


def test_a_plain_rotary_embedding_may_be_said_in_words(directory):
    """Catches a good model that is refused for fields that change nothing."""
    plain = {"type": "default", "rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 1.0, "factor": None}
    _change_json(directory / "config.json", rope_parameters=plain, rope_scaling=None, partial_rotary_factor=1.0)
    assert load_config(directory).rope_theta == 5e4
    _change_json(directory / "config.json", head_dim=DROPPED, tie_word_embeddings=DROPPED, sliding_window=DROPPED)
    config = load_config(directory)
    assert (config.width_of_head, config.tie_word_embeddings, config.sliding_window) == (4, False, None)


def test_a_silent_mistral_has_its_window(exporter):
    """Catches a window that is dropped: transformers takes 4096 where a Mistral configuration names none."""
    exporter("dense")
    assert load_config(exporter.output).sliding_window is None
    _change_json(exporter.output / "config.json", sliding_window=DROPPED)
    assert load_config(exporter.output).sliding_window == 4096


# Tensors


def test_a_missing_tensor_is_named(directory):
    """Catches an expert left as uninitialised memory."""
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    _change_weights(directory, **{name: None})
    assert f"1 tensors are missing, the first is {name};" in _refused(directory)


def test_an_extra_tensor_is_named(directory):
    """Catches weights that are silently ignored: a bias, another layer, another expert."""
    name = "model.layers.0.self_attn.q_proj.bias"
    _change_weights(directory, **{name: torch.zeros(16)})
    assert f"do not belong to the model of its configuration, the first is {name};" in _refused(directory)


def test_a_wrong_shape_is_named(directory):
    """Catches a tensor that is broadcast or cut to fit."""
    _change_weights(directory, **{"model.norm.weight": torch.ones(1)})
    assert "model.norm.weight has shape [1], and the configuration asks for [16]; take both" in _refused(directory)


def test_quantised_weights_are_refused(directory):
    """Catches integers taken for weights."""
    _change_weights(directory, **{"model.norm.weight": torch.ones(16, dtype=torch.int8)})
    assert "model.norm.weight is torch.int8" in _refused(directory)


def test_a_body_without_a_head_is_named(directory):
    """Catches a `MixtralModel` that is called a model of another architecture."""
    weights = load_file(directory / SINGLE)
    del weights["lm_head.weight"]
    save_file({name.removeprefix("model."): tensor for name, tensor in weights.items()}, directory / SINGLE)
    said = _refused(directory)
    assert (
        "without its language-model head (embed_tokens.weight is what" in said
        and "as MixtralForCausalLM rather than MixtralModel" in said
    )


def test_other_shapes_in_the_configuration_are_named(directory):
    """Catches a configuration that does not fit the weights."""
    _change_json(directory / "config.json", intermediate_size=24)
    assert re.search(r"w\d\.weight has shape \[.*asks for \[", _refused(directory))
    _change_json(directory / "config.json", intermediate_size=12, num_local_experts=4)
    assert "6 tensors are missing, the first is model.layers.0.block_sparse_moe.experts.3.w1" in _refused(directory)


# Files


@pytest.mark.parametrize(
    "name",
    [
        *("../outside.safetensors", "/outside.safetensors", "sub/x.safetensors", "..", ".", "", "a\0.safetensors"),
        *("a\\b.safetensors", "model.bin", "x.safetensors\n", 5, None, ["x"]),
    ],
    ids=repr,
)
def test_an_index_never_leads_out_of_the_directory(sharded, name):
    """Catches weights read from anywhere on the machine: transformers itself follows such a path."""
    index = json.loads((sharded / INDEX).read_text())
    outside = sharded.parent / "outside.safetensors"
    file = index["weight_map"]["model.norm.weight"]
    outside.write_bytes((sharded / file).read_bytes())
    index["weight_map"]["model.norm.weight"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    assert f"{name!r} is not the name of a safetensors file in this directory; fetch it again" in _refused(sharded)


def test_a_missing_or_damaged_shard_is_named(sharded):
    """Catches a traceback for a download that did not finish."""
    shards = sorted(sharded.glob("model-*.safetensors"))
    missing = f"{shards[0]}: can not be read (No such file or directory); fetch it again."
    shards[0].unlink()
    assert _refused(sharded) == missing
    shards[0].symlink_to("nowhere")
    assert _refused(sharded) == missing
    shards[0].unlink()
    shards[0].mkdir()
    assert f"{shards[0]}: can not be read (Is a directory); fetch it again." == _refused(sharded)
    shards[0].rmdir()
    shards[0].write_bytes(shards[1].read_bytes())
    assert shards[0].name in _refused(sharded)  # the index says that it holds other tensors
    shards[0].write_bytes(shards[1].read_bytes()[:50])
    assert shards[0].name in _refused(sharded)


def test_a_missing_index_is_named(sharded):
    """Catches a sentence about model.safetensors, which there never was."""
    (sharded / INDEX).unlink()
    said = _refused(sharded)
    assert f"{sharded / INDEX}: is missing, which says what model-00001-of-" in said and "fetch it again" in said


def test_a_shard_that_went_after_its_headers_were_read_is_named(sharded):
    """Catches a traceback for a file that is removed, or on a disk that is gone, in the middle of the work."""
    source = HuggingFaceSource(sharded)
    shard = source.stored("model.norm.weight").path
    shard.unlink()
    with pytest.raises(InputError, match=rf"{shard.name}: can not be read any more, from model.norm.weight on"):
        source.tensor("model.norm.weight")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}'], ids=repr)
def test_a_broken_index_is_named(sharded, content):
    """Catches a traceback for an index that is no index."""
    (sharded / INDEX).write_text(content)
    said = _refused(sharded)
    assert INDEX in said and "fetch it again" in said


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"version https://git-lfs.github.com/spec/v1\n"], ids=repr)
def test_a_broken_weights_file_is_named(directory, content):
    """Catches a traceback (or an unpickling) for a file that is empty, a pickle, or a pointer of Git LFS."""
    (directory / SINGLE).write_bytes(content)
    assert f"{SINGLE}: can not be read" in _refused(directory)
    (directory / SINGLE).unlink()
    assert f"{SINGLE}: can not be read" in _refused(directory)


# Configuration


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b"\x80\x04N."], ids=lambda c: repr(c[:9])
)
def test_a_broken_configuration_is_named(directory, content):
    """Catches a traceback for a config.json that is no JSON object."""
    (directory / "config.json").write_bytes(content)
    said = _refused(directory)
    assert "config.json: " in said and "fetch it again" in said


def test_a_missing_configuration_is_named(directory):
    """Catches a traceback for a directory that is no model."""
    (directory / "config.json").unlink()
    said = _refused(directory)
    assert "config.json: is missing; fetch it again, or give a directory that holds it beside the weights" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen2_moe"}, "model_type='qwen2_moe' is not supported; mixtral and mistral are"),
        ({"model_type": DROPPED}, "model_type is missing; add it, or fetch the file again"),
        ({"model_type": ["mixtral"]}, "model_type=['mixtral'] is not of type str"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope scaling is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling is not supported"),
        ({"rope_parameters": {"type": "linear", "factor": 4.0, "rope_theta": 1e4}}, "type='linear'"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "factor": 4.0}},
            "rotary embedding (factor=4.0); take a model without it.",
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "(partial_rotary_factor=0.5)"),
        ({"partial_rotary_factor": 0.25}, "(partial_rotary_factor=0.25)"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "(full_attention="),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_theta is missing"),
        ({"rope_parameters": DROPPED, "rope_theta": DROPPED}, "rope_theta is missing"),
        ({"rope_parameters": [1]}, "rope_parameters=[1] is not a JSON object"),
        ({"num_local_experts": DROPPED}, "num_local_experts is missing"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
        ({"num_experts_per_tok": 4}, "model.num_experts_per_tok=4: must be at most model.num_experts=3"),
        ({"hidden_size": DROPPED}, "hidden_size is missing"),
        ({"num_key_value_heads": DROPPED}, "num_key_value_heads is missing"),
        ({"rms_norm_eps": DROPPED}, "rms_norm_eps is missing"),
        ({"hidden_size": "16"}, "hidden_size='16' is not of type int; correct it, or fetch the file again"),
        ({"hidden_size": 16.0}, "hidden_size=16.0 is not of type int"),
        ({"hidden_size": True}, "hidden_size=True is not of type int"),
        ({"hidden_size": 0}, "model.hidden_size=0: must be at least 1"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' is not of type bool"),
        ({"sliding_window": 10**20}, f"model.sliding_window={10**20}: must be less than 2147483648"),
        ({"per_layer_config": {"1": {"num_experts_per_tok": 1}}}, "per_layer_config is not supported"),
        ({"num_key_value_heads": 3}, "must be a multiple of model.num_key_value_heads=3"),
    ],
    ids=str,
)
def test_a_configuration_that_can_not_be_followed_is_refused(directory, changes, words):
    """Catches a traceback, or a model built on a default that the file did not mean."""
    _change_json(directory / "config.json", **changes)
    message = _refused(directory)
    assert words in message and "config.json" in message
