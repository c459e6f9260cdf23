"""Damaged and crafted checkpoints: refused by name, before anything of them is loaded and within bounded memory."""

import dataclasses
import json
import os
import random
import resource
import struct

import pytest
import torch

import moe_lm.checkpoint.store as store_module
from moe_lm.checkpoint.checkpoint import Checkpoint
from moe_lm.checkpoint.config import CheckpointConfig
from moe_lm.checkpoint.store import CheckpointStore, TensorSlice
from moe_lm.checkpoint.tensor_file import HEADER_BYTES, CheckpointError, write_tensors
from moe_lm.training.progress import Progress
from moe_lm.training.state import progress_of
from tests.unit.checkpoint.sealing import seal

TENSORS = {
    "model/a": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)),
    "model/b": torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "optimizer/step": torch.tensor(7.25),
}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Two checkpoints, each of several files of tensors."""
    monkeypatch.setattr(store_module, "FILE_BYTES", 100)
    store = CheckpointStore(tmp_path / "checkpoints", CheckpointConfig())
    for step in (1, 2):
        store.save(step, [TensorSlice.whole(*item) for item in TENSORS.items()], {"step": step})
    return store


@pytest.fixture
def newest(store):
    """The newest checkpoint's directory."""
    return store.path(2)


def _refusal(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path)
    return str(caught.value)


def test_every_truncation_falls_back_to_the_one_before(store, newest, figure):
    """Catches a file cut short that is used, not named, or that stops the walk to the one before."""
    cases = 0
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        for length in (0, 1, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            refused: list[str] = []
            assert store.newest(refused.append).state["step"] == 1
            assert len(refused) == 1 and path.name in refused[0], (path.name, length, refused)
            cases += 1
        path.write_bytes(content)
    assert store.newest(pytest.fail).state["step"] == 2
    figure(f"truncation: {cases} of {cases} cut files named, the checkpoint before used")


def test_any_flipped_bit_is_detected(newest, figure):
    """Catches a bit that no hash covers: 1,000 single bits over all files, drawn by their sizes."""
    files = sorted(newest.iterdir())
    sizes = [path.stat().st_size for path in files]
    generator = random.Random(7)
    for path in generator.choices(files, sizes, k=1000 - len(files)) + files:
        content = path.read_bytes()
        bit = generator.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert _refusal(newest), (path.name, bit)
        path.write_bytes(content)
    Checkpoint(newest)
    figure("bit flips: 1,000 of 1,000 detected")


def _with_header(path, edit) -> None:
    """Rewrite a safetensors file with another header, whatever it says."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = edit(content[8 : 8 + length])
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def _duplicate(header: bytes) -> bytes:
    """A header that names its tensor a second time, elsewhere in the file."""
    text = header.rstrip()
    inner = json.loads(text)
    name = next(n for n in inner if n != "__metadata__")
    return text[:-1] + b"," + json.dumps({name: inner[name]}).encode()[1:]


def _changed(header: bytes, name: str, entry: object) -> bytes:
    """A header that says something else of one name."""
    return json.dumps({**json.loads(header), name: entry}).encode()


IN_HEADER = ("duplicated", "beyond the end", "metadata", "no place", "a type", "a size")
"""Edits that need the file as it was."""

EDITS = {
    "missing": (lambda path, key: write_tensors(path, {}), "is not there"),
    "renamed": (lambda path, key: write_tensors(path, {"other": TENSORS[key]}), "is not there"),
    "extra": (
        lambda path, key: write_tensors(path, {key: TENSORS[key], "more": torch.zeros(1)}),
        "'more' is in no tensor",
    ),
    "duplicated": (lambda path, key: _with_header(path, _duplicate), "stands there twice"),
    "wrong shape": (lambda path, key: write_tensors(path, {key: TENSORS[key][:1]}), "by the index"),
    "wrong type": (lambda path, key: write_tensors(path, {key: TENSORS[key].to(torch.float64)}), "by the index"),
    "same bytes, other shape": (lambda path, key: write_tensors(path, {key: TENSORS[key].flatten()}), "by the index"),
    "beyond the end": (
        lambda path, key: _with_header(path, lambda h: h.replace(b'"data_offsets":[0,140]', b'"data_offsets":[8,148]')),
        "do not fill the file",
    ),
    "metadata that is no text": (
        lambda path, key: _with_header(path, lambda h: _changed(h, "__metadata__", {"format": 1})),
        "the header's __metadata__ is not one of texts",
    ),
    "metadata that is a list": (
        lambda path, key: _with_header(path, lambda h: _changed(h, "__metadata__", [])),
        "the header's __metadata__ is not one of texts",
    ),
    "no place": (
        lambda path, key: _with_header(path, lambda h: _changed(h, key, {"dtype": "F32", "shape": [7, 5]})),
        "the header says no valid type, shape and place of 'model/a'",
    ),
    "a type of nobody": (
        lambda path, key: _with_header(path, lambda h: h.replace(b'"F32"', b'"F33"')),
        "the header says no valid type, shape and place of 'model/a'",
    ),
    "a size below zero": (
        lambda path, key: _with_header(path, lambda h: h.replace(b"[7,5]", b"[-7,-5]")),
        "the header says no valid type, shape and place of 'model/a'",
    ),
    "no safetensors": (lambda path, key: path.write_bytes(b"PK\x03\x04" + bytes(100)), "header"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_tensor_file_is_refused_with_the_names(newest, edit):
    """Catches a checkpoint that is loaded in part, cast or broadcast: its hashes are right, its tensors are not."""
    path, key = newest / "tensors-00000.safetensors", "model/a"
    assert list(json.loads(path.read_bytes()[8:][: struct.unpack("<Q", path.read_bytes()[:8])[0]]))[1:] == [key]
    act, words = EDITS[edit]
    path.unlink() if not edit.startswith(IN_HEADER) else None
    act(path, key)
    seal(newest)
    said = _refusal(newest)
    assert words in said and (path.name in said), said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index.pop("model/a"), "'model/a' is in no tensor"),
        (lambda index: index.update({"model/c": index["model/a"]}), "belongs to another slice"),
        (lambda index: index["model/a"].update(shape=[5, 7]), "beyond its shape"),
        (lambda index: index["model/a"].update(dtype="float64"), "by the index"),
        (lambda index: index["model/a"]["slices"][0].update(key="model/b"), "is not there"),
        (lambda index: index["model/a"]["slices"][0].update(file="tensors-00001.safetensors"), "is not there"),
    ],
    ids=["missing", "used twice", "shape", "type", "key", "file"],
)
def test_an_edited_index_is_refused_with_the_names(newest, change, words):
    """Catches an index that tells of other tensors than the files hold."""
    path = newest / "index.json"
    index = json.loads(path.read_text())
    change(index["tensors"])
    path.write_text(json.dumps(index))
    seal(newest)
    said = _refusal(newest)
    assert words in said and "model/" in said


PROGRESS = dataclasses.asdict(Progress(step=1))
STATE = {"progress": PROGRESS, "losses": [], "environment": {}, "config": {}, "data": {}}
STATE |= {"corpus_fingerprint": "", "tokenizer_fingerprint": ""}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(({name: None}, f"state.json: has no {name} of a run") for name in STATE),
        ({"progress": {}}, "was saved at step 0, whatever its name says"),
        ({"progress": {**PROGRESS, "skipped_data_steps": None}}, r"state.json: says no valid progress of a run \("),
        ({"progress": {**PROGRESS, "more": 1}}, r"state.json: says no valid progress of a run \(.*'more'\)"),
        *(
            ({"progress": {**PROGRESS, **wrong}}, "state.json: the progress of a run is counted in whole numbers")
            for wrong in ({"updates": 1.5}, {"data_step": -1}, {"skipped_data_steps": [True]}, {"step": "1"})
        ),
        ({"progress": {**PROGRESS, "step": 2}}, "was saved at step 2, whatever its name says"),
    ],
)
def test_a_state_that_is_not_that_of_a_run_is_refused(store, changes, words):
    """Catches a checkpoint, whole by its hashes, that a resume gets half into before it fails."""
    path = store.save(1, [TensorSlice.whole("model/a", torch.zeros(1))], STATE)
    assert progress_of(Checkpoint(path)) == Progress(step=1)
    (path / "state.json").write_text(json.dumps({**STATE, **changes}))
    seal(path)
    with pytest.raises(CheckpointError, match=words):
        progress_of(Checkpoint(path))


def test_a_name_that_stands_twice_in_json_is_refused(newest):
    """Catches the last of two values winning in silence, in any of the JSON files."""
    for name, twice in (("index.json", b'{"tensors": {}, '), ("state.json", b'{"step": 1, ')):
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(twice + content[1:])
        seal(newest)
        assert f"{name} is not JSON: " in _refusal(newest) and "stands there twice" in _refusal(newest)
        (newest / name).write_bytes(content)
        seal(newest)


def _in_child(path) -> tuple[str, int]:
    """What opening a checkpoint says, and by how many bytes it raised the peak memory of a child made for it."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        said = "accepted"
        try:
            Checkpoint(path)
        except CheckpointError as error:
            said = str(error)
        except BaseException as error:
            said = f"not refused, but {error!r}"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        os.write(write, json.dumps([said[:300], grown]).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as answer:
        return tuple(json.loads(answer.read()))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("state.json", b"[" * 1_000_000 + b"]" * 1_000_000, "state.json is not JSON"),
        ("index.json", b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "index.json is not JSON"),
        ("index.json", b'{"tensors": {' + b" " * 100_000_000 + b"}}", "index.json has 100,000,0"),
        ("state.json", b'{"a": "' + b"x" * 100_000_000 + b'"}', "state.json has 100,000,0"),
        ("manifest.json", b'{"a": "' + b"x" * 100_000_000 + b'"}', "manifest.json has 100,000,0"),
        ("COMPLETE", b"0" * 100_000_000, "COMPLETE has 100,000,000 bytes"),
        ("state.json", b"9" * 1_000_000, "state.json is not"),
        (
            "tensors-00000.safetensors",
            struct.pack("<Q", HEADER_BYTES + 8) + b" " * (HEADER_BYTES + 8),
            "a header of 16,777,224 bytes does not fit",
        ),
        ("tensors-00000.safetensors", b"\xff" * 8 + b"{}", "a header of 18,446,744,073,709,551,615 bytes"),
        ("tensors-00000.safetensors", struct.pack("<Q", 200_000) + b"[" * 200_000, "is not JSON"),
        ("tensors-00000.safetensors", struct.pack("<Q", 2) + b"{}" + b"x", "do not fill the file"),
        ("tensors-00000.safetensors", b"\x00" * 4, "does not fit a file of 4"),
    ],
    ids=[
        "deep list",
        "deep objects",
        "100 MB of blanks",
        "100 MB of state",
        "100 MB manifest",
        "100 MB mark",
        "long number",
        "long header",
        "huge header",
        "deep header",
        "unclaimed bytes",
        "four bytes",
    ],
)
def test_crafted_files_are_refused_within_bounded_memory(newest, name, content, words):
    """Catches a reader that takes in whatever it is given: hashes right, peak memory raised by less than 64 MiB."""
    (newest / name).write_bytes(content)
    if name == "manifest.json":
        seal(newest, manifest=None)
    elif name != "COMPLETE":
        seal(newest)
    del content
    said, grown = _in_child(newest)
    assert words in said, said
    assert grown < 64 * 2**20, f"{grown / 2**20:.0f} MiB"


def test_links_and_pipes_under_a_name_of_ours_are_refused(newest, tmp_path):
    """Catches a link to a file elsewhere, and a pipe that would block its reader for ever."""
    for name in ("COMPLETE", "manifest.json", "index.json", "state.json", "tensors-00000.safetensors"):
        path, elsewhere = newest / name, tmp_path / name
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
        assert _refusal(newest) == f"{name} is not a plain file"
        path.unlink()
        os.mkfifo(path)
        assert _refusal(newest) == f"{name} is not a plain file"
        path.unlink()
        elsewhere.rename(path)
    Checkpoint(newest)
