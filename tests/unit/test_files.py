"""A directory that appears whole, in the place of an earlier one, or not at all."""

import os
from pathlib import Path

import pytest

import moe_lm.files as files
from moe_lm.errors import InputError
from moe_lm.files import locked, new_directory, sync_tree


def _tree(directory: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None for p in directory.rglob("*")}


def _refuse_notes(output: Path) -> None:
    if (output / "notes").exists():
        raise InputError(f"{output}: holds notes.")


@pytest.fixture
def output(tmp_path) -> Path:
    """A directory with one file in it, alone in its place."""
    (tmp_path / "place/output").mkdir(parents=True)
    (tmp_path / "place/output/old").write_bytes(b"old")
    return tmp_path / "place/output"


def _replace(output: Path) -> None:
    with new_directory(output, lambda: _refuse_notes(output)) as directory:
        (directory / "new").write_bytes(b"new")


def test_it_takes_the_place_of_what_is_there(output):
    """Catches files of two directories that are mixed, and something left beside them."""
    _replace(output)
    assert _tree(output.parent) == {"output": None, "output/new": b"new"}
    _replace(output.parent / "deep/other")
    assert _tree(output.parent / "deep") == {"other": None, "other/new": b"new"}


def test_two_at_once_do_not_meet(output):
    """Catches a second process that empties what the first is writing, so that files which nobody verified are
    published under the first one's receipt.
    """
    with new_directory(output, lambda: None) as directory:
        (directory / "new").write_bytes(b"new")
        with pytest.raises(InputError, match="output: another process is writing it"):
            _replace(output)
        assert _tree(directory) == {"new": b"new"}
    assert _tree(output.parent) == {"output": None, "output/new": b"new"}


def test_a_place_beneath_a_file_is_refused(output):
    """Catches a traceback for an output that no directory can be made at."""
    before = _tree(output.parent)
    with pytest.raises(InputError, match=r"old/new: can not be written \(Not a directory\); give another output="):
        _replace(output / "old/new")
    assert _tree(output.parent) == before


def test_a_lock_on_a_directory_that_was_renamed_is_none(tmp_path, monkeypatch):
    """Catches a process that opened the temporary directory just before another published it, and would empty that."""
    (tmp_path / "temporary").mkdir()
    lock = files._lock

    def late(descriptor: int) -> bool:
        (tmp_path / "temporary").rename(tmp_path / "published")
        return lock(descriptor)

    monkeypatch.setattr(files, "_lock", late)
    with locked(tmp_path / "temporary") as free:
        assert not free


def test_what_is_put_there_meanwhile_is_not_deleted(output):
    """Catches a check that is made only hours before the replacement that it is for."""

    def late() -> None:
        with new_directory(output, lambda: _refuse_notes(output)) as directory:
            (directory / "new").write_bytes(b"new")
            (output / "notes").write_bytes(b"precious")

    with pytest.raises(InputError, match="holds notes"):
        late()
    assert _tree(output.parent) == {"output": None, "output/old": b"old", "output/notes": b"precious"}


@pytest.mark.parametrize("number", [0, 1])
def test_a_renaming_that_fails_changes_nothing(output, monkeypatch, number):
    """Catches a failure between the two renamings, after which there is nothing under the name."""
    before, rename, calls = _tree(output.parent), Path.rename, []

    def fails(path: Path, target: Path) -> None:
        calls.append(path)
        if len(calls) == number + 1:
            raise OSError(5, "Input/output error")
        rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Input/output"):
        _replace(output)
    assert _tree(output.parent) == before


def test_directories_that_were_made_on_the_way_go_again(output):
    """Catches a refusal that says nothing was written, and leaves the parents of what it would have been."""
    with pytest.raises(ValueError, match="fails"), new_directory(output.parent / "a/b/c", lambda: None):
        raise ValueError("fails")
    assert _tree(output.parent) == {"output": None, "output/old": b"old"}


def test_what_a_killed_process_put_aside_comes_back(output):
    """Catches a process that was killed between the renamings, and a next one that fails: both would be gone."""
    output.rename(output.parent / ".old-output")
    with pytest.raises(ValueError, match="fails"), new_directory(output, lambda: None):
        raise ValueError("fails")
    assert _tree(output.parent) == {"output": None, "output/old": b"old"}


def test_every_file_is_durable_before_the_name_is(output, monkeypatch):
    """Catches a file of a library that is still in memory alone when the power goes: a whole name on half a content."""
    synced, rename = [], Path.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))

    def checked(path: Path, target: Path) -> None:
        if path.name.startswith(".tmp-"):
            assert {p.stat().st_ino for p in [path, *path.rglob("*")]} <= set(synced)
        rename(path, target)

    monkeypatch.setattr(Path, "rename", checked)
    with new_directory(output, lambda: None) as directory:
        (directory / "deep").mkdir()
        (directory / "deep/config.json").write_text("{}")
    assert (output / "deep/config.json").stat().st_ino in synced


def test_a_tree_may_hold_links_that_lead_nowhere(tmp_path):
    """Catches a traceback for a link, which has nothing that could be made durable."""
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    sync_tree(tmp_path)
    assert (tmp_path / "link").is_symlink()
