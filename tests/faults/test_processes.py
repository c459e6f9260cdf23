"""Jobs of several processes in which one dies, hangs, fails or was started otherwise than the others."""

import json
import os
import signal

import pytest

from tests.faults.jobs import SHARDED, Job
from tests.runs import metrics, prepare, wait_for


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("processes")
    prepare(directory)
    return directory


@pytest.fixture
def start(parent, place):
    """Starts a job; whatever is left of it at the end is killed."""
    jobs = []

    def start(world, name, *options, case="pretrain"):
        jobs.append(Job(parent, world, [*SHARDED, *options], place, name, case))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


def _wait_for_step(job: Job, step: int) -> None:
    path = job.run / "metrics.jsonl"
    wait_for(lambda: path.exists() and path.read_text().count('"loss"') >= step)


@pytest.mark.parametrize(
    ("world", "victim", "options"), [(3, 1, ["parallel=fsdp_ep"]), (3, 0, ["parallel=fsdp_ep"]), (2, 1, [])]
)
def test_a_process_that_dies_ends_all_by_name(start, world, victim, options):
    """Catches processes that wait for one that has gone, die of it with a traceback of gloo's, or do not say which it
    was: without a launcher, and long before a collective of gloo's gives up."""
    job = start(world, f"killed-{world}-{victim}", *options, "trainer.max_steps=2000")
    _wait_for_step(job, 3)
    os.kill(job.pids[victim], signal.SIGKILL)
    others = [rank for rank in range(world) if rank != victim]
    assert job.seconds_until_gone(*others) < 60
    assert job.wait(*others) == [1] * len(others)
    sentences = [line for rank in others for line in job.sentences(rank)]
    assert len(sentences) == 1 and f"process {victim} (host" in sentences[0] and "has died" in sentences[0]
    assert not any("Traceback" in job.said(rank) for rank in others)
    if victim:
        state = json.loads((job.run / "state.json").read_text())
        assert state["status"] == "failed" and f"process {victim} " in state["error"]


def test_a_process_that_stops_is_found_by_the_watchdog(start):
    """Catches a hang that nobody ends, or that says nothing of its place and of who is silent."""
    job = start(2, "stopped", "parallel=fsdp_ep", "trainer.max_steps=2000", "trainer.step_timeout=12")
    _wait_for_step(job, 3)
    os.kill(job.pids[1], signal.SIGSTOP)
    assert job.wait(0) == [1]
    assert "no step has ended for 12 s" in job.said(0) and "process 1 (host" in job.said(0)
    assert "has been silent for" in job.said(0) and "in _train_until_rewind" in job.said(0)


def test_what_one_process_meets_is_said_by_all_and_ends_all(start):
    """Catches an error of one process that leaves its peers in a collective, or without a word of why."""
    job = start(2, "failing", "parallel=fsdp_ep", "trainer.max_steps=2000", case="failing_on_rank_one")
    assert job.wait() == [1, 1]
    assert "a fault of this process alone" in job.said(1)
    assert any("process 1" in line and "a fault of this process alone" in line for line in job.sentences(0))
    assert "Traceback" not in job.said(0)


def test_a_bug_in_one_process_s_save_ends_all(start):
    """Catches processes that wait for each other in different collectives, and a bug that the others report as an
    orderly stop, which a script would start again and again."""
    job = start(2, "bug", "parallel=fsdp_ep", "trainer.max_steps=2000", case="failing_save_on_rank_one")
    assert job.wait() == [1, 1]
    assert "ValueError: a bug in a save of this process alone" in job.said(1)
    assert "Traceback" not in job.said(0) and "stopped after" not in job.said(0)
    assert json.loads((job.run / "state.json").read_text())["status"] == "failed"


def test_a_run_that_gives_up_hangs_nowhere(start):
    """Catches a collective at the end of a failed run that one process never reaches."""
    options = ["guards.max_skipped=3", "optimizer.learning_rate=1e30", "schedule.warmup_steps=0"]
    job = start(2, "hopeless", "parallel=fsdp_ep", *options, "checkpoint.interval=3")
    assert job.wait() == [1, 1]
    # That of the step before: begun by all, and completed though the run ends.
    assert (job.run / "checkpoints/step-00000003/COMPLETE").exists()
    assert any("3 updates in a row were skipped" in line for line in job.sentences(0)), job.said(0)
    assert "Traceback" not in job.said(0) + job.said(1)


def test_a_stopped_run_goes_on_in_another_layout(start, place):
    """Catches data, weights or moments that depend on who holds them: three processes with three owners, then two with
    two and experts placed by their counts, then one, against one throughout."""
    whole = start(1, "whole")
    assert whole.wait() == [0], whole.said(0)
    first = start(3, "moving", "parallel=fsdp_ep")
    _wait_for_step(first, 4)
    os.kill(first.pids[2], signal.SIGTERM)
    assert first.wait() == [75, 75, 75]
    assert "experts placed in order" in first.said(0)
    owners = json.loads((first.run / "placement.json").read_text())
    assert [len(experts) for experts in owners["layers"][0]] == [3, 3, 2]
    (place / "runs/moving/stop").unlink(missing_ok=True)
    second = start(2, "moving", "parallel=fsdp_ep", "parallel.placement=balanced")
    _wait_for_step(second, max(metrics(first.run)) + 2)
    os.kill(second.pids[0], signal.SIGTERM)
    assert second.wait() == [75, 75]
    assert "experts placed by the counts of the last" in second.said(0)
    balanced = json.loads((second.run / "placement.json").read_text())
    assert balanced["ep"] == 2 and balanced["layers"][0] != [[0, 1, 2, 3], [4, 5, 6, 7]]
    third = start(1, "moving")
    assert third.wait() == [0], third.said(0)
    assert metrics(third.run) == pytest.approx(metrics(whole.run), rel=1e-5)
    assert metrics(third.run, "targets") == metrics(whole.run, "targets")


def _placement(experts: list[list[int]]) -> str:
    return json.dumps({"num_experts": 8, "ep": 2, "layers": [experts, [[0, 1, 2, 3], [4, 5, 6, 7]]]})


@pytest.mark.parametrize(
    ("world", "options", "words"),
    [
        (2, ["trainer.global_batch_size=9"], ["trainer.global_batch_size=9", "such as"]),
        (2, ["parallel=single"], ["parallel=single", "2 processes were started"]),
        (2, ["parallel=fsdp_ep", "parallel.ep=9"], ["parallel.ep=9", "model.num_experts=8"]),
        (3, ["parallel=fsdp_ep", "parallel.ep=2"], ["parallel.ep=2", "dp_shard=3", "1, 3"]),
        (2, ["parallel=hsdp_ep"], ["parallel.dp_replicate=null", "one node"]),
        (3, ["parallel=hsdp_ep", "parallel.dp_replicate=2"], ["parallel.dp_replicate=2", "1, 3"]),
        (2, ["parallel=fsdp", "parallel.ep=2"], ["parallel.ep=2", "no such axis"]),
        (2, ["parallel=fsdp_ep", "model=dense", "model.intermediate_size=48"], ["parallel=fsdp_ep", "no experts"]),
        (3, ["parallel=fsdp"], ["model.hidden_size=32", "dp_shard / ep = 3"]),
        (2, ["parallel=fsdp_ep", "PLACED=[[0, 1, 2], [4, 5, 6, 7]]"], ["parallel.placement_file=", "layer 0", "3"]),
        (2, ["parallel=fsdp_ep", "PLACED=[[0, 1, 2, 3], [3, 4, 5, 6, 7]]"], ["parallel.placement_file=", "3"]),
        (2, ["parallel=fsdp", "PLACED=[[0, 1, 2, 3], [4, 5, 6, 7]]"], ["parallel.placement=file", "nothing to place"]),
    ],
)
def test_axes_that_do_not_fit_are_refused_once(start, place, world, options, words):
    """Catches a layout that is refused by a traceback, by every process at once, or only after minutes."""
    name = f"refused-{len(list(place.glob('refused-*-0.log')))}"
    placed = [option.partition("=")[2] for option in options if option.startswith("PLACED=")]
    if placed:
        (place / "placed.json").write_text(_placement(json.loads(placed[0])))
        options = [*(o for o in options if not o.startswith("PLACED=")), "parallel.placement=file"]
        options.append("parallel.placement_file=placed.json")
    job = start(world, name, *options)
    assert job.wait() == [2] * world
    (sentence,) = job.sentences(0)
    assert all(word in sentence for word in words), sentence
    assert not any(job.sentences(rank) for rank in range(1, world))
    assert not any("Traceback" in job.said(rank) for rank in range(world)) and not job.run.exists()


def test_streams_that_do_not_fit_the_processes_are_refused_once(start, place):
    """Catches streams that are dealt out unevenly, found out by another process than the first."""
    rows = place / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i} " * 50}) + "\n" for i in range(200)))
    options = ["data=jsonl", f"data.paths=[{rows}]", "data.streaming=true", "data.num_streams=4"]
    job = start(3, "streams", *options)
    assert job.wait() == [2, 2, 2]
    (sentence,) = job.sentences(0)
    assert "data.num_streams=4" in sentence and not job.sentences(1) and not job.run.exists()


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("other_options", ["seed", "process 1"]),
        ("other_code", ["code of moe_lm", "the same code"]),
        ("other_machine", ["trainer.precision=fp32", "torch.float32", "torch.bfloat16", "machines of one kind"]),
        ("other_disk", ["output_dir=runs: process 1 does not see", "all machines share"]),
    ],
)
def test_processes_that_were_started_otherwise_are_refused(start, case, words):
    """Catches a job whose processes train different things, with different code or types, each without an error; and
    one that trains for hours and can not save, for each process writes to a directory of its own."""
    job = start(2, case, case=case)
    assert job.wait() == [2, 2]
    (sentence,) = job.sentences(0)
    assert all(word in sentence for word in words), sentence
    assert not job.sentences(1) and not job.run.exists()


def test_only_the_main_process_speaks(start):
    """Catches output of other processes that cuts through the progress bar of the first, or is lost."""
    job = start(3, "speaking", "parallel=fsdp_ep", "trainer.max_steps=4", case="talkative")
    assert job.wait() == [0, 0, 0]
    assert not job.said(1) and not job.said(2) and "a warning of process 0" in job.said(0)
    for rank in (1, 2):
        said = (job.run / f"output/process-{rank:05d}.txt").read_text()
        assert f"a warning of process {rank}" in said and f"printed by process {rank}" in said
