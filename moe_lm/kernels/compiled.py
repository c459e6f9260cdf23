"""Libraries in C++: compiled for this machine at first use, then loaded from the user's cache.

Without a compiler there is none, and callers do without. CXX names another compiler, with arguments if need be
("ccache g++"); one that gives no library that loads is said. MOE_LM_NATIVE=0 switches all off.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from moe_lm.files import write_atomically
from moe_lm.kernels.hardware import is_switched_off

SWITCH = "MOE_LM_NATIVE"
"""Environment variable; 0 turns off what is compiled."""

_DIGEST_BYTES = 32


def load(
    sources: Sequence[Path], flags: Sequence[str], without: str, link_flags: Sequence[str] = ()
) -> ctypes.CDLL | None:
    """The library made of some sources; null where it is switched off or can not be had, which is said.

    Args:
        sources: the file to compile, whose name the library gets, and those that it includes.
        flags: of the compiler; with these, it itself, the processor and the sources, the library in the cache is told
            from others.
        without: what is said to follow where a compiler fails.
        link_flags: of the linker.
    """
    named = os.environ.get("CXX")
    if is_switched_off(SWITCH) or sys.platform != "linux" or not (named or shutil.which("c++")):
        return None
    try:
        return _load(shlex.split(named or "c++"), sources, flags, link_flags)
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"{without} (CXX chooses a compiler, {SWITCH}=0 turns them off): {detail}",
            stacklevel=3,
        )
        return None


def is_ours_and_whole(path: Path) -> bool:
    """Whether nobody else can have written a library, and it ends in its digest: one cut short ends the process."""
    if not path.exists():
        return False
    for place in (path, path.parent):
        status = place.stat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            return False
    return is_whole(path)


def is_whole(path: Path) -> bool:
    """Whether a library ends in its digest, which the loader does not look at: one cut short would end the process."""
    content = path.read_bytes()
    return content[-_DIGEST_BYTES:] == _digest(content[:-_DIGEST_BYTES])


def _load(compiler: list[str], sources: Sequence[Path], flags: Sequence[str], link_flags: Sequence[str]) -> ctypes.CDLL:
    """From the user's cache, or compiled, and put there."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, text=True).stdout
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")  # x86's name, and Arm's
    texts = (source.read_text() for source in sources)
    made_of = "\n".join((*texts, version, *compiler, *flags, *link_flags, processor, platform.machine()))
    place = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    name = f"{sources[0].stem}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    library: ctypes.CDLL | None = None
    try:
        cached = Path(place).expanduser() / "moe-lm" / name
        if is_ours_and_whole(cached):
            return ctypes.CDLL(str(cached))
        cached.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=cached.parent) as directory:  # /tmp need not be a place to run code from
            built = _compile(compiler, sources[0], flags, link_flags, Path(directory) / name)
            library = _loaded(built)  # before it is kept: one that does not load is of no use to the next start
            content = built.read_bytes()
        write_atomically(cached, content + _digest(content))  # other processes may be doing the same
        cached.chmod(0o600)  # whatever the umask: what a group may write is not loaded
    except (OSError, RuntimeError) as error:  # no home, or one that can not be written
        _say_not_kept(place, getattr(error, "strerror", None) or str(error))
    except ValueError:  # it does not load: perhaps nothing in that place may be run
        pass
    if library is None:
        with tempfile.TemporaryDirectory() as directory:
            library = _loaded(_compile(compiler, sources[0], flags, link_flags, Path(directory) / name))
    return library


@functools.cache  # said once, though there are several libraries
def _say_not_kept(place: str, reason: str) -> None:
    said = f"compiled kernels can not be kept in {place}, and are compiled at every start: {reason}"
    warnings.warn(said, stacklevel=1)


def _loaded(built: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        raise ValueError(f"what it makes does not load: {error}") from error


def _compile(compiler: list[str], source: Path, flags: Sequence[str], link_flags: Sequence[str], built: Path) -> Path:
    objects = built.with_suffix(".o")
    # -fopenmp is left out of the link: the names are then found in the library that torch has loaded.
    for arguments in (
        ["-c", str(source), "-o", str(objects), *flags],
        ["-shared", str(objects), "-o", str(built), *link_flags],
    ):
        subprocess.run([*compiler, *arguments], capture_output=True, check=True, text=True, timeout=120)
    if not built.exists():
        raise subprocess.SubprocessError(f"{compiler[0]} has written no library")
    return built


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
