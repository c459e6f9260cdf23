"""A warm parent: a process that has imported everything once and forks a child for each case of the fault matrix.

Starting Python with torch costs seconds, a fork costs milliseconds. The parent has used no thread of torch's when it
forks, so that its children are as good as fresh processes.

    python -m tests.faults.forks      reads one JSON request a line, answers each with one line
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

from tests.runs import ENVIRONMENT

FULL = os.environ.get("MOE_LM_FAULTS") == "full"
"""Whether the whole matrix is asked for (`make test-faults`) or the quick slice."""


class WarmParent:
    """The parent's other end; a context manager."""

    def __enter__(self) -> "WarmParent":
        command = [sys.executable, "-m", "tests.faults.forks"]
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(
            command, cwd=root, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def start(self, case: str, *arguments: object, log: Path, environment: dict[str, str] | None = None) -> int:
        """Fork a child that calls tests.faults.cases.CASE; its process id."""
        log.touch()  # so that whoever waits for a word in it can read it
        request = {"case": case, "arguments": arguments, "log": str(log), "environment": environment or {}}
        return self._ask(request, default=str)

    def wait(self, pid: int) -> int:
        """Wait for a child; its exit code, or the negative number of the signal that ended it."""
        return self._ask({"wait": pid})

    def run(self, case: str, *arguments: object, log: Path, environment: dict[str, str] | None = None) -> int:
        """Start a child and wait for it."""
        return self.wait(self.start(case, *arguments, log=log, environment=environment))

    def _ask(self, request: dict, **options: object) -> int:
        self._process.stdin.write(json.dumps(request, **options) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def _serve() -> None:
    cases = importlib.import_module("tests.faults.cases")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if not answer:
                _child(getattr(cases, request["case"]), request)
        print(answer, flush=True)


def _child(case, request: dict) -> None:
    code = 1
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
        os.environ.update(request["environment"])
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with contextlib.closing(open(os.devnull)) as nothing:
            for here, there in ((nothing.fileno(), 0), (log, 1), (log, 2)):
                os.dup2(here, there)
        code = case(*request["arguments"]) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
