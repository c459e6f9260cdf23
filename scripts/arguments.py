"""What scripts take, and how they end: mistakes are said in a sentence, those of arguments by argparse."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from moe_lm.errors import InputError


def run_and_exit(main: Callable[[], int | None]) -> NoReturn:
    """Run a script, and exit with what it returns; text that can not be read, say, ends it in its sentence."""
    try:
        sys.exit(main())
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """A whole number of 0 or more."""
    return _at_least(0, text)


def place(text: str) -> Path:
    """A directory, or a place for one."""
    path = Path(text)
    if any(above.exists() and not above.is_dir() for above in (path, *path.parents)):
        raise argparse.ArgumentTypeError(f"{text}: is no directory, nor a place for one")
    return path


def _at_least(least: int, text: str) -> int:
    if not text.lstrip("-").isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least {least}")
    return int(text)
