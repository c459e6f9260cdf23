"""Numbers that would harm the weights: not finite, or leaping; injected into real runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.faults.forks import FULL
from tests.runs import ENVIRONMENT, TINY, final_tensors, metrics, prepare

OPTIONS = [
    *TINY,
    "data=prepared",
    "data.paths=[prepared]",
    "trainer.max_steps=60",
    "trainer.eval_interval=0",
    "trainer.micro_batch_size=4",
    "finish.export=false",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("guards")
    prepare(directory)
    return directory


def _lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _states(path: Path) -> dict[int, str]:
    """Hash of weights, moments, load and loss window after each step, as the run wrote it down."""
    return {int(step): digest for step, digest in (line.split() for line in path.read_text().splitlines())}


@pytest.mark.parametrize("kind", ["nan", pytest.param("inf", marks=pytest.mark.full)])
def test_one_bad_micro_batch_changes_nothing(parent, place, figure, kind):
    """Catches one number that is not finite getting into weights, moments, the balancing load or the loss window, or
    costing healthy steps: one gradient of one micro-batch of steps 7, 20 and 21 is poisoned."""
    name, log, states = f"bad-{kind}", place / f"{kind}.log", place / f"{kind}.states"
    bad = [7, 20, 21]
    arguments = [*OPTIONS, f"run_name={name}"], place, bad, kind, states
    assert parent.run("poisoned", *arguments, log=log) == 0, log.read_text()
    hashes = _states(states)
    unchanged = [step for step in range(2, 61) if hashes[step] == hashes[step - 1]]
    assert unchanged == bad
    applied = {line["step"]: line["applied"] for line in _lines(place / "runs" / name) if "applied" in line}
    assert [step for step, is_applied in applied.items() if not is_applied] == bad
    assert "step 7: update skipped" in log.read_text() and "data step 6, rows 72 to 83" in log.read_text()
    figure(
        f"{kind} in one micro-batch: 0 bytes changed in {len(bad)} of {len(bad)}, 0 of {60 - len(bad)} others skipped"
    )


def test_too_many_in_a_row_end_with_a_diagnosis(parent, place):
    """Catches a run that idles on for ever, and an end that does not say where to look."""
    log = place / "row.log"
    options = [*OPTIONS, "run_name=row", "guards.max_skipped=4"]
    assert parent.run("poisoned", options, place, [5, 6, 7, 9, 10, 11, 12], "nan", None, log=log) == 1
    said = log.read_text()
    assert "4 updates in a row were skipped, the last at step 12" in said and "Traceback" not in said
    assert "weights and activations are finite; the gradient of model.layers.0.self_attn.o_proj.weight is" in said
    assert parent.run("poisoned", [*options, "run_name=weight"], place, [6, 7, 8, 9], "weight", None, log=log) == 1
    assert "the weights themselves are not finite: model.layers.1.mlp.gate.weight" in log.read_text()
    assert parent.run("poisoned", [*options, "run_name=forward"], place, [6, 7, 8, 9], "forward", None, log=log) == 1
    assert "the output of model.layers.1.self_attn is the first that is not finite" in log.read_text()


def test_one_process_with_a_nan_stops_none(place):
    """Catches processes that disagree about a step: a NaN on the second of two, both skip, weights stay equal."""
    script = place / "two.py"
    script.write_text(
        "import os, sys\nfrom tests.faults.cases import poison, record_states\n"
        "from moe_lm import cli\n"
        "record_states('two.states-' + os.environ['RANK'])\n"
        "if os.environ['RANK'] == '1':\n    poison([5], 'nan', None)\n"
        "cli.run_and_exit(['pretrain', *sys.argv[1:]])\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    options = [*OPTIONS, "trainer.micro_batch_size=3", "trainer.max_steps=9", "run_name=two"]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*launcher, *options], cwd=place, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    applied = {line["step"]: line["applied"] for line in _lines(place / "runs/two") if "applied" in line}
    assert [step for step, is_applied in applied.items() if not is_applied] == [5]
    assert all(tensor.isfinite().all() for tensor in final_tensors(place / "runs/two").values())
    first, second = ((place / f"two.states-{rank}").read_text() for rank in (0, 1))
    assert first == second and first.count("\n") == 9


SPIKES = {"warn": [45], "skip": [45, 46], "rewind": [45]}


@pytest.mark.parametrize("policy", SPIKES)
def test_a_spike_is_treated_by_policy(parent, place, policy):
    """Catches a spike that passes unseen, a policy that is not followed, or a rewind that is not the run that left
    those batches out from the start: the loss of data step 44 (and 45) is raised."""
    name, log, states = f"spike-{policy}", place / f"spike-{policy}.log", place / f"spike-{policy}.states"
    options = [*OPTIONS, f"run_name={name}", f"guards.spike_policy={policy}", "guards.rewind_margin=2"]
    data_steps = [step - 1 for step in SPIKES[policy]]
    assert parent.run("spiked", options, place, data_steps, states, log=log) == 0, log.read_text()
    said, lines = log.read_text(), _lines(place / "runs" / name)
    assert "step 45: loss " in said and f"guards.spike_policy={policy}" in said
    events = [line for line in lines if "event" in line]
    if policy == "warn":
        assert [line["step"] for line in lines if line.get("applied") is False] == []
        assert [event["data_step"] for event in events] == [44]
    elif policy == "skip":
        assert [line["step"] for line in lines if line.get("applied") is False] == [45, 46]
        hashes = _states(states)
        assert hashes[44] == hashes[45] == hashes[46] != hashes[47]
    else:
        skipped = [42, 43, 44, 45, 46]
        assert [event["event"] for event in events] == ["rewind"] and events[0]["skipped_data_steps"] == skipped
        used = [line["data_step"] for line in lines if "loss" in line and "event" not in line]
        assert used == [*range(42), *range(47, 65)]
        assert [line["step"] for line in lines if "loss" in line and "event" not in line] == list(range(1, 61))


def test_a_rewind_is_deterministic_and_part_of_the_state(parent, place):
    """Catches skipped batches that a later resume forgets, and a rewind that a kill changes: a run that is stopped
    after its rewind, and one that is killed right after it, end with the bytes of the one that was left alone."""
    options = [*OPTIONS, "guards.spike_policy=rewind", "guards.rewind_margin=2"]
    log = place / "rewind.log"
    assert parent.run("spiked", [*options, "run_name=alone"], place, [44], None, log=log) == 0, log.read_text()
    expected = final_tensors(place / "runs/alone")
    for name, kill_at in (("before", 41), ("after", 42), ("later", 55)) if FULL else (("after", 42),):
        code = parent.run("spiked", [*options, f"run_name={name}"], place, [44], None, kill_at, log=log)
        assert code == -9, log.read_text()
        assert parent.run("spiked", [*options, f"run_name={name}"], place, [44], None, log=log) == 0, log.read_text()
        ours = final_tensors(place / "runs" / name)
        assert all(torch.equal(ours[key], expected[key]) for key in expected), name
        assert metrics(place / "runs" / name) == metrics(place / "runs/alone"), name


@pytest.mark.full
@pytest.mark.parametrize("bounded", [[], ["data.epochs=2"]], ids=["endless", "two epochs"])
def test_a_rewind_does_not_depend_on_the_checkpoints_there_are(parent, place, bounded):
    """Catches a rewind that is another run where other checkpoints exist: to step 40, to 42, or, without any that is
    old enough, to the beginning; with data that ends, a schedule that follows the batches left out."""
    log, which = place / "which.log", "epochs" if bounded else "endless"
    options = [*OPTIONS, *bounded, "guards.spike_policy=rewind", "guards.rewind_margin=2"]
    results = {}
    for interval in (40, 42, 50):
        name = f"{which}-{interval}"
        own = [f"run_name={name}", f"checkpoint.interval={interval}"]
        assert parent.run("spiked", [*options, *own], place, [44], None, log=log) == 0, log.read_text()
        target = 0 if interval == 50 else interval
        assert f"went back from step 45 to step {target}; data steps 42 to 46 are left out" in log.read_text()
        results[interval] = final_tensors(place / "runs" / name), metrics(place / "runs" / name)
    for tensors, losses in results.values():
        assert all(torch.equal(tensors[name], results[40][0][name]) for name in tensors)
        assert losses == results[40][1]


def test_a_rewind_that_does_not_help_ends(parent, place):
    """Catches a run that goes back and forth for ever: the weights, not the batches, are to blame."""
    log = place / "forever.log"
    options = [*OPTIONS, "guards.spike_policy=rewind", "guards.rewind_margin=1", "guards.max_rewinds=2"]
    options += ["run_name=forever", "checkpoint.interval=40"]
    assert parent.run("spiked", options, place, list(range(44, 80)), None, log=log) == 1
    assert "the loss leapt again after 2 rewinds to step 40" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_training_draws_nothing_from_global_generators(parent, place):
    """Catches randomness that a checkpoint would have to hold: a whole run leaves torch's, numpy's and Python's global
    generators as they were."""
    log = place / "random.log"
    assert parent.run("random_state_kept", [*OPTIONS, "run_name=random"], place, log=log) == 0, log.read_text()
