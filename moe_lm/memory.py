"""Memory that this process may use: what the machine has, or less where a control group (a container, a batch system's
job) has a limit of its own, beyond which the kernel kills the process without a word.
"""

import os
from pathlib import Path
from typing import NamedTuple

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


class _Files(NamedTuple):
    """Names of a control group's files."""

    limit: str
    used: str
    reclaimable: str
    """Key in memory.stat of the bytes of the page cache that are given back when others ask for them."""


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("memory.max", "memory.current", "inactive_file")


def total_memory() -> int:
    """Bytes that this process may have at most."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for limit, _ in _groups())])


def available_memory() -> int:
    """Bytes that are free for this process; all that it may have, where the system does not say."""
    return min([_number(PROC / "meminfo", "MemAvailable:", 1024) or total_memory(), *(free for _, free in _groups())])


def _groups() -> list[tuple[int, int]]:
    """Limit and free bytes of each control group with a limit that this process is in: a limit holds for all below."""
    found = []
    for line in _text(PROC / "self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, files = CGROUPS, _V2
        elif "memory" in controllers.split(","):
            root, files = CGROUPS / "memory", _V1
        else:
            continue
        # In a container the path may be the host's: its lower parts are then not there, and the root is the group.
        below = root / path.strip("/")
        for group in (below, *(parent for parent in below.parents if parent.is_relative_to(root))):
            limit, used = _text(group / files.limit).strip(), _text(group / files.used).strip()
            if limit.isdecimal() and used.isdecimal():  # not "max", and not missing
                cached = _number(group / "memory.stat", files.reclaimable) or 0
                found.append((int(limit), max(0, int(limit) - int(used) + cached)))
    return found


def _number(path: Path, key: str, unit: int = 1) -> int | None:
    """The number behind a key, at the beginning of a line."""
    lines = (line.split() for line in _text(path).splitlines())
    return next((unit * int(words[1]) for words in lines if words[:1] == [key]), None)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
