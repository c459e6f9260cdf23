"""SIGTERM, SIGINT, SIGUSR1, the save file and the stop file, at any time: saved, exit code 75, nothing lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.faults.forks import FULL
from tests.runs import ENVIRONMENT, TINY, children_of, final_tensors, metrics, prepare, wait_for

OPTIONS = [
    *TINY,
    "data=prepared",
    "data.paths=[prepared]",
    "trainer.max_steps=30",
    "trainer.eval_interval=6",
    "checkpoint.interval=5",
    "finish.export=false",
]
PHASES = ("start", "step", "evaluation", "save")
ROUNDS = 50 if FULL else 4


@pytest.fixture(scope="module")
def whole(parent, tmp_path_factory):
    directory = tmp_path_factory.mktemp("signals")
    prepare(directory)
    log = directory / "whole.log"
    assert parent.run("pretrain", [*OPTIONS, "run_name=whole"], directory, log=log) == 0, log.read_text()
    return directory


def _state(run: Path) -> dict:
    return json.loads((run / "state.json").read_text())


def _assert_equal(run: Path, whole: Path) -> None:
    ours, theirs = final_tensors(run), final_tensors(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("loss", "validation_bits_per_byte"):
        assert metrics(run, name) == metrics(whole, name), name


def test_signals_in_every_phase_do_as_promised(parent, whole, figure):
    """Catches a signal that is lost, that ends a run unsaved or with another code, or a stop that changes the run: in
    start-up, steps, evaluations and saves; afterwards the run ends with the bytes of the uninterrupted one."""
    generator = random.Random(5)
    done = 0
    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    for number in range(ROUNDS):
        phase, kind = PHASES[number % 4], kinds[(number // 4 + number) % 4]  # all pairs within sixteen rounds
        name, log = f"s{number}", whole / f"s{number}.log"
        run = whole / "runs" / name
        options = [*OPTIONS, f"run_name={name}"]
        pid = parent.start("signalled", options, whole, phase, generator.randrange(1, 4), log=log)
        wait_for(lambda log=log, words=f"now in {phase}": words in log.read_text())
        os.kill(pid, kind)
        code = parent.wait(pid)
        said = log.read_text()
        if kind == signal.SIGUSR1:
            assert code == 0, (phase, said)
        else:
            assert code == 75, (phase, kind, said)
            assert "Traceback" not in said
            if phase != "start":
                step = _state(run)["step"]
                assert _state(run)["status"] == "stopped"
                assert (run / f"checkpoints/step-{step:08d}/COMPLETE").exists(), (phase, kind, said)
                assert f"the same command goes on from step-{step:08d}" in said
            assert parent.run("pretrain", options, whole, log=log) == 0, log.read_text()
        _assert_equal(run, whole / "runs/whole")
        done += 1
    figure(f"SIGTERM/SIGINT/SIGUSR1/SIGHUP in start-up, step, evaluation and save: {done} of {ROUNDS} as promised")


def test_sigusr1_and_the_save_file_save_and_go_on(parent, whole):
    """Catches a request that is taken for a stop, or not heard: a checkpoint of that very step, and the run ends."""
    log = whole / "usr1.log"
    options = [*OPTIONS, "run_name=usr1", "checkpoint.interval=0", "checkpoint.keep_last=9"]
    pid = parent.start("signalled", options, whole, "step", 3, log=log)
    wait_for(lambda: "now in step" in log.read_text())
    os.kill(pid, signal.SIGUSR1)
    assert parent.wait(pid) == 0, log.read_text()
    kept = [path.name for path in (whole / "runs/usr1/checkpoints").iterdir()]
    assert len(kept) == 2 and "step-00000030" in kept, kept

    (whole / "runs/file").mkdir()
    (whole / "runs/file/save").touch()
    options = [*OPTIONS, "run_name=file", "checkpoint.interval=0", "checkpoint.keep_last=9"]
    assert parent.run("pretrain", options, whole, log=log) == 0, log.read_text()
    kept = [path.name for path in (whole / "runs/file/checkpoints").iterdir()]
    assert sorted(kept) == ["step-00000000", "step-00000030"] and not (whole / "runs/file/save").exists()


def test_the_stop_file_stops_and_the_next_start_goes_on(parent, whole):
    """Catches a stop file that is not seen, that stops every later start as well, or that a launcher's restart
    undoes."""
    log = whole / "stop.log"
    options = [*OPTIONS, "run_name=stopped"]
    pid = parent.start("signalled", options, whole, "step", 3, log=log)
    wait_for(lambda: "now in step" in log.read_text())
    (whole / "runs/stopped/stop").touch()
    assert parent.wait(pid) == 75 and "(runs/stopped/stop)" in log.read_text()
    restarted = {"TORCHELASTIC_RESTART_COUNT": "1"}
    assert parent.run("pretrain", options, whole, log=log, environment=restarted) == 75
    assert parent.run("pretrain", options, whole, log=log) == 0, log.read_text()
    _assert_equal(whole / "runs/stopped", whole / "runs/whole")


def test_a_second_sigint_ends_at_once(parent, whole):
    """Catches a Ctrl-C, Ctrl-C that waits for a save: ended within the step, without a checkpoint of it."""
    log = whole / "twice.log"
    pid = parent.start("signalled", [*OPTIONS, "run_name=twice"], whole, "hang", 3, log=log)
    wait_for(lambda: "now in hang" in log.read_text())
    os.kill(pid, signal.SIGINT)
    wait_for(lambda: "SIGINT: saving and stopping" in log.read_text())
    os.kill(pid, signal.SIGINT)
    assert parent.wait(pid) == 75
    assert "interrupted twice" in log.read_text() and "stopped after step" not in log.read_text()
    assert _state(whole / "runs/twice")["status"] == "stopped" and _state(whole / "runs/twice")["exit_code"] == 75


def test_a_stop_that_can_not_be_obeyed_ends_at_its_deadline(parent, whole):
    """Catches a process that a launcher has to kill, because it waits for a peer that has gone: the main thread is
    inside a call that never comes back."""
    log, run = whole / "deadline.log", whole / "runs/deadline"
    pid = parent.start(
        "signalled", [*OPTIONS, "run_name=deadline", "trainer.stop_deadline=2"], whole, "hang", 7, log=log
    )
    wait_for(lambda: "now in hang" in log.read_text())
    begin = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    assert parent.wait(pid) == 75 and time.monotonic() - begin >= 2
    assert "not over 2 s later" in log.read_text() and _state(run)["status"] == "stopped"
    assert parent.run("pretrain", [*OPTIONS, "run_name=deadline"], whole, log=log) == 0, log.read_text()
    _assert_equal(run, whole / "runs/whole")


def test_a_hang_is_ended_with_stacks(parent, whole):
    """Catches a hang that nobody ends: the stacks of all threads name the place, exit code 1, and a restart ends the
    run as if nothing had been."""
    log, options = whole / "hang.log", [*OPTIONS, "run_name=hang"]
    assert parent.run("signalled", [*options, "trainer.step_timeout=8"], whole, "hang", 7, log=log) == 1
    said = log.read_text()
    assert "no step has ended for 8 s (trainer.step_timeout)" in said and "def hang" not in said
    assert "in hang" in said and "loop.py" in said and _state(whole / "runs/hang")["status"] == "failed"
    assert parent.run("pretrain", options, whole, log=log) == 0
    _assert_equal(whole / "runs/hang", whole / "runs/whole")


def test_a_stream_is_stopped_with_its_workers(whole):
    """Catches tokenizing workers that die of a signal to the whole group, as SLURM and `kill -- -GROUP` send it, and
    take the run with them: SIGUSR1 saves and goes on, SIGTERM saves and stops."""
    options = ["pretrain", *OPTIONS, "data=text", "data.paths=[corpus]", "data.streaming=true", "run_name=stream"]
    options += ["trainer.max_steps=100000", "checkpoint.interval=0", "trainer.eval_interval=0"]
    run = whole / "runs/stream"
    with (whole / "stream.log").open("w") as log:
        command = [sys.executable, "-m", "moe_lm", *options]
        process = subprocess.Popen(command, cwd=whole, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True)
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) > 3)
        os.killpg(process.pid, signal.SIGUSR1)
        wait_for(lambda: list((run / "checkpoints").glob("step-*")))
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) == 75, (whole / "stream.log").read_text()
    step = _state(run)["step"]
    assert (run / f"checkpoints/step-{step:08d}/COMPLETE").exists()


def test_a_deadline_needs_no_reader_of_the_output(parent, whole):
    """Catches a signal thread that dies of a closed error output, and with it the deadline."""
    log = whole / "closed.log"
    options = [*OPTIONS, "run_name=closed", "trainer.stop_deadline=2"]
    pid = parent.start("signalled", options, whole, "hang without output", 3, log=log)
    wait_for(lambda: "now in hang" in log.read_text())
    os.kill(pid, signal.SIGTERM)
    assert parent.wait(pid) == 75


def test_processes_agree_on_a_signal_that_one_gets(whole):
    """Catches peers that go on into a collective: SIGTERM to the second process alone stops both, with one save; and a
    peer that does not answer any more is left at the deadline."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moe_lm"]
    options = ["pretrain", *OPTIONS, "trainer.micro_batch_size=6", "trainer.max_steps=5000", "run_name=two"]
    log = (whole / "two.log").open("w+")
    run = whole / "runs/two"

    def start() -> tuple[subprocess.Popen, list[int]]:
        process = subprocess.Popen([*launcher, *options], cwd=whole, env=ENVIRONMENT, stdout=log, stderr=log)
        before = len(metrics(run)) if (run / "metrics.jsonl").exists() else 0
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) > before + 3)
        return process, sorted(children_of(process.pid, "moe_lm"), key=_rank)

    process, ranks = start()
    os.kill(ranks[1], signal.SIGTERM)
    process.wait(timeout=60)
    step = _state(run)["step"]
    assert _state(run)["status"] == "stopped" and (run / f"checkpoints/step-{step:08d}/COMPLETE").exists()

    options.append("trainer.stop_deadline=3")
    process, ranks = start()
    os.kill(ranks[1], signal.SIGSTOP)
    time.sleep(0.5)
    begin = time.monotonic()
    os.kill(ranks[0], signal.SIGTERM)
    wait_for(lambda: _has_ended(ranks[0]))
    assert 2 < time.monotonic() - begin < 25
    os.kill(ranks[1], signal.SIGKILL)
    process.wait(timeout=60)
    assert "not over 3 s later" in (whole / "two.log").read_text()


def _rank(pid: int) -> int:
    return int(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0RANK=")[1].split(b"\0")[0])


def _has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
