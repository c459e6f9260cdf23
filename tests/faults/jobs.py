"""Jobs of several processes, forked from the warm parent as a launcher would start them."""

import os
import signal
import socket
import time
from pathlib import Path

from tests.faults.forks import WarmParent
from tests.runs import TINY

SHARDED = [
    *TINY,
    "data=prepared",
    "data.paths=[prepared]",
    "trainer.micro_batch_size=2",
    "trainer.max_steps=30",
    "trainer.eval_interval=0",
    "checkpoint.interval=5",
    "finish.export=false",
    "optimizer=adamw",
]
"""A tiny run that 1, 2, 3 or 6 processes can share."""


class Job:
    """Processes of one run; `kill` at the end whatever happened."""

    def __init__(
        self, parent: WarmParent, world: int, options: list[str], directory: Path, name: str, case: str = "pretrain"
    ):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._parent, self.run = parent, directory / "runs" / name
        self.logs = [directory / f"{name}-{rank}.log" for rank in range(world)]
        self.codes: dict[int, int] = {}
        options = [*options, f"run_name={name}"]
        self.pids = []
        for rank, log in enumerate(self.logs):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            self.pids.append(parent.start(case, options, directory, log=log, environment=environment))

    def said(self, rank: int) -> str:
        return self.logs[rank].read_text()

    def sentences(self, rank: int) -> list[str]:
        """What a process has said in the name of the program."""
        return [line for line in self.said(rank).splitlines() if line.startswith("moe-lm")]

    def wait(self, *ranks: int) -> list[int]:
        """Exit codes of these processes, or of all."""
        for rank in ranks or range(len(self.pids)):
            if rank not in self.codes:
                self.codes[rank] = self._parent.wait(self.pids[rank])
        return [self.codes[rank] for rank in ranks or range(len(self.pids))]

    def seconds_until_gone(self, *ranks: int) -> float:
        """Waits for these processes, and how long that took."""
        begin = time.monotonic()
        self.wait(*ranks)
        return time.monotonic() - begin

    def kill(self) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                os.kill(pid, signal.SIGKILL)
        self.wait()
