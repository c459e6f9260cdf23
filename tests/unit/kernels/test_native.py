"""How the native kernels are had: built, kept, rebuilt, and done without."""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

from moe_lm.kernels import compiled, native

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="native kernels are for Linux")
COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")

PROBE = """
import torch
from moe_lm.kernels import native
from moe_lm.kernels.normalization import rms_norm
x = torch.arange(4096.0).view(64, 64)
for _ in range(2):
    torch.testing.assert_close(rms_norm(x, x[1], 1e-3), rms_norm(x, x[1], 1e-3, "reference"))
print("plain" if native.library() is None else "native")
"""


def start(**environment: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "always", **environment}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", PROBE], env=environment, text=True, **streams)


def result(process: subprocess.Popen) -> tuple[str, int]:
    """Which kernels gave right results, and how often it was said that there are no native ones."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip(), err.count("no native kernels")


def load() -> ctypes.CDLL | None:
    """The library as a new process would load it, past this one's cache."""
    return native.library.__wrapped__()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One in which nothing about native kernels is set."""
    for name in ("CXX", compiled.SWITCH):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def cache(environment: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    environment.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "moe-lm"


@LINUX
@COMPILER
def test_a_compiler_is_enough(environment: pytest.MonkeyPatch) -> None:
    """Catches a source that does not compile, which would turn every test of native kernels into a skip."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library = load()
    assert library is not None
    for name in native._ARGUMENTS:
        if not name.startswith("amx_"):
            assert any(hasattr(library, name + suffix) for suffix in ("", "_float"))
    macros = subprocess.run(
        ["c++", "-march=native", "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=True
    ).stdout
    if "__AMX_BF16__" in macros:
        assert all(hasattr(library, name) for name in native._ARGUMENTS if name.startswith("amx_"))
        # Asked here without the library: whether Linux gives this process the tiles (ARCH_REQ_XCOMP_PERM).
        granted = ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0
        assert native.has_amx() == granted


@LINUX
def test_the_switch_turns_them_off(tmp_path: Path) -> None:
    """Catches a switch that is read too late, and a compilation that nobody asked for."""
    assert result(start(MOE_LM_NATIVE="0", XDG_CACHE_HOME=str(tmp_path))) == ("plain", 0)
    assert not list(tmp_path.iterdir())


@LINUX
def test_a_broken_compiler_is_said_once(tmp_path: Path) -> None:
    """Catches a warning at every call, an error, or results that are not those of the plain kernels."""
    assert result(start(CXX="/bin/false", XDG_CACHE_HOME=str(tmp_path))) == ("plain", 1)


@LINUX
@pytest.mark.parametrize("compiler", ["/bin/false", "/bin/true", "no-such-compiler", "'", "/bin/sh"])
def test_compilers_that_do_not_compile(compiler: str, environment: pytest.MonkeyPatch, cache: Path) -> None:
    """Catches an exception out of the search for a library, and a named compiler whose absence goes unsaid."""
    environment.setenv("CXX", compiler)
    with pytest.warns(UserWarning, match="no native kernels") as caught:
        assert load() is None
    assert len(caught) == 1


@LINUX
@COMPILER
def test_a_compiler_with_arguments(environment: pytest.MonkeyPatch, cache: Path) -> None:
    """Catches CXX="ccache g++" taken for the name of one program, and a library kept from before an option."""
    environment.setattr(native, "_FLAGS", [flag for flag in native._FLAGS if flag != "-O3"])  # compiles faster
    for compiler in ("env c++", "c++ -O1"):
        environment.setenv("CXX", compiler)
        assert load() is not None
    assert len(list(cache.iterdir())) == 2


@LINUX
def test_no_compiler_is_no_fault(environment: pytest.MonkeyPatch) -> None:
    """Catches a warning for those who have not asked for anything."""
    environment.setenv("PATH", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load() is None


@LINUX
@COMPILER
@pytest.mark.parametrize("place", ["a file", "/proc/version", "/proc"])
def test_a_cache_that_can_not_be_written(place: str, environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a training run that ends because of a home directory, and one that compiles each time without a word."""
    if place == "a file":
        place = str(tmp_path / "file")
        Path(place).touch()
    environment.setenv("XDG_CACHE_HOME", place)
    environment.setattr(native, "_FLAGS", [flag for flag in native._FLAGS if flag != "-O3"])  # compiles faster
    compiled._say_not_kept.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load() is not None and load() is not None
    [said] = caught  # once, though there are several libraries
    assert f"can not be kept in {place}, and are compiled at every start: " in str(said.message)


@LINUX
@COMPILER
@pytest.mark.parametrize("place", ["TMPDIR", "XDG_CACHE_HOME"])
def test_a_place_from_which_nothing_runs(place: str, environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches kernels that are lost where /tmp, or the home, is mounted so."""
    closed = tmp_path / "closed"
    closed.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec", "none", closed], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        environment.setenv("XDG_CACHE_HOME", str(tmp_path))
        environment.setenv(place, str(closed))
        environment.setattr(tempfile, "tempdir", None)  # where it was found before
        environment.setattr(native, "_FLAGS", [flag for flag in native._FLAGS if flag != "-O3"])  # compiles faster
        assert load() is not None
    finally:
        environment.undo()
        tempfile.tempdir = None
        subprocess.run(["umount", "-l", closed], check=True)


@LINUX
@COMPILER
def test_a_library_that_does_not_load_is_not_kept(environment: pytest.MonkeyPatch, cache: Path) -> None:
    """Catches a compiler of C, whose library lacks C++'s own: a start that blames the cache, and leaves it there."""
    broken = cache.parent / "broken.cpp"
    environment.setattr(native, "SOURCES", [broken])
    broken.write_text('extern "C" void no_such_function(); extern "C" void call() { no_such_function(); }')
    with pytest.warns(UserWarning, match="no native kernels.*does not load: .*undefined symbol") as caught:
        assert load() is None
    assert len(caught) == 1 and not [file for file in cache.rglob("*") if file.is_file()]


@LINUX
@COMPILER
def test_a_umask_that_lets_the_group_write_does_not_compile_each_time(cache: Path) -> None:
    """Catches a library that is written to the cache and never taken from it, where 002 is the default umask."""
    before = os.umask(0o002)
    try:
        assert load() is not None
    finally:
        os.umask(before)
    (path,) = cache.iterdir()
    assert compiled.is_ours_and_whole(path)


@LINUX
@COMPILER
@pytest.mark.parametrize("writable", ["the file", "the directory"])
def test_a_library_that_others_could_have_written_is_not_loaded(writable: str, cache: Path) -> None:
    """Catches code of another user that runs in one's own process."""
    assert load() is not None
    (path,) = cache.iterdir()
    whose = path if writable == "the file" else cache
    whose.chmod(0o777)
    assert not compiled.is_ours_and_whole(path)
    assert load() is not None  # built anew
    whose.chmod(0o700)
    assert compiled.is_ours_and_whole(path)


@LINUX
@COMPILER
def test_a_damaged_library_is_built_again(cache: Path) -> None:
    """Catches a library cut short, whose pages beyond the end would kill the process that touches them."""
    assert load() is not None
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    assert compiled.is_whole(path)
    for content in (
        b"",
        whole[:20],
        whole[:200],
        whole[: len(whole) // 2],
        whole[:-1],
        whole[:99] + b"?" + whole[100:],
    ):
        path.unlink()  # not over the pages that this process has mapped
        path.write_bytes(content)
        assert not compiled.is_whole(path)
    path.write_bytes(whole[: len(whole) // 2])
    assert result(start()) == ("native", 0)
    assert compiled.is_whole(path)


@LINUX
@COMPILER
def test_two_processes_that_build_at_once(cache: Path) -> None:
    """Catches one that loads what the other has half written, and files left behind."""
    processes = [start(), start()]
    assert [result(process) for process in processes] == [("native", 0)] * 2
    (path,) = cache.iterdir()
    assert compiled.is_whole(path)
