"""Steps made ready in the background while the present one is computed."""

import queue
import threading
import time

from moe_lm.data.loader import Loader, StepBatch

DEPTH = 2
"""Steps that wait ready: one hides the work of making it, a second evens out steps that take longer to make."""


class Prefetcher:
    """A thread that makes the next steps of a loader; a context manager.

    The thread only asks numpy and worker processes, which give up the interpreter while they work. Whatever it raises
    is raised by `next`: nobody waits for a step that will never come.
    """

    def __init__(self, loader: Loader, first_step: int) -> None:
        self._ready: queue.Queue[StepBatch | BaseException] = queue.Queue(DEPTH)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(loader, first_step), daemon=True, name="prefetch")
        self.waited = 0.0
        """Seconds that `next` has waited, in all."""

    def __enter__(self) -> "Prefetcher":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:  # room for the step that the thread may be waiting to put down
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def next(self) -> StepBatch:
        """The next step.

        Raises:
            InputError, RunError: What the loader raised.
        """
        start = time.perf_counter()
        step = self._ready.get()
        self.waited += time.perf_counter() - start
        if isinstance(step, BaseException):
            raise step
        return step

    def _run(self, loader: Loader, data_step: int) -> None:
        try:
            while not self._stop.is_set() and (loader.num_steps is None or data_step < loader.num_steps):
                self._ready.put(loader.step(data_step))
                data_step += 1
        except BaseException as error:
            self._ready.put(error)
