"""`moe-lm import` and `moe-lm upcycle`: what they write, which commands go on from it, and what they refuse."""

import argparse
import ast
import dataclasses
import hashlib
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import moe_lm.checkpoint.store as store
import moe_lm.commands.model_directory as model_directory
from moe_lm.cli import main
from moe_lm.commands.model_source import describe, open_model, open_source
from moe_lm.data.tokenizer_export import save_tokenizer_files
from moe_lm.data.tokenizer_sentencepiece import train_tokenizer
from moe_lm.evaluation.generation import generate
from moe_lm.files import locked
from moe_lm.finetune.upcycle import UpcycledModel
from moe_lm.hf.load import HuggingFaceSource
from moe_lm.hf.model_configuration import load_config
from tests.runs import TINY, moe_lm, write_corpus

SHAPE = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    texts = [Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, ast)]
    save_tokenizer_files(train_tokenizer(texts, SHAPE["vocab_size"], directory), directory, 64)
    return directory


@pytest.fixture
def mixtral(tmp_path, tokenizer) -> Path:
    """A Hugging Face directory in several shards, with a tokenizer."""
    torch.manual_seed(3)
    model = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2))
    return _with_tokenizer(model, tmp_path / "mixtral", tokenizer)


@pytest.fixture
def llama(tmp_path, tokenizer) -> Path:
    torch.manual_seed(4)
    return _with_tokenizer(LlamaForCausalLM(LlamaConfig(**SHAPE)), tmp_path / "llama", tokenizer)


def _with_tokenizer(model, directory: Path, tokenizer: Path) -> Path:
    model.save_pretrained(directory, max_shard_size="60KB")
    for file in tokenizer.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _run(*arguments: str) -> None:
    assert main(list(arguments)) == 0


def _refused(capsys, tmp_path: Path, *arguments: str) -> str:
    """One sentence, exit code 2, and nothing that was not there before."""
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    assert sorted(tmp_path.rglob("*")) == before
    return said


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_round_trip_is_bitwise(tmp_path, tokenizer, dtype, capsys):
    """Catches a tensor that an import or an export moves, rounds or loses: Hugging Face → native → Hugging Face."""
    torch.manual_seed(3)
    model = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2))
    model.to(torch.float32 if dtype == "fp32" else torch.bfloat16)
    original = _with_tokenizer(model, tmp_path / "original", tokenizer)
    native, exported = tmp_path / "native", tmp_path / "exported"
    _run("import", f"checkpoint={original}", f"output={native}")
    _run("export", f"checkpoint={native}", f"output={exported}", f"dtype={dtype}")
    expected, found = _tensors(original), _tensors(exported)
    assert found.keys() == expected.keys()
    assert all(t.dtype == found[name].dtype and torch.equal(t, found[name]) for name, t in expected.items())
    assert {p.name for p in native.iterdir()} == {"checkpoints", "tokenizer", "import.json"}
    for file in (native / "tokenizer").iterdir():
        assert file.read_bytes() == (tokenizer / file.name).read_bytes()


def test_the_receipt_names_every_tensor_once(tmp_path, mixtral, capsys):
    """Catches a receipt that leaves a tensor out, or has the digest of another one."""
    _run("import", f"checkpoint={mixtral}", f"output={tmp_path / 'native'}")
    receipt = json.loads((tmp_path / "native" / "import.json").read_text())
    sources = [name for entry in receipt["tensors"].values() for name in entry["from"]]
    assert sorted(sources) == sorted(_tensors(mixtral))
    native = open_source(tmp_path / "native")
    assert list(receipt["tensors"]) == native.names()
    name = "model.layers.1.mlp.experts.down_proj"
    digest = hashlib.sha256(native.tensor(name).numpy().tobytes()).hexdigest()
    assert receipt["tensors"][name]["sha256"] == digest
    assert receipt["files"] == sorted(path.name for path in mixtral.glob("*.safetensors"))
    said = capsys.readouterr().out
    assert "made 21 parameters" in said and "float32" in said


def test_memory_holds_one_parameter_at_a_time(tmp_path, mixtral, monkeypatch, capsys):
    """Catches a conversion whose memory grows with the model: someone on the way keeps what was read before."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most: list[int] = []
    original = HuggingFaceSource.tensor

    def tensor(self, name):
        most.append(len(alive))
        read = original(self, name)
        alive.add(read)
        return read

    monkeypatch.setattr(HuggingFaceSource, "tensor", tensor)
    monkeypatch.setattr(model_directory, "FILE_BYTES", 1)
    _run("import", f"checkpoint={mixtral}", f"output={tmp_path / 'native'}")
    assert len(most) == 21 and max(most) == 0
    most.clear()
    _run("upcycle", f"checkpoint={mixtral}", f"output={tmp_path / 'up'}", "num_experts=8")
    assert max(most[:21]) == 0  # what follows is the comparison


def test_text_can_be_generated_from_an_import(tmp_path, mixtral, capsys):
    """Catches a directory that looks like a run's, and is none to the other commands."""
    _run("import", f"checkpoint={mixtral}", f"output={tmp_path / 'native'}")
    texts = []
    for path in (mixtral, tmp_path / "native"):
        capsys.readouterr()
        _run("generate", f"checkpoint={path}", "prompt=import ", "max_new_tokens=8", "temperature=0", "device=cpu")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("import ")


def test_many_prompts_are_continued_as_each_alone(tmp_path, mixtral, capsys):
    """Catches completions that go to another prompt, depend on their batch, or lose a line break."""
    prompts = ["import ", "x", "def f(a):\n    return a", "import ", "", "é" * 9, "a\u2028b"]
    lines = (json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts)
    (tmp_path / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    options = [f"checkpoint={mixtral}", "max_new_tokens=8", "temperature=0", "device=cpu"]
    alone = []
    for prompt in prompts:
        capsys.readouterr()
        _run("generate", *options, f"prompt={prompt}")
        alone.append(capsys.readouterr().out.removesuffix("\n"))
    for size in (1, 4):
        capsys.readouterr()
        _run("generate", *options, f"prompts={tmp_path / 'prompts.jsonl'}", f"batch_size={size}")
        made = [json.loads(line) for line in capsys.readouterr().out.removesuffix("\n").split("\n")]
        assert [one["prompt"] for one in made] == prompts
        assert [one["prompt"] + one["completion"] for one in made] == alone


def test_sampling_follows_its_options(tmp_path, mixtral, capsys):
    """Catches a seed, a temperature, a top-k or a number of tokens that is read and then not used, prompts of a file
    that share their random numbers, and a text that goes on past the model's context."""

    def text(*options: str) -> str:
        capsys.readouterr()
        _run("generate", f"checkpoint={mixtral}", "prompt=import ", "device=cpu", "max_new_tokens=12", *options)
        return capsys.readouterr().out

    greedy, one, other = text("temperature=0"), text("temperature=1", "seed=1"), text("temperature=1", "seed=2")
    assert len({greedy, one, other}) == 3 and text("temperature=1", "seed=1") == one
    assert text("temperature=1", "top_k=1") == greedy == text("temperature=0.0001")
    (tmp_path / "prompts.jsonl").write_text('"import "\n' * 3)
    capsys.readouterr()
    options = [f"checkpoint={mixtral}", f"prompts={tmp_path / 'prompts.jsonl'}", "max_new_tokens=12", "device=cpu"]
    _run("generate", *options, "temperature=1", "seed=1")
    made = [json.loads(line)["completion"] for line in capsys.readouterr().out.removesuffix("\n").split("\n")]
    assert len(set(made)) == 3 and f"import {made[0]}\n" == one and f"import {made[1]}\n" == other
    context = SHAPE["max_position_embeddings"]
    said = _refused(capsys, tmp_path, "generate", f"checkpoint={mixtral}", "prompt=x", f"max_new_tokens={context}")
    assert f"more than the model's context of {context} tokens" in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_model_generates_with_its_own_head(tmp_path, tokenizer, dtype):
    """Catches a head that is no longer the embedding, and so memory that nobody has written; and routers in bf16."""
    torch.manual_seed(5)
    theirs = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, tie_word_embeddings=True)).eval()
    directory = _with_tokenizer(theirs, tmp_path / "tied", tokenizer)
    model, _ = open_model(directory, torch.device("cpu"), dtype)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype is dtype
    assert model.model.layers[0].mlp.gate.weight.dtype is torch.float32
    if dtype is torch.float32:
        prompt = torch.tensor([[1, 14, 22]])
        expected = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert generate(model, prompt.tolist(), 12) == expected[:, 3:].tolist()


def test_a_text_does_not_depend_on_its_batch_whatever_the_capacity(tmp_path, mixtral, monkeypatch):
    """Catches padding and neighbours that take an expert's places from a prompt."""
    config = dataclasses.replace(load_config(mixtral), capacity_factor=0.5)
    monkeypatch.setattr("moe_lm.hf.load.load_config", lambda directory: config)
    model, _ = open_model(mixtral, torch.device("cpu"))
    prompts = [[1, *range(10, 10 + length)] for length in (2, 30, 7)]
    alone = [generate(model, [prompt], 10)[0] for prompt in prompts]
    assert generate(model, prompts, 10) == alone


def test_a_model_is_described_as_it_is_opened(tmp_path, mixtral, capsys):
    """Catches a base whose configuration or tokenizer is another before its weights are read than afterwards."""
    _run("import", f"checkpoint={mixtral}", f"output={tmp_path / 'native'}")
    checkpoints = tmp_path / "native" / "checkpoints"
    for path in (mixtral, tmp_path / "native", checkpoints, checkpoints / "step-00000000"):
        source = open_source(path)
        assert describe(path) == (source.config, source.tokenizer_directory)
        assert source.config.num_experts == 4 and source.tokenizer_directory is not None


def test_a_run_goes_on_from_an_import_in_bf16(tmp_path, tokenizer, capsys):
    """Catches weights of a type that a run can not begin from, and a run that does not begin from them."""
    torch.manual_seed(3)
    model = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)).to(torch.bfloat16)
    _with_tokenizer(model, tmp_path / "mixtral", tokenizer)
    _run("import", f"checkpoint={tmp_path / 'mixtral'}", f"output={tmp_path / 'native'}")
    write_corpus(tmp_path / "corpus")
    options = [option for option in TINY if not option.startswith(("model.", "tokenizer.", "checkpoint."))]
    options += ["data.paths=[corpus]", "trainer.max_steps=1", "optimizer.learning_rate=1e-9", "finish.export=false"]
    moe_lm("finetune", "base=native", "run_name=on", *options, cwd=tmp_path)
    base, trained = open_source(tmp_path / "native"), open_source(tmp_path / "runs" / "on")
    for name, tensor in base.parameters():
        assert torch.allclose(trained.tensor(name), tensor.float(), atol=1e-6), name


def test_a_dense_model_becomes_a_mixture_of_the_same_function(tmp_path, llama, capsys):
    """Catches a mixture that does not compute what its base does, or a receipt that does not say so."""
    _run("upcycle", f"checkpoint={llama}", f"output={tmp_path / 'up'}", "num_experts=4")
    receipt = json.loads((tmp_path / "up" / "upcycle.json").read_text())
    assert receipt["logits"]["relative_difference"] < 1e-5 and receipt["logits"]["must_be_equal"]
    assert receipt["parameters"]["after"]["total"] > receipt["parameters"]["after"]["active"]
    assert receipt["tensors"]["model.layers.0.mlp.experts.down_proj"]["made_of"] == "4 copies of the dense block"
    said = capsys.readouterr().out
    assert "the same function" in said and f"{receipt['parameters']['after']['total']:,}" in said
    _run("export", f"checkpoint={tmp_path / 'up'}", f"output={tmp_path / 'hf'}")
    theirs = MixtralForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.arange(40).view(1, 40)
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(llama).eval()(tokens).logits
        assert (theirs(tokens).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_changed_copy_says_how_far_it_is(tmp_path, llama, capsys):
    """Catches a difference that nobody is told of."""
    _run("upcycle", f"checkpoint={llama}", f"output={tmp_path / 'up'}", "num_experts=4", "reinitialize=0.5")
    receipt = json.loads((tmp_path / "up" / "upcycle.json").read_text())
    assert receipt["logits"]["relative_difference"] > 0.01 and not receipt["logits"]["must_be_equal"]
    assert "another function, as asked for" in capsys.readouterr().out


def test_a_mixture_gets_more_experts(tmp_path, mixtral, capsys):
    """Catches an import that can not be upcycled, and copies that can not part without a word about it."""
    _run("import", f"checkpoint={mixtral}", f"output={tmp_path / 'native'}")
    _run("upcycle", f"checkpoint={tmp_path / 'native'}", f"output={tmp_path / 'up'}", "num_experts=8")
    assert "give noise=0.01" in capsys.readouterr().out
    config = open_source(tmp_path / "up").config
    assert (config.num_experts, config.num_experts_per_tok) == (8, 4)


def test_a_mixture_that_is_wrong_is_not_written(tmp_path, llama, monkeypatch, capsys):
    """Catches a receipt that says that the function is kept, whatever was measured."""
    original = UpcycledModel._base_experts
    monkeypatch.setattr(UpcycledModel, "_base_experts", lambda *args: original(*args) * 1.001)
    assert main(["upcycle", f"checkpoint={llama}", f"output={tmp_path / 'up'}"]) == 1
    assert "must compute what its base does" in capsys.readouterr().err
    assert not (tmp_path / "up").exists() and not list(tmp_path.glob(".tmp-*"))


def test_a_deep_model_that_amplifies_rounding_is_upcycled(tmp_path, capsys):
    """Catches a good mixture that is refused for what the last bits of its base's embedding do as well."""
    torch.manual_seed(1)
    shape = {**SHAPE, "num_hidden_layers": 24, "hidden_size": 64, "initializer_range": 0.4}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path / "deep")
    _run("upcycle", f"checkpoint={tmp_path / 'deep'}", f"output={tmp_path / 'up'}", "num_experts=4")
    logits = json.loads((tmp_path / "up" / "upcycle.json").read_text())["logits"]
    assert 1e-5 < logits["relative_difference"] < logits["tolerance"] < 1e-2


# Bad input


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, mixtral, capsys, value):
    """Catches a model that is imported, and ends in a traceback wherever it is used."""
    shard = next(path for path in mixtral.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    tensors = load_file(shard)
    tensors["model.norm.weight"][5] = value
    save_file(tensors, shard)
    for command in ("import", "upcycle"):
        said = _refused(capsys, tmp_path, command, f"checkpoint={mixtral}", f"output={tmp_path / 'out'}")
        assert "model.norm.weight holds values that are not finite" in said


def test_a_mixture_that_is_not_finite_is_refused(tmp_path, llama, monkeypatch, capsys):
    """Catches a mixture that is written though it computes no numbers: a huge noise once made one."""
    original = UpcycledModel._base_experts
    monkeypatch.setattr(UpcycledModel, "_base_experts", lambda *args: original(*args) * 1e25)
    assert main(["upcycle", f"checkpoint={llama}", f"output={tmp_path / 'up'}", "noise=0.1"]) == 1
    assert "logits that are not finite; nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "up").exists() and not list(tmp_path.glob(".tmp-*"))


def test_faults_of_the_checkpoint_leave_nothing_behind(tmp_path, mixtral, capsys):
    """Catches half an import under the name of a whole one, and a traceback where a sentence belongs."""
    arguments = ("import", f"checkpoint={mixtral}", f"output={tmp_path / 'native'}")
    shard = sorted(mixtral.glob("model-*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    assert f"{shard.name}: can not be read" in _refused(capsys, tmp_path, *arguments)
    shard.unlink()
    assert f"{shard.name}: can not be read (No such file" in _refused(capsys, tmp_path, *arguments)
    shard.write_bytes(content)
    raw = json.loads((mixtral / "config.json").read_text())
    (mixtral / "config.json").write_text(json.dumps({**raw, "model_type": "qwen2_moe"}))
    assert "model_type='qwen2_moe' is not supported" in _refused(capsys, tmp_path, *arguments)
    (mixtral / "config.json").unlink()
    assert "config.json: is missing; fetch it again" in _refused(capsys, tmp_path, *arguments)


def test_the_output_must_be_free(tmp_path, mixtral, llama, capsys):
    """Catches an import over somebody's files."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, words in (("full", "is not empty; give"), ("file", "is a file; give the name of a new directory.")):
        output = f"output={tmp_path / name}"
        assert words in _refused(capsys, tmp_path, "import", f"checkpoint={mixtral}", output)
        assert words in _refused(capsys, tmp_path, "upcycle", f"checkpoint={llama}", output)
    (tmp_path / "empty").mkdir()
    _run("import", f"checkpoint={mixtral}", f"output={tmp_path / 'empty'}")
    assert (tmp_path / "empty" / "import.json").exists()


def test_nothing_is_written_into_somebody_elses_directory(tmp_path, mixtral, llama, capsys):
    """Catches a foreign model whose directory changes, so that it can not be trusted any more, or is replaced."""
    for command, source in (("import", mixtral), ("upcycle", llama), ("export", mixtral)):
        for output in (source, source / "below" / "it"):
            said = _refused(capsys, tmp_path, command, f"checkpoint={source}", f"output={output}")
            assert f"lies in {source}, which is left as it is; give a place outside" in said
    _run("import", f"checkpoint={mixtral}", f"output={tmp_path / 'native'}")
    _run("upcycle", f"checkpoint={tmp_path / 'native'}", f"output={tmp_path / 'native/up'}", "num_experts=8")
    assert (tmp_path / "native/up/upcycle.json").exists()


def test_a_disk_that_fills_leaves_nothing_behind(tmp_path, mixtral, monkeypatch, capsys):
    """Catches a temporary directory of gigabytes that stays after a failure."""

    def full(path, tensors):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(store, "write_tensors", full)
    before = sorted(tmp_path.rglob("*"))
    assert main(["import", f"checkpoint={mixtral}", f"output={tmp_path / 'native'}"]) == 1
    assert "No space left" in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before


def test_two_at_once_do_not_meet(tmp_path, mixtral, capsys):
    """Catches a second process that removes what the first is writing; and leftovers of a killed one that get into the
    result.
    """
    temporary = tmp_path / ".tmp-native"
    (temporary / "checkpoints" / "step-00000009").mkdir(parents=True)
    (temporary / "stale.json").write_text("{}")
    arguments = ("import", f"checkpoint={mixtral}", f"output={tmp_path / 'native'}")
    with locked(temporary) as free:
        assert free and "another process is writing it" in _refused(capsys, tmp_path, *arguments)
    _run(*arguments)
    assert {p.name for p in (tmp_path / "native").iterdir()} == {"checkpoints", "tokenizer", "import.json"}
    assert [p.name for p in (tmp_path / "native" / "checkpoints").iterdir()] == ["step-00000000"]
    assert not temporary.exists()


def test_an_export_of_two_types_is_none(tmp_path, mixtral, capsys):
    """Catches a comparison with the source in the type of one tensor, whatever the others have."""
    _run("import", f"checkpoint={mixtral}", f"output={tmp_path / 'native'}")
    shard = sorted(mixtral.glob("model-*.safetensors"))[0]
    weights = load_file(shard)
    name = next(name for name in weights if "experts" not in name)
    save_file({**weights, name: weights[name].bfloat16()}, shard, metadata={"format": "pt"})
    assert main(["verify", f"checkpoint={mixtral}", f"against={tmp_path / 'native'}"]) == 1
    said = f"checkpoint={mixtral}: verification failed: tensors: an export has one type, and these have 2"
    assert said in capsys.readouterr().err


def test_other_mistakes_are_sentences(tmp_path, mixtral, llama, tokenizer, capsys):
    """Catches a traceback for a wrong directory, a native checkpoint, a foreign tokenizer or a plan that does not
    fit.
    """
    out = f"output={tmp_path / 'out'}"
    assert "there is no such directory" in _refused(capsys, tmp_path, "import", f"checkpoint={tmp_path / 'no'}", out)
    file = mixtral / "config.json"
    said = _refused(capsys, tmp_path, "import", f"checkpoint={file}", out)
    assert f"checkpoint={file}: is no directory; give the one that it lies in." in said
    assert "output: is required" in _refused(capsys, tmp_path, "import", f"checkpoint={mixtral}")
    assert "holds no complete checkpoint" in _refused(capsys, tmp_path, "import", f"checkpoint={tokenizer}", out)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "adapter of PEFT" in _refused(capsys, tmp_path, "upcycle", f"checkpoint={tmp_path / 'adapter'}", out)
    options = ("upcycle", f"checkpoint={mixtral}", out)
    assert "num_experts=6: the base has 4 experts" in _refused(capsys, tmp_path, *options, "num_experts=6")
    options = ("upcycle", f"checkpoint={llama}", out)
    assert "num_experts=1: a token is sent to 2" in _refused(capsys, tmp_path, *options, "num_experts=1")
    for number in (10**8, 10**30, 10**400):
        said = _refused(capsys, tmp_path, *options, f"num_experts={number}")
        assert f"num_experts={number}: those of one layer take " in said and "GiB of memory; give fewer." in said
    assert "at most num_experts=4" in _refused(capsys, tmp_path, *options, "num_experts=4", "num_experts_per_tok=5")
    _run("import", f"checkpoint={mixtral}", f"output={tmp_path / 'native'}")
    assert "is a native checkpoint already" in _refused(
        capsys, tmp_path, "import", f"checkpoint={tmp_path / 'native'}", out
    )
    small = MixtralForCausalLM(MixtralConfig(**{**SHAPE, "vocab_size": 100}, num_local_experts=2))
    _with_tokenizer(small, tmp_path / "small", tokenizer)
    for command in ("import", "export"):
        said = _refused(capsys, tmp_path, command, f"checkpoint={tmp_path / 'small'}", out)
        assert "has 400 ids, the model only 100; put the model's own there" in said


def test_a_model_without_a_tokenizer_is_imported(tmp_path, mixtral, capsys):
    """Catches a refusal: weights can be looked at and upcycled without one; only text needs one, and says so."""
    for name in ("tokenizer.model", "tokenizer.json"):
        (mixtral / name).unlink()
    _run("import", f"checkpoint={mixtral}", f"output={tmp_path / 'native'}")
    assert "tokenizer:  none" in capsys.readouterr().out
    said = _refused(capsys, tmp_path, "generate", f"checkpoint={tmp_path / 'native'}", "prompt=x", "device=cpu")
    assert "there is no tokenizer.model in" in said
