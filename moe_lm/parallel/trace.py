"""The routing of a run, read back from its metrics.jsonl: which experts were busy.

Every logged step has `expert_counts`, the rows routed to each expert of each layer, of the whole global batch over all
processes. Letters: L layers, E experts.
"""

import collections
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_lm.errors import InputError


def summed(steps: Sequence[list[list[int]]]) -> list[list[int]]:
    """Counts of several steps together, [L][E]."""
    return [[sum(counts) for counts in zip(*layers)] for layers in zip(*steps)]


def read_steps(path: Path, last: int | None = None, field: str = "trace") -> list[list[list[int]]]:
    """Expert counts [L][E] of each logged step of a run, oldest first, at least one.

    Args:
        path: Run directory, or its metrics.jsonl.
        last: Only this many steps, the latest; null, or more than there are, means all.
        field: What sentences call `path`.

    Raises:
        InputError: There is no such file, it has no expert counts, or they are of different models.
    """
    assert last is None or last >= 1, last
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        most = None if last is None else min(last, sys.maxsize)
        steps = list(collections.deque(_expert_counts(file), maxlen=most))
    except FileNotFoundError as error:
        raise InputError(f"{field}={path}: there is no {file}; give a run directory or its metrics.jsonl.") from error
    except OSError as error:
        raise InputError(f"{field}={path}: {file} can not be read ({error.strerror}); give a run directory.") from error
    except InputError as error:
        raise InputError(f"{field}={path}: {error}") from error
    if not steps:
        raise InputError(
            f"{field}={path}: {file} has no expert counts; give a run of a mixture of experts that has logged a step."
        )
    shapes = {(len(count_LE), len(count_LE[0])) for count_LE in steps}
    if len(shapes) > 1:
        said = " and of ".join(f"{layers} layers × {experts} experts" for layers, experts in sorted(shapes))
        raise InputError(f"{field}={path}: {file} has steps of {said}; give the metrics.jsonl of one model.")
    return steps


def _expert_counts(file: Path) -> Iterator[list[list[int]]]:
    """Counts [L][E] of each logged step, oldest first; a dense model's are empty, and are left out.

    Raises:
        InputError: A line is not what a run writes.
    """
    lines = file.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                return  # a kill cut it short, or the run is writing it just now
            raise InputError(
                f"line {number} of {file} is not JSON; give a run directory or its metrics.jsonl."
            ) from error
        counts = values.get("expert_counts") if isinstance(values, dict) else None
        if counts is None:
            continue
        if not _is_table(counts):
            raise InputError(
                f"line {number} of {file} has expert_counts that are no table of whole numbers, layers by experts; "
                "remove the line, or give another run."
            )
        if counts and counts[0]:
            yield counts


def _is_table(counts: Any) -> bool:
    """Whether this is [L][E] of whole numbers, none of them negative."""
    if not isinstance(counts, list) or not all(isinstance(row, list) and len(row) == len(counts[0]) for row in counts):
        return False
    return all(type(count) is int and count >= 0 for row in counts for count in row)
