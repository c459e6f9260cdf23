"""Signals: SIGINT, SIGTERM and SIGHUP stop, SIGUSR1 asks for a checkpoint; and the time within which a stop must be
over.

A handler written in Python runs only when the main thread comes back to the interpreter, which it does not while it
waits in a collective for a peer that has gone. So the interpreter's own handler, in C, puts the signal's number into a
pipe (`signal.set_wakeup_fd`), and a thread reads it there: it remembers what was asked, ends the process at a second
SIGINT, and ends it when a deadline passes, before a launcher's SIGKILL would (torchrun waits 30 seconds).
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from moe_lm.errors import Stopped
from moe_lm.process import attempt, rank, say, world_size

STOPPED = 75
"""Exit code of a run that was stopped and can go on (EX_TEMPFAIL of sysexits.h)."""

DEADLINE = 25.0
"""Seconds from a signal to the end of the process, at most, where a command does not say otherwise."""

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_ECHO_SECONDS = 2.0
"""A launcher repeats the terminal's Ctrl-C to its processes: what comes within this time is the same one."""


class Interrupts:
    """The signals of this process, while the context is open.

    At first a stop raises `KeyboardInterrupt` wherever the main thread is. While training, which ends at step
    boundaries, it is only remembered (`deferred`).
    """

    def __init__(self) -> None:
        self._before: dict[int, object] = {}
        self._forget()

    def _forget(self) -> None:
        self.stop: str | None = None
        """Name of the signal that asked to stop."""
        self.save = False
        """Whether a checkpoint was asked for; whoever makes one sets it back."""
        self._deferred = self._obeyed = self._ignored = False
        self._interrupted: float | None = None
        self._deadline_seconds = DEADLINE
        self._deadline: float | None = None
        self._last_words: Callable[[], object] | None = None

    def __enter__(self) -> "Interrupts":
        self._forget()
        if threading.current_thread() is not threading.main_thread():
            return self  # signals belong to the main thread, and to whoever runs it
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in (*_STOPPING, signal.SIGUSR1):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: the terminal may go
            self._before[number] = signal.signal(number, self._in_main_thread)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="signals")
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)  # the thread reads the end of the pipe
        self._thread.join()
        os.close(self._read)

    @contextlib.contextmanager
    def deferred(self, deadline: float, last_words: Callable[[], object]) -> Iterator[None]:
        """Only remember signals while the block runs, which must ask.

        Args:
            deadline: Seconds from a signal to the end of the process, at most.
            last_words: Called before the process is ended by the deadline, or by a second SIGINT.
        """
        self._deadline_seconds, self._last_words, self._deferred = deadline, last_words, True
        try:
            yield
        except Stopped:
            # A launcher that sees a peer end first sends SIGTERM: it must not tear what is still to be written. It is
            # remembered all the same, so that a deadline stands, and a second SIGINT ends the process.
            self._obeyed = True
            raise
        finally:
            self._deferred, self._last_words = False, None

    def ignore(self) -> None:
        """Take no more stops: the process ends for another reason, and a launcher's SIGTERM to it is no stop."""
        self._ignored = True

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGUSR1 and not (self._deferred or self._obeyed or self._ignored):
            raise KeyboardInterrupt

    def _watch(self) -> None:
        while True:
            timeout = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            if not select.select([self._read], [], [], timeout)[0]:
                self._end_at_deadline()
            numbers = os.read(self._read, 64)
            if not numbers:
                return
            for number in numbers:
                self._remember(number)

    def _remember(self, number: int) -> None:
        if number == signal.SIGUSR1:
            self.save = True
            return
        if number not in _STOPPING or self._ignored:
            return
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted is None:
                self._interrupted = now
            elif not (world_size() > 1 and now - self._interrupted < _ECHO_SECONDS):
                _say_once("interrupted twice: ended at once, without a checkpoint of this step")
                self._end(2)
        if self.stop is None:
            self.stop = signal.Signals(number).name
            self._deadline = now + self._deadline_seconds
            if self._deferred:
                again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
                _say_once(f"{self.stop}: saving and stopping at the end of this step{again}")

    def _end_at_deadline(self) -> None:
        _say_once(f"{self.stop}: not over {self._deadline_seconds:g} s later, and so ended; see trainer.stop_deadline")
        self._end(2)

    def _end(self, seconds: float) -> NoReturn:
        """End the process, after at most so many seconds for the last words."""
        if self._last_words is not None:
            attempt(self._last_words, seconds)
        os._exit(STOPPED)


def _say_once(text: str) -> None:
    """A line on the error output of one process: a signal to a job reaches all of them."""
    if rank() == 0:
        say(text)


interrupts = Interrupts()
"""Of this process: signals are its own, not any object's."""
