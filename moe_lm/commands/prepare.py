"""`moe-lm prepare`: text to a tokenizer and token shards."""

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from moe_lm.commands.config import PrepareConfig
from moe_lm.data.config import DataConfig
from moe_lm.data.prepare import Part, prepare
from moe_lm.data.settings import DATA_ONLY_CUT
from moe_lm.errors import InputError


def run(config: PrepareConfig) -> int:
    """Make the set, or say that it is there."""
    assert config.output is not None
    _check_weights(config.data)
    directory = Path(config.output).expanduser()
    complete = (directory / "data" / "manifest.json").exists()
    part = Part(*config.slice)
    try:
        with PreparationDisplay() as display:
            done = prepare(
                config.data, config.tokenizer, directory, part=part, report=display.line, progress=display.progress
            )
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise InputError(
            f"output={config.output}: can not be written ({where}{error.strerror}); make room or give another one, and "
            "run the command again: it goes on with what is there."
        ) from error
    if complete:
        print(f"{directory} is prepared already, from the same text and with the same settings")
    elif done:
        print(f"prepared: {directory} (train on it with data=prepared data.paths=[{directory}])")
    if left_out := _options_of_training(config.data):
        print(f"note: {' and '.join(left_out)}: how rows are cut is no part of a set; give it to `pretrain` as well")
    return 0


def _check_weights(config: DataConfig) -> None:
    """Refuse shares of a mixture, which a set does not keep; of streams they are asked for with the rest.

    Raises:
        InputError: There is one.
    """
    weighed = [(name, source.weight) for name, source in config.sources.items() if source.weight is not None]
    if weighed and not config.streaming:
        name, weight = weighed[0]
        raise InputError(
            f"data.sources.{name}.weight={weight}: a prepared set keeps all of its text and no weights; leave it out, "
            "and give it to `pretrain`."
        )


def _options_of_training(config: DataConfig) -> list[str]:
    """Options that were given, as far as their values show it, and change nothing in a set."""
    kept = {"workers", "sequence_length"} if config.has_chat else {"workers"}
    defaults = DataConfig()
    return [
        f"data.{name}"
        for name in DATA_ONLY_CUT
        if name not in kept and getattr(config, name) != getattr(defaults, name)
    ]


class PreparationDisplay:
    """A bar of bytes on a terminal, a line now and then elsewhere, and lines that stay; a context manager."""

    SECONDS_BETWEEN_LINES = 30.0

    def __init__(self) -> None:
        console = Console(file=sys.stderr, highlight=False)
        self._open = ExitStack()
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal and not os.environ.get("CI"):
            columns = (TextColumn("tokenizing"), BarColumn(None), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(compact=True), console=console, transient=True)
            self._task = self._bar.add_task("", total=None, start=False)

    def __enter__(self) -> "PreparationDisplay":
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def line(self, text: str) -> None:
        """Print a line that stays."""
        if self._bar is not None and self._bar.live.is_started:
            self._bar.console.print(text, soft_wrap=True, markup=False)
        else:
            print(text, flush=True)

    def progress(self, done: int, total: int) -> None:
        """Show that so many bytes of text are tokenized, of about so many."""
        if self._bar is None:
            if time.monotonic() - self._last_line >= self.SECONDS_BETWEEN_LINES:
                self._last_line = time.monotonic()
                of_total = f" (of files with {total / 1e6:,.0f} MB)" if total else ""
                self.line(f"tokenized {done / 1e6:,.0f} MB of text{of_total}")
            return
        if not self._bar.live.is_started:
            self._open.enter_context(self._bar)
            self._bar.start_task(self._task)
        self._bar.update(self._task, completed=done, total=max(total, done) or None)
