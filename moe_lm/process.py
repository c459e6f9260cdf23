"""This process: its place among those that its launcher started, and how it speaks and ends where Python may not."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable


def open_standard_streams() -> None:
    """Lead input and output that were closed (`>&-`) to /dev/null.

    Otherwise the next file that is opened, say a checkpoint's, gets the descriptor of what is printed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest that is free, which is this one
            os.set_inheritable(opened, True)
    # Python gives no stream to a descriptor that it found closed.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def rank() -> int:
    """Number of this process in its job; known before any process group exists."""
    return _number("RANK", 0)


def world_size() -> int:
    """Number of processes that the launcher started; known before any process group exists."""
    return _number("WORLD_SIZE", 1)


def was_restarted() -> bool:
    """Whether torchrun has started this job again, after a process of it had gone."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0) > 0


def _number(name: str, default: int) -> int:
    """A variable of the launcher's; what is no number is for `Runtime` to refuse, and stops no sentence before."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def signature() -> str:
    """What a sentence to the user begins with."""
    return "moe-lm" if rank() == 0 else f"moe-lm (rank {rank()})"


def say(sentence: str) -> None:
    """A line on the error output, past whatever lock the main thread may hold."""
    with contextlib.suppress(OSError):  # whoever read it may have gone, and this must go on
        os.write(2, f"\nmoe-lm: {sentence}\n".encode(errors="backslashreplace"))


def attempt(act: Callable[[], object], seconds: float) -> None:
    """Wait for something at most so long: a dead mount or a full pipe must not hold an end up."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
