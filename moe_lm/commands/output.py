"""Output that may end before the run does (a closed terminal, `| head`, a full disk under a log), and that of processes
which nobody watches.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from moe_lm.errors import InputError


class _Lasting:
    """A stream that leads nowhere once it can not be written any more."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._or_nowhere():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._or_nowhere():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _or_nowhere(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # What stands in the stream's buffer goes there as well, at its next flush.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """While the block runs, nobody has to read what is printed: hours of training do not depend on it."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Lasting(out), _Lasting(err)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = out, err


@contextlib.contextmanager
def output_to_file(directory: Path, rank: int) -> Iterator[None]:
    """While the block runs, what a process other than the main one prints goes to a file of its own.

    On the terminal it would cut through the main process's progress bar. What ends the process is said there all the
    same: exceptions leave the block, and stacks of a watchdog go to the file descriptor.
    """
    if rank == 0:
        yield
        return
    path = directory / f"process-{rank:05d}.txt"
    with contextlib.ExitStack() as opened:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = opened.enter_context(open(path, "a", buffering=1))
        except OSError as error:
            raise InputError(f"{path}: can not be written ({error.strerror}); move what lies there away.") from error
        opened.enter_context(contextlib.redirect_stdout(file))
        opened.enter_context(contextlib.redirect_stderr(file))
        yield
