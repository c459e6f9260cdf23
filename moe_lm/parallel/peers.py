"""A process that goes ends its job on all processes, soon and by name.

Nobody else does that everywhere: gloo raises in the next collective, NCCL waits for its timeout, torchrun ends the
processes that it knows of, and a bare srun none. Here each process holds a connection to rank 0's. The kernel closes it
whatever a process dies of, so that nothing has to be guessed from time; an orderly end says farewell first, and one by
an exception says which. A process that is only silent (stopped, its machine gone) is reported, and left to the
watchdog: how long a silence may last is not known here.
"""

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import NoReturn

from moe_lm.errors import InputError, RunError, Stopped
from moe_lm.interrupts import STOPPED
from moe_lm.parallel.peer_connections import Departure
from moe_lm.parallel.peer_hub import Hub
from moe_lm.parallel.peer_spoke import Spoke

BEAT = 2.0
"""Seconds between two signs of life."""

GRACE = 5.0
"""Seconds from a departure until the process is ended, if it does not end by itself, nor asks or answers who tells of
it."""

_LAST_WORDS = 2.0
_FAREWELL = 2.0
"""Seconds that an end waits for the others to read of it, at most."""

_SETTLE = 1.0
"""Seconds in which a process that meets the same failure as another one says so itself."""

_ANSWERING = 3.0
"""Seconds that processes stay, after rank 0's end, to answer others that ask who has told of it, and may ask later."""

_NAMING = 3.0
"""Seconds that a backend's error waits for the departure which it may come from."""

_SIGNALLED = 0.5
"""Seconds that a signal to stop waits for it: a launcher sends one only after the process has gone."""


class DepartedPeerError(RunError):
    """The job can not go on without a process that has gone."""

    told = True

    def __init__(self, sentence: str, code: int):
        super().__init__(sentence)
        self.code = code


class PeerWatch:
    """Watches over the other processes of the job while the context is open; nothing where there are none.

    Leaving it by an exception tells the others, which end as well, unless it is `Stopped` or `agreed` says that they
    know. Leaving it by an error that comes of a departed peer raises `DepartedPeerError` in its place.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        from_main: Callable[[str], str],
        *,
        agreed: Callable[[], bool] = lambda: False,
        at_departure: Callable[[str], object] = lambda sentence: None,
        last_words: Callable[[str], object] = lambda sentence: None,
    ):
        """Begin to watch when the context is entered, on every process.

        Args:
            rank: Of this process.
            world_size: Number of processes.
            from_main: Gives every process the text that rank 0 calls it with.
            agreed: Whether every process knows of the failure that this one ends by.
            at_departure: Told in another thread of a departure, as soon as it is known.
            last_words: Told of it before the process is ended, where it has not ended by itself; has two seconds.
        """
        self._rank, self._world_size, self._from_main = rank, world_size, from_main
        self._agreed, self._at_departure = agreed, at_departure
        self.last_words = last_words
        """May be replaced while the context is open."""
        self._station: Hub | Spoke | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True, name="peers")
        self._departure: Departure | None = None
        self._has_departed, self._is_told = threading.Event(), threading.Event()
        self._farewell: Departure | None = None
        self._ends, self._has_said, self._has_left = threading.Event(), threading.Event(), threading.Event()
        self._has_own_word = False

    @property
    def departed(self) -> str | None:
        """Which process has gone, and how, as a sentence."""
        return None if self._departure is None else self._departure.sentence

    def wait_for_departure(self, seconds: float) -> str | None:
        """`departed`, as soon as it is known: a backend often notices first, and names nobody."""
        if self._station is not None:
            self._has_departed.wait(seconds)
        return self.departed

    def silent(self, after: float) -> list[str]:
        """A sentence on each process, of those that this one is connected to, without a sign of life for so long.

        Args:
            after: In seconds; several times `BEAT`.
        """
        return [] if self._station is None else self._station.silent(after)

    def named(self, error: BaseException) -> BaseException:
        """The departure that an error of this process comes from, where there is one; else the error itself.

        A backend that misses its peer raises a RuntimeError, and a launcher that misses a process sends SIGTERM.
        """
        if isinstance(error, RunError) or not isinstance(error, (RuntimeError, KeyboardInterrupt)):
            return error
        was_asked = isinstance(error, KeyboardInterrupt)
        self.wait_for_departure(_SIGNALLED if was_asked else _NAMING)
        if self._departure is None or (was_asked and self._departure.code == STOPPED):
            return error
        return DepartedPeerError(self._departure.sentence, self._departure.code)

    def fail(self, why: str, code: int = 1) -> None:
        """Tell the others that this process ends; for whoever ends it past the context (a watchdog, a deadline)."""
        self._leave(Departure(f"ended: {why}", code, died=False))

    def tell(self, error: BaseException) -> None:
        """Tell the others at once that this process ends by an error which they do not know of."""
        if not isinstance(error, DepartedPeerError) and not self._agreed():
            self._has_own_word = True
            self._leave(_failure(error))

    def __enter__(self) -> "PeerWatch":
        if self._world_size == 1:
            return self
        if self._rank == 0:
            self._station = Hub(self._world_size, self._from_main, self._take_in)
        else:
            self._station = Spoke(self._rank, self._world_size, self._from_main, self._take_in)
        station = weakref.ref(self._station)
        os.register_at_fork(after_in_child=lambda: (mine := station()) and mine.close())
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._station is None:
            return
        end = error
        while True:
            try:
                end = self._end_orderly(end)
                break
            except KeyboardInterrupt as again:  # a launcher repeats the terminal's; the others must hear all the same
                end = end or again
        if end is not None and end is not error:
            raise end from error

    def _end_orderly(self, error: BaseException | None) -> BaseException | None:
        """Say farewell, and wait a little until it is heard; gives the error by its name."""
        error = error if error is None or self._ends.is_set() else self.named(error)
        comes_of_departure = isinstance(error, DepartedPeerError)
        self._has_own_word = error is not None and not comes_of_departure
        self._has_left.set()
        if comes_of_departure:
            self._is_told.wait(GRACE)
        known = error is None or comes_of_departure or isinstance(error, Stopped) or self._agreed()
        self._leave(None if known or error is None else _failure(error))
        self._thread.join(_FAREWELL + 1)
        return error

    def _leave(self, farewell: Departure | None) -> None:
        if self._station is None:
            return
        if not self._ends.is_set():
            self._farewell = farewell
            self._ends.set()
            self._station.wake()
        self._has_said.wait(1)

    def _watch(self) -> None:
        station = self._station
        assert station is not None
        next_beat, until = 0.0, float("inf")
        while not station.done and (now := time.monotonic()) < until:
            if self._ends.is_set() and not self._has_said.is_set():
                station.farewell(self._farewell)
                self._has_said.set()
                until = now + _FAREWELL
                continue
            if now >= next_beat:
                station.beat()
                next_beat = now + BEAT
            station.step(min(next_beat, until) - now)
        station.close()

    def _take_in(self, departure: Departure) -> None:
        if self._departure is None and not self._ends.is_set():
            self._departure = departure
            self._has_departed.set()
            threading.Thread(target=self._end, args=(departure,), daemon=True, name="departure").start()

    def _end(self, departure: Departure) -> NoReturn:
        """Tell the user, and end the process if it does not end by itself: from whatever hangs in it, also later."""
        assert self._station is not None
        deadline = time.monotonic() + GRACE
        _within(0, lambda: self._at_departure(departure.sentence))
        if not departure.died:
            self._has_left.wait(_SETTLE)
        if (departure.died or not self._has_own_word) and self._station.tells_the_user(departure):
            _within(1, lambda: _say(departure.sentence))
        self._station.answer_askers(departure, _ANSWERING)
        self._is_told.set()
        self._station.answer_askers(departure, deadline - time.monotonic())
        time.sleep(max(0.0, deadline - time.monotonic()))
        if not self._has_left.is_set():
            _within(_LAST_WORDS, lambda: self.last_words(departure.sentence))
        os._exit(departure.code)


def _failure(error: BaseException) -> Departure:
    """What the others shall say of this process."""
    if isinstance(error, KeyboardInterrupt):
        return Departure("was interrupted", STOPPED, died=False)
    said = " ".join(str(error).split())[:600]
    kind = "" if isinstance(error, (InputError, RunError)) else f"{type(error).__name__}: "
    return Departure(f"failed: {kind}{said}", died=False)


def _within(seconds: float, act: Callable[[], object]) -> None:
    """Wait for something at most so long: a dead mount or a full pipe must not hold an end up."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)


def _say(sentence: str) -> None:
    """A line on the error output, past whatever lock the main thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"\nmoe-lm: {sentence}\n".encode(errors="backslashreplace"))
