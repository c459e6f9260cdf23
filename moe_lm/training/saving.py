"""Saving a run while it trains: what its processes do together, from step boundary to step boundary.

Writing is done by a thread of each process (`checkpoint/saver.py`). Threads never talk to other processes; here the
training loop does so for them.
"""

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from moe_lm.checkpoint.saver import Saver, said
from moe_lm.checkpoint.store import TensorSlice, step_of
from moe_lm.checkpoint.tensor_file import CheckpointError
from moe_lm.errors import Stopped
from moe_lm.parallel.runtime import Runtime
from moe_lm.training.requests import Requests
from moe_lm.training.watchdog import Pulse


class Saving:
    """The checkpoints that a run writes, one at a time.

    Of a model that every process has whole, the main process writes the checkpoint. Of a sharded one each process
    writes its part, and once all have, the main one joins them:

        idle ── begin ──> writing ──> idle
        idle ── begin ──> writing parts ── go_on ──> joining ──> idle

    Arrows without a name are ends of threads. The parts are to be joined as long as `_to_join` holds the state that
    goes with them. A thread may also end with `Saver.failure`, which ends the run (`raise_failure`).
    """

    def __init__(self, saver: Saver, runtime: Runtime, requests: Requests, sharded: bool, stands_at: Callable[[], int]):
        """Begin idle.

        Args:
            saver: Writes for this process.
            runtime: This process among its peers.
            requests: A stop that is asked for gives up on a save that keeps failing.
            sharded: Whether each process holds a part of the model alone.
            stands_at: Gives the step that the run stands at.
        """
        self._saver, self._store, self._runtime, self._requests = saver, saver.store, runtime, requests
        self._sharded, self._stands_at = sharded, stands_at
        self._to_join: dict[str, Any] | None = None
        self.newest_step: int | None = None
        """Step of the newest checkpoint, written or being written; whoever goes back to another one sets it."""

    def begin(self, slices: Iterable[TensorSlice], state: dict[str, Any], pulse: Pulse) -> None:
        """Begin a checkpoint of the present step, of an idle run; every process must call it.

        Args:
            slices: What this process has of the tensors, of a sharded model; of a whole one what the main one has.
            state: See `CheckpointStore.save`.
            pulse: Called while this waits, where saving is not in the background.
        """
        step, background = self._stands_at(), self._store.config.background
        if self._sharded:
            self._runtime.on_main(self._sweep)  # before any process begins to write
            self._to_join = state
            self._saver.start_part(step, slices, self._runtime.rank, copy=background)
        elif self._runtime.is_main:
            self._saver.start(step, slices, state, copy=background)
        self.newest_step = step
        if not background:
            self.finish(pulse)

    def _sweep(self) -> None:
        with contextlib.suppress(OSError):  # the save will meet it as well, and does as the policy says
            self._store.sweep()

    def go_on(self, busy: bool) -> None:
        """Begin to join a checkpoint of which every process has written its part.

        Args:
            busy: Whether any process is still writing; the same on every one.
        """
        if self._to_join is None or busy:
            return
        if self._runtime.is_main:
            assert self.newest_step is not None
            self._saver.start_join(self.newest_step, self._runtime.world_size, self._to_join)
        self._to_join = None

    def finish(self, pulse: Pulse) -> None:
        """Wait until the checkpoint that was begun is on disk; every process must call it.

        Raises:
            Stopped: It can not be written, on every process.
        """
        pause = 0.001
        while True:
            stop = self._requests.stopping
            busy, failed, stop = self._runtime.any([self._saver.busy, self._saver.failure is not None, stop])
            if stop:
                self._saver.hurry()
            if not busy and (failed or self._to_join is None):
                break
            self.go_on(busy)
            pulse()
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        if failed:
            self.raise_failure()

    def raise_failure(self) -> NoReturn:
        """End the run because its last checkpoint can not be written; every process must call it.

        Raises:
            Stopped: Of a disk, on every process.
            Exception: A bug that a process met, on every process.
        """
        failure = self._saver.failure
        is_disk = isinstance(failure, (OSError, CheckpointError))
        self._runtime.agree(None if is_disk else failure)  # a bug of one process is no orderly stop of the others
        reason = "" if failure is None else f" ({said(failure)})"
        raise Stopped(
            f"stopped after step {self._stands_at()}, because the checkpoint of step {self.newest_step} can not be "
            f"written{reason}; {self.said_next_start()}"
        )

    def said_next_start(self) -> str:
        """What the same command will do, in words."""
        paths = [path for path in self._store.paths() if step_of(path) <= self._stands_at()]
        does = f"goes on from {paths[-1].name}" if paths else "begins anew, for there is no checkpoint yet"
        return f"the same command {does}"
