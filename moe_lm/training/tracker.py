"""An experiment tracker behind a wall: it can not stop, slow or delay training, and metrics.jsonl never needs it.

The tracker runs in a process of its own (`tracker_process.py`), fed by a thread that alone waits for it. A thread in
this process would not be wall enough. wandb, measured at 0.31: with its helper process killed, the hooks that it puts
on imports raised in the main thread, at the import of transformers in the export, and the run ended with exit code 1;
with the helper stopped, its hook at exit waited for it without end; it replaces `sys.exit` and `sys.excepthook`; and
the stop button on its page interrupts the main thread. To undo each of these is to know wandb's inside; a process can
be left.
"""

import json
import os
import secrets
import subprocess
import sys
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from moe_lm.training.config import TrackerConfig, TrackerMode, TrackerName

PROGRAM = Path(__file__).with_name("tracker_process.py")

QUEUE_LINES = 10_000
"""Lines that wait for the tracker, about 10 MB; more are dropped. wandb alone may take 90 s to start."""

CLOSE_SECONDS = 15.0
"""How long the end of a run waits for the tracker to start, to send what it has and to finish."""


class Tracker:
    """Accelerate's tracker, out of training's way."""

    def __init__(self, is_main: bool, config: TrackerConfig, directory: Path, name: str, run: dict[str, Any]):
        self._on = config.name is not TrackerName.none and is_main
        if not self._on:
            return
        self._directory = directory
        self._lines: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._dropped = 0
        self._process: subprocess.Popen | None = None
        self._thread = threading.Thread(target=self._run, args=(config, name, run), name="tracker", daemon=True)
        self._thread.start()

    def log(self, values: dict[str, Any], step: int) -> None:
        """Hand numbers over, without waiting; structured values stay in metrics.jsonl."""
        if not self._on:
            return
        if self._lines.qsize() >= QUEUE_LINES:
            self._dropped += 1
            return
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        self._lines.put({"values": numbers, "step": step})

    def close(self) -> None:
        """Let the tracker finish, or leave it."""
        if not self._on:
            return
        self._lines.put(None)
        try:
            self._thread.join(CLOSE_SECONDS)
        finally:
            if self._thread.is_alive():
                self._switch_off(f"not done {CLOSE_SECONDS:.0f} s after training; what it has is in {self._directory}")
                self._end_process()
        if self._dropped:
            print(f"tracker: {self._dropped} lines came too fast for it; metrics.jsonl has them", file=sys.stderr)

    def _run(self, config: TrackerConfig, name: str, run: dict[str, Any]) -> None:
        """The thread: everything that may raise, or wait for the tracker."""
        try:
            online = config.mode is TrackerMode.online
            options = {
                "id": _tracker_id(self._directory / "tracker.json", name),
                "resume": "allow",
                "name": name,
                "dir": str(self._directory),
                "mode": config.mode.value,
                # Its process has nothing to show; the figures of the machine are those of this process.
                "settings": {"console": "off", "x_stats_pid": os.getpid()},
            }
            start = {"project": config.project, "login": online, "options": options, "run": run}
            with self._started() as connection:
                self._feed(connection, start)
        except Exception as error:
            self._switch_off(str(error))
            self._end_process()
        if self._process is not None:
            self._process.wait()

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _started(self) -> Connection:
        """Start the tracker's process; return our end of the connection to it.

        It is away from the terminal, on which it could ask and be interrupted, and from our output, on which whoever
        reads this run's would wait for it.
        """
        ours, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-P", str(PROGRAM), str(theirs.fileno())]
            nowhere = subprocess.DEVNULL
            self._process = subprocess.Popen(
                command,
                stdin=nowhere,
                stdout=nowhere,
                stderr=nowhere,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        return ours

    def _feed(self, connection: Connection, start: dict[str, Any]) -> None:
        _send(connection, start)
        if url := _answer(connection)["url"]:
            print(f"tracker: {url}", file=sys.stderr)
        line: dict[str, Any] | None = start
        while line is not None:
            line = self._lines.get()
            _send(connection, line)
        _answer(connection)

    def _switch_off(self, why: str) -> None:
        if self._on:
            self._on = False
            print(f"tracker switched off, metrics.jsonl goes on: {why}", file=sys.stderr)


def _send(connection: Connection, message: dict[str, Any] | None) -> None:
    try:
        connection.send_bytes(json.dumps(message).encode())
    except OSError:
        _answer(connection)  # it has gone, and may have said why
        raise


def _answer(connection: Connection) -> dict[str, Any]:
    """The next thing that the tracker's process says: that it has started or finished, or what went wrong."""
    try:
        answer = json.loads(connection.recv_bytes())
    except (EOFError, OSError):
        raise RuntimeError("its process has ended") from None
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer


def _tracker_id(path: Path, name: str) -> str:
    """The tracker's id of this run: made once, kept beside the run, so that a resumed run continues its curves."""
    if path.exists():
        return json.loads(path.read_text())["id"]
    made = f"{name}-{secrets.token_hex(4)}"
    path.write_text(json.dumps({"id": made}) + "\n")
    return made
