"""Memory that a process may use, within the limits of its control groups."""

from pathlib import Path

import pytest

import moe_lm.memory as memory
from moe_lm.memory import available_memory, total_memory

MB = 10**6


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes files of /proc and /sys/fs/cgroup."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")

    def write(files: dict[str, str]) -> None:
        for name, text in {"proc/meminfo": "MemTotal: 999 kB\nMemAvailable:   500000 kB\n", **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return write


V2 = {
    "proc/self/cgroup": "0::/job/step\n",
    "cgroup/job/step/memory.max": "max\n",
    "cgroup/job/step/memory.current": f"{50 * MB}\n",
    "cgroup/job/memory.max": f"{200 * MB}\n",
    "cgroup/job/memory.current": f"{150 * MB}\n",
    "cgroup/job/memory.stat": f"anon {90 * MB}\ninactive_file {40 * MB}\nactive_file 7\n",
}
V1 = {
    "proc/self/cgroup": "5:devices:/x\n4:cpu,memory:/docker/of-the-host\n0::/\n",
    "cgroup/memory/memory.limit_in_bytes": f"{200 * MB}",
    "cgroup/memory/memory.usage_in_bytes": f"{150 * MB}",
    "cgroup/memory/memory.stat": f"inactive_file 3\ntotal_inactive_file {40 * MB}\n",
}


@pytest.mark.parametrize("files", [V1, V2], ids=["v1", "v2"])
def test_a_container_s_limit_counts(system, files):
    """Catches a whole model that is loaded because the host has memory, and is killed at the container's limit; a limit
    of an outer group that is overlooked; and files that were read and are taken for memory that is in use.
    """
    system(files)
    assert total_memory() == 200 * MB and available_memory() == 90 * MB


def test_what_the_machine_has_left_counts_too(system):
    """Catches a container with a generous limit on a machine that is full."""
    system({**V2, "proc/meminfo": "MemAvailable: 30000 kB\n"})
    assert total_memory() == 200 * MB and available_memory() == 30_720_000
    system({**V2, "cgroup/job/memory.current": f"{300 * MB}"})
    assert available_memory() == 0


def test_without_limits_it_is_the_machine_s(system, tmp_path: Path):
    """Catches a traceback on a system without control groups, or without /proc, and version 1's number for none."""
    assert available_memory() == total_memory() > 100 * MB
    whole = total_memory()
    system({})
    assert available_memory() == 512 * MB and total_memory() == whole
    system({**V1, "cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096)})
    assert available_memory() == 512 * MB and total_memory() == whole
