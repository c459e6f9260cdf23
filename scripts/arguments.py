"""Types of the scripts' arguments, whose mistakes argparse says in a sentence."""

import argparse
from pathlib import Path


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
