"""Whole runs of `moe-lm pretrain` as processes: learning, resuming, finishing, exporting, generating, tracking."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_lm.files import locked
from moe_lm.kernels import native
from tests.runs import ENVIRONMENT, TINY, final_tensors, metrics, moe_lm, write_corpus


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A directory with a corpus and one finished run of 60 steps."""
    directory = tmp_path_factory.mktemp("pretrain")
    write_corpus(directory / "corpus")
    options = ["pretrain", *TINY, "data.paths=[corpus]", "trainer.max_steps=60"]
    done = moe_lm(*options, "run_name=whole", cwd=directory)
    return directory, options, done


def test_a_run_learns_and_says_where_everything_is(finished):
    """Catches a run that does not learn, and a contract that is broken: files, figures and closing lines."""
    directory, _, done = finished
    run = directory / "runs/whole"
    losses = metrics(run)
    assert losses[1] == pytest.approx(torch.tensor(400.0).log().item(), rel=0.05)
    assert losses[60] < 0.6 * losses[1]
    bits = metrics(run, "validation_bits_per_byte")
    assert bits[60] < bits[5]
    state = json.loads((run / "state.json").read_text())
    assert state["exit_code"] == 0 and state["validation"]["bits_per_byte"] == bits[60]
    for part in ("config.yaml", "tokenizer/tokenizer.model", "hf/config.json", "checkpoints/step-00000060/COMPLETE"):
        assert (run / part).exists(), part
    for words in ("gzip -9", "xz -9", "sample:", "runs/whole", "runs/whole/hf"):
        assert words in done.stdout
    counts = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["expert_counts"]
    assert [sum(of_layer) for of_layer in counts] == [2 * 12 * 32] * 2  # top-2 of every token, in both layers


def test_a_finished_run_says_so(finished):
    """Catches a finished run that trains again, or an exit code other than 0 for it."""
    directory, options, _ = finished
    before = (directory / "runs/whole/metrics.jsonl").read_bytes()
    done = moe_lm(*options, "run_name=whole", cwd=directory)
    assert "is finished" in done.stdout and (directory / "runs/whole/metrics.jsonl").read_bytes() == before


def test_another_configuration_is_refused_by_name(finished):
    """Catches a run that silently goes on as another one; fields that do not touch learning may change."""
    directory, options, _ = finished
    changed = [
        *options,
        "run_name=whole",
        "optimizer.learning_rate=0.5",
        "model.num_experts=4",
        "trainer.eval_interval=7",
    ]
    done = moe_lm(*changed, cwd=directory, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "optimizer.learning_rate=0.002 → 0.5" in done.stderr and "model.num_experts=8 → 4" in done.stderr
    assert "eval_interval" not in done.stderr


def test_a_killed_run_goes_on_bit_for_bit(finished):
    """Catches any state that a checkpoint misses: killed outright after a checkpoint, the run ends with the same losses
    at every step and the same bytes of weights and moments as the one that was never interrupted."""
    directory, options, _ = finished
    run = directory / "runs/killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_lm", *options, "run_name=killed"],
        cwd=directory,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (run / "checkpoints/step-00000008").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    status = json.loads((run / "state.json").read_text())["status"]
    assert status == "running", "the run ended before it could be killed"
    done = moe_lm(*options, "run_name=killed", cwd=directory)
    assert "resumed" in done.stdout
    whole = directory / "runs/whole"
    for name in ("loss", "gradient_norm", "load_violation", "targets", "validation_bits_per_byte"):
        assert metrics(run, name) == metrics(whole, name), name
    ours, theirs = final_tensors(run), final_tensors(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    exports = [d / "hf/model.safetensors" for d in (run, whole)]
    assert len({hashlib.sha256(e.read_bytes()).hexdigest() for e in exports}) == 1


def test_a_run_that_is_being_trained_is_left_alone(finished):
    """Catches two processes that write one run: the second is refused, the first goes on undisturbed."""
    directory, options, _ = finished
    with locked(directory / "runs/whole") as free:
        assert free
        done = moe_lm(*options, "run_name=whole", cwd=directory, check=False)
    assert done.returncode == 2 and "run_name=whole: another process is training" in done.stderr


def test_a_second_start_does_not_take_the_first_ones_directory(finished):
    """Catches a process that finds the run locked and cleans up what it did not make."""
    directory, options, _ = finished
    fresh = directory / "runs/fresh"
    fresh.mkdir()
    with locked(fresh):
        assert moe_lm(*options, "run_name=fresh", cwd=directory, check=False).returncode == 2
    assert fresh.is_dir()


def test_a_finished_run_is_made_longer_by_insisting(finished):
    """Catches a finished run that can not go on, a name in resume.allow_change that allows nothing, a change that is
    let through unasked, tensors that do not fit and end in a traceback, or other kernels that are not mentioned."""
    directory, options, _ = finished
    short = [*options, "run_name=longer", "finish.export=false", "schedule.name=constant"]
    moe_lm(*short, "trainer.max_steps=6", cwd=directory)
    longer = [*short, "trainer.max_steps=9"]
    refused = moe_lm(*longer, cwd=directory, check=False)
    assert refused.returncode == 2 and "resume.allow_change=[trainer.max_steps]" in refused.stderr
    misspelt = moe_lm(*longer, "resume.allow_change=[trainer.max_step]", cwd=directory, check=False)
    assert misspelt.returncode == 2 and "did you mean 'trainer.max_steps'" in misspelt.stderr
    wider = [*longer, "resume.allow_change=[trainer,model]", "model.num_experts=4"]
    unfit = moe_lm(*wider, cwd=directory, check=False)
    assert unfit.returncode == 2 and "(model.num_experts can not change)." in unfit.stderr
    insisting = [*longer, "resume.allow_change=[trainer.max_steps]"]
    other = moe_lm(*insisting, "seed=3", cwd=directory, check=False)
    assert other.returncode == 2 and "insist with resume.allow_change=[trainer.max_steps,seed]" in other.stderr
    done = moe_lm(*insisting, cwd=directory, launcher=["env", "MOE_LM_NATIVE=0", sys.executable])
    assert "step 6 of 9" in done.stdout
    changed = "other than when it was saved: kernels native kernels → plain kernels;" in done.stdout
    assert changed == (native.library() is not None and not torch.cuda.is_available())
    whole = metrics(directory / "runs/whole", "validation_bits_per_byte")
    assert sorted(metrics(directory / "runs/longer")) == list(range(1, 10)) and 5 in whole
    assert "is finished (9 steps): see runs/longer; another" in moe_lm(*longer, cwd=directory).stdout
    exporting = [option for option in longer if not option.startswith("finish.export")]
    assert "`moe-lm export checkpoint=runs/longer` writes its hf/" in moe_lm(*exporting, cwd=directory).stdout


def test_a_micro_batch_that_the_loss_depends_on_is_fixed(finished):
    """Catches a run that goes on with another gradient because it was cut up otherwise, without a word."""
    directory, options, _ = finished
    longer = ["trainer.max_steps=4", "resume.allow_change=[trainer.max_steps]", "trainer.micro_batch_size=6"]
    for run, option in (("cut", "model.capacity_factor=1.0"), ("own", "model.load_balancing_source=micro_batch")):
        short = [*options, f"run_name={run}", "finish.export=false", option]
        moe_lm(*short, "trainer.max_steps=2", cwd=directory)
        done = moe_lm(*short, *longer, cwd=directory, check=False)
        assert done.returncode == 2 and f"=6 on 1 process: with {option} the loss depends" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and "step-00000002 was trained with 12 on 1; go on" in done.stderr
    # Of two processes each has half of the balanced micro-batch: the loss is the same.
    shutil.copytree(directory / "runs/own", directory / "runs/alone")
    alone = [option.replace("run_name=own", "run_name=alone") for option in (*short, *longer[:2])]
    moe_lm(*alone, cwd=directory)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert "resumed" in moe_lm(*short, *longer, cwd=directory, launcher=torchrun).stdout
    theirs = metrics(directory / "runs/alone")
    assert len(theirs) == 4 and metrics(directory / "runs/own") == pytest.approx(theirs, rel=1e-6)


def test_other_held_out_text_by_insisting(finished):
    """Catches a change that is proposed, and refused however it is insisted on; and `~` taken for a directory."""
    directory, options, _ = finished
    kernels = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    at_home = {"cwd": directory, "launcher": ["env", f"HOME={directory}", f"XDG_CACHE_HOME={kernels}", sys.executable]}
    short = [*options, "run_name=held", "finish.export=false", "trainer.max_steps=2", "output_dir=~/runs"]
    moe_lm(*short, **at_home)
    write_corpus(directory / "others")
    unquoted = moe_lm(*short, "data.validation_paths=[~/others]", **at_home, check=False)
    assert """quote its entries, as in 'data.validation_paths=["~/others"]'.""" in unquoted.stderr
    other = [*short, 'data.validation_paths=["~/others"]']
    refused = moe_lm(*other, **at_home, check=False)
    assert refused.returncode == 2 and "resume.allow_change=[data.validation_paths]" in refused.stderr, refused.stderr
    shutil.rmtree(directory / "runs/held/data")
    insisting = [*other, "trainer.max_steps=3", "resume.allow_change=[data.validation_paths,trainer.max_steps]"]
    done = moe_lm(*insisting, **at_home)
    assert "resumed runs/held" in done.stdout.replace(f"{directory}/", "")
    into = ["prepare", "data=text", 'data.paths=["~/others"]', "output=~/others/x"]
    among = moe_lm(*into, **at_home, check=False)
    assert among.returncode == 2 and "would be read as text" in among.stderr, among.stderr


def test_a_model_larger_than_its_tokenizer(finished):
    """Catches ids that no token stands for, or control ids, being sampled: the sample and `generate` must not fail."""
    directory, options, _ = finished
    wide = ["model.vocab_size=3000", "trainer.max_steps=3", "run_name=wide", "finish.sample_tokens=60"]
    moe_lm(*options, *wide, cwd=directory)
    said = moe_lm("generate", "checkpoint=runs/wide", "temperature=5", "top_k=null", cwd=directory).stdout
    assert "<|" not in said and "\u2047" not in said


def test_going_on_in_bf16_is_exact_too(finished):
    """Catches a low-precision twin that is not refreshed from loaded masters; AdamW, accumulation, tied embeddings."""
    directory, options, _ = finished
    other = [
        "trainer.precision=bf16",
        "optimizer=adamw",
        "trainer.micro_batch_size=4",
        "model.tie_word_embeddings=true",
    ]
    command = [*options, *other, "trainer.max_steps=8", "run_name=bf16", "finish.export=false"]
    moe_lm(*command, cwd=directory)
    run = directory / "runs/bf16"
    losses, tensors = metrics(run), final_tensors(run)
    shutil.rmtree(run / "checkpoints/step-00000008")
    (run / "state.json").unlink()
    resumed = moe_lm(*command, cwd=directory).stdout
    assert "step 4 of 8" in resumed and "other than when it was saved" not in resumed
    again = final_tensors(run)
    assert metrics(run) == losses
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_a_damaged_checkpoint_is_passed_over(finished):
    """Catches a resume from damaged weights: the newest checkpoint has a flipped bit, the one before is used, both
    said."""
    directory, options, _ = finished
    short = [*options, "trainer.max_steps=10", "run_name=damaged", "finish.export=false"]
    moe_lm(*short, cwd=directory)
    run = directory / "runs/damaged"
    (run / "state.json").unlink()
    path = run / "checkpoints/step-00000010/tensors-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    done = moe_lm(*short, cwd=directory)
    assert "refused checkpoint" in done.stdout and "tensors-00000.safetensors" in done.stdout
    assert "step 8 of 10" in done.stdout


def test_the_export_is_the_model(finished):
    """Catches an export that differs from the checkpoint, or a tokenizer that does; and generation from all three
    kinds."""
    directory, _, _ = finished
    run = directory / "runs/whole"
    model = AutoModelForCausalLM.from_pretrained(run / "hf")
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    weights = {n.removeprefix("model/"): t for n, t in final_tensors(run).items() if n.startswith("model/")}
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    prompt = "line 7 of file"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    theirs = model.generate(ids, max_new_tokens=12, do_sample=False)[0]
    expected = tokenizer.decode(theirs, skip_special_tokens=True)
    assert expected.startswith(prompt)
    again = moe_lm("export", "checkpoint=runs/whole", "output=again", "dtype=bf16", cwd=directory)
    assert "again" in again.stdout and (directory / "again/model.safetensors").exists()
    options = [f"prompt={prompt}", "max_new_tokens=12", "temperature=0"]
    for source in ("runs/whole", "runs/whole/checkpoints/step-00000060", "runs/whole/hf"):
        done = moe_lm("generate", f"checkpoint={source}", *options, cwd=directory)
        assert done.stdout.rstrip("\n") == expected.rstrip("\n"), source


def test_dense_family_trains_and_exports_as_mistral(finished):
    """Catches a dense model that trips over routing somewhere on the way to its export."""
    directory, options, _ = finished
    moe_lm(*options, "model=dense", *TINY[:4], "trainer.max_steps=6", "run_name=dense", cwd=directory)
    config = json.loads((directory / "runs/dense/hf/config.json").read_text())
    assert config["model_type"] == "mistral" and config["architectures"] == ["MistralForCausalLM"]
    AutoModelForCausalLM.from_pretrained(directory / "runs/dense/hf")


def test_wandb_offline_keeps_its_run_on_resume(finished):
    """Catches a tracker that breaks the run or starts a second curve on resume; metrics.jsonl is complete either
    way."""
    directory, options, _ = finished
    tracked = [*options, "tracker=wandb", "tracker.mode=offline", "run_name=tracked", "trainer.max_steps=9"]
    moe_lm(*tracked, cwd=directory)
    run = directory / "runs/tracked"
    identity = json.loads((run / "tracker.json").read_text())["id"]
    (run / "state.json").unlink()
    moe_lm(*tracked, cwd=directory)
    offline = [p.name for p in (run / "wandb").iterdir() if p.name.startswith("offline-run-")]
    assert len(offline) == 2 and all(name.endswith(identity) for name in offline)
    assert sorted(metrics(run)) == list(range(1, 10))


def test_json_lines_with_a_field_and_activation_checkpointing(finished):
    """Catches a JSONL source or recomputation that only works in unit tests."""
    directory, options, _ = finished
    rows = [json.dumps({"body": f"row {i}: " + "words and more words " * 5}) for i in range(200)]
    (directory / "rows.jsonl").write_text("\n".join(rows) + "\n")
    source = ["data=jsonl", "data.paths=rows.jsonl", "data.text_field=body", "trainer.activation_checkpointing=full"]
    moe_lm(*options, *source, "trainer.max_steps=4", "run_name=rows", cwd=directory)
    assert sorted(metrics(directory / "runs/rows")) == [1, 2, 3, 4]
