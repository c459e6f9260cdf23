"""A disk that is full, or that can not be written: the checkpoint before stays, and the policy is followed."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.faults.cases import save, store_in
from tests.runs import ENVIRONMENT, TINY, metrics, moe_lm, wait_for, write_corpus

FOREVER = 10**6


def _steps(directory) -> list[int]:
    """Steps of the checkpoints that load."""
    return [json.loads((path / "state.json").read_text())["step"] for path in store_in(str(directory)).paths()]


@pytest.mark.parametrize("policy", ["wait", "stop"])
def test_enospc_at_every_write_leaves_the_checkpoint_before(parent, tmp_path, figure, policy):
    """Catches a save that deletes before it has written, leaves half of itself, or gives up a disk that has room again:
    full at the n-th write for ever (policy stop) or for five tries (policy wait), for every n."""
    log, output = tmp_path / "log", tmp_path / "output.json"
    directory, first, cases = tmp_path / "store", 1, 0
    while True:
        shutil.rmtree(directory, ignore_errors=True)
        save(str(directory), 1, 2, False)
        times = 5 if policy == "wait" else FOREVER
        assert parent.run("full_disk_save", directory, policy, first, times, output, log=log) == 0, log.read_text()
        done = json.loads(output.read_text())
        if not done["failed"]:
            break
        assert not [p for p in directory.iterdir() if p.name.startswith(".")]
        newest = store_in(str(directory)).newest(refused=pytest.fail)
        assert "No space left on device" in done["said"][0] and "checkpoint of step 3" in done["said"][0]
        if policy == "wait":
            assert (
                newest.state["step"] == 3 and done["failure"] == "None" and "written after 6 tries" in done["said"][-1]
            )
        else:
            assert newest.state["step"] == 2 and "OSError(28" in done["failure"]
        first, cases = first + 1, cases + 1
    assert cases >= 8, "a save has more writes than that"
    figure(f"ENOSPC at each of {cases} writes, policy {policy}: the checkpoint before intact in {cases} of {cases}")


def test_room_is_made_of_what_the_new_one_supersedes(tmp_path):
    """Catches a full disk on which old checkpoints stay that the next one would replace anyhow, or the newest goes."""
    store = store_in(str(tmp_path), keep_last=3)
    for step in (1, 2, 3):
        save(str(tmp_path), 3, step, False)
    store.make_room(4)
    assert _steps(tmp_path) == [2, 3]
    store.config.keep_last = 1
    store.make_room(4)
    assert _steps(tmp_path) == [3]
    (store.path(3) / "state.json").write_text("{}")
    store.make_room(4)
    assert store.path(3).exists(), "nothing is deleted while no checkpoint is good"


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path / "corpus")
    return tmp_path


OPTIONS = ["pretrain", *TINY, "data.paths=[corpus]", "finish.export=false", "run_name=x"]


def _mounted(directory, size: str) -> bool:
    directory.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", directory], capture_output=True)
    return done.returncode == 0


@pytest.fixture
def small_disk(corpus):
    """A file system of 40 MB under runs/."""
    if not _mounted(corpus / "runs", "40m"):
        pytest.skip("mounting a tmpfs needs root")
    yield corpus
    subprocess.run(["umount", "-l", corpus / "runs"], check=True)


def _start_and_wait_for_a_save(directory, options: list[str]) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_lm", *options],
        cwd=directory,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: (directory / "runs/x/checkpoints/step-00000004").exists())
    return process


@pytest.mark.full
def test_a_full_disk_while_training_is_waited_for_and_survived(parent, small_disk):
    """Catches a run that dies of a full disk, or that goes on as if it were saved: on a real full file system training
    waits with a clear message until there is room, then ends with the figures of a run that had it all along."""
    directory = small_disk
    options = [*OPTIONS, "trainer.max_steps=120", "trainer.eval_interval=0"]
    log = directory / "roomy.log"
    assert parent.run("pretrain", [*options[1:], "output_dir=roomy"], directory, log=log) == 0, log.read_text()
    run, filler = directory / "runs/x", directory / "runs/filler"
    process = _start_and_wait_for_a_save(directory, options)
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(2**16)):
            pass
    said = ""
    while "can not be written" not in said:
        line = process.stderr.readline()
        assert line, f"the run ended without a word about its checkpoint: {said}"
        said += line
    assert "No space left on device" in said and "free some space" in said
    filler.unlink()
    said += process.communicate(timeout=100)[1]
    assert process.returncode == 0 and "written after" in said, said
    whole = metrics(directory / "roomy/x")
    assert metrics(run) == whole


def test_a_full_disk_ends_the_run_resumable_by_policy(small_disk):
    """Catches a policy that is not followed: exit code 75, the checkpoint before in place, and the same command ends
    the run once there is room."""
    directory = small_disk
    options = [*OPTIONS, "trainer.max_steps=3000", "checkpoint.on_failure=stop"]
    run, filler = directory / "runs/x", directory / "runs/filler"
    process = _start_and_wait_for_a_save(directory, options)
    # Room for state.json, none for a checkpoint.
    free = os.statvfs(directory / "runs").f_bavail * os.statvfs(directory / "runs").f_bsize
    with contextlib.suppress(OSError):  # a save may have taken it meanwhile
        filler.write_bytes(bytes(free - 2**16))
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 75 and "the same command goes on from step-" in said, said
    state = json.loads((run / "state.json").read_text())
    assert state["status"] == "stopped" and state["exit_code"] == 75
    assert moe_lm("verify", "checkpoint=runs/x", cwd=directory).stdout.count(": good;") >= 1


def test_checkpoints_that_can_not_fit_are_refused_before_the_first_step(small_disk):
    """Catches a disk that is found full only at the save: the estimate names the sizes and the options."""
    wide = ["model.hidden_size=256", "model.intermediate_size=512", "trainer.max_steps=10"]
    done = moe_lm(*OPTIONS, *wide, cwd=small_disk, check=False)
    assert done.returncode == 2 and "MB free" in done.stderr and "checkpoint.keep_last" in done.stderr, done.stderr
    assert "step 1/" not in done.stderr


def test_a_finished_run_on_a_full_disk_says_so(small_disk):
    """Catches room that is asked for where nothing more is to be written."""
    options = [*OPTIONS, "trainer.max_steps=2"]
    moe_lm(*options, cwd=small_disk)
    free = os.statvfs(small_disk / "runs").f_bavail * os.statvfs(small_disk / "runs").f_bsize
    (small_disk / "runs/filler").write_bytes(bytes(free - 2**16))
    assert "is finished (2 steps)" in moe_lm(*options, cwd=small_disk).stdout


def test_a_read_only_disk_is_refused_before_the_first_step(small_disk):
    """Catches a run that is lost at its first save."""
    subprocess.run(["mount", "-o", "remount,ro", small_disk / "runs"], check=True)
    done = moe_lm(*OPTIONS, "trainer.max_steps=10", cwd=small_disk, check=False)
    assert done.returncode == 2 and "output_dir=runs" in done.stderr and "Read-only file system" in done.stderr
    assert "tokenized" not in done.stdout


def test_checkpoints_alone_on_a_read_only_disk_are_refused_before_the_first_step(corpus):
    """Catches a probe of the run's directory that says nothing of the checkpoints' own, which may be elsewhere."""
    elsewhere = corpus / "elsewhere"
    if not _mounted(elsewhere, "10m"):
        pytest.skip("mounting a tmpfs needs root")
    try:
        subprocess.run(["mount", "-o", "remount,ro", elsewhere], check=True)
        (corpus / "runs/x").mkdir(parents=True)
        (corpus / "runs/x/checkpoints").symlink_to(elsewhere)
        done = moe_lm(*OPTIONS, "trainer.max_steps=10", cwd=corpus, check=False)
        assert done.returncode == 2 and "runs/x/checkpoints can not be written" in done.stderr
        assert "Read-only" in done.stderr
        assert "step 1/" not in done.stderr
        done = moe_lm("verify", "checkpoint=runs", "output=elsewhere/x.json", cwd=corpus, check=False)
        assert done.returncode == 2 and "elsewhere can not be written in" in done.stderr, "before hours of checks"
    finally:
        subprocess.run(["umount", "-l", elsewhere], check=True)
