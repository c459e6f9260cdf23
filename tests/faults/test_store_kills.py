"""SIGKILL before, after and in the middle of every file operation of a save: the newest checkpoint always loads."""

import json
import shutil

import pytest

from moe_lm.checkpoint.checkpoint import Checkpoint
from moe_lm.checkpoint.tensor_file import CheckpointError
from tests.faults.cases import save, store_in

SCENARIOS = {
    "first save": ([], 2, 1, False),
    "later save": ([1], 2, 2, False),
    "rotation": ([1, 2], 2, 3, False),
    "rotation, only one kept": ([1], 1, 2, False),
    "in the background": ([1, 2], 2, 3, True),
    "replacing one that is refused": ([1, 2], 2, 2, False),
}
"""Steps that are there, how many are kept, the step that is saved, and whether by the saver's thread."""


QUICK = ("first save", "rotation", "in the background")


@pytest.mark.parametrize(
    "scenario", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in SCENARIOS]
)
def test_a_kill_at_any_moment_of_a_save_leaves_the_newest_loadable(parent, tmp_path, figure, scenario):
    """Catches any moment at which a name stands for half a checkpoint, or the last good one is gone: killed before,
    after and within each operation, all that stands under a checkpoint's name loads, and the newest is the last or the
    new one; and the save after it sweeps what was left."""
    there, keep_last, step, background = SCENARIOS[scenario]
    pristine, log = tmp_path / "pristine", tmp_path / "log"
    for old in there:
        save(str(pristine), keep_last, old, False)
    if step in there:
        (pristine / f"step-{step:08d}" / "state.json").write_text("{}")
    counted = tmp_path / "counted"
    if there:
        shutil.copytree(pristine, counted)
    output = tmp_path / "operations.json"
    assert parent.run("count_operations", counted, keep_last, step, background, output, log=log) == 0, log.read_text()
    operations = json.loads(output.read_text())
    assert {"open", "write", "fsync", "mkdir", "rename"} <= set(operations)
    good_before = [s for s in there if s != step]
    directory, outcomes, kills = tmp_path / "killed", set(), 0
    for number, name in enumerate(operations, 1):
        for moment in ("before", "after", *(["middle"] if name == "write" else [])):
            shutil.rmtree(directory, ignore_errors=True)
            if there:
                shutil.copytree(pristine, directory)
            killed = parent.run("killed_save", directory, keep_last, step, background, number, moment, log=log)
            assert killed == -9, (number, name, moment, log.read_text())
            kills += 1
            store = store_in(str(directory), keep_last)
            names = [path.name for path in store.paths()]
            broken = [path.name for path in store.paths() if not _loads(path)]
            # One that was refused before may stand until the new one takes its name.
            assert set(broken) <= ({f"step-{step:08d}"} if step in there else set()), (number, name, moment, broken)
            newest = store.newest(refused=lambda reason: None)
            expected = max(good_before, default=None)
            outcome = None if newest is None else newest.state["step"]
            assert outcome in (expected, step), (number, name, moment, names)
            outcomes.add(outcome)
            save(str(directory), keep_last, step + 1, False)
            left = [path for path in directory.iterdir() if path.name.startswith(".")]
            assert not left and store.newest(refused=lambda reason: None).state["step"] == step + 1
    figure(f"SIGKILL in a save ({scenario}): {kills} kills around {len(operations)} operations, 0 unloadable states")
    assert outcomes == {max(good_before, default=None), step}, "kills did not reach both sides of the publication"


def _loads(path) -> bool:
    try:
        checkpoint = Checkpoint(path)
    except CheckpointError:
        return False
    step = checkpoint.state["step"]
    return bool((checkpoint.tensor("model/a") == step).all()) and checkpoint.tensor("optimizer/b")[0] == step
