"""The watch over the other processes of a job: real small processes, ended in every way."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moe_lm.errors import RunError
from moe_lm.parallel.peer_spoke import Spoke
from moe_lm.parallel.peers import PeerWatch
from tests.runs import wait_for

ROOT = Path(__file__).parents[3]
LIMIT = 60
"""Seconds: several times what is promised, for a busy machine, and far less than a collective's own patience."""


class Job:
    """Processes of tests.unit.parallel.peer; what each printed as an error is in a file."""

    def __init__(self, directory: Path, world_size: int, **constants: float):
        self.directory, self.world_size = directory, world_size
        self.constants = [f"{name}={value}" for name, value in ({"GRACE": 1, "BEAT": 0.1} | constants).items()]
        self.processes: dict[int, subprocess.Popen] = {}

    def start(self, *ranks: int) -> "Job":
        for rank in ranks or range(self.world_size):
            arguments = [str(rank), str(self.world_size), str(self.directory), *self.constants]
            with (self.directory / f"error-{rank}").open("w") as error:
                self.processes[rank] = subprocess.Popen(
                    [sys.executable, "-m", "tests.unit.parallel.peer", *arguments],
                    cwd=ROOT,
                    env={**os.environ, "MASTER_ADDR": "localhost"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=error,
                    text=True,
                )
        for rank in ranks or range(self.world_size):
            assert self.heard(rank) == "in", self.error(rank)
        return self

    def acquaint(self) -> "Job":
        """Wait until each knows how to ask the others without rank 0, as a job does once it trains."""
        for rank in range(1, self.world_size):
            self.tell(rank, "acquaint")
            assert self.heard(rank) == "acquainted"
        return self

    def tell(self, rank: int, command: str) -> None:
        self.processes[rank].stdin.write(command + "\n")
        self.processes[rank].stdin.flush()

    def end(self, rank: int) -> None:
        """Let one end well."""
        self.processes[rank].stdin.close()

    def heard(self, rank: int) -> str:
        return self.processes[rank].stdout.readline().strip()

    def codes(self, *ranks: int) -> list[int]:
        return [self.processes[rank].wait(timeout=LIMIT) for rank in ranks]

    def name(self, rank: int) -> str:
        return f"process {rank} (host {socket.gethostname()}, pid {self.processes[rank].pid})"

    def error(self, rank: int) -> str:
        return (self.directory / f"error-{rank}").read_text()

    def said(self) -> dict[int, list[str]]:
        """The lines that each process printed for the user, of those that printed any."""
        errors = {rank: [line for line in self.error(rank).splitlines() if line] for rank in self.processes}
        return {rank: lines for rank, lines in errors.items() if lines}

    def close(self) -> None:
        for process in self.processes.values():
            with contextlib.suppress(OSError):
                process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(OSError):
                process.stdin.close()


@pytest.fixture
def job(tmp_path):
    """Makes one job."""
    with contextlib.ExitStack() as jobs:

        def make(world_size: int = 3, **constants: float) -> Job:
            made = Job(tmp_path, world_size, **constants)
            jobs.callback(made.close)
            return made

        yield make


def test_a_main_process_that_can_not_be_reached_is_named(monkeypatch):
    """Catches a traceback, or a wait without end, where a firewall stands between the machines of a job."""
    with socket.create_server(("localhost", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    invitation = json.dumps({"who": "process 0 (host a, pid 1)", "port": port, "token": ""})
    sentence = rf"process 3 can not reach process 0 \(host a, pid 1\) at localhost:{port} \(Connection refused\); the"
    with pytest.raises(RunError, match=sentence):
        Spoke(3, 4, lambda text: invitation, pytest.fail)


def test_a_death_ends_all_within_the_limit(job):
    """Catches processes that wait in C for a peer that has gone, as NCCL does: with the times that users have, the
    others have ended, one of them has said who, and each had its last words."""
    job = job(GRACE=5, BEAT=2).start()
    for rank in (0, 1):
        job.tell(rank, "lock")
    begin = time.monotonic()
    job.processes[2].kill()
    assert job.codes(0, 1) == [1, 1]
    assert 5 <= time.monotonic() - begin < LIMIT
    assert job.said() == {0: [f"moe-lm: {job.name(2)} has died"]}
    for rank in (0, 1):
        for file in ("at-departure", "last-words"):
            assert (job.directory / f"{file}-{rank}").read_text() == f"{job.name(2)} has died"


def test_rank_0_may_die_as_well(job):
    """Catches survivors that only rank 0 would have told, and a line that all print."""
    job = job(4, GRACE=5).start().acquaint()
    for rank in range(1, 4):
        job.tell(rank, "lock")
    job.processes[0].kill()
    assert job.codes(1, 2, 3) == [1, 1, 1]
    assert job.said() == {1: [f"moe-lm: {job.name(0)} has died"]}


def test_the_one_that_should_tell_of_rank_0_may_die_as_well(job):
    """Catches a line that nobody prints, since the one that should has died too, however long its death takes."""
    job = job(4, GRACE=5).start().acquaint()
    for rank in (2, 3):
        job.tell(rank, "lock")
    job.processes[1].send_signal(signal.SIGSTOP)  # as one whose memory the system still takes back
    job.processes[0].kill()
    wait_for(lambda: all((job.directory / f"at-departure-{rank}").exists() for rank in (2, 3)))
    time.sleep(1)
    job.processes[1].kill()
    assert job.codes(2, 3) == [1, 1]
    assert job.said() == {2: [f"moe-lm: {job.name(0)} has died"]}


def test_many_that_should_tell_of_rank_0_may_hang(job):
    """Catches a line that comes too late, after the process that asks one after the other has been ended."""
    job = job(8, GRACE=5, BEAT=2).start().acquaint()
    for rank in range(1, 6):  # as a machine whose memory the system still takes back
        job.processes[rank].send_signal(signal.SIGSTOP)
    job.processes[0].kill()
    for rank in (6, 7):
        job.tell(rank, "backend 0")
    assert job.codes(6, 7) == [1, 1]
    assert job.said()[6] == [f"moe-lm: {job.name(0)} has died"]


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_a_crash_is_a_death(job, number):
    """Catches an end that only an exception would have told of."""
    job = job(2).start()
    job.tell(1, f"signal {number:d}")
    assert job.codes(0, 1) == [1, -number]
    assert job.said() == {0: [f"moe-lm: {job.name(1)} has died"]}


def test_a_worker_does_not_hide_a_death(job):
    """Catches connections that a forked worker holds open past the death of its process."""
    job = job(2).start()
    job.tell(1, "fork")
    assert job.heard(1) == "forked"
    job.processes[1].kill()
    assert job.codes(0) == [1]


@pytest.mark.parametrize("order", ["012", "210", "120"])
def test_ends_in_any_order_are_no_deaths(job, order):
    """Catches a process that takes an end for a death, since the other is through sooner."""
    job = job().start()
    for rank in map(int, order):
        job.end(rank)
        assert job.codes(rank) == [0]
        time.sleep(0.2)
    assert job.said() == {}


def test_an_end_that_all_know_of_is_no_death(job):
    """Catches a slower process, which still saves, that is ended by what it knows itself."""
    job = job().start()
    job.tell(1, "agreed disk full")
    assert job.codes(1) == [1]
    time.sleep(2)  # a failure would end the others by now
    job.tell(0, "agreed disk full")
    job.tell(2, "stopped by a signal")
    assert job.codes(0, 2) == [1, 75]
    assert job.said() == {0: ["moe-lm: disk full"], 1: ["moe-lm: disk full"]}


@pytest.mark.parametrize("rank", [0, 2])
def test_a_failure_of_one_is_told_with_its_reason(job, rank):
    """Catches others that wait for a process with a failure of its own, or do not say which it was."""
    job = job().start()
    others = [other for other in range(3) if other != rank]
    for other in others:
        job.tell(other, "lock")
    job.tell(rank, "bug too  many")
    assert job.codes(rank, *others) == [1, 1, 1]
    assert job.said()[others[0]] == [f"moe-lm: {job.name(rank)} failed: ValueError: too many"]
    assert "Traceback" in job.error(rank) and others[1] not in job.said()


def test_the_same_failure_of_all_is_told_by_each(job):
    """Catches a word on another process before one's own, where all meet the same mistake at nearly the same time."""
    job = job(GRACE=15, _SETTLE=10).start()
    for rank in (2, 1, 0):
        job.tell(rank, "input wrong=1")
        time.sleep(0.1)
    assert job.codes(0, 1, 2) == [2, 2, 2]
    assert job.said() == {rank: ["moe-lm: wrong=1"] for rank in range(3)}


def test_an_error_of_the_backend_gets_the_name(job):
    """Catches a traceback of gloo's in place of who has died; one that comes first waits for the name."""
    job = job().start()
    job.tell(0, "backend 0")
    time.sleep(0.3)
    job.processes[2].kill()
    job.tell(1, "backend 0.2")
    assert job.codes(0, 1) == [1, 1]
    assert job.said() == {0: [f"moe-lm: {job.name(2)} has died"]}


def test_an_error_without_a_departure_stays_what_it_is(job):
    """Catches a bug that is taken for somebody's death."""
    job = job(2).start()
    job.tell(1, "backend 0")
    assert job.codes(1, 0) == [1, 1]
    assert "RuntimeError: Connection closed by peer" in job.error(1)
    assert job.said()[0] == [f"moe-lm: {job.name(1)} failed: RuntimeError: Connection closed by peer [127.0.0.1]:1"]


def test_a_launchers_signal_after_a_death_is_no_stop(job):
    """Catches exit code 75, as of a run that was stopped, where a launcher ends those that are left."""
    job = job(_SIGNALLED=10).start()
    job.processes[2].kill()
    for rank in (0, 1):
        job.processes[rank].send_signal(signal.SIGINT)
    assert job.codes(0, 1) == [1, 1]
    assert job.said() == {0: [f"moe-lm: {job.name(2)} has died"]}


def test_a_signal_stops_all(job):
    """Catches a process that is interrupted, and others that wait, or end with another code than 75; also when the
    signal comes twice, from a terminal and a launcher."""
    job = job().start()
    job.tell(0, "lock")
    job.processes[1].send_signal(signal.SIGINT)
    time.sleep(0.1)
    job.processes[1].send_signal(signal.SIGINT)
    assert job.codes(0, 1, 2) == [75, 75, 75]
    assert job.said() == {0: [f"moe-lm: {job.name(1)} was interrupted"]}


def test_a_signal_to_all_is_nobodys_failure(job):
    """Catches a word on the first that obeyed, where a launcher stops all."""
    job = job(GRACE=15, _SETTLE=10).start()
    for rank in (2, 1, 0):
        job.processes[rank].send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert job.codes(0, 1, 2) == [75, 75, 75]
    assert job.said() == {}


def test_a_deadline_is_told(job):
    """Catches a process that is ended past its context, and counts as dead."""
    job = job(2).start()
    job.tell(1, "deadline no step for 9 s")
    assert job.codes(0, 1) == [75, 75]
    assert job.said() == {0: [f"moe-lm: {job.name(1)} ended: no step for 9 s"]}


def test_a_stopped_process_is_silent(job):
    """Catches a process that hangs and whose name nobody can say, rank 0 included; it is no death, and no longer silent
    when it goes on."""
    job = job().start()

    def are_silent(rank: int, *others: int) -> bool:
        job.tell(rank, "silent 1")
        said = re.sub(r" for \d+ s", "", job.heard(rank))
        return said == ("; ".join(f"{job.name(other)} has been silent" for other in others) or "nobody")

    job.processes[1].send_signal(signal.SIGSTOP)
    wait_for(lambda: are_silent(0, 1))
    wait_for(lambda: are_silent(2))
    job.processes[1].send_signal(signal.SIGCONT)
    wait_for(lambda: are_silent(0))
    job.processes[0].send_signal(signal.SIGSTOP)
    wait_for(lambda: are_silent(2, 0))
    job.processes[0].send_signal(signal.SIGCONT)
    for rank in range(3):
        wait_for(lambda rank=rank: are_silent(rank))
        job.end(rank)
    assert job.codes(0, 1, 2) == [0, 0, 0] and job.said() == {}


def test_strangers_do_no_harm(job):
    """Catches a port that anybody can end the job by, or keep busy: silence, garbage, a wrong token, a right message
    without any, deep JSON, and nothing at all, by which rank 0 neither ends nor keeps its peers waiting."""
    job = job().start(0)
    port = int(job.directory.joinpath("invitation").read_text().split('"port": ')[1].split(",")[0])
    hello = b'{"kind": "hello", "rank": 1, "ear": 1, "host": "h", "pid": 1}\n'
    garbage = [os.urandom(4096), b"\n", b"0" * 32 + b" " + hello, hello, b"[" * 100_000, b"\0" * 900, b"", b"\xff\n\n"]
    with contextlib.ExitStack() as open_sockets:
        for content in garbage * 20:
            stranger = socket.create_connection(("localhost", port), timeout=5)
            open_sockets.enter_context(stranger)
            with contextlib.suppress(OSError):
                stranger.sendall(content)
        job.start(1, 2).acquaint()
        with pytest.raises(OSError):  # all are here
            socket.create_connection(("localhost", port), timeout=5)
        job.processes[1].kill()
        assert job.codes(0, 2) == [1, 1]
    assert job.said() == {0: [f"moe-lm: {job.name(1)} has died"]}


def test_one_that_comes_late_is_waited_for_and_told(job):
    """Catches a start that others hold up, and one that has missed what was said before it came."""
    job = job(GRACE=10).start(0, 1)
    job.tell(0, "silent 0.0")
    assert "process 2 has been silent" in job.heard(0)
    job.processes[1].kill()
    time.sleep(0.5)
    job.start(2)
    job.tell(2, "lock")
    assert job.codes(0, 2) == [1, 1]
    assert job.said() == {0: [f"moe-lm: {job.name(1)} has died"]}


def test_a_single_process_opens_nothing():
    """Catches threads or ports of a run that has no peers."""
    before = os.listdir("/proc/self/fd")

    def never(text: str) -> str:
        raise AssertionError

    with PeerWatch(0, 1, never) as watch:
        assert len(os.listdir("/proc/self/fd")) == len(before)
        assert watch.silent(0) == [] and watch.departed is None and watch.wait_for_departure(60) is None
        error = RuntimeError("of this process")
        assert watch.named(error) is error
        watch.announce_end("nobody listens")


def test_nothing_is_left_open(monkeypatch):
    """Catches a socket or a thread that every run in one process would leave behind, and ends that wait for each other
    until a timeout."""
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    before, said, begin = os.listdir("/proc/self/fd"), [], time.monotonic()
    for _ in range(3):
        with PeerWatch(0, 2, lambda text: said.append(text) or text), PeerWatch(1, 2, lambda text: said[-1]):
            pass
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert not [thread for thread in threading.enumerate() if thread.name == "peers"]
    assert time.monotonic() - begin < LIMIT
