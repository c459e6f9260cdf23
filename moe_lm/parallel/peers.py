"""A process that goes ends its job on all processes, soon and by name.

Nobody else does that everywhere: gloo raises in the next collective, NCCL waits for its timeout, torchrun ends the
processes that it knows of, and a bare srun none. Here each process holds a connection to rank 0's. The kernel closes it
whatever a process dies of, so that nothing has to be guessed from time; an orderly end says farewell first, and one by
an exception says which. A process that is only silent (stopped, its machine gone) is reported, and left to the
watchdog: how long a silence may last is not known here.

Three threads take part. The main one trains, and at last leaves the context. "peers" alone uses the connections, from
the beginning to the end. "ending" begins with another process's departure: it has the user told, and ends this process
if that does not end by itself. A fourth, the watchdog's or that of signals, may end it past the context. What they tell
each other is never taken back, and each wait for it has a limit:

| state | means | set by | waited for by |
| --- | --- | --- | --- |
| `_departure`, then `_departure_known` | another process has gone | peers | main, with an error that may come from it |
| `_farewell`, then `_farewell_due` | this process goes, and says this | whoever goes first | peers |
| `_farewell_sent` | it is on its way to the others | peers | whoever goes |
| `_context_left` | the main thread ends by itself | main | ending, for the main thread to fail by itself |
| `_fails_itself` | and by an error of its own, which it tells the user | main | – |
| `_may_exit` | the user knows of the departure, and who asked has an answer | ending | main, when it ends by it |
"""

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
from moe_lm.process import attempt, say

BEAT = 2.0
"""Seconds between two signs of life."""

GRACE = 5.0
"""Seconds from a departure until the process is ended, if it does not end by itself, nor asks or answers who tells of
it."""

_LAST_WORDS = 2.0
"""Seconds in which it may still be written down how this process ends."""

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
        self._farewell: Departure | None = None
        self._departure_known, self._may_exit = threading.Event(), threading.Event()
        self._farewell_due, self._farewell_sent = threading.Event(), threading.Event()
        self._context_left = threading.Event()
        self._fails_itself = False

    @property
    def departed(self) -> str | None:
        """Which process has gone, and how, as a sentence."""
        return None if self._departure is None else self._departure.sentence

    def wait_for_departure(self, seconds: float) -> str | None:
        """`departed`, as soon as it is known: a backend often notices first, and names nobody."""
        if self._station is not None:
            self._departure_known.wait(seconds)
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

    def announce_end(self, why: str, code: int = 1) -> None:
        """Tell the others that this process ends; for whoever ends it past the context (a watchdog, a deadline)."""
        self._say_farewell(Departure(f"ended: {why}", code, died=False))

    def announce_failure(self, error: BaseException) -> None:
        """Tell the others at once that this process ends by an error which they do not know of."""
        if not isinstance(error, DepartedPeerError) and not self._agreed():
            self._fails_itself = True
            self._say_farewell(_failure(error))

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
                end = self._leave(end)
                break
            except KeyboardInterrupt as again:  # a launcher repeats the terminal's; the others must hear all the same
                end = end or again
        if end is not None and end is not error:
            raise end from error

    def _leave(self, error: BaseException | None) -> BaseException | None:
        """Say farewell, and wait a little until it is heard; gives the error by its name."""
        if error is not None and not self._farewell_due.is_set():
            error = self.named(error)
        comes_of_departure = isinstance(error, DepartedPeerError)
        self._fails_itself = error is not None and not comes_of_departure
        self._context_left.set()
        if comes_of_departure:
            self._may_exit.wait(GRACE)
        known = error is None or comes_of_departure or isinstance(error, Stopped) or self._agreed()
        self._say_farewell(None if known or error is None else _failure(error))
        self._thread.join(_FAREWELL + 1)
        return error

    def _say_farewell(self, failure: Departure | None) -> None:
        """Have it said to the others, the first time that this is called; wait until it is on its way."""
        if self._station is None:
            return
        if not self._farewell_due.is_set():
            self._farewell = failure
            self._farewell_due.set()
            self._station.wake()
        self._farewell_sent.wait(1)

    def _watch(self) -> None:
        """Thread "peers": hear of the others and give signs of life, until everybody has heard the farewell."""
        station = self._station
        assert station is not None
        next_beat, until = 0.0, float("inf")
        while not station.done and (now := time.monotonic()) < until:
            if self._farewell_due.is_set() and not self._farewell_sent.is_set():
                station.farewell(self._farewell)
                self._farewell_sent.set()
                until = now + _FAREWELL
                continue
            if now >= next_beat:
                station.beat()
                next_beat = now + BEAT
            station.step(min(next_beat, until) - now)
        station.close()

    def _take_in(self, departure: Departure) -> None:
        """Begin to end, by the first departure that comes before this process goes by itself."""
        if self._departure is None and not self._farewell_due.is_set():
            self._departure = departure
            self._departure_known.set()
            threading.Thread(target=self._end, args=(departure,), daemon=True, name="ending").start()

    def _end(self, departure: Departure) -> NoReturn:
        """Thread "ending": have the user told, and end the process from whatever hangs in it, also later."""
        assert self._station is not None
        deadline = time.monotonic() + GRACE
        attempt(lambda: self._at_departure(departure.sentence), 0)
        if not departure.died:  # this process may be about to meet the same
            self._context_left.wait(_SETTLE)
        if (departure.died or not self._fails_itself) and self._station.tells_the_user(departure):
            attempt(lambda: say(departure.sentence), 1)
        self._station.answer_askers(departure, _ANSWERING)
        self._may_exit.set()
        self._station.answer_askers(departure, deadline - time.monotonic())
        time.sleep(max(0.0, deadline - time.monotonic()))
        if not self._context_left.is_set():
            attempt(lambda: self.last_words(departure.sentence), _LAST_WORDS)
        os._exit(departure.code)


def _failure(error: BaseException) -> Departure:
    """What the others shall say of this process."""
    if isinstance(error, KeyboardInterrupt):
        return Departure("was interrupted", STOPPED, died=False)
    said = " ".join(str(error).split())[:600]
    kind = "" if isinstance(error, (InputError, RunError)) else f"{type(error).__name__}: "
    return Departure(f"failed: {kind}{said}", died=False)
