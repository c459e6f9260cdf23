"""What a run is asked for from outside while it trains: by signals, and by files where launchers swallow signals."""

import contextlib
from pathlib import Path
from typing import NamedTuple

from moe_lm.checkpoint.saver import Saver
from moe_lm.interrupts import interrupts
from moe_lm.parallel.runtime import Runtime

STOP_FILE = "stop"
"""`touch runs/NAME/stop`: save and stop at the end of the step. The next start removes it."""

SAVE_FILE = "save"
"""`touch runs/NAME/save`: save at the end of the step and go on. Removed when that begins."""


class Asked(NamedTuple):
    """What was asked for, on any process; the same on every process."""

    stop: bool
    save: bool
    failed: bool
    """The last checkpoint can not be written, and the run shall not go on without it."""
    saving: bool
    """A process has not written its part of the last checkpoint yet."""


class Requests:
    """The requests to one run; every process asks at every step boundary."""

    def __init__(self, directory: Path, runtime: Runtime):
        self._stop_file, self._save_file = directory / STOP_FILE, directory / SAVE_FILE
        self._runtime = runtime

    def agreed(self, saver: Saver) -> Asked:
        """What stands to be done now, with one collective; a request to save is taken by this."""
        stop, save = self.stopping, interrupts.save
        if save:
            interrupts.save = False
        if self._runtime.is_main and self._save_file.is_file():
            with contextlib.suppress(OSError):
                self._save_file.unlink()
                save = True
        busy = saver.busy  # before its failure, which it may only now meet
        return Asked(*self._runtime.any([stop, save, saver.failure is not None, busy]))

    @property
    def stopping(self) -> bool:
        """Whether this very process was asked to stop, which its peers may not know yet."""
        return interrupts.stop is not None or (self._runtime.is_main and self._stop_file.is_file())

    @property
    def reason(self) -> str:
        """Who asked this process to stop."""
        if interrupts.stop is not None:
            return interrupts.stop
        return str(self._stop_file) if self._runtime.is_main and self._stop_file.is_file() else "another process"
