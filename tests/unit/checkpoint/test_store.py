"""The checkpoint store: what is written comes back bit for bit, and what is damaged is refused by name."""

import json
import os
import pickle
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import moe_lm.checkpoint.checkpoint as checkpoint_module
import moe_lm.checkpoint.store as store_module
from moe_lm.checkpoint.checkpoint import Checkpoint
from moe_lm.checkpoint.config import CheckpointConfig
from moe_lm.checkpoint.store import CheckpointStore, TensorSlice, most_kept, retained
from moe_lm.checkpoint.tensor_file import CheckpointError, TensorKind
from tests.unit.checkpoint.sealing import hash_of, seal

TENSORS = {
    "model/a": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
    "model/b": torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
    "optimizer/count": torch.arange(-3, 4),
    "optimizer/step": torch.tensor(7.25),
    "balancing/empty": torch.zeros(0, 4),
    "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
}
STATE = {"progress": {"step": 3, "best": None}, "name": "é", "list": [1, 2.5]}
FILES = ["COMPLETE", "index.json", "manifest.json", "state.json", "tensors-00000.safetensors"]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", CheckpointConfig(keep_last=3))


@pytest.fixture
def saved(store: CheckpointStore) -> Path:
    return store.save(3, _slices(TENSORS), STATE)


def _slices(tensors: dict[str, torch.Tensor]) -> list[TensorSlice]:
    return [TensorSlice.whole(name, tensor) for name, tensor in tensors.items()]


def _newest_step(store: CheckpointStore) -> int:
    return store_module.step_of(store.newest(refused=pytest.fail).path)


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.dtype == other.dtype and one.shape == other.shape
    assert _bits(one) == _bits(other)


def _manifest(path: Path) -> dict:
    return json.loads((path / "manifest.json").read_text())


def _change_index(path: Path, name: str, **changes: object) -> None:
    index = json.loads((path / "index.json").read_text())
    index["tensors"].setdefault(name, {}).update(changes)
    (path / "index.json").write_text(json.dumps(index))
    seal(path)


def _slice(file: str, key: str, offsets: list[int], lengths: list[int]) -> dict:
    return {"file": file, "key": key, "offsets": offsets, "lengths": lengths}


def _refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path)
    return str(caught.value)


# Round trip


def test_every_tensor_comes_back_bit_for_bit(store, saved):
    """Catches a type, shape or value that changes on the way: fp32, bf16, int64, 0-dim, empty, NaN, negative zero."""
    checkpoint = Checkpoint(saved)
    assert checkpoint.state == STATE and checkpoint.kinds() == {n: TensorKind.of(t) for n, t in TENSORS.items()}
    assert list(checkpoint.kinds("model/")) == ["model/a", "model/b"]
    for name, tensor in TENSORS.items():
        _assert_same(checkpoint.tensor(name), tensor)
    assert sorted(p.name for p in saved.iterdir()) == FILES


def test_tensors_are_spread_over_files(store, monkeypatch):
    """Catches a tensor lost or doubled where one file is full and the next begins."""
    monkeypatch.setattr(store_module, "FILE_BYTES", 40)
    tensors = {f"t{i}": torch.full((i + 1, 3), float(i)) for i in range(7)}
    path = store.save(1, _slices(tensors), {})
    assert len(list(path.glob("*.safetensors"))) > 3
    checkpoint = Checkpoint(path)
    for name, tensor in tensors.items():
        _assert_same(checkpoint.tensor(name), tensor)


def test_slices_that_come_one_at_a_time_are_let_go(store):
    """Catches a save that holds the whole model, or the file before, while it gathers the next: a conversion of a model
    that is larger than memory would die.
    """
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = []

    def slices():
        for number in range(20):
            tensor = torch.full((10,), float(number))  # 40 bytes, two to a file
            alive.add(tensor)
            most.append(len(alive))
            yield TensorSlice.whole(f"t{number}", tensor)
            del tensor

    path = store.save(1, slices(), {}, file_bytes=80)
    assert len(list(path.glob("*.safetensors"))) == 10 and max(most) == 2


def test_a_transposed_view_comes_back(store):
    """Catches bytes written in the order of memory instead of that of the tensor."""
    whole = torch.arange(12.0).view(3, 4)
    path = store.save(1, _slices({"transposed": whole.T, "column": whole[:, 1]}), {})
    _assert_same(Checkpoint(path).tensor("transposed"), whole.T)
    _assert_same(Checkpoint(path).tensor("column"), whole[:, 1])


def test_a_name_given_twice_is_a_bug(store, monkeypatch):
    """Catches one tensor silently replacing another of the same name, in the same file or in a later one."""
    twice = [TensorSlice.whole("t", torch.zeros(2)), TensorSlice.whole("t", torch.ones(2))]
    for file_bytes in (10**9, 1):
        monkeypatch.setattr(store_module, "FILE_BYTES", file_bytes)
        with pytest.raises(AssertionError, match="t"):
            store.save(1, twice, {})
    assert store.paths() == []


# Slices


@pytest.fixture
def sliced(saved: Path) -> tuple[Path, torch.Tensor]:
    """A checkpoint with a tensor [4, 6] that two further files hold three boxes of."""
    whole = torch.arange(24.0).view(4, 6)
    save_file({"top": whole[:1].clone(), "left": whole[1:, :2].clone()}, saved / "rank0.safetensors")
    save_file({"right": whole[1:, 2:].clone()}, saved / "rank1.safetensors")
    slices = [
        _slice("rank1.safetensors", "right", [1, 2], [3, 4]),
        _slice("rank0.safetensors", "top", [0, 0], [1, 6]),
        _slice("rank0.safetensors", "left", [1, 0], [3, 2]),
    ]
    _change_index(saved, "whole", dtype="float32", shape=[4, 6], slices=slices)
    return saved, whole


def test_slices_of_several_files_make_one_tensor(sliced):
    """Catches a reader that takes a slice for the whole, or puts it in the wrong place."""
    path, whole = sliced
    _assert_same(Checkpoint(path).tensor("whole"), whole)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s[1:], "12 of 24"),
        (lambda s: [], "0 of 24"),
        (lambda s: [s[0], s[1], s[1]], "24 of 24 values, or some twice"),
        (lambda s: [s[0], s[1], {**s[2], "offsets": [1, 1]}], "or some twice"),
        (lambda s: [s[0], s[1], {**s[2], "offsets": [2, 0]}], "beyond its shape"),
        (lambda s: [s[0], s[1], {**s[2], "offsets": [-3, 0]}], "beyond its shape"),
        (lambda s: [s[0], s[1], {**s[2], "offsets": [1]}], "beyond its shape"),
        (lambda s: [s[0], s[1], {**s[2], "offsets": [1, 0.0]}], "beyond its shape"),
        (lambda s: [s[0], s[1], {**s[2], "lengths": [3, 2, 1]}], "beyond its shape"),
        (lambda s: [*s, {**s[1], "lengths": [1, 3]}], "27 of 24"),
    ],
    ids=[
        "one missing",
        "all missing",
        "one twice",
        "overlap",
        "beyond",
        "negative",
        "rank",
        "float",
        "lengths",
        "more",
    ],
)
def test_slices_that_do_not_cover_a_tensor_exactly_are_refused(sliced, change, words):
    """Catches weights that are half uninitialised memory: a gap that an overlap makes up for has the right count."""
    path, _ = sliced
    index = json.loads((path / "index.json").read_text())
    _change_index(path, "whole", slices=change(index["tensors"]["whole"]["slices"]))
    assert words in _refusal(path)


def test_more_slices_than_any_layout_makes_are_refused(sliced, monkeypatch):
    """Catches an index that keeps its reader comparing boxes with each other for hours."""
    path, whole = sliced
    monkeypatch.setattr(checkpoint_module, "SLICES", 3)
    _assert_same(Checkpoint(path).tensor("whole"), whole)
    monkeypatch.setattr(checkpoint_module, "SLICES", 2)
    assert _refusal(path) == "index.json: whole has more than 2 slices"


def test_a_file_that_goes_after_it_was_verified_is_named(saved):
    """Catches a traceback for a checkpoint that another process deletes while it is read."""
    checkpoint = Checkpoint(saved)
    (saved / "tensors-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"^model/a can not be read: .*No such file"):
        checkpoint.tensor("model/a")


def test_a_slice_that_differs_from_its_file_is_refused(sliced):
    """Catches a type or shape of the file that is cast or broadcast to what the index says, without a word."""
    path, whole = sliced
    for piece in (whole[1:, 2:].bfloat16(), whole[1:, :1].clone()):
        save_file({"right": piece}, path / "rank1.safetensors")
        seal(path)
        with pytest.raises(CheckpointError, match=r"rank1\.safetensors: whole is"):
            Checkpoint(path).tensor("whole")
    save_file({"another": whole}, path / "rank1.safetensors")
    seal(path)
    with pytest.raises(CheckpointError, match="right"):
        Checkpoint(path).tensor("whole")


def test_a_tensor_that_is_not_there_is_named(saved):
    """Catches a KeyError where a model asks for a parameter that its checkpoint lacks."""
    with pytest.raises(CheckpointError, match="there is no tensor model/c"):
        Checkpoint(saved).tensor("model/c")


# The store


def test_the_newest_are_kept_in_order_of_steps(store):
    """Catches retention that deletes the wrong ones, also where names sort otherwise than numbers."""
    for step in (5, 10, 99_999_999, 100_000_000):
        store.save(step, _slices(TENSORS), {})
    assert [p.name for p in store.paths()] == ["step-00000010", "step-99999999", "step-100000000"]
    assert _newest_step(store) == 100_000_000


def test_nothing_is_deleted_before_the_new_one_is_complete(store):
    """Catches a save that makes room first: a full disk or a kill would then cost the last good checkpoint."""
    store.config.keep_last = 1
    store.save(1, _slices(TENSORS), {})

    def fails_midway():
        yield TensorSlice.whole("a", torch.zeros(3))
        assert [p.name for p in store.paths()] == ["step-00000001"]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        store.save(2, fails_midway(), {})
    assert _newest_step(store) == 1
    store.save(3, _slices(TENSORS), {})
    assert [p.name for p in store.directory.iterdir()] == ["step-00000003"]


def test_a_damaged_later_one_never_pushes_out_the_new_one(store):
    """Catches retention that counts a refused checkpoint of a later step, and deletes the one just written for it."""
    store.config.keep_last = 1
    store.save(10, _slices(TENSORS), {})
    (store.directory / "step-00000020").mkdir()
    written = store.save(15, _slices(TENSORS), {})
    assert written.is_dir()
    refused = []
    assert store.newest(refused.append).path.name == "step-00000015" and len(refused) == 1


def test_a_damaged_one_of_the_same_step_is_replaced(store, saved):
    """Catches a run that walked back, comes to the same step again, and can not save it."""
    (saved / "state.json").write_text("{}")
    assert store.newest(refused=lambda reason: None) is None
    store.save(3, _slices(TENSORS), STATE)
    assert store.newest(refused=pytest.fail).state == STATE


def test_leftovers_of_a_killed_save_are_no_checkpoints_and_are_swept(store, saved):
    """Catches a half-written directory taken for a checkpoint, or filling the disk for ever."""
    leftover = store.directory / ".tmp-step-00000009"
    shutil.copytree(saved, leftover)
    strange = [".tmp-step-00000010", "step-0000", "step-00000004x", "notes"]
    for name in strange:
        (store.directory / name).mkdir()
    (store.directory / "step-00000011").write_text("a file")
    assert store.paths() == [saved]
    store.sweep()
    assert {p.name for p in store.directory.iterdir()} == {saved.name, *strange[1:], "step-00000011"}


def test_a_store_without_a_directory_is_empty(tmp_path):
    """Catches a first run that fails because there is nothing to resume yet."""
    store = CheckpointStore(tmp_path / "none", CheckpointConfig())
    assert store.paths() == [] and store.newest(refused=pytest.fail) is None
    assert not (tmp_path / "none").exists()


def test_newest_walks_back_and_says_why(store):
    """Catches loading a damaged checkpoint, losing a good older one, or walking back in silence."""
    for step in (1, 2, 3):
        store.save(step, _slices(TENSORS), {})
    newest, middle, _ = reversed(store.paths())
    (newest / "state.json").write_text("{}  ")
    (middle / "COMPLETE").unlink()
    refused: list[str] = []
    assert store.newest(refused.append).path.name == "step-00000001"
    assert [r.split(":")[0] for r in refused] == [str(newest), str(middle)]
    assert "state.json has 4 bytes instead of 3" in refused[0] and "COMPLETE is missing" in refused[1]


# Damage


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_detected_by_name(saved, name):
    """Catches a file that a full disk or a kill cut short, at any place."""
    content = (saved / name).read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        (saved / name).write_bytes(content[:length])
        assert name in _refusal(saved), length
    (saved / name).write_bytes(content + b" ")
    if name != "COMPLETE":  # JSON may end in a space; the mark itself is guarded by what it says
        assert name in _refusal(saved)


@pytest.mark.parametrize("name", FILES)
def test_every_missing_file_is_named(saved, name):
    """Catches a checkpoint that an incomplete copy made."""
    (saved / name).unlink()
    assert f"{name} is missing" in _refusal(saved)


@pytest.mark.parametrize("name", ["COMPLETE", "manifest.json", "index.json", "state.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"3", b'"text"', b"{}", b"{", b"\xff\xfe", b"[" * 100_000, b'{"tensors": []}', b'{"a": 1}'],
    ids=["empty", "list", "null", "number", "text", "object", "cut", "no UTF-8", "deep", "no tensors", "other"],
)
def test_json_of_the_wrong_kind_is_refused(saved, name, content):
    """Catches an exception other than CheckpointError, which would end the walk back instead of going on with it."""
    (saved / name).write_bytes(content)
    if name == "manifest.json":
        (saved / "COMPLETE").write_text(hash_of(saved / name) + "\n")
    elif name != "COMPLETE":
        seal(saved)
    if name == "state.json" and content in (b"{}", b'{"a": 1}', b'{"tensors": []}'):
        assert isinstance(Checkpoint(saved).state, dict)
    else:
        assert _refusal(saved)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        "text",
        {},
        {"dtype": "float32", "shape": [2]},
        {"dtype": "Tensor", "shape": [0], "slices": []},
        {"dtype": "__name__", "shape": [0], "slices": []},
        {"dtype": 5, "shape": [0], "slices": []},
        {"dtype": "float32", "shape": "0", "slices": []},
        {"dtype": "float32", "shape": [-1], "slices": []},
        {"dtype": "float32", "shape": [True], "slices": []},
        {"dtype": "float32", "shape": [0], "slices": 5},
        {"dtype": "float32", "shape": [0], "slices": [5]},
        {"dtype": "float32", "shape": [0], "slices": [{"file": "a"}]},
        {"dtype": "float32", "shape": [0], "slices": [_slice("", "", [0], [0])]},
        {"dtype": "float32", "shape": [0], "slices": [{**_slice("state.json", "", [0], [0]), "file": ["x"]}]},
    ],
    ids=str,
)
def test_a_senseless_index_entry_is_refused(saved, entry):
    """Catches an exception other than CheckpointError for an index that some other program wrote."""
    index = json.loads((saved / "index.json").read_text())
    index["tensors"]["model/a"] = entry
    (saved / "index.json").write_text(json.dumps(index))
    seal(saved)
    assert _refusal(saved)


@pytest.mark.parametrize("shape", [[2**40], [10**30], [2**31, 2**31, 4]], ids=str)
def test_a_tensor_larger_than_memory_is_refused(saved, shape):
    """Catches a reader that dies of an absurd shape instead of refusing it."""
    part = _slice("tensors-00000.safetensors", "model/a", [0] * len(shape), shape)
    _change_index(saved, "model/a", dtype="float32", shape=shape, slices=[part])
    with pytest.raises(CheckpointError, match="model/a"):
        Checkpoint(saved).tensor("model/a")


# Paths


BAD_NAMES = ["../outside.safetensors", "a/b", "/etc/hostname", "..", ".", "", "a\0b", "a\\b", "-x", ".hidden", "x\n"]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_names_that_leave_the_checkpoint_are_refused_in_the_manifest(saved, name):
    """Catches a manifest that makes the loader read a file anywhere else."""
    outside = saved.parent / "outside.safetensors"
    shutil.copy(saved / "tensors-00000.safetensors", outside)
    entry = {"bytes": outside.stat().st_size, "sha256": hash_of(outside)}
    seal(saved, {**_manifest(saved), name: entry})
    assert _refusal(saved) == f"manifest.json: {name!r} is not a file name of a checkpoint"


@pytest.mark.parametrize("name", [*BAD_NAMES, "absent.safetensors", "COMPLETE"], ids=repr)
def test_names_that_leave_the_checkpoint_are_refused_in_the_index(saved, name):
    """Catches a slice that is read from outside the directory, or from a file that no hash vouches for."""
    shutil.copy(saved / "tensors-00000.safetensors", saved.parent / "outside.safetensors")
    part = _slice(name, "model/a", [0, 0], [5, 3])
    _change_index(saved, "model/a", slices=[part])
    assert f"{name!r}, which manifest.json does not name" in _refusal(saved)


def test_an_unverified_file_beside_is_not_read(saved):
    """Catches a slice from a file that lies in the directory, but that the manifest does not name."""
    shutil.copy(saved / "tensors-00000.safetensors", saved / "extra.safetensors")
    index = json.loads((saved / "index.json").read_text())
    index["tensors"]["model/a"]["slices"][0]["file"] = "extra.safetensors"
    (saved / "index.json").write_text(json.dumps(index))
    seal(saved)
    manifest = _manifest(saved)
    del manifest["extra.safetensors"]
    seal(saved, manifest)
    assert "'extra.safetensors', which manifest.json does not name" in _refusal(saved)


def test_an_index_or_state_without_a_hash_is_refused(saved):
    """Catches a manifest that leaves out the very files that say what the tensors are."""
    for name in ("index.json", "state.json"):
        manifest = _manifest(saved)
        del manifest[name]
        seal(saved, manifest)
        assert _refusal(saved) == f"manifest.json does not name {name}"
        seal(saved)


def test_links_and_directories_are_no_files_of_a_checkpoint(saved):
    """Catches a link that reads a file elsewhere, and can change it after it was verified."""
    original = saved / "tensors-00000.safetensors"
    elsewhere = saved.parent / "elsewhere.safetensors"
    original.rename(elsewhere)
    original.symlink_to(elsewhere)
    assert _refusal(saved) == "tensors-00000.safetensors is not a plain file"
    original.unlink()
    original.mkdir()
    assert _refusal(saved) == "tensors-00000.safetensors is not a plain file"


# No pickle


class _Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_ever_unpickles(store, saved, tmp_path):
    """Catches any reader that tries a pickle it finds, listed in the manifest or not, named as ours or not."""
    exploded = tmp_path / "exploded"
    bomb = pickle.dumps(_Bomb(exploded))
    pickle.loads(bomb)
    assert exploded.exists()
    exploded.unlink()
    for name in ("model.pt", "optimizer.pkl", "pytorch_model.bin", "custom_checkpoint_0.pkl", ".metadata"):
        (saved / name).write_bytes(bomb)
    checkpoint = store.newest(refused=pytest.fail)
    assert all(checkpoint.tensor(name) is not None for name in checkpoint.kinds())

    (saved / ".metadata").unlink()
    seal(saved)
    checkpoint = store.newest(refused=pytest.fail)
    assert all(checkpoint.tensor(name) is not None for name in checkpoint.kinds())

    (saved / "tensors-00000.safetensors").write_bytes(bomb)
    seal(saved)
    with pytest.raises(CheckpointError, match=r"tensors-00000\.safetensors: a header of"):
        Checkpoint(saved).tensor("model/a")
    (saved / "state.json").write_bytes(bomb)
    seal(saved)
    assert "state.json is not JSON" in _refusal(saved)
    assert not exploded.exists()


def test_the_package_has_no_loader_of_pickles():
    """Catches a call that unpickles, by the names under which torch, numpy, joblib and pandas have one."""
    package = Path(store_module.__file__).parents[1]
    loaders = (
        r"\bpickle\b",
        r"\bcloudpickle\b",
        r"\bdill\b",
        r"\bjoblib\b",
        r"\bshelve\b",
        r"\bmarshal\b",
        r"torch\.load\(",
        r"torch\.save\(",
        r"allow_pickle=(?!False)",  # numpy's own default is not to
        r"read_pickle",
        r"torch\.jit\.load",
        r"distributed\.checkpoint",
        r"\bdcp\b",
        r"load_state\(",
        r"broadcast_object|gather_object|scatter_object",
    )
    for path in package.rglob("*.py"):
        code = "\n".join(line.split("#")[0] for line in path.read_text().splitlines())
        code = re.sub(r'""".*?"""', "", code, flags=re.DOTALL)
        code = re.sub(r'"[^"\n]*"', '""', code)  # such as the suffixes of files that are refused
        for loader in loaders:
            assert not re.search(loader, code), f"{path}: {loader}"
    assert re.search(loaders[0], "import pickle")


# Boxes and retention


@pytest.mark.parametrize(
    ("offsets", "lengths"),
    [([0, 0], [4, 6]), ([0, 0], [1, 6]), ([1, 2], [2, 3]), ([0, 1], [4, 2]), ([3, 5], [1, 1]), ([2, 0], [0, 6])],
    ids=str,
)
def test_a_box_is_read_from_the_slices_that_share_it(sliced, offsets, lengths):
    """Catches values of the wrong slice, or in the wrong place, where another layout reads only its part."""
    path, whole = sliced
    (o, p), (n, m) = offsets, lengths
    _assert_same(Checkpoint(path).box("whole", offsets, lengths), whole[o : o + n, p : p + m].contiguous())


def test_slices_are_written_and_come_back_as_one(store):
    """Catches a writer that knows whole tensors only: three processes' boxes of one tensor, uneven."""
    whole = torch.randn(8, 3, generator=torch.Generator().manual_seed(3))
    boxes = [(0, 3), (3, 4), (4, 8)]
    slices = [TensorSlice("experts", whole[a:b].clone(), [8, 3], [a, 0]) for a, b in boxes]
    path = store.save(1, [*slices[::-1], *_slices({"other": torch.ones(2)})], {})
    checkpoint = Checkpoint(path)
    _assert_same(checkpoint.tensor("experts"), whole)
    _assert_same(checkpoint.box("experts", [2, 0], [4, 3]), whole[2:6].clone())
    with pytest.raises(CheckpointError, match="hold 21 of 24 values"):
        store.save(2, [*slices[:1], slices[2]], {})
    assert [p.name for p in store.paths()] == ["step-00000001"]


def test_expected_tensors_are_compared(saved):
    """Catches a load of tensors that do not fit, or of some of them."""
    checkpoint = Checkpoint(saved)
    a, b = (TensorKind.of(TENSORS[name]) for name in ("model/a", "model/b"))
    wide = b._replace(dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"model/b is bfloat16 \[4, 2, 2\] instead of float32 \[4, 2, 2\]"):
        checkpoint.expect({"model/a": a, "model/b": wide}, "model/")
    with pytest.raises(CheckpointError, match="model/c is missing; model/b is not expected"):
        checkpoint.expect({"model/a": a, "model/c": b}, "model/")
    checkpoint.expect({"model/a": a, "model/b": b}, "model/")


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"keep_last": 1, "keep_best": False}, {50}),
        ({"keep_last": 2, "keep_best": False}, {40, 50}),
        ({"keep_last": 9, "keep_best": False}, {10, 20, 30, 40, 50}),
        ({"keep_last": 1, "keep_every": 20, "keep_best": False}, {20, 40, 50}),
        ({"keep_last": 1}, {30, 50}),
        ({"keep_last": 2, "keep_every": 20}, {20, 30, 40, 50}),
    ],
    ids=str,
)
def test_retention(config, kept):
    """Catches a rule that keeps too little, or the best that is none: lower is better, ties go to the later."""
    scores = {10: 3.0, 20: 2.0, 30: 2.0, 40: None}
    assert retained([30, 10, 50, 20, 40], scores, CheckpointConfig(**config)) == kept


def test_a_rewind_finds_a_checkpoint_that_is_old_enough():
    """Catches checkpoints asked for by hand that push out the last one from before a rewind's margin."""
    config = CheckpointConfig(keep_last=2, keep_best=False)
    assert retained([10, 20, 27, 28], {}, config, behind=8) == {20, 27, 28}
    assert retained([10, 20, 28], {}, config, behind=8) == {20, 28}
    assert retained([26, 27, 28], {}, config, behind=8) == {27, 28}
    assert retained([10, 20, 28], {}, config, behind=0) == {20, 28}


@pytest.mark.parametrize("behind", [None, 5, 35])
@pytest.mark.parametrize("keep_best", [False, True])
@pytest.mark.parametrize("keep_every", [0, 20])
@pytest.mark.parametrize("keep_last", [1, 2, 20])
def test_a_run_keeps_as_many_as_its_disk_was_asked_for(keep_last, keep_every, keep_best, behind):
    """Catches a run that was let begin, and fills the disk with what it keeps besides."""
    config = CheckpointConfig(interval=10, keep_last=keep_last, keep_every=keep_every, keep_best=keep_best)
    kept: set[int] = set()
    most = 0
    for step in range(10, 101, 10):
        kept = retained({*kept, step}, {10: 1.0}, config, behind)  # the first stays the best
        most = max(most, len(kept))
    promised = most_kept(100, 10, config, rewinds=behind is not None)
    assert most <= promised <= most + 3


def test_what_can_not_be_deleted_is_no_failed_save(store, monkeypatch):
    """Catches a published checkpoint that is reported as failed, and taken away again by the retry."""
    store.config.keep_last = 1
    store.save(1, _slices(TENSORS), {})
    with monkeypatch.context() as patch:

        def refuses(name, *arguments, **options):
            raise OSError(39, "Directory not empty", str(name))

        patch.setattr(os, "rmdir", refuses)
        store.save(2, _slices(TENSORS), {})
        assert _newest_step(store) == 2
    store.save(3, _slices(TENSORS), {})
    assert [p.name for p in store.directory.iterdir()] == ["step-00000003"]


def test_a_checkpoint_that_was_moved_and_linked_back_is_let_go(store, saved, tmp_path):
    """Catches a link that no deletion can handle, and that every later save then stumbles over."""
    saved.rename(tmp_path / "moved")
    saved.symlink_to(tmp_path / "moved")
    store.config.keep_last = 1
    store.save(4, _slices(TENSORS), {})
    store.save(5, _slices(TENSORS), {})
    assert [p.name for p in store.directory.iterdir()] == ["step-00000005"]
    assert Checkpoint(tmp_path / "moved").state == STATE


def test_the_best_by_its_score_outlives_the_last(store):
    """Catches a score that is not read back from disk, or a damaged state that ends a save."""
    store.config.keep_last, store.config.keep_best = 1, True
    for step, score in ((1, 2.0), (2, 1.0), (3, 1.5), (4, None)):
        store.save(step, _slices(TENSORS), {"score": score})
    assert [path.name for path in store.paths()] == ["step-00000002", "step-00000004"]
    (store.path(2) / "state.json").write_text("{")
    store.save(5, _slices(TENSORS), {"score": 3.0})
    assert [path.name for path in store.paths()] == ["step-00000005"]


def test_files_are_synced_before_the_mark_and_the_directory_before_its_name(store, monkeypatch):
    """Catches a checkpoint that a power loss could leave with a name and without its bytes: each file is synced, the
    mark comes last, the directory is synced before the rename and its parent after."""
    done: list[tuple[str, str]] = []

    def watch(name, what):
        original = getattr(os, name)

        def call(*arguments, **options):
            done.append((name, what(*arguments)))
            return original(*arguments, **options)

        monkeypatch.setattr(os, name, call)

    def name_of(descriptor, *rest):
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    watch("fsync", name_of)
    watch("write", name_of)
    watch("rename", lambda source, target: os.path.basename(target))
    store.save(1, _slices(TENSORS), {})
    synced = [name for kind, name in done if kind == "fsync"]
    files = [name for name in FILES if name != "COMPLETE"]
    order = {name: index for index, name in enumerate(synced)}
    assert set(files) <= set(synced) and all(order[name] < order["COMPLETE"] for name in files)
    written = [i for i, (kind, name) in enumerate(done) if kind == "write"]
    for name in FILES:
        last = max(i for i in written if done[i][1] == name)
        assert ("fsync", name) in done[last:], name
    renamed = done.index(("rename", "step-00000001"))
    assert ("fsync", ".tmp-step-00000001") in done[done.index(("fsync", "COMPLETE")) : renamed]
    assert ("fsync", "checkpoints") in done[renamed:]
