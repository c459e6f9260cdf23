"""Whole runs of `moe-lm finetune` as processes: from a run, from its export, all of it and LoRA, resumed, exported."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from moe_lm.commands.model_source import open_source
from tests.runs import ENVIRONMENT, TINY, final_tensors, metrics, moe_lm, wait_for, write_corpus

OPTIONS = [option for option in TINY if not option.startswith(("model.", "tokenizer."))]
LORA = ["finetune=lora", "finetune.rank=4", "optimizer.learning_rate=0.02"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a corpus, and a model that was trained a little."""
    directory = tmp_path_factory.mktemp("finetune")
    write_corpus(directory / "corpus")
    moe_lm("pretrain", *TINY, "data.paths=[corpus]", "trainer.max_steps=10", "run_name=base", cwd=directory)
    return directory


def _finetune(place, name, *options, base="runs/base", **how):
    fixed = [*OPTIONS, "data.paths=[corpus]", "trainer.max_steps=12", f"base={base}", f"run_name={name}"]
    return moe_lm("finetune", *fixed, *options, cwd=place, **how)


@pytest.fixture(scope="module")
def lora(place):
    """A finished LoRA run."""
    return _finetune(place, "lora", *LORA)


def test_a_model_goes_on_learning_from_where_it_stood(place):
    """Catches a base whose weights are not those that training begins with, from whatever format: the same run from a
    run and from its export ends with the same bytes, and its first validation is the base's last.
    """
    # An export says what it was trained with by transformers' formula.
    balance = ["model.router_aux_loss_coef=0.01", "model.load_balancing=per_layer"]
    done = _finetune(place, "full", *balance)
    _finetune(place, "from-export", *balance, base="runs/base/hf")
    before, figures = metrics(place / "runs/base", "validation_loss"), metrics(place / "runs/full", "validation_loss")
    assert figures[0] == pytest.approx(before[10], rel=1e-5)
    assert figures[12] < figures[0] - 0.1
    assert f"validation loss: {figures[0]:.3f} before, {figures[12]:.3f} now" in done.stdout
    assert "training 106,144 of 106,144 parameters (100 %)" in done.stdout
    ours, theirs = final_tensors(place / "runs/full"), final_tensors(place / "runs/from-export")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_lora_trains_adapters_alone_and_exports_the_whole(place, lora):
    """Catches a checkpoint that holds the base as well, a base that moved, a merged export that is not the model that
    was trained, and an adapter that is not written."""
    run = place / "runs/lora"
    names = {name.removeprefix("model/") for name in final_tensors(run) if name.startswith("model/")}
    assert names and all("lora_" in name for name in names)
    figures = metrics(run, "validation_loss")
    assert figures[12] < figures[0]
    assert "LoRA of rank 4: attention" in lora.stdout
    theirs = AutoModelForCausalLM.from_pretrained(run / "hf")
    merged, base = dict(open_source(run).parameters()), dict(open_source(place / "runs/base").parameters())
    state = theirs.state_dict()
    assert all(torch.equal(state[name], value) for name, value in merged.items())
    changed = {name for name in merged if not torch.equal(merged[name], base[name])}
    assert changed == {name for name in merged if ".self_attn." in name or ".mlp." in name}


def test_the_adapter_on_the_exported_base_is_the_merged_model(place, lora):
    """Catches an adapter that peft can not load, loads on another base, or loads as another model; and an export of it
    by hand that differs from the one at the run's end."""
    run = place / "runs/lora"
    merged = AutoModelForCausalLM.from_pretrained(run / "hf")
    said = json.loads((run / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert said == str(place / "runs/base/hf")
    assert json.loads((run / "adapter/base.json").read_text())["base_fingerprint"]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(said), run / "adapter")
    tokens = torch.randint(50, 400, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = merged(tokens).logits, adapted(tokens).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    moe_lm("export", "checkpoint=runs/lora", "adapter=true", "output=by-hand", cwd=place)
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.model"):
        assert (place / "by-hand" / name).read_bytes() == (run / "adapter" / name).read_bytes()
    done = moe_lm("export", "checkpoint=runs/base", "adapter=true", cwd=place, check=False)
    assert done.returncode == 2 and "has no adapters" in done.stderr
    assert "good" in moe_lm("verify", "checkpoint=runs/lora", cwd=place).stdout


@pytest.mark.parametrize("options", [[], LORA, ["finetune.experts=[1,3]", "model.router_drift_coef=0.1"]], ids=str)
def test_a_killed_run_goes_on_bit_for_bit(place, options):
    """Catches state that a checkpoint of fine-tuning misses: the adapters' moments, what is frozen, the router that the
    penalty keeps near."""
    name = f"resumed{len(options)}"
    _finetune(place, f"{name}-whole", *options)
    command = [*OPTIONS, "data.paths=[corpus]", "trainer.max_steps=12", "base=runs/base", f"run_name={name}", *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_lm", "finetune", *command], cwd=place, env=ENVIRONMENT, stdout=subprocess.DEVNULL
    )
    checkpoints = place / f"runs/{name}/checkpoints"
    wait_for(lambda: any(checkpoints.glob("step-*")) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "resumed" in moe_lm("finetune", *command, cwd=place).stdout
    run, whole = place / f"runs/{name}", place / f"runs/{name}-whole"
    ours, theirs = final_tensors(run), final_tensors(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert metrics(run, "validation_loss") == metrics(whole, "validation_loss")


def test_two_processes_adapt_as_one_does(place, lora):
    """Catches adapters that processes do not share, or sum twice: experts on both, and checkpoints in parts."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [*LORA, "trainer.micro_batch_size=6", "parallel=fsdp_ep"]
    _finetune(place, "two", *options, launcher=launcher)
    ours, theirs = metrics(place / "runs/two"), metrics(place / "runs/lora")
    assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-4)
    for name, value in open_source(place / "runs/lora").parameters():
        assert torch.allclose(value, open_source(place / "runs/two").tensor(name), atol=1e-3)


def test_another_base_is_refused(place, lora):
    """Catches adapters that go on, or are merged, on a model that they were not trained on."""
    state = place / "runs/lora/checkpoints/step-00000012/state.json"
    assert json.loads(state.read_text())["start"]["base"] == str(place / "runs/base/checkpoints/step-00000010")
    moe_lm("pretrain", *TINY, "data.paths=[corpus]", "trainer.max_steps=4", "run_name=other", "seed=2", cwd=place)
    longer = ["trainer.max_steps=20", "resume.allow_change=[trainer.max_steps,base]"]
    done = _finetune(place, "lora", *LORA, *longer, base="runs/other", check=False)
    assert done.returncode == 2 and "its weights are not those that" in done.stderr, done.stderr
    moved = place / "runs/base"
    moved.rename(place / "runs/hidden")
    try:
        done = moe_lm("generate", "checkpoint=runs/lora", "prompt=line", cwd=place, check=False)
        assert done.returncode == 2 and "holds adapters alone, and their base is not in" in done.stderr
        options = ["checkpoint=runs/lora", "output=elsewhere", "base=runs/other"]
        done = moe_lm("export", *options, cwd=place, check=False)
        assert done.returncode == 2 and "base=runs/other: is another model than the adapters' base" in done.stderr
        assert f"was trained on, then in {moved / 'checkpoints/step-00000010'}, a copy" in done.stderr
        done = moe_lm("export", *options[:2], "base=nosuch", cwd=place, check=False)
        assert done.returncode == 2 and "base=nosuch: there is no such directory" in done.stderr
        moe_lm("export", *options[:2], "base=runs/hidden/hf", cwd=place)
        written = [place / directory / "model.safetensors" for directory in ("elsewhere", "runs/lora/hf")]
        assert written[0].read_bytes() == written[1].read_bytes()
    finally:
        (place / "runs/hidden").rename(moved)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["base=runs/none"], "base=runs/none: there is no such directory"),
        (["base="], "base: is required"),
        (["base=corpus"], "holds no complete checkpoint"),
        (["model.hidden_size=64"], "model.hidden_size=64: the base in runs/base has 32; leave it out."),
        (["model.num_experts_per_tok=1"], "model.num_experts_per_tok=1: the base in runs/base has 2"),
        (["model=dense"], "model=dense: the model's shape and the tokenizer are the base's; leave it out."),
        (["tokenizer.vocab_size=600"], "tokenizer.vocab_size=600: the model's shape and the tokenizer are the base's"),
        (["finetune.experts=8"], "finetune.experts=[8]: the base has 8 experts"),
        (
            ["finetune.rank=4"],
            "finetune.rank=4: finetune.method=full trains the weights themselves; give finetune=lora",
        ),
        (["finetune.alpha=4"], "finetune.alpha=4.0: finetune.method=full"),
        (["base=other.model"], "base=other.model: is no directory"),
        (
            ["data=prepared", "data.paths=[set]"],
            "data.paths: set was prepared with another tokenizer than that in runs",
        ),
        (["finetune.experts=[9]"], "finetune.experts=[9]: the base has 8 experts"),
        (["finetune=qlora"], "there is no such finetune; choose from full, lora"),
        (["finetune.rank=0"], "finetune.rank=0: must be at least 1"),
        (["model.router_drift_coef=1", "finetune.parts=[attention]"], "finetune.parts leaves the router out"),
        (["tokenizer.path=other.model"], "is another tokenizer than that of the base"),
    ],
)
def test_a_mistake_is_one_sentence(place, options, sentence):
    """Catches a traceback, a run that begins all the same, and a directory that stays."""
    other = place / "other.model"
    if not other.exists():
        moe_lm("prepare", "data=text", "data.paths=[corpus]", "tokenizer.vocab_size=390", "output=set", cwd=place)
        other.write_bytes((place / "set/tokenizer/tokenizer.model").read_bytes())
    done = _finetune(place, "wrong", *options, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and sentence in done.stderr, done.stderr
    assert not (place / "runs/wrong").exists()


def test_a_run_goes_on_with_a_copy_of_its_base(place):
    """Catches a copy of the base that is refused for where it lies, or where its tokenizer does; an advice that can not
    be followed; and a full fine-tuning that takes a rank for granted."""
    shutil.copytree(place / "runs/base", place / "runs/kept")
    _finetune(place, "moved", *LORA, base="runs/kept")
    (place / "runs/kept").rename(place / "runs/copy")
    longer = [*LORA, "trainer.max_steps=16"]
    done = _finetune(place, "moved", *longer, base="runs/kept", check=False)
    assert (
        "base=runs/kept: there is no such directory; a run whose base was moved goes on with base=COPY" in done.stderr
    )
    done = _finetune(place, "moved", *longer, base="runs/copy", check=False)
    assert "resume.allow_change=[trainer.max_steps,base] if the base is a copy" in done.stderr, done.stderr
    done = _finetune(place, "moved", *longer, "finetune.rank=2", base="runs/copy", check=False)
    assert done.returncode == 2 and "(finetune.rank can not change)." in done.stderr and "insist" not in done.stderr
    insisting = "resume.allow_change=[trainer.max_steps,base]"
    assert "resumed" in _finetune(place, "moved", *longer, insisting, base="runs/copy").stdout
    assert "good" in moe_lm("verify", "checkpoint=runs/moved/checkpoints/step-00000016", cwd=place).stdout


def test_a_model_that_diverged_is_no_base(place):
    """Catches NaN in state.json, which is no JSON, exit code 0, and a traceback out of sampling."""
    options = [*TINY, "data.paths=[corpus]", "trainer.max_steps=8", "run_name=diverged", "finish.export=false"]
    options += ["optimizer=adamw", "optimizer.learning_rate=1e18", "schedule.warmup_steps=20"]
    done = moe_lm("pretrain", *options, cwd=place, check=False)
    sentence = "moe-lm: the validation loss after step 8 is nan: the run has diverged, and nothing is exported;"
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(sentence), done.stderr
    for temperature in (0, 0.8):
        sampling = ["checkpoint=runs/diverged", "prompt=line", f"temperature={temperature}"]
        done = moe_lm("generate", *sampling, cwd=place, check=False)
        assert done.returncode == 1 and done.stderr.startswith("moe-lm: the model's logits are not finite")
        assert len(done.stderr.splitlines()) == 1
    done = _finetune(place, "onward", base="runs/diverged", check=False)
    assert done.returncode == 1 and done.stderr.startswith("moe-lm: the base's validation loss is nan before the first")
    states = [*place.glob("runs/diverged/**/state.json"), *place.glob("runs/onward/**/state.json")]
    assert len(states) == 4 and not any("NaN" in state.read_text() for state in states)
    assert json.loads((place / "runs/onward/state.json").read_text())["status"] == "failed"


def test_a_directory_of_another_command_is_named(place, lora):
    """Catches a whole file that is called broken, and the advice to remove a run or a model."""
    small = [*TINY, "data.paths=[corpus]", "trainer.max_steps=12"]
    moe_lm("import", "checkpoint=runs/base/hf", "output=runs/imported", cwd=place)
    for command, name, sentence in (
        ("pretrain", "lora", "run_name=lora: runs/lora holds a fine-tuning run; give another run_name="),
        ("finetune", "base", "run_name=base: runs/base holds a pretraining run; give another run_name="),
        (
            "pretrain",
            "imported",
            "run_name=imported: runs/imported holds a model that `moe-lm import` wrote, and no run",
        ),
    ):
        if command == "finetune":
            done = _finetune(place, name, check=False)
        else:
            done = moe_lm(command, *small, f"run_name={name}", cwd=place, check=False)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and sentence in done.stderr, done.stderr


def test_a_dense_base_routes_nothing(place):
    """Catches a penalty, or a weight of a loss, that does nothing."""
    options = [*TINY, "data.paths=[corpus]", "trainer.max_steps=2", "model=dense", "run_name=dense"]
    moe_lm("pretrain", *options, "finish.export=false", cwd=place)
    for option in ("router_drift_coef=0.1", "router_aux_loss_coef=0.5"):
        done = _finetune(place, "wrong", f"model.{option}", base="runs/dense", check=False)
        assert done.returncode == 2 and f"model.{option}: the base in runs/dense is a dense model" in done.stderr


def test_the_card_says_nothing_of_a_tokenizer_that_was_not_trained(place, lora):
    """Catches the size of a vocabulary that the model does not have."""
    card = (place / "runs/lora/hf/README.md").read_text()
    assert '"path"' in card and '"vocab_size": 4096' not in card and "training_bytes" not in card
    assert '"vocab_size": 400' in (place / "runs/base/hf/README.md").read_text()


def test_a_run_from_scratch_has_no_router_to_stay_near(place):
    """Catches a penalty that does nothing, or pulls a router towards zeros."""
    options = [*TINY, "data.paths=[corpus]", "model.router_drift_coef=1"]
    done = moe_lm("pretrain", *options, cwd=place, check=False)
    assert done.returncode == 2 and "a run from scratch has no router to stay near" in done.stderr
