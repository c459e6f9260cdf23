"""`moe-lm export` and `moe-lm verify`: what they write and say, and what they refuse."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from moe_lm.cli import main
from moe_lm.commands.config import ExportConfig
from tests.runs import TINY, moe_lm, write_corpus

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run, with the export that it ended with; what it said stands beside it."""
    directory = tmp_path_factory.mktemp("export")
    write_corpus(directory / "corpus")
    done = moe_lm("pretrain", *TINY, "data.paths=[corpus]", "trainer.max_steps=8", "run_name=r", cwd=directory)
    (directory / "said").write_text(done.stdout)
    return directory / "runs/r"


@pytest.fixture
def exported(finished, tmp_path) -> Path:
    """A copy of the run's export."""
    return shutil.copytree(finished / "hf", tmp_path / "hf")


@pytest.fixture
def refused(capsys):
    """Runs a command that is refused; what it said, in one line."""

    def run(*arguments: object, code: int = 2) -> str:
        capsys.readouterr()
        assert main(list(map(str, arguments))) == code
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return run


def test_a_run_ends_with_a_verified_export(finished):
    """Catches a run whose export skips the gate, or does not say that it passed it."""
    said = (finished.parents[1] / "said").read_text()
    assert "verified: 7 checks, whole model against transformers (layers within" in said
    receipt = json.loads((finished / "hf/verification.json").read_text())
    assert receipt["tier"] == "whole model" and receipt["versions"].keys() >= {"torch", "transformers", "moe-lm"}
    names = {"tokenizer.model", "tokenizer.json", "generation_config.json", "README.md", "config.json"}
    assert names <= {path.name for path in (finished / "hf").iterdir()}


def test_the_model_card_says_what_is_known(finished):
    """Catches a card with invented figures, a licence that nobody gave, or places of the machine it was made on."""
    card = (finished / "hf/README.md").read_text()
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    validation = next(line for line in reversed(lines) if "validation_bits_per_byte" in line)
    assert validation["complete"]
    assert f"| validation | {validation['validation_bits_per_byte']:.4f} bits per byte (the whole validation" in card
    assert f"| tokens learned from | {max(line.get('targets', 0) for line in lines):,} |" in card
    balance = next(line for line in reversed(lines) if "expert_counts" in line)["load_violation"]
    assert f"the busiest expert of any layer took {1 + balance:.2f} times" in card
    assert 'license: "unknown"' in card and "No licence was stated" in card
    assert "| data | text: corpus |" in card and '"optimizer"' in card and "| tokenizer " in card
    assert str(finished.parents[1]) not in card


def test_export_and_verify_by_hand(finished, tmp_path, capsys):
    """Catches options that do nothing, and a receipt that differs from what was done."""
    output, receipt = tmp_path / "hf", tmp_path / "receipt.json"
    options = ("dtype=bf16", "max_shard_size=30KB", "license=apache-2.0", "whole_model=false")
    assert main(["export", f"checkpoint={finished}", f"output={output}", *options]) == 0
    said = capsys.readouterr().out
    assert "| tensors " in said and "verified: 6 checks, layer by layer" in said and "whole_model=false" in said
    shards = sorted(output.glob("*.safetensors"))
    assert len(shards) > 2 and max(sum(t.nbytes for t in load_file(shard).values()) for shard in shards) <= 30_000
    assert 'license: "apache-2.0"' in (output / "README.md").read_text()
    for options in ((), (f"against={finished}",)):
        assert main(["verify", f"checkpoint={output}", f"output={receipt}", *options]) == 0
        assert "verified: 7 checks, whole model" in capsys.readouterr().out
        assert (
            json.loads(receipt.read_text())["tensors"]
            == json.loads((output / "verification.json").read_text())["tensors"]
        )


def test_a_checkpoint_is_run_against_transformers(finished, capsys):
    """Catches a checkpoint that is whole, and computes something else."""
    assert main(["verify", f"checkpoint={finished}"]) == 0
    said = capsys.readouterr().out
    assert said.count(": good;") >= 1 and "MixtralDecoderLayer" in said and "whole model against transformers" in said


def test_checkpoints_of_fine_tuning_are_good(finished, capsys, monkeypatch):
    """Catches adapters, or moments of a part of the model, that are taken for damage; and a card without its base."""
    monkeypatch.chdir(finished.parents[1])
    of_base = ("model.", "tokenizer.")
    options = [option for option in TINY if not option.startswith(of_base)]
    options += ["data.paths=[corpus]", "trainer.max_steps=2", f"base={finished}"]
    for name, chosen in (("lora", ["finetune=lora"]), ("part", ["finetune.parts=[attention]"])):
        assert main(["finetune", *options, *chosen, f"run_name={name}"]) == 0
        capsys.readouterr()
        assert main(["verify", f"checkpoint=runs/{name}"]) == 0
        said = capsys.readouterr().out
        assert said.count(": good;") == 1 and "verified: 2 checks, whole model" in said
        assert "from the model in `r/step-00000008`." in (finished.parent / name / "hf/README.md").read_text()


def test_an_export_that_changed_is_not_trusted(exported, finished, refused):
    """Catches exit code 0 for weights that are not those that were verified."""
    weights = load_file(exported / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, exported / "model.safetensors")
    said = refused("verify", f"checkpoint={exported}", code=1)
    assert "verification failed: tensors: model.norm.weight is not the one that verification.json" in said
    said = refused("verify", f"checkpoint={exported}", f"against={finished}", code=1)
    assert "tensors: model.norm.weight is not the source's in 1 of 32 values" in said


def test_damaged_directories_are_named(finished, tmp_path, refused):
    """Catches a traceback for a download that did not finish."""
    output = tmp_path / "hf"
    assert main(["export", f"checkpoint={finished}", f"output={output}", "max_shard_size=60KB"]) == 0
    index = json.loads((output / INDEX).read_text())
    left = {name: file for name, file in index["weight_map"].items() if name != "model.norm.weight"}
    (output / INDEX).write_text(json.dumps({"weight_map": left}))
    assert "has no entry for model.norm.weight" in refused("verify", f"checkpoint={output}")
    (output / INDEX).write_text(json.dumps(index))
    shard = sorted(output.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard}: can not be read" in refused("verify", f"checkpoint={output}")


def test_a_receipt_replaces_receipts_and_nothing_else(finished, exported, tmp_path, refused):
    """Catches a receipt that is written over somebody's paper, or over the weights' own index."""
    paper = tmp_path / "paper.tex"
    for content in ("precious", "", '{"format": 2, "tensors": {}}'):
        paper.write_text(content)
        said = refused("verify", f"checkpoint={exported}", f"output={paper}")
        assert said.endswith(f"output={paper}: is another file than a receipt, and would be lost; give another one.")
        assert paper.read_text() == content
    assert "is another file than a receipt" in refused("verify", f"checkpoint={finished}", "output=/dev/null")
    for _ in range(2):
        assert main(["verify", f"checkpoint={exported}", f"output={tmp_path / 'receipt.json'}"]) == 0


def test_a_receipt_that_can_not_be_had_is_refused(tmp_path, refused, monkeypatch):
    """Catches exit code 0 without the file that was asked for, of a model that is not run against transformers."""
    write_corpus(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    options = [*TINY, "data.paths=[corpus]", "trainer.max_steps=1", "run_name=r", "model.capacity_factor=1.5"]
    assert main(["pretrain", *options, "finish.export=false", "finish.sample_tokens=1"]) == 0
    for option in ("output=receipt.json", "whole_model=true"):
        said = refused("verify", "checkpoint=runs/r", option)
        assert f"{option}: there is no receipt of this model (model.capacity_factor=1.5: drops tokens" in said
        assert said.endswith("; leave it out.")
    for options in ((), ("whole_model=false",)):
        assert main(["verify", "checkpoint=runs/r", *options]) == 0


def test_other_architectures_are_named(tmp_path, refused):
    """Catches a model of another kind that is read as if it were one of ours."""
    shape = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    Qwen2ForCausalLM(Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=1)).save_pretrained(tmp_path)
    said = refused("verify", f"checkpoint={tmp_path}")
    assert "model_type='qwen2' is not supported; mixtral and mistral are" in said


def test_mistral_s_own_files_are_to_be_imported(tmp_path, refused):
    """Catches a traceback of transformers, which does not read them."""
    (tmp_path / "params.json").write_text("{}")
    save_file({"norm.weight": torch.ones(3)}, tmp_path / "consolidated.safetensors")
    assert "`import` it, and verify what that writes" in refused("verify", f"checkpoint={tmp_path}")


def test_what_can_not_be_followed_is_refused(finished, exported, tmp_path, refused):
    """Catches options that are ignored, and an export that begins before it is known where to."""
    run, output = f"checkpoint={finished}", tmp_path / "new"
    assert "against=x: is for an export" in refused("verify", run, "against=x")
    assert "against=" in refused("verify", f"checkpoint={exported}", "against=nowhere")
    assert "output=" in refused("verify", run, f"output={tmp_path}/no/such.json")
    for size in ("", "0", "big", "4 GiB", "-1", "10", "9999B", "4iB"):
        assert f"max_shard_size={size}: must be a size" in refused("export", run, f"max_shard_size={size}")
    for option in ("dtype=bf16", "max_shard_size=1GB", "license=mit", "whole_model=false"):
        said = refused("export", run, "adapter=true", option)
        assert (
            f"adapter=true: writes the adapters alone, in fp32 and in one file, so {option.split('=')[0]} has" in said
        )
    assert "is of no LoRA run, and needs no base; leave it out." in refused("export", run, f"base={exported}")
    for value in ("2", "1", "0", "yes", "off"):
        assert f"whole_model={value}: must be true or false" in refused("export", run, f"whole_model={value}")
        assert f"adapter={value}: must be true or false." in refused("export", run, f"adapter={value}")
    assert "license='a: b'" in refused("export", run, "license=a: b")
    assert "output=null" in refused("export", f"checkpoint={exported}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("precious")
    assert "is not an export of moe-lm" in refused("export", run, f"output={tmp_path / 'full'}")
    assert not output.exists()


@pytest.mark.parametrize(
    ("size", "number"),
    [
        ("10KB", 10_000),
        ("1.5MB", 1_500_000),
        ("4g", 4 * 10**9),
        ("2GiB", 2 * 2**30),
        ("10kib", 10_240),
        ("10000", 10_000),
    ],
)
def test_sizes_are_read_as_they_are_written(size, number):
    """Catches powers of two that are taken for powers of ten."""
    assert ExportConfig(checkpoint="x", max_shard_size=size).max_shard_bytes == number


def test_an_export_that_is_impossible_is_refused_before_training(tmp_path, refused, monkeypatch):
    """Catches hours of training that end in an export that Mixtral's format can not express."""
    write_corpus(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    options = [*TINY, "data.paths=[corpus]", "trainer.max_steps=4", "run_name=r"]
    said = refused("pretrain", *options, "model.capacity_factor=1.5")
    assert "model.capacity_factor=1.5: drops tokens" in said and "finish.export=false" in said
    assert not (tmp_path / "runs/r").exists()
