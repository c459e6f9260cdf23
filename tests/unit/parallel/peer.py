"""A small process of a job for tests of the watch over peers; it does what it reads, one command a line.

python -m tests.unit.parallel.peer RANK WORLD_SIZE DIRECTORY CONSTANT=SECONDS …
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from moe_lm.errors import InputError, RunError, Stopped
from moe_lm.interrupts import STOPPED
from moe_lm.parallel import peers


def main() -> int:
    rank, world_size, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    for constant in sys.argv[4:]:
        name, _, seconds = constant.partition("=")
        assert hasattr(peers, name)
        setattr(peers, name, float(seconds))

    def from_main(text: str) -> str:
        file = directory / "invitation"
        if text:
            (directory / "partial").write_text(text)
            (directory / "partial").rename(file)
        while not file.exists():
            time.sleep(0.01)
        return file.read_text()

    agreed = threading.Event()
    watch = peers.PeerWatch(
        rank,
        world_size,
        from_main,
        agreed=agreed.is_set,
        at_departure=(directory / f"at-departure-{rank}").write_text,
        last_words=(directory / f"last-words-{rank}").write_text,
    )
    try:
        with watch:
            print("in", flush=True)
            for line in sys.stdin:
                obey(watch, agreed, *line.split())
    except peers.DepartedPeerError as error:
        return error.code
    except (InputError, RunError) as error:
        print("moe-lm:", error, file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except (KeyboardInterrupt, Stopped):
        return STOPPED
    return 0


def obey(watch: peers.PeerWatch, agreed: threading.Event, command: str, *words: str) -> None:
    if command == "silent":
        print("; ".join(watch.silent(float(words[0]))) or "nobody", flush=True)
    elif command == "acquaint":  # rank 0 tells the others of each other once the last has come, which takes a moment
        for _ in range(6000):
            if watch._station._ears:
                break
            time.sleep(0.01)
        else:
            raise AssertionError("rank 0 has not told of the others")
        print("acquainted", flush=True)
    elif command == "lock":  # as a collective that waits for ever: in C, without the interpreter
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    elif command == "fork":  # a worker that lives on
        if os.fork() == 0:
            time.sleep(5)
            os._exit(0)
        print("forked", flush=True)
    elif command == "backend":  # as gloo, once a peer has gone
        time.sleep(float(words[0]))
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1")
    elif command == "agreed":
        agreed.set()
        raise RunError(" ".join(words))
    elif command == "deadline":
        watch.announce_end(" ".join(words), STOPPED)
        os._exit(STOPPED)
    elif command == "signal":
        os.kill(os.getpid(), int(words[0]))
        time.sleep(5)
    else:
        raise {"run": RunError, "input": InputError, "stopped": Stopped, "bug": ValueError}[command](" ".join(words))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
