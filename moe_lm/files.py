"""Writing files so that a reader finds the old one, the new one or none, and never half of one."""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from moe_lm.errors import InputError


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary sibling for writing; renames it to `path` when the block ends without an exception.

    The sibling's name is random: two processes preparing the same directory each write their own, on whatever
    machines, and since the contents are the same, it does not matter whose rename comes last.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a whole file atomically."""
    with atomic_file(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically, readable and in the order given."""
    write_atomically(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """JSON as this project writes it."""
    return (json.dumps(value, indent=2) + "\n").encode()


def compact_json_bytes(value: Any) -> bytes:
    """JSON of which there is much."""
    return (json.dumps(value, separators=(",", ":")) + "\n").encode()


def write_durably(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """Writes a new file and makes its content durable; for directories that are renamed as a whole.

    Returns:
        SHA-256, in hexadecimal, of what was meant to be written, not of what the disk gives back.
    """
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for piece in pieces:
            digest.update(piece)
            left = memoryview(piece).cast("B")
            while left:
                left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):  # whoever reads it back shall see what the disk holds, not what memory does
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write does not know its file
    finally:
        os.close(descriptor)
    return digest.hexdigest()


@contextmanager
def locked(directory: Path) -> Iterator[bool]:
    """Holds a lock on a directory while the block runs; gives False where another process holds it, or has just renamed
    the directory.

    The lock is on the directory itself: no file is left, and the system releases it however the process ends. Where the
    file system has no locks, it gives True.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        yield _lock(descriptor) and directory.exists() and os.path.samestat(os.fstat(descriptor), os.stat(directory))
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True


@contextmanager
def new_directory(output: Path, check: Callable[[], None]) -> Iterator[Path]:
    """An empty directory that takes the output's name, and the place of what is there, once the block has filled it.

    Where the block fails, or the renaming does, what was there is there as before, and nothing besides it.

    Args:
        output: The directory, or a link to it.
        check: Refuses, with an `InputError`, what must not be replaced. Asked at the beginning and again at the end,
            for the block may take hours, in which somebody puts a file there.

    Raises:
        InputError: The directory can not be written, or another process is writing it.
    """
    output = output.resolve()
    temporary, replaced = output.with_name(f".tmp-{output.name}"), output.with_name(f".old-{output.name}")
    new_parents = [parent for parent in output.parents if not parent.exists()]
    with ExitStack() as held:
        try:
            check()
            temporary.mkdir(parents=True, exist_ok=True)
            if not held.enter_context(locked(temporary)):
                raise InputError(f"{output}: another process is writing it; wait for it, or give another output=.")
            for leftover in temporary.iterdir():  # of one that was killed
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            if replaced.exists() and not output.exists():  # one was killed between its two renamings
                replaced.rename(output)
        except OSError as error:
            raise InputError(f"{output}: can not be written ({error.strerror}); give another output=.") from error
        try:
            yield temporary
            sync_tree(temporary)
            check()
            _rename_over(temporary, output, replaced)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            with suppress(OSError):  # somebody has put something there meanwhile
                for parent in new_parents:
                    parent.rmdir()
            raise
        shutil.rmtree(replaced, ignore_errors=True)
        sync_directory(output.parent)


def _rename_over(new: Path, output: Path, replaced: Path) -> None:
    """Rename a directory to a name that another may have, which is put aside; it stays where that fails."""
    if not output.exists():
        new.rename(output)
        return
    shutil.rmtree(replaced, ignore_errors=True)
    output.rename(replaced)
    try:
        new.rename(output)
    except BaseException:
        replaced.rename(output)
        raise


def sha256(path: Path) -> str:
    """Hash of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Makes all files below a directory, and their names, durable: those, too, that a library wrote."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_directory(path)
    sync_directory(directory)
