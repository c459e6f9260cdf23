"""The export on disk: names, shapes and types of its tensors; and a directory that is complete or not there."""

import contextlib
import json
import os
import re
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from moe_lm.errors import InputError
from moe_lm.hf.export import check_output
from moe_lm.hf.receipt import MARK

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def _content(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def _names(directory: Path) -> set[str]:
    return {p.name for p in directory.iterdir()}


# Layout


@pytest.mark.parametrize("family", ["mixture", "tied"])
def test_experts_are_single_matrices_gate_rows_first(exporter, family):
    """Catches gate and up swapped, experts out of order, or stacked tensors that vLLM and llama.cpp can not read."""
    model = exporter(family)
    weights = load_file(exporter.output / SINGLE)
    width = model.config.intermediate_size
    expected = {}
    for name, parameter in model.named_parameters():
        if match := re.fullmatch(r"(.*)\.mlp\.experts\.(gate_up_proj|down_proj)", name):
            for expert in range(model.config.num_experts):
                prefix = f"{match[1]}.block_sparse_moe.experts.{expert}"
                if match[2] == "down_proj":
                    expected[f"{prefix}.w2.weight"] = parameter[expert]
                else:
                    expected[f"{prefix}.w1.weight"] = parameter[expert, :width]
                    expected[f"{prefix}.w3.weight"] = parameter[expert, width:]
        else:
            expected[name.replace(".mlp.gate.weight", ".block_sparse_moe.gate.weight")] = parameter
    assert weights.keys() == expected.keys()
    assert ("lm_head.weight" in weights) == (family != "tied")
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert weights["model.layers.1.block_sparse_moe.experts.2.w1.weight"].shape == (12, 16)
    assert weights["model.layers.1.block_sparse_moe.experts.2.w2.weight"].shape == (16, 12)


def test_a_dense_model_keeps_its_names(exporter):
    """Catches the mixture's renaming applied to Mistral's layers."""
    model = exporter("dense")
    weights = load_file(exporter.output / SINGLE)
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert "model.layers.0.mlp.gate_proj.weight" in weights
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())


def test_the_file_holds_each_matrix_once(exporter):
    """Catches a view of a stacked tensor that drags the whole stack into the file."""
    model = exporter("mixture")
    num_bytes = 4 * sum(p.numel() for p in model.parameters())
    assert num_bytes < (exporter.output / SINGLE).stat().st_size < num_bytes + 10_000


def test_large_models_are_sharded_with_an_index(exporter):
    """Catches a shard above the limit, a tensor lost between shards, or an index that names the wrong file."""
    whole = exporter()
    expected = load_file(exporter.output / SINGLE)
    exporter(max_shard_bytes=3000)
    index = json.loads((exporter.output / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 5 and sorted(exporter.output.glob("*.safetensors")) == [exporter.output / f for f in files]
    found = {}
    for file in files:
        with safe_open(exporter.output / file, framework="pt") as reader:
            assert reader.metadata() == {"format": "pt"}
            held = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        assert all(index["weight_map"][name] == file for name in held)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 3000
        found |= held
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in whole.parameters())


def test_bf16_rounds_every_value_once(exporter):
    """Catches a second rounding on the way (fp32 to fp16 to bf16, or truncation instead of nearest even)."""
    model = exporter("mixture", torch.bfloat16)
    weights = load_file(exporter.output / SINGLE)
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            disk = weights[name.replace(".mlp.gate.weight", ".block_sparse_moe.gate.weight")]
            assert torch.equal(disk, _nearest_bf16(parameter.detach()))
    up = model.model.layers[1].mlp.experts.gate_up_proj.detach()[2, 12:]
    assert torch.equal(weights["model.layers.1.block_sparse_moe.experts.2.w3.weight"], _nearest_bf16(up))
    assert json.loads((exporter.output / "config.json").read_text())["dtype"] == "bfloat16"


def _nearest_bf16(tensor: torch.Tensor) -> torch.Tensor:
    """Round to nearest even by the bits, without torch's own conversion."""
    bits = tensor.contiguous().view(torch.int32).to(torch.int64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.to(torch.int16).view(torch.bfloat16)


def test_configuration_says_what_the_model_is(exporter):
    """Catches a field of config.json that is missing, misnamed, or taken from transformers' defaults."""
    exporter("tied")
    raw = json.loads((exporter.output / "config.json").read_text())
    expected = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 20,
        "hidden_size": 16,
        "head_dim": 4,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "sliding_window": 5,
        "tie_word_embeddings": True,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
        "rope_theta": 5e4,  # what transformers before 5 reads
        "hidden_act": "silu",
        "dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    assert {name: raw.get(name) for name in expected} == expected
    generation = json.loads((exporter.output / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 3)


def test_generation_ends_where_the_chat_template_does(exporter):
    """Catches an export that goes on behind an answer, since its template closes that with another mark."""
    exporter.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ '<pad>' if m.role == 'assistant' else '<s>' }}{% endfor %}"
    )
    path = exporter.tokenizer.directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"split_special_tokens": False}))  # or no template works
    assert exporter.tokenizer.end_ids == [2, 3]
    exporter.tokenizer.chat_template += "\n"  # which it has no id for: <unk> ends nothing
    assert exporter.tokenizer.end_ids == [2, 3]
    exporter.tokenizer.chat_template = exporter.tokenizer.chat_template.strip()
    exporter()
    assert json.loads((exporter.output / "generation_config.json").read_text())["eos_token_id"] == [2, 3]
    assert json.loads((exporter.output / "config.json").read_text())["eos_token_id"] == 2


# The directory


def test_an_export_names_all_its_files(exporter):
    """Catches a file that a later export would take for somebody else's."""
    exporter()
    assert set(json.loads((exporter.output / MARK).read_text())["files"]) == _names(exporter.output) - {MARK}
    assert {"tokenizer.json", "README.md", "verification.json"} < _names(exporter.output)
    check_output(exporter.output)


def test_an_earlier_export_is_replaced_whole(exporter):
    """Catches files of the earlier export that stay beside the new one: an old index would win over the new weights."""
    exporter(max_shard_bytes=3000)
    exporter("dense")
    assert not list(exporter.output.glob("model-*")) and INDEX not in _names(exporter.output)
    assert json.loads((exporter.output / "config.json").read_text())["model_type"] == "mistral"
    assert _names(exporter.output.parent) == {"hf"}


def test_an_export_through_a_link_replaces_what_it_leads_to(exporter, tmp_path):
    """Catches a link that makes the replacement fail at the very end."""
    (tmp_path / "real").mkdir()
    exporter.output.symlink_to(tmp_path / "real")
    exporter()
    exporter("dense")
    assert exporter.output.is_symlink() and SINGLE in _names(tmp_path / "real")


def test_leftovers_of_a_killed_export_do_not_get_into_the_next(exporter):
    """Catches a stale temporary directory whose files end up in a new export."""
    stale = exporter.output.parent / ".tmp-hf"
    (stale / "deep").mkdir(parents=True)
    (stale / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    exporter()
    assert not list(exporter.output.glob("model-*")) and "deep" not in _names(exporter.output)
    assert not stale.exists()


def test_two_exports_at_once_do_not_meet(exporter, monkeypatch):
    """Catches a second export that takes the first one's directory: the receipt of one on the weights of another."""
    save = exporter.tokenizer.save

    def save_while_another_comes(directory, model_max_length):
        monkeypatch.setattr(exporter.tokenizer, "save", save)
        with pytest.raises(InputError, match=r"hf: another process is writing it"):
            exporter("dense")
        save(directory, model_max_length)

    monkeypatch.setattr(exporter.tokenizer, "save", save_while_another_comes)
    exporter()
    assert json.loads((exporter.output / "config.json").read_text())["model_type"] == "mixtral"


def test_a_file_that_came_during_the_export_stays(exporter, monkeypatch):
    """Catches notes that are deleted, since the output was looked at only before the work."""
    exporter()
    save = exporter.tokenizer.save

    def save_slowly(directory, model_max_length):
        (exporter.output / "notes.txt").write_text("precious")
        save(directory, model_max_length)

    monkeypatch.setattr(exporter.tokenizer, "save", save_slowly)
    with pytest.raises(InputError, match=r"did not write \(notes.txt\)"):
        exporter("dense")
    assert (exporter.output / "notes.txt").read_text() == "precious" and _names(exporter.output.parent) == {"hf"}


def test_failure_midway_leaves_nothing_behind(exporter):
    """Catches half an export under the name of a whole one."""
    with pytest.raises(OSError, match="No space left"):
        exporter(tensors=_fails_midway())
    assert _names(exporter.output.parent) == set()


def test_failure_midway_leaves_the_earlier_export_intact(exporter):
    """Catches an export that deletes its predecessor before it is complete."""
    exporter()
    before = _content(exporter.output)
    with pytest.raises(OSError, match="No space left"):
        exporter(tensors=_fails_midway())
    assert _content(exporter.output) == before
    assert _names(exporter.output.parent) == {"hf"}


def _fails_midway():
    yield "model.norm.weight", torch.ones(16)
    raise OSError(28, "No space left on device")


def test_a_tokenizer_that_fails_leaves_nothing_behind(exporter, monkeypatch):
    """Catches an export that appears although its last part failed."""

    def fails(directory, model_max_length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter.tokenizer, "save", fails)
    with pytest.raises(OSError, match="No space left"):
        exporter()
    assert _names(exporter.output.parent) == set()


# Refusals


def _refused(directory: Path) -> str:
    before = sorted(directory.parent.rglob("*")) if directory.parent.is_dir() else []
    with pytest.raises(InputError) as caught:
        check_output(directory, "give another output=")
    assert str(caught.value).startswith(f"{directory}: ") and "give another output=" in str(caught.value)
    assert not before or sorted(directory.parent.rglob("*")) == before
    return str(caught.value)


def test_new_and_empty_directories_are_accepted(tmp_path):
    """Catches a check that asks for a directory to exist, or makes one."""
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    with pytest.raises(InputError, match="holds something that is not an export"):
        check_output(Path("/"))
    check_output(tmp_path / "new/with/parents")
    assert _names(tmp_path) == {"empty"}


def test_a_file_is_refused(tmp_path):
    """Catches an export that deletes a file, or fails after all the work because a file stands in its way."""
    (tmp_path / "file").write_text("precious")
    assert "Not a directory" in _refused(tmp_path / "file")
    assert "file is not a directory" in _refused(tmp_path / "file/sub/deeper")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_foreign_directory_is_refused(tmp_path):
    """Catches an export that replaces somebody's home directory."""
    (tmp_path / "thesis.tex").write_text("precious")
    assert "holds something that is not an export of moe-lm" in _refused(tmp_path)


@pytest.mark.parametrize("foreign", ["notes.txt", ".git/config", "model.safetensors/x"])
def test_an_export_with_one_foreign_file_is_refused(exporter, foreign):
    """Catches deleting what somebody put beside an export, also in a directory named as one of its files."""
    exporter()
    path = exporter.output / foreign
    if path.parent.is_file():
        path.parent.unlink()
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    assert f"({Path(foreign).parts[0]})" in _refused(exporter.output)
    before = _names(exporter.output)
    with pytest.raises(InputError):
        exporter()
    assert _names(exporter.output) == before and path.read_text() == "precious"


@pytest.mark.parametrize("mark", ["", "[]", "{}", '{"files": 3}', '{"files": [[]]}', "\\"], ids=repr)
def test_a_broken_mark_is_no_permission(exporter, mark):
    """Catches a damaged list of files that ends in a traceback, or is taken for leave to delete."""
    exporter()
    (exporter.output / MARK).write_text(mark)
    assert "not an export of moe-lm" in _refused(exporter.output)


def test_a_place_that_can_not_be_written_is_refused_before_any_work(tmp_path):
    """Catches hours of export that end in a permission error, or a name that no file system takes."""
    assert "File name too long" in _refused(tmp_path / ("x" * 300))
    with tempfile.TemporaryDirectory() as locked:
        os.chmod(locked, 0o555)
        with _nobody():
            assert f"{locked} is not a directory that can be written" in _refused(Path(locked) / "new/hf")


@contextlib.contextmanager
def _nobody():
    """Without the privileges of root, who may write anywhere, where the tests run as root."""
    is_root = os.getuid() == 0
    if is_root:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if is_root:
            os.setresuid(0, 0, 0)
