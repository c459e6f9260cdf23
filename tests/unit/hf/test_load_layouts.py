"""Every layout of a model on disk gives the same native parameters, one at a time; each fault of it is named."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from moe_lm.commands.model_source import load_model
from moe_lm.errors import InputError
from moe_lm.hf.layout import Layout
from moe_lm.hf.load import HuggingFaceSource
from moe_lm.hf.model_configuration import load_config
from moe_lm.model.decoder import CausalLM

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
TOKENS = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(3)
    return MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)).eval()


@torch.no_grad()
def _same_logits(directory: Path, reference: torch.Tensor) -> bool:
    model = load_model(HuggingFaceSource(directory), torch.device("cpu"))
    logits = model.logits(model(TOKENS).hidden_BSD)
    return (logits - reference).abs().max() < 1e-5 * reference.abs().max()


# transformers' own


@pytest.mark.parametrize("options", [{}, {"save_original_format": False}, {"max_shard_size": "10KB"}], ids=str)
def test_what_transformers_writes_is_read(mixtral, tmp_path, options):
    """Catches a layout of transformers' own that is refused, or read into other places: stacked names, shards."""
    mixtral.save_pretrained(tmp_path, **options)
    source = HuggingFaceSource(tmp_path)
    fused = options == {"save_original_format": False}
    assert source.layout is (Layout.fused if fused else Layout.per_expert)
    read, expected = dict(source.parameters()), dict(mixtral.named_parameters())
    assert list(read) == source.names() and read.keys() == expected.keys()
    assert all(torch.equal(read[name], parameter) for name, parameter in expected.items())
    with torch.no_grad():
        assert _same_logits(tmp_path, mixtral(TOKENS).logits)


def test_the_stored_type_is_kept(mixtral, tmp_path):
    """Catches a checkpoint in bf16 that is widened on the way, and is twice as large afterwards."""
    MixtralForCausalLM(mixtral.config).to(torch.bfloat16).save_pretrained(tmp_path)
    assert {tensor.dtype for _, tensor in HuggingFaceSource(tmp_path).parameters()} == {torch.bfloat16}


def test_a_llama_is_a_dense_model(tmp_path):
    """Catches Llama read with Mistral's window, or another rotary base than its own."""
    torch.manual_seed(4)
    llama = LlamaForCausalLM(LlamaConfig(**SHAPE, rms_norm_eps=1e-4)).eval()
    llama.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    assert not config.is_mixture and config.sliding_window is None and config.rms_norm_eps == 1e-4
    with torch.no_grad():
        assert _same_logits(tmp_path, llama(TOKENS).logits)


def test_an_old_llama_is_read_with_its_defaults(tmp_path):
    """Catches fields that first releases left out, and frequencies that they wrote down."""
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_key_value_heads": 4})).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["rope_parameters"], raw["num_key_value_heads"], raw["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, frequencies: torch.ones(3)}, tmp_path / "model.safetensors")
    source = HuggingFaceSource(tmp_path)
    assert (source.config.rope_theta, source.config.num_key_value_heads) == (10000.0, 4)
    assert source.ignored == [frequencies]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}, "rope scaling"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"model_type": "qwen2_moe"}, "model_type='qwen2_moe' is not supported"),
        ({"model_type": "my_model", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "model_type='my_model'"),
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused(tmp_path, change, words):
    """Catches a model that loads and says something else than it was trained to: biases, scaling, another family."""
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(InputError, match=r"config\.json") as caught:
        HuggingFaceSource(tmp_path)
    assert words in str(caught.value)


def test_code_of_the_directory_is_not_run(mixtral, tmp_path):
    """Catches remote code: the directory names a module of its own, which would leave a mark if it were imported."""
    mixtral.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({**raw, "auto_map": auto_map}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    source = HuggingFaceSource(tmp_path)
    assert source.has_code and len(dict(source.parameters())) == len(source.names())
    assert not (tmp_path / "run").exists()


# Mistral's own


def _consolidated(model: MixtralForCausalLM, directory: Path, kind: str) -> dict[str, torch.Tensor]:
    """A random model in Mistral's own layout: `new`, `stacked` (the first release), or `dense`."""
    generator = torch.Generator().manual_seed(7)
    config = model.config

    def matrix(*shape: int) -> torch.Tensor:
        return torch.empty(*shape).normal_(0.0, 0.3, generator=generator)

    hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    width = hidden // config.num_attention_heads
    weights = {
        "tok_embeddings.weight": matrix(config.vocab_size, hidden),
        "norm.weight": 1 + matrix(hidden),
        "output.weight": matrix(config.vocab_size, hidden),
    }
    for layer in range(config.num_hidden_layers):
        name = f"layers.{layer}"
        for part, rows in (("q", config.num_attention_heads), ("k", 2), ("v", 2)):
            weights[f"{name}.attention.w{part}.weight"] = matrix(rows * width, hidden)
        weights[f"{name}.attention.wo.weight"] = matrix(hidden, hidden)
        weights |= {f"{name}.{norm}.weight": 1 + matrix(hidden) for norm in ("attention_norm", "ffn_norm")}
        if kind == "dense":
            weights |= {f"{name}.feed_forward.w{i}.weight": matrix(inner, hidden) for i in (1, 3)}
            weights[f"{name}.feed_forward.w2.weight"] = matrix(hidden, inner)
        elif kind == "stacked":
            weights[f"{name}.block_sparse_moe.gate.weight"] = matrix(experts, hidden)
            weights |= {f"{name}.block_sparse_moe.w{i}": matrix(experts * inner, hidden) for i in (1, 2, 3)}
        else:
            weights[f"{name}.feed_forward.gate.weight"] = matrix(experts, hidden)
            for expert in range(experts):
                prefix = f"{name}.feed_forward.experts.{expert}"
                weights |= {f"{prefix}.w{i}.weight": matrix(inner, hidden) for i in (1, 3)}
                weights[f"{prefix}.w2.weight"] = matrix(hidden, inner)
    params = {"dim": hidden, "n_layers": 2, "head_dim": width, "hidden_dim": inner, "n_heads": 4, "n_kv_heads": 2}
    params |= {"norm_eps": 1e-5, "vocab_size": config.vocab_size}
    if kind != "dense":
        params["moe"] = {"num_experts": experts, "num_experts_per_tok": 2}
    directory.mkdir(exist_ok=True)
    (directory / "params.json").write_text(json.dumps(params))
    save_file(weights, directory / "consolidated.safetensors")
    return weights


def _rotated(x_BSNH: torch.Tensor, theta: float) -> torch.Tensor:
    """Mistral's own rotary embedding: neighbouring values are the real and imaginary part of a number."""
    frequencies = 1.0 / theta ** (torch.arange(0, x_BSNH.shape[-1], 2).float() / x_BSNH.shape[-1])
    angles = torch.outer(torch.arange(x_BSNH.shape[1]).float(), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    numbers = torch.view_as_complex(x_BSNH.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(numbers * turns).flatten(-2)


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def _reference_logits(weights: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    """The forward pass of mistral-inference on its own weights, written down once more, token by token for experts."""

    def feed_forward(x: torch.Tensor, name: str) -> torch.Tensor:
        if kind == "dense":
            w1, w2, w3 = (weights[f"{name}.feed_forward.w{i}.weight"] for i in (1, 2, 3))
            return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
        block = f"{name}.{'block_sparse_moe' if kind == 'stacked' else 'feed_forward'}"
        chosen, experts = torch.topk(x @ weights[f"{block}.gate.weight"].T, 2)
        share, y = chosen.softmax(-1), torch.zeros_like(x)
        for row, place, slot in [(b, s, k) for b in range(2) for s in range(20) for k in range(2)]:
            expert = int(experts[row, place, slot])
            if kind == "stacked":
                rows = slice(expert * 16, expert * 16 + 16)
                w1, w2, w3 = (weights[f"{block}.w{i}"][rows] for i in (1, 2, 3))
                w2 = w2.T
            else:
                w1, w2, w3 = (weights[f"{block}.experts.{expert}.w{i}.weight"] for i in (1, 2, 3))
            token = x[row, place]
            y[row, place] += share[row, place, slot] * ((F.silu(token @ w1.T) * (token @ w3.T)) @ w2.T)
        return y

    x = weights["tok_embeddings.weight"][TOKENS]
    for layer in range(2):
        name = f"layers.{layer}"
        h = _norm(x, weights[f"{name}.attention_norm.weight"])
        q, k, v = (
            (h @ weights[f"{name}.attention.w{part}.weight"].T).unflatten(-1, (-1, 6)) for part in ("q", "k", "v")
        )
        q, k = _rotated(q, 1e6), _rotated(k, 1e6)
        k, v = (part.repeat_interleave(2, dim=2) for part in (k, v))
        o = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)), is_causal=True)
        x = x + o.transpose(1, 2).flatten(2) @ weights[f"{name}.attention.wo.weight"].T
        x = x + feed_forward(_norm(x, weights[f"{name}.ffn_norm.weight"]), name)
    return _norm(x, weights["norm.weight"]) @ weights["output.weight"].T


@pytest.mark.parametrize("kind", ["new", "stacked", "dense"])
def test_mistrals_own_files_give_the_model_that_they_are(mixtral, tmp_path, kind):
    """Catches rotary rows left interleaved (or permuted the wrong way round), w2 of the stacked form not transposed,
    and gate and up swapped: logits against Mistral's own forward pass.
    """
    weights = _consolidated(mixtral, tmp_path, kind)
    config = load_config(tmp_path)
    assert (config.rope_theta, config.is_mixture, config.max_position_embeddings) == (1e6, kind != "dense", 32768)
    assert _same_logits(tmp_path, _reference_logits(weights, kind))


def test_mistrals_own_files_may_be_several(mixtral, tmp_path):
    """Catches a second file that is not looked at, or a tensor that is in two of them and taken from either."""
    weights = _consolidated(mixtral, tmp_path, "new")
    (tmp_path / "consolidated.safetensors").unlink()
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: weights[name] for name in part}, tmp_path / f"consolidated.{number:02}.safetensors")
    read = dict(HuggingFaceSource(tmp_path).parameters())
    assert torch.equal(read["lm_head.weight"], weights["output.weight"])
    save_file({names[0]: weights[names[0]]}, tmp_path / "consolidated.02.safetensors")
    with pytest.raises(InputError, match=r"layers.*is in consolidated.00.safetensors as well"):
        HuggingFaceSource(tmp_path)


def test_the_rotary_base_of_silent_params_is_mistrals(mixtral, tmp_path):
    """Catches the wrong base for Mistral 7B v0.1, whose params.json has a window and no base."""
    _consolidated(mixtral, tmp_path, "dense")
    params = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps({**params, "sliding_window": "4096"}))
    config = load_config(tmp_path)
    assert (config.sliding_window, config.rope_theta) == (4096, 1e4)
    (tmp_path / "params.json").write_text(json.dumps({**params, "rope_theta": 77.0, "max_seq_len": 512}))
    config = load_config(tmp_path)
    assert (config.rope_theta, config.max_position_embeddings) == (77.0, 512)
    for more, words in (
        ({"vision_encoder": {"hidden_size": 8}}, "vision_encoder is not supported; mixtures and dense models of text"),
        ({"lora": {"rank": 4}}, "lora is not supported; mixtures and dense models of text alone are"),
        ({"moe": [8, 2]}, r"moe=\[8, 2\] is not a JSON object"),
    ):
        (tmp_path / "params.json").write_text(json.dumps({**params, **more}))
        with pytest.raises(InputError, match=rf"params.json: {words}"):
            load_config(tmp_path)
    del params["n_heads"]
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.raises(InputError, match=r"params.json: num_attention_heads is missing"):
        load_config(tmp_path)


def test_hugging_faces_files_win_over_mistrals(mixtral, tmp_path):
    """Catches a directory with both, as Mistral publishes them, read with the configuration of one and the weights of
    the other.
    """
    _consolidated(mixtral, tmp_path, "new")
    mixtral.save_pretrained(tmp_path)
    source = HuggingFaceSource(tmp_path)
    assert source.layout is Layout.per_expert
    assert torch.equal(source.tensor("lm_head.weight"), mixtral.lm_head.weight)


# Faults


def test_an_index_without_an_entry_is_refused(mixtral, tmp_path):
    """Catches a tensor that is there, and that nobody reads."""
    mixtral.save_pretrained(tmp_path, max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    del values["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"has no entry for model\.norm\.weight"):
        HuggingFaceSource(tmp_path)
    values["weight_map"]["model.norm.weight"] = values["weight_map"]["model.embed_tokens.weight"]
    index.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"model\.norm\.weight is in model-.*, and not in model-"):
        HuggingFaceSource(tmp_path)


def test_an_entry_without_its_tensor_is_refused(mixtral, tmp_path):
    """Catches a parameter that an index promises and no file holds: a shard of an older save."""
    mixtral.save_pretrained(tmp_path, max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.bias"] = file = values["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(values))
    with pytest.raises(InputError, match=rf"{file}: model\.bias is missing, and {index.name} says that it is there"):
        HuggingFaceSource(tmp_path)


def test_two_sets_of_weights_are_refused(mixtral, tmp_path):
    """Catches weights of an older save that are read instead of the newer ones."""
    mixtral.save_pretrained(tmp_path, max_shard_size="10KB")
    (tmp_path / "model.safetensors").write_bytes(b"old")
    with pytest.raises(InputError, match="holds both"):
        HuggingFaceSource(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_pickles_are_refused_with_a_remedy(mixtral, tmp_path, name):
    """Catches a pickle that is opened, and a sentence that leaves the user alone with it."""
    mixtral.config.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(InputError, match=rf"pickles alone \({name}\).*save_pretrained"):
        HuggingFaceSource(tmp_path)


def test_links_of_a_hub_cache_are_followed(mixtral, tmp_path):
    """Catches a cache of the hub, whose files are links to blobs beside it, that can not be read."""
    mixtral.save_pretrained(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(Path("..") / "blobs" / file.name)
    assert torch.equal(HuggingFaceSource(tmp_path / "snapshot").tensor("lm_head.weight"), mixtral.lm_head.weight)


def test_types_within_a_parameter_must_agree(mixtral, tmp_path):
    """Catches one expert of another type than its neighbours, which would be cast in silence."""
    mixtral.save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    weights = load_file(file)
    save_file({**weights, name: weights[name].bfloat16()}, file)
    with pytest.raises(InputError, match=r"experts\.2\.w1\.weight is torch\.bfloat16, and .* is torch\.float32"):
        HuggingFaceSource(tmp_path)
    save_file({**weights, name: weights[name].double()}, file)
    with pytest.raises(InputError, match=r"experts\.2\.w1\.weight is torch\.float64; float32, bfloat16 and float16"):
        HuggingFaceSource(tmp_path)


def test_a_name_that_stands_twice_is_refused(mixtral, tmp_path):
    """Catches a header with one name twice, of which the library takes the last."""
    mixtral.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    first, second = b'"model.layers.0.input_layernorm.weight"', b'"model.layers.1.input_layernorm.weight"'
    header = content[8 : 8 + length].replace(second, first)
    file.write_bytes(content[:8] + header + content[8 + length :])
    with pytest.raises(InputError, match=r"'model\.layers\.0\.input_layernorm\.weight' stands there twice"):
        HuggingFaceSource(tmp_path)


def test_a_truncated_shard_is_named_before_anything_is_read(mixtral, tmp_path, monkeypatch):
    """Catches a download that stopped, found only after gigabytes were read."""
    mixtral.save_pretrained(tmp_path, max_shard_size="10KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    monkeypatch.setattr(HuggingFaceSource, "tensor", None)
    with pytest.raises(InputError, match=rf"{shard.name}: can not be read \(its tensors do not fill the file"):
        HuggingFaceSource(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 10**9}, "fewer tensors than its configuration has layers"),
        ({"num_local_experts": 10**9}, "fewer tensors than its configuration has experts"),
        ({"hidden_size": 2**60, "head_dim": 6}, "no model has the sizes"),
        ({"vocab_size": 10**30}, "no model has the sizes"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf is not"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta=nan is not"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps=1000"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_absurd_sizes_are_refused_at_once(mixtral, tmp_path, change, words):
    """Catches a configuration that makes the reader build a million layers before it looks at the files, or a number
    that ends in a traceback.
    """
    mixtral.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(InputError) as caught:
        HuggingFaceSource(tmp_path)
    assert words in str(caught.value)


def test_parameters_come_one_at_a_time(mixtral, tmp_path, monkeypatch):
    """Catches a reader that gathers the whole model before it gives the first parameter."""
    mixtral.save_pretrained(tmp_path)
    source = HuggingFaceSource(tmp_path)
    read: list[str] = []
    original = HuggingFaceSource.tensor
    monkeypatch.setattr(HuggingFaceSource, "tensor", lambda self, name: read.append(name) or original(self, name))
    for number, (name, _) in enumerate(source.parameters(), start=1):
        assert read[-1] == name and len(read) == number
    assert list(dict(CausalLM(source.config).named_parameters())) == read
