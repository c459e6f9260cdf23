"""Ends a process that hangs, with the stacks of its threads, so that a launcher can start it again."""

import faulthandler
import os
import threading
import time
from collections.abc import Callable

from moe_lm.process import attempt, rank, say

Pulse = Callable[[], None]
"""Called wherever a run makes progress, or waits for something that it says it waits for."""

GRACE = 30.0
"""Seconds after which the C library's timer acts for a watchdog that itself can not: a hang inside a call that holds
the interpreter's lock."""


class Watchdog:
    """A thread that wants a sign of life (`beat`) every so often; a context manager."""

    def __init__(self, limit: float, at_end: Callable[[str], object], about: Callable[[], str] = lambda: ""):
        """Begin to watch when the context is entered.

        Args:
            limit: Seconds without a sign of life; 0 never ends anything.
            at_end: Told why, before the process ends.
            about: Gives what else is known then, to be put after it.
        """
        self._limit, self._at_end, self._about = limit, at_end, about
        self._last = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def beat(self) -> None:
        """Say that the process makes progress."""
        self._last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.beat()
        if self._limit:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._limit:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        rest = self._limit
        while rest > 0:
            faulthandler.dump_traceback_later(rest + GRACE, exit=True, file=2)
            if self._over.wait(rest):
                return
            rest = self._last + self._limit - time.monotonic()
        text = f"no step has ended for {self._limit:g} s (trainer.step_timeout){self._about()}"
        say(f"{text}; stacks of process {rank()} at this moment:")
        faulthandler.dump_traceback(file=2, all_threads=True)
        attempt(lambda: self._at_end(text), 2)
        os._exit(1)
