"""The gate of an export, and the same checks by hand: each can fail, and says which tensor, field or file is wrong."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import moe_lm.hf.export as export_module
import moe_lm.hf.verification as verification_module
from moe_lm.errors import InputError, RunError
from moe_lm.hf.configuration_parity import check_reading
from moe_lm.hf.layout import to_disk, to_hf_config
from moe_lm.hf.load import HuggingFaceSource
from moe_lm.hf.parity import check_layers, check_model
from moe_lm.hf.receipt import FORMAT, LAYERS, WHOLE, VerificationError
from moe_lm.hf.router_choices import RouterChoices
from moe_lm.hf.their_model import DiskModel
from moe_lm.hf.verification import verify_alone, verify_export, verify_native
from moe_lm.model.config import LoadBalancing, ModelConfig
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize
from tests.models import CHARACTERS, InMemory, write_tokenizer
from tests.unit.hf.conftest import CONFIGS, SHAPE, make_model

SINGLE = "model.safetensors"
EXPERT = "model.layers.1.block_sparse_moe.experts.2"


def _change_weights(directory: Path, change) -> None:
    weights = load_file(directory / SINGLE)
    change(weights)
    save_file(weights, directory / SINGLE, metadata={"format": "pt"})


def _swap(*names: str):
    def change(weights):
        first, second = (weights[name] for name in names)
        weights[names[0]], weights[names[1]] = second.clone(), first.clone()

    return change


def _flip_bit(weights) -> None:
    weights[f"{EXPERT}.w2.weight"].view(torch.int32)[3, 5] ^= 1


def _set(name: str, value):
    def change(weights):
        weights[name] = value(weights.get(name))

    return change


WEIGHT_FAULTS = {
    "swapped": (_swap(f"{EXPERT}.w1.weight", f"{EXPERT}.w3.weight"), f"{EXPERT}.w1.weight is not the source's in "),
    "permuted": (
        _swap(f"{EXPERT}.w2.weight", "model.layers.1.block_sparse_moe.experts.0.w2.weight"),
        "model.layers.1.block_sparse_moe.experts.0.w2.weight is not the source's in 192 of 192 values",
    ),
    "bit": (_flip_bit, f"{EXPERT}.w2.weight is not the source's in 1 of 192 values"),
    "missing": (lambda weights: weights.pop(f"{EXPERT}.w3.weight"), f"{EXPERT}.w3.weight is missing"),
    "extra": (_set("model.layers.1.bias", lambda _: torch.zeros(3)), "model.layers.1.bias is in no parameter"),
    "type": (_set("model.norm.weight", torch.Tensor.bfloat16), "model.norm.weight is bfloat16 [16], and float32 [16]"),
    "shape": (_set("model.norm.weight", lambda w: w[:8].clone()), "model.norm.weight is float32 [8]"),
}


def _json(name: str, **changes):
    def change(directory: Path) -> None:
        path = directory / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _file(name: str):
    def write(directory: Path) -> None:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"\x80\x04N.")

    return write


def _truncate(directory: Path) -> None:
    content = (directory / SINGLE).read_bytes()
    (directory / SINGLE).write_bytes(content[:-7])


FILE_FAULTS = {
    "theta": (_json("config.json", rope_parameters={"rope_type": "default", "rope_theta": 1e4}), "configuration: rope"),
    "top_k": (_json("config.json", num_experts_per_tok=1), "configuration: num_experts_per_tok is 1 in config.json"),
    "eps": (_json("config.json", rms_norm_eps=1e-6), "configuration: rms_norm_eps is 1e-06 in config.json"),
    "window": (_json("config.json", sliding_window=8), "configuration: sliding_window is 8 in config.json"),
    "auxiliary": (_json("config.json", router_aux_loss_coef=0.5), "configuration: router_aux_loss_coef is 0.5 by"),
    "dropout": (_json("config.json", attention_dropout=0.5), "configuration: attention_dropout is 0.5 by"),
    "activation": (_json("config.json", hidden_act="gelu"), "configuration: "),
    "begin": (_json("config.json", bos_token_id=2), "configuration: bos_token_id is 2 by transformers"),
    "kind": (_json("config.json", model_type="qwen2_moe"), "configuration: "),
    "end": (_json("generation_config.json", eos_token_id=3), "configuration: eos_token_id is 3 in generation_config"),
    "unreadable": (_json("config.json", id2label=3), "configuration: transformers can not read config.json"),
    "generation": (
        lambda directory: (directory / "generation_config.json").unlink(),
        r"configuration: generation_config.json can not be read \(",
    ),
    "truncated": (_truncate, f"tensors: .*{SINGLE}"),
    "pickle": (_file("pytorch_model.bin"), "files: pytorch_model.bin can run code"),
    "capitals": (_file("Model.PKL"), "files: Model.PKL can run code"),
    "below": (_file("original/consolidated.00.pth"), "files: original/consolidated.00.pth can run code"),
    "python": (_file("modeling_mine.py"), "files: modeling_mine.py can run code"),
    "code": (_json("config.json", auto_map={"AutoConfig": "mine.Mine"}), r"files: config.json names code to run"),
    "tokenizer_code": (_json("tokenizer_config.json", auto_map={}), "files: tokenizer_config.json names code"),
    "tokenizer": (lambda directory: write_tokenizer(directory, CHARACTERS[::-1]), "tokenizer: '.*' is .* in training"),
    "broken": (
        lambda directory: (directory / "tokenizer.json").write_text("{"),
        "tokenizer: transformers can not load",
    ),
}


@pytest.fixture
def with_fault(monkeypatch):
    """Puts a fault into what an export has written, before it is read back."""

    def put(fault) -> None:
        def verify(directory, *arguments):
            fault(directory)
            return verify_export(directory, *arguments)

        monkeypatch.setattr(export_module, "verify_export", verify)

    return put


def _content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# The gate


@pytest.mark.parametrize("case", WEIGHT_FAULTS)
def test_a_wrong_tensor_stops_the_export(exporter, with_fault, case):
    """Catches a gate that lets a wrong tensor through, or does not say which it is."""
    change, words = WEIGHT_FAULTS[case]
    with_fault(lambda directory: _change_weights(directory, change))
    with pytest.raises(RunError) as caught:
        exporter()
    assert f"verification failed: tensors: {words}" in str(caught.value)
    assert "nothing was written to" in str(caught.value) and not list(exporter.output.parent.iterdir())


@pytest.mark.parametrize("case", FILE_FAULTS)
def test_a_wrong_file_stops_the_export(exporter, with_fault, case):
    """Catches a gate that looks at weights alone; an earlier export stays as it was."""
    exporter("dense")
    before = _content(exporter.output)
    change, words = FILE_FAULTS[case]
    with_fault(change)
    with pytest.raises(RunError, match=f"verification failed: {words}"):
        exporter()
    assert _content(exporter.output) == before and len(list(exporter.output.parent.iterdir())) == 1


def test_a_shard_or_its_entry_that_is_missing_stops_the_export(exporter, with_fault):
    """Catches an index that is written for other files than those that are there."""
    index = "model.safetensors.index.json"

    def drop_entry(directory: Path) -> None:
        weight_map = json.loads((directory / index).read_text())["weight_map"]
        weight_map.pop("model.norm.weight")
        (directory / index).write_text(json.dumps({"weight_map": weight_map}))

    def drop_shard(directory: Path) -> None:
        next(directory.glob("model-00002*")).unlink()

    for fault, words in ((drop_entry, "no entry for model.norm.weight"), (drop_shard, "model-00002-of")):
        with_fault(fault)
        with pytest.raises(RunError, match=f"verification failed: tensors: .*{words}"):
            exporter(max_shard_bytes=3000)


def test_a_vocabulary_beyond_the_embedding_stops_the_export(exporter, tmp_path):
    """Catches a tokenizer with ids that the model has no row for."""
    exporter.tokenizer = write_tokenizer(tmp_path / "larger", CHARACTERS + "pqrst")
    with pytest.raises(RunError, match=r"vocabulary: model.embed_tokens.weight has 20 rows, and the tokenizer 25 ids"):
        exporter()


def test_a_value_that_is_not_finite_stops_the_export(exporter):
    """Catches a diverged model that is published."""
    model = make_model("mixture")
    tensors = ((n, t * float("nan") if n == "model.norm.weight" else t) for n, t in model.named_parameters())
    with pytest.raises(RunError, match=r"tensors: model.norm.weight has values that are not finite"):
        exporter(tensors=list(tensors))


def test_a_wrong_layout_is_found_by_running_the_layers(exporter, monkeypatch):
    """Catches gate and up swapped in the mapping itself, where each tensor is what the mapping says."""

    def swapped(tensors):
        names = {"w1": "w3", "w3": "w1"}
        for name, tensor in to_disk(tensors):
            *head, matrix, tail = name.split(".")
            yield ".".join([*head, names.get(matrix, matrix), tail]), tensor

    for module in (export_module, verification_module):
        monkeypatch.setattr(module, "to_disk", swapped)
    with pytest.raises(RunError, match=r"layers: model.layers.0 differs from transformers' MixtralDecoderLayer by"):
        exporter()


# What runs the model


def _theirs(source: InMemory, drop: str = "", **changes) -> DiskModel:
    values = {**to_hf_config(source.config), **changes}
    tensors = {name: tensor for name, tensor in to_disk(source.parameters()) if name != drop}
    config = AutoConfig.for_model("mixtral", **values)
    return DiskModel(config, lambda prefix: {n: t for n, t in tensors.items() if n.startswith(prefix)}, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts_per_tok": 1},
        {"rms_norm_eps": 1e-6},
        {"sliding_window": 20},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 4e4}},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
    ],
    ids=str,
)
def test_layers_that_compute_something_else_are_found(changes):
    """Catches a parity check that is too short, or too coarse, to see a field of the configuration."""
    source = InMemory(make_model("mixture"))
    assert check_layers(_theirs(source), source, torch.float32).figures["layers"] < 1e-5
    with pytest.raises(VerificationError, match=r"layers: model.layers.0"):
        check_layers(_theirs(source, **changes), source, torch.float32)


def test_a_layer_that_is_not_filled_is_found():
    """Catches an expert or a norm that transformers leaves random without an error."""
    source = InMemory(make_model("mixture"))
    for name in (f"{EXPERT}.w1.weight", "model.layers.1.input_layernorm.weight"):
        with pytest.raises(VerificationError, match=r"layers: model.layers.1.*transformers"):
            check_layers(_theirs(source, drop=name), source, torch.float32)


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_parts_outside_the_layers_are_run_with_the_whole_model(name):
    """Catches a final norm or a head that no layer alone would show."""
    source = InMemory(make_model("mixture"))
    theirs = _theirs(source)
    check = check_model(theirs, source, torch.float32)
    assert set(check.figures) == {"logits", "loss", "auxiliary loss"} and max(check.figures.values()) < 1e-5
    with pytest.raises(VerificationError, match=rf"model: {name}: transformers reports missing"):
        check_model(_theirs(source, drop=name), source, torch.float32)
    changed = {**theirs.read(""), name: theirs.read("")[name] * 1.001}
    with pytest.raises(VerificationError, match=r"model: logits and transformers' are .* apart"):
        check_model(theirs._replace(read=lambda _: changed), source, torch.float32)


def test_a_model_that_amplifies_rounding_is_no_other_model():
    """Catches a good deep model that is refused, or a bound that lets a wrong one through with it."""
    model = CausalLM(dataclasses.replace(CONFIGS["mixture"], num_hidden_layers=16, initializer_range=0.6))
    initialize(model, seed=5)
    source = InMemory(model)
    theirs = _theirs(source)
    assert "the last bit of the embedding alone changes" in check_model(theirs, source, torch.float32).finding
    head = theirs.read("")["lm_head.weight"]
    changed = {**theirs.read(""), "lm_head.weight": head * (1 + 5e-5)}
    with pytest.raises(VerificationError, match=r"model: loss and transformers' are .* apart, and 1e-05 is allowed"):
        check_model(theirs._replace(read=lambda _: changed), source, torch.float32)
    changed = theirs.read("")
    changed["model.layers.0.input_layernorm.weight"] *= 1.1
    with pytest.raises(VerificationError, match=r"model: logits and transformers' are .* apart"):
        check_model(theirs._replace(read=lambda _: changed), source, torch.float32)


def test_equal_experts_are_compared_and_near_ties_are_not():
    """Catches a good model that is refused because two implementations may break a tie either way."""
    model = make_model("mixture")
    gates = [layer.mlp.gate.weight for layer in model.model.layers]
    with torch.no_grad():
        for gate in gates:
            gate[1] = gate[0]  # an upcycled mixture has such routers
    source = InMemory(model)
    assert check_layers(_theirs(source), source, torch.float32)
    with torch.no_grad():
        for gate in gates:
            gate[:] = gate[0] * (1 + 1e-6 * torch.arange(3)[:, None])
    with pytest.raises(
        VerificationError, match=r"model.layers.0.mlp.gate: more than half of its choices of experts are ties"
    ):
        check_layers(_theirs(source), source, torch.float32)


def _tied_from(monkeypatch, place: int) -> None:
    """Makes the tokens of a text from this place on count as ties."""

    def clear(_, tokens_BS: torch.Tensor) -> torch.Tensor:
        return (torch.arange(tokens_BS.shape[1]) < place).expand(tokens_BS.shape)

    monkeypatch.setattr(RouterChoices, "clear", clear)


def test_what_is_left_of_ties_is_said_and_is_at_least_half(monkeypatch):
    """Catches a receipt that says 48 where four were compared, and that leaves out the losses without a word."""
    source = InMemory(make_model("mixture"))
    theirs = _theirs(source)
    assert "(fp32, 48 random hidden states each)" in check_layers(theirs, source, torch.float32).finding
    assert "(relative, fp32, 96 tokens)" in check_model(theirs, source, torch.float32).finding
    _tied_from(monkeypatch, 30)
    assert "(fp32, at least 30 of 48 random hidden states each)" in check_layers(theirs, source, torch.float32).finding
    check = check_model(theirs, source, torch.float32)
    assert "60 of 96 tokens, before any tie" in check.finding
    assert set(check.figures) == {"logits", "loss", "auxiliary loss"}
    _tied_from(monkeypatch, 23)
    with pytest.raises(
        VerificationError, match=r"layers.0.mlp.gate: more than half of its choices of experts are ties"
    ):
        check_layers(theirs, source, torch.float32)
    with pytest.raises(VerificationError, match="model: ties of experts leave less than half of any text"):
        check_model(theirs, source, torch.float32)


def test_others_are_drawn_where_there_are_ties(monkeypatch):
    """Catches a good model that is refused for one unlucky draw."""
    source = InMemory(make_model("mixture"))
    theirs, clear, calls = _theirs(source), RouterChoices.clear, []

    def unlucky(choices: RouterChoices, tokens_BS: torch.Tensor) -> torch.Tensor:
        calls.append(tokens_BS)
        return clear(choices, tokens_BS) if len(calls) > 1 else torch.zeros_like(tokens_BS, dtype=torch.bool)

    monkeypatch.setattr(RouterChoices, "clear", unlucky)
    assert "48 random hidden states" in check_layers(theirs, source, torch.float32).finding and len(calls) == 3
    calls.clear()
    assert "96 tokens" in check_model(theirs, source, torch.float32).finding and len(calls) == 2


def test_tokens_that_rounding_sends_to_other_experts_are_ties(monkeypatch):
    """Catches a bound of a thousandth for each model of which one token has another expert in the nudged run."""
    source = InMemory(make_model("mixture"))
    theirs = _theirs(source)
    monkeypatch.setattr(RouterChoices, "same", lambda *_: torch.arange(48).expand(2, 48) < 40)
    assert "80 of 96 tokens, before any tie" in check_model(theirs, source, torch.float32).finding


# Receipts


def test_the_receipt_names_the_tier(exporter):
    """Catches a receipt that claims more than was checked."""
    exporter()
    receipt = json.loads((exporter.output / "verification.json").read_text())
    names = ["files", "configuration", "tensors", "vocabulary", "tokenizer", "layers"]
    assert receipt["tier"] == WHOLE and [check["name"] for check in receipt["checks"]] == [*names, "model"]
    assert receipt["tensors"].keys() == load_file(exporter.output / SINGLE).keys()
    source = InMemory(make_model("mixture"))
    partly = verify_export(exporter.output, source, exporter.tokenizer, torch.float32, whole=False)
    assert partly.tier == LAYERS and [check.name for check in partly.checks] == names
    assert "whole_model=false" in partly.why


def test_memory_decides_the_tier(exporter, monkeypatch):
    """Catches a whole model that is loaded where it does not fit."""
    source = InMemory(make_model("mixture"))
    for free, tier in ((10_000, LAYERS), (10**9, WHOLE)):
        monkeypatch.setattr(verification_module, "available_memory", lambda free=free: free)
        assert verify_native(source).tier == tier


# By hand


@pytest.mark.parametrize("family", CONFIGS)
def test_an_export_is_good_by_itself(exporter, family):
    """Catches a hand check that refuses what the gate let through."""
    exporter(family, torch.bfloat16, max_shard_bytes=1500)
    receipt = verify_alone(exporter.output, HuggingFaceSource(exporter.output, None), exporter.tokenizer)
    assert receipt.tier == WHOLE and "each the one that verification.json was written for" in receipt.table()


def test_a_configuration_that_transformers_reads_otherwise_is_found(exporter):
    """Catches a hand check that compares our reading with itself: a field that we read, and transformers does not."""
    exporter()
    source = HuggingFaceSource(exporter.output, None)
    assert "19 fields as transformers reads them" in check_reading(exporter.output, source.config).finding
    for name, value in (("rope_theta", 1e6), ("num_experts_per_tok", 1), ("sliding_window", 8), ("rms_norm_eps", 1e-6)):
        misread = dataclasses.replace(source.config, **{name: value})
        with pytest.raises(VerificationError, match=r"configuration: .* by transformers, and .* is meant"):
            check_reading(exporter.output, misread)


def test_a_bit_that_flipped_later_is_named(exporter):
    """Catches damage after the export: every file still opens, and the model still runs."""
    exporter()
    _change_weights(exporter.output, _flip_bit)
    with pytest.raises(VerificationError, match=rf"tensors: {EXPERT}.w2.weight is not the one .* \(SHA-256 differs\)"):
        verify_alone(exporter.output, HuggingFaceSource(exporter.output, None), exporter.tokenizer)


def _text(name: str):
    def write(directory: Path) -> None:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("{{ messages }}")

    return write


LATER_FAULTS = {
    **{name: FILE_FAULTS[name][0] for name in ("theta", "top_k", "window", "begin", "end", "tokenizer")},
    "generation": lambda directory: (directory / "generation_config.json").unlink(),
    "template": lambda directory: (directory / "chat_template.jinja").write_text("{{ messages }}"),
    "no_tokenizer": lambda directory: [path.unlink() for path in directory.glob("tokenizer*")],
    "receipt": lambda directory: (directory / "verification.json").unlink(),
    "old_receipt": _json("verification.json", format=1),
    "template_below": _text("additional_chat_templates/tool_use.jinja"),
    "vocabulary": _text("vocab.txt"),
}


@pytest.mark.parametrize("fault", LATER_FAULTS)
def test_a_file_that_changed_later_is_named(exporter, fault):
    """Catches an export that another model or tokenizer is read from than the one that was verified, by everybody
    alike."""
    exporter()
    LATER_FAULTS[fault](exporter.output)
    with pytest.raises(VerificationError, match=r"files: [\w./]+ (is (missing|not in|not the one that)|has format 1)"):
        verify_alone(exporter.output, HuggingFaceSource(exporter.output, None), exporter.tokenizer)


def test_a_mark_that_names_no_files_is_no_mark(exporter):
    """Catches a traceback over a file of another program."""
    exporter()
    (exporter.output / "verification.json").unlink()
    (exporter.output / "moe_lm_export.json").write_text('{"files": null}')
    receipt = verify_alone(exporter.output, HuggingFaceSource(exporter.output, None), exporter.tokenizer)
    assert "no verification.json to compare them with" in receipt.table()


def test_the_card_of_an_export_may_be_written_anew(exporter):
    """Catches a receipt that binds what no reader of a model opens."""
    exporter()
    (exporter.output / "README.md").write_text("a better one")
    (exporter.output / ".gitattributes").write_text("")
    assert verify_alone(exporter.output, HuggingFaceSource(exporter.output, None), exporter.tokenizer).files


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "verification.json: can not be read as JSON"),
        ("[]", "verification.json: "),
        ("{}", f"verification.json has format None, and this version reads {FORMAT} alone"),
        *(
            (json.dumps({"format": FORMAT, **more}), "files: verification.json has no digests of files")
            for more in ({}, {"files": {}, "tensors": {}}, {"files": 3})
        ),
    ],
)
def test_a_broken_receipt_is_named(exporter, content, words):
    """Catches a receipt without digests that passes for one."""
    exporter()
    (exporter.output / "verification.json").write_text(content)
    with pytest.raises((VerificationError, InputError), match=words):
        verify_alone(exporter.output, HuggingFaceSource(exporter.output, None), exporter.tokenizer)


@pytest.mark.parametrize("kind", ["mixtral", "llama", "llama with a window that it does not look at"])
def test_what_transformers_wrote_is_good(tmp_path, kind):
    """Catches a check that takes its own exports alone; and old files' values that belong to no parameter."""
    torch.manual_seed(1)
    if kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, **({"sliding_window": 8} if "window" in kind else {})))
    model.save_pretrained(tmp_path)
    inverse = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _change_weights(tmp_path, _set(inverse, lambda _: torch.ones(2)))
    receipt = verify_alone(tmp_path, HuggingFaceSource(tmp_path, None), None)
    assert receipt.tier == WHOLE and f"{kind.split()[0].capitalize()}DecoderLayer" in receipt.table()
    assert "no verification.json to compare them with" in receipt.table()


def test_capacity_can_not_be_expressed(exporter):
    """Catches an export whose tokens are dropped in training, and nowhere else."""
    source = InMemory(make_model("mixture"))
    source.config = dataclasses.replace(source.config, capacity_factor=1.5)
    with pytest.raises(InputError, match=r"model.capacity_factor=1.5: drops tokens .* by `finetune`"):
        export_module.export(source, exporter.tokenizer, exporter.output, torch.float32, lambda receipt: "")
    assert isinstance(source.config, ModelConfig) and not exporter.output.exists()


def test_a_copy_of_an_export_is_as_good(exporter, tmp_path):
    """Catches a receipt that is tied to a place."""
    exporter()
    copy = shutil.copytree(exporter.output, tmp_path / "copy")
    assert verify_alone(copy, HuggingFaceSource(copy, None), exporter.tokenizer).tier == WHOLE


@pytest.mark.parametrize(("formula", "share"), [("per_layer", 0.5), ("pooled", 1.0), ("none", 0.0)])
def test_the_load_balancing_loss_keeps_its_weight(formula, share):
    """Catches a coefficient that weighs another loss to transformers, and one that changes from import to export."""
    config = dataclasses.replace(CONFIGS["mixture"], load_balancing=LoadBalancing(formula), router_aux_loss_coef=0.06)
    assert to_hf_config(config)["router_aux_loss_coef"] == 0.06 * share


def test_a_foreign_load_balancing_loss_is_taken_over(exporter):
    """Catches a round trip that changes what the router is trained with."""
    exporter()
    _json("config.json", router_aux_loss_coef=0.02)(exporter.output)
    config = HuggingFaceSource(exporter.output, None).config
    assert (config.router_aux_loss_coef, config.load_balancing) == (0.02, LoadBalancing.pooled)
    assert to_hf_config(config)["router_aux_loss_coef"] == 0.02
    raw = json.loads((exporter.output / "config.json").read_text())
    del raw["router_aux_loss_coef"]
    (exporter.output / "config.json").write_text(json.dumps(raw))
    silent = HuggingFaceSource(exporter.output, None).config.router_aux_loss_coef
    assert silent == AutoConfig.from_pretrained(exporter.output).router_aux_loss_coef == 0.001
