"""Saving while training goes on: one copy of the state in memory, and a thread that writes it.

Training stalls for the copy alone. There is one thread and one save at a time, so that a second save never overtakes
the first, and no more than one copy is held. A save that fails says so and is tried again; what happens when it keeps
failing is `checkpoint.on_failure`. Where a model is sharded, each process writes its part in this way, and one of them
completes the checkpoint once all have; threads never talk to other processes, which the training loop does.
"""

import errno
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moe_lm.checkpoint.config import FailurePolicy
from moe_lm.checkpoint.store import CheckpointStore, TensorSlice
from moe_lm.checkpoint.tensor_file import CheckpointError

PAUSES = (1.0, 4.0)
"""Seconds between the first tries."""

LATER_PAUSE = 10.0
"""Seconds between the tries after those, where the policy is to wait."""

FULL = (errno.ENOSPC, errno.EDQUOT)


class Saver:
    """Writes the checkpoints of a run, in its own thread."""

    def __init__(self, store: CheckpointStore, report: Callable[[str], None]):
        """Begin idle.

        Args:
            store: Where checkpoints go.
            report: Is told in a sentence what failed; called from the thread.
        """
        self.store, self._report = store, report
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()
        self.failure: Exception | None = None
        """What ended the last save for good; null while it goes on, and when it ended well."""

    @property
    def busy(self) -> bool:
        """Whether a save has not ended yet."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, step: int, slices: Iterable[TensorSlice], state: dict[str, Any], copy: bool = True) -> None:
        """Copy the tensors and begin to write a checkpoint of them; the save before must have ended.

        Args:
            step: What the checkpoint is named by.
            slices: See `CheckpointStore.save`.
            state: The same.
            copy: False where the tensors do not change until the save has ended.
        """
        copies = _copies(slices, copy)
        self._begin(step, lambda: self.store.save(step, copies, state))

    def start_part(self, step: int, slices: Iterable[TensorSlice], writer: int, copy: bool = True) -> None:
        """Copy the tensors and begin to write this process's part of a checkpoint.

        Args:
            step: What the checkpoint is named by.
            slices: See `CheckpointStore.write_part`.
            writer: The same.
            copy: As in `start`.
        """
        copies = _copies(slices, copy)
        self._begin(step, lambda: self.store.write_part(step, writer, copies))

    def start_join(self, step: int, writers: int, state: dict[str, Any]) -> None:
        """Begin to complete a checkpoint of which all processes have written their parts; for one of them to do."""
        self._begin(step, lambda: self.store.join(step, writers, state))

    def _begin(self, step: int, work: Callable[[], object]) -> None:
        assert not self.busy
        self.failure = None
        self._hurry.clear()
        self._thread = threading.Thread(target=self._save, args=(step, work), daemon=True, name="checkpoint")
        self._thread.start()

    def hurry(self) -> None:
        """Let a save that keeps failing end with its next failure."""
        self._hurry.set()

    def close(self) -> None:
        """Let the save that has begun end, whatever ends the run."""
        self.hurry()
        if self._thread is not None:
            self._thread.join()

    def _save(self, step: int, work: Callable[[], object]) -> None:
        tries = 0
        while True:
            try:
                work()
            except (OSError, CheckpointError) as error:
                tries += 1
                if not self._try_again(step, tries, error):
                    self.failure = error
                    return
            except Exception as error:  # a bug: raised by whoever asks how the save went
                self.failure = error
                return
            else:
                if tries:
                    self._report(f"checkpoint of step {step}: written after {tries + 1} tries")
                return

    def _try_again(self, step: int, tries: int, error: OSError | CheckpointError) -> bool:
        """Report a failed try, make room or wait; whether to try once more."""
        full = isinstance(error, OSError) and error.errno in FULL
        waits = self.store.config.on_failure is FailurePolicy.wait
        makes_room = full and tries == 1
        last = (self._hurry.is_set() and not makes_room) or (tries > len(PAUSES) and not waits)
        remedy = "" if last else "; free some space, it is tried again" if full else "; it is tried again"
        if tries <= len(PAUSES) + 1 or tries % 6 == 0 or last:
            failed = f"checkpoint of step {step} can not be written ({said(error)})"
            self._report(f"{failed}{remedy}; earlier checkpoints are intact")
        if last:
            return False
        if makes_room:
            try:
                self.store.make_room(step)
            except OSError as second:
                self._report(f"no room could be made ({said(second)})")
            return True
        self._hurry.wait(PAUSES[tries - 1] if tries <= len(PAUSES) else LATER_PAUSE)
        return True


def _copies(slices: Iterable[TensorSlice], copy: bool) -> list[TensorSlice]:
    return [TensorSlice(s.name, s.data.detach().to("cpu", copy=copy).contiguous(), s.shape, s.offsets) for s in slices]


def said(error: Exception) -> str:
    """A failure in words, with the file that it is about."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
