"""The tracker's own process: Accelerate's tracker, fed with JSON by `tracker.py` over one connection.

It is run as a file and imports nothing of this package, so that it starts the same from any directory.
"""

import json
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""What tells Accelerate that it is one of several processes; this one has no peers to wait for."""


def serve(connection: Connection) -> None:
    """Start the tracker, log lines until null is sent, finish; say what went well and what did not."""
    try:
        tracker = _start(**json.loads(connection.recv_bytes()))
        _say(connection, url=getattr(tracker.tracker, "url", None))
        while (line := json.loads(connection.recv_bytes())) is not None:
            tracker.log(line["values"], step=line["step"])
        tracker.finish()
        _say(connection, finished=True)
    except BaseException as error:  # whatever a tracker raises; or training has gone without a word, as after a kill
        try:
            _say(connection, error=" ".join(str(error).split()) or type(error).__name__)
        finally:
            os._exit(1)  # not through wandb's hooks at exit, which wait for its helper without end


def _start(project: str, login: bool, options: dict[str, Any], run: dict[str, Any]) -> Any:
    for name in LAUNCHER:
        os.environ.pop(name, None)
    if login:
        import wandb

        # Asked first, because wandb.init would ask on the terminal.
        if not wandb.login(prompt=False):
            raise RuntimeError("nobody is logged in; run `wandb login`, or give tracker.mode=offline")
    from accelerate import PartialState
    from accelerate.tracking import WandBTracker

    PartialState(cpu=True)
    tracker = WandBTracker(project, **options)
    tracker.start()
    tracker.store_init_configuration(run)
    return tracker


def _say(connection: Connection, **answer: Any) -> None:
    connection.send_bytes(json.dumps(answer).encode())


if __name__ == "__main__":
    # Ctrl-C is for training to answer; and the stop button of wandb's page interrupts the process that wandb runs in.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # wandb's helper must not keep the connection open
    serve(Connection(descriptor))
