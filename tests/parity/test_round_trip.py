"""There and back, bit for bit: native → Hugging Face → native, and Hugging Face → native → Hugging Face, over the
configurations that are compared with transformers.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_lm.cli import main
from moe_lm.commands.model_directory import save_parameters
from moe_lm.commands.model_source import open_source
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize
from tests.models import InMemory, randomize, write_tokenizer
from tests.parity.test_transformers import CASES, _dense, _mixture, _theirs

ONE, MANY = "4GB", "20KB"


def _config(family: str, case):
    return _mixture(case) if family == "mixture" else _dense(case)


def _on_disk(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory, by its name on disk."""
    tensors: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def _assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(
            tensor.contiguous().view(torch.uint8), theirs[name].contiguous().view(torch.uint8)
        ), name


@pytest.mark.parametrize("shards", [ONE, MANY])
@pytest.mark.parametrize(("family", "case"), CASES, ids=str)
def test_native_to_hugging_face_and_back(tmp_path, family, case, shards):
    """Catches a parameter that is lost, misplaced or rounded on the way out or in."""
    model = CausalLM(_config(family, case))
    initialize(model, seed=3)
    source = InMemory(randomize(model, seed=4))
    save_parameters(tmp_path / "native", source.config, source.parameters(), {"command": "test"})
    write_tokenizer(tmp_path / "native/tokenizer")
    _run("export", f"checkpoint={tmp_path / 'native'}", f"output={tmp_path / 'hf'}", f"max_shard_size={shards}")
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 2) == (shards == MANY)
    _run("import", f"checkpoint={tmp_path / 'hf'}", f"output={tmp_path / 'back'}")
    back = open_source(tmp_path / "back")
    _assert_same(dict(back.parameters()), dict(source.parameters()))
    for field in ("width_of_head", "rope_theta", "rms_norm_eps", "sliding_window", "tie_word_embeddings", "family"):
        assert getattr(back.config, field) == getattr(source.config, field)


@pytest.mark.parametrize(("dtype", "shards"), [("fp32", ONE), ("bf16", MANY)])
@pytest.mark.parametrize(("family", "case"), CASES, ids=str)
def test_hugging_face_to_native_and_back(tmp_path, family, case, dtype, shards):
    """Catches somebody else's checkpoint that does not come back as it was, in names, types or values."""
    torch.manual_seed(5)
    theirs = _theirs(_config(family, case)).to(torch.float32 if dtype == "fp32" else torch.bfloat16)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size=shards)
    write_tokenizer(tmp_path / "hf")
    _run("import", f"checkpoint={tmp_path / 'hf'}", f"output={tmp_path / 'native'}")
    options = (f"output={tmp_path / 'back'}", f"dtype={dtype}", f"max_shard_size={shards}")
    _run("export", f"checkpoint={tmp_path / 'native'}", *options)
    _assert_same(_on_disk(tmp_path / "back"), _on_disk(tmp_path / "hf"))


def _run(*arguments: str) -> None:
    assert main(list(arguments)) == 0
