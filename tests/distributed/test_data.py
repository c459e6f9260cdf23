"""Streams and mixtures in real processes over gloo: a run goes on with another number of them."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.distributed.test_replicated import TORCHRUN
from tests.runs import ENVIRONMENT, TINY, children_of, metrics, moe_lm, wait_for, write_corpus


def write_rows(directory):
    """JSON lines of two domains out of the corpus of these tests."""
    for index, path in enumerate(sorted(write_corpus(directory / "corpus").iterdir())):
        with (directory / ("even.jsonl" if index % 2 == 0 else "odd.jsonl")).open("a") as file:
            for line in path.read_text().splitlines():
                file.write(json.dumps({"text": line * 3}) + "\n")


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """A directory with rows, and a run of one process to its end."""
    directory = tmp_path_factory.mktemp("streamed")
    write_rows(directory)
    options = [
        "pretrain",
        *[option for option in TINY if option != "data=text"],
        "data=jsonl",
        "data.streaming=true",
        "data.num_streams=4",
        "data.sources.even.paths=even.jsonl",
        "data.sources.even.weight=2",
        "data.sources.odd.paths=odd.jsonl",
        "data.sources.odd.weight=1",
        "optimizer=adamw",
        "trainer.max_steps=8",
        "finish.export=false",
    ]
    moe_lm(*options, "run_name=single", cwd=directory)
    return directory, options


def test_a_stream_goes_on_with_two_processes(streamed):
    """Catches a data state that knows only the main process's streams: four steps on two processes, four on one."""
    directory, options = streamed
    sizes = "trainer.micro_batch_size=6"
    moe_lm(*options, sizes, "run_name=elastic", cwd=directory, launcher=TORCHRUN)
    whole, run = directory / "runs/single", directory / "runs/elastic"
    assert metrics(run) == pytest.approx(metrics(whole), rel=2e-5)
    shutil.rmtree(run / "checkpoints/step-00000008")
    (run / "state.json").unlink()
    done = moe_lm(*options, sizes, "run_name=elastic", cwd=directory)
    assert "(step 4 of 8," in done.stdout
    assert metrics(run) == pytest.approx(metrics(whole), rel=2e-5)
    domains = metrics(run, "tokens_by_domain")
    assert domains == metrics(whole, "tokens_by_domain")
    assert domains[8]["even"] / domains[8]["odd"] == pytest.approx(2, rel=0.1)


def test_every_process_learns_that_a_stream_has_ended(streamed):
    """Catches a process that waits for a peer which has no more data: the same end on one process and on two."""
    directory, options = streamed
    # So little of one source that the other ends the run.
    bounded = ["data.sources.odd.weight=0.1", "data.epochs=1", "trainer.max_steps=1000", "trainer.eval_interval=0"]
    results = []
    for name, launcher in (("ended-one", None), ("ended-two", TORCHRUN)):
        size = "trainer.micro_batch_size=6"
        done = moe_lm(*options, *bounded, size, f"run_name={name}", cwd=directory, launcher=launcher)
        assert "the data ended after" in done.stderr
        results.append(metrics(directory / "runs" / name, "targets"))
    assert results[0] == results[1] and 20 < max(results[0]) < 900


def test_what_one_process_meets_ends_all_with_its_sentence(streamed):
    """Catches peers that wait for a process which has gone, or die of it with a traceback of gloo's: the tokenizing
    process of the second rank is killed."""
    directory, options = streamed
    more = ["trainer.max_steps=5000", "run_name=dies", "trainer.micro_batch_size=6", "trainer.eval_interval=0"]
    command = [*TORCHRUN, "-m", "moe_lm", *options, *more]
    process = subprocess.Popen(command, cwd=directory, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    run = directory / "runs/dies"
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) > 2)
    ranks = children_of(process.pid, "moe_lm")
    (second,) = [pid for pid in ranks if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    for pid in children_of(second, "spawn_main"):
        os.kill(pid, signal.SIGKILL)
    said = process.communicate(timeout=100)[1]
    state = json.loads((run / "state.json").read_text())
    assert process.returncode != 0 and state["status"] == "failed" and state["exit_code"] == 1
    assert "process 1 failed: a tokenizing process (data.workers) died" in state["error"]
    assert "Connection closed by peer" not in said


def test_processes_that_do_not_divide_the_streams_are_named(streamed):
    """Catches a run that begins and then fails in the middle."""
    directory, options = streamed
    wrong = ["data.num_streams=3", "run_name=wrong", "trainer.micro_batch_size=6"]
    done = moe_lm(*options, *wrong, cwd=directory, launcher=TORCHRUN, check=False)
    assert (
        done.returncode != 0 and "data.num_streams=3: must be a multiple of the number of processes, 2" in done.stderr
    )
    assert not (directory / "runs/wrong").exists()
