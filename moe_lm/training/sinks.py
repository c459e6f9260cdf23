"""Where the numbers of a run go: metrics.jsonl, and a progress bar or plain lines; `tracker.py` has the tracker."""

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from moe_lm.files import write_atomically


class MetricsFile:
    """metrics.jsonl: one JSON object per line, in order of steps."""

    def __init__(self, path: Path, resume_step: int):
        """Open for appending, cut back to the lines of finished steps up to `resume_step`.

        The closing validation goes as well: a run that is resumed closes again.
        """
        self._path = path
        self._waiting = b""
        self._failing = False
        self._file = self._open(resume_step)

    def _open(self, step: int) -> int:
        content = self._path.read_bytes() if self._path.exists() else b""
        lines = (content + self._waiting).splitlines(keepends=True)
        kept = b"".join(line for line in lines if _step_of(line) <= step)
        if kept != content:
            write_atomically(self._path, kept)
        self._waiting = b""
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def _open_anew(self) -> None:
        with contextlib.suppress(OSError):
            opened = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            os.close(self._file)
            self._file = opened

    def cut_back(self, step: int) -> None:
        """Drop the lines of steps after `step`, and go on from there."""
        cut = self._open(step)
        os.close(self._file)
        self._file = cut

    def write(self, values: dict[str, Any]) -> None:
        """Append one line."""
        # JSON has no NaN: what is not finite becomes null, so that every reader can read the line that matters most.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        if not os.path.exists(self._path):  # somebody has moved or removed it, or the whole directory
            self._open_anew()
        self._waiting += (json.dumps(finite, allow_nan=False) + "\n").encode()
        try:
            self._flush()
        except OSError as error:
            if not self._failing:
                print(f"moe-lm: {self._path}: {error.strerror}; its lines wait in memory", file=sys.stderr, flush=True)
            self._failing = True
        else:
            self._failing = False

    def _flush(self) -> None:
        """Write what waits: nothing of it is lost or doubled, wherever a full disk cuts it."""
        while self._waiting:
            self._waiting = self._waiting[os.write(self._file, self._waiting) :]

    def close(self) -> None:
        """Write what still waits, as far as that can be done, and close the file."""
        with contextlib.suppress(OSError):
            self._flush()
        os.close(self._file)


def _step_of(line: bytes) -> float:
    try:
        values = json.loads(line)
        step = float(values["step"])
        closing = values.get("complete") and step > 0  # that of step 0 says how good a model the run began from
        return float("inf") if closing or not line.endswith(b"\n") else step
    except (ValueError, KeyError, TypeError, AttributeError):
        return float("inf")  # a line that a kill cut short


class Display:
    """Progress for a person: a live bar on a terminal, a line now and then elsewhere (logs, pipes), nothing on other
    ranks.
    """

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, shown: bool):
        self._console = Console(file=sys.stderr, quiet=not shown, highlight=False)
        self._progress: Progress | None = None
        if shown and self._console.is_terminal and not os.environ.get("CI"):
            text = TextColumn("{task.description}", table_column=Column(no_wrap=True))
            columns = (MofNCompleteColumn(), BarColumn(None), text, TimeRemainingColumn(compact=True))
            self._progress = Progress(*columns, console=self._console, expand=True)
            self._task = self._progress.add_task("", total=None)
            self._progress.start()

    def begin(self, max_steps: int, first_step: int) -> None:
        """Show that `first_step` of `max_steps` steps are done."""
        self._max_steps, self._first_step = max_steps, first_step
        self._start = self._last_line = time.monotonic()
        if self._progress is not None:
            self._progress.reset(self._task, total=max_steps, completed=first_step)

    def step(self, step: int, text: str) -> None:
        """Show that `step` steps are done, with a line of figures."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=text)
            return
        now = time.monotonic()
        if step == self._first_step + 1:
            # The first step sets kernels up and takes several times as long: no time left is foretold from it.
            self._start = self._last_line = now
            self.line(f"step {step}/{self._max_steps}  {text}")
        elif now - self._last_line >= self.SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._start) / (step - self._first_step - 1) * (self._max_steps - step)
            self.line(f"step {step}/{self._max_steps}  {text}  {left:.0f} s left")

    def line(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Stop the bar."""
        if self._progress is not None:
            self._progress.stop()
