"""Short messages between the processes of a job: JSON, one a line, over sockets that never block."""

import contextlib
import functools
import json
import os
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

LONGEST = 32 * 1024
"""Bytes of the longest message."""

_TOLD = b"!"


@dataclass(frozen=True)
class Departure:
    """Why a job can not go on: one of its processes has gone."""

    sentence: str
    code: int = 1
    """Exit code of the processes that end because of it."""
    died: bool = True
    """Whether it said nothing itself."""
    of_main: bool = False
    """Whether it is rank 0 that has gone."""

    @classmethod
    def of(cls, message: dict[str, Any]) -> "Departure":
        """The departure that a message tells of."""
        try:
            return cls(**message["departure"])
        except (KeyError, TypeError) as error:
            raise EndedError("has sent nonsense") from error

    def message(self) -> bytes:
        """The message that tells of it."""
        return encode("departed", departure=asdict(self))


class EndedError(Exception):
    """A connection that has ended; the text says how, of the process at its other end."""


class Connection:
    """Lines over a socket. A process that does not read holds nobody up."""

    def __init__(self, sock: socket.socket, longest: int = LONGEST):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self.longest = sock, longest
        self.heard = time.monotonic()
        self._received, self._unsent = b"", b""

    def fileno(self) -> int:
        """For selectors."""
        return self._socket.fileno()

    def lines(self) -> list[bytes]:
        """What has come since.

        Raises:
            EndedError: Nothing more will come, or nothing that can be meant.
        """
        try:
            content = self._socket.recv(LONGEST)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            content = b""
        except OSError as error:
            raise EndedError(f"can not be reached any more ({error.strerror})") from error
        if not content:
            raise EndedError("has died")
        *lines, self._received = (self._received + content).split(b"\n")
        if len(self._received) > self.longest:
            raise EndedError("has sent nonsense")
        self.heard = time.monotonic()
        return lines

    def send(self, line: bytes) -> None:
        """Send as much as goes off at once; whether the connection has ended is for `lines` to find."""
        self._unsent += line + b"\n"
        self._flush()

    def beat(self) -> None:
        """Give a sign of life, unless the other end has not read the last ones."""
        self._flush()
        if not self._unsent:
            self.send(encode("beat"))

    def finish(self) -> None:
        """Send nothing more: the other end reads everything up to here, and then the end."""
        self._flush()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()

    def _flush(self) -> None:
        with contextlib.suppress(OSError):
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]


class Station:
    """What hub and spoke have in common; everything but `wake` and `silent` belongs to one thread."""

    def __init__(self, report_departure: Callable[[Departure], None]):
        self.report_departure = report_departure
        self.leaving = False
        """Whether it has said farewell."""
        self.selector = selectors.DefaultSelector()
        self._waker, woken = socket.socketpair()
        self._waker.setblocking(False)
        self.on_input(woken, functools.partial(woken.recv, 64))

    def step(self, seconds: float) -> None:
        """Wait at most so long for something to come, and take it in."""
        for key, _ in self.selector.select(max(0.0, seconds)):
            if self.selector.get_map().get(key.fd) is key:  # one that came before it may have closed it
                key.data()

    def wake(self) -> None:
        """End the wait of `step`, from another thread."""
        with contextlib.suppress(OSError):
            self._waker.send(b".")

    def close(self) -> None:
        """Close every socket; also in a forked child, whose copies would outlive this process and hide its death."""
        for key in list((self.selector.get_map() or {}).values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self.selector.close()
        self._waker.close()

    def on_input(self, source: socket.socket | Connection, act: Callable[[], object]) -> None:
        """Call `act` whenever something has come from there."""
        self.selector.register(source, selectors.EVENT_READ, act)

    def part(self, source: socket.socket | Connection) -> None:
        """Listen there no more, and close it."""
        self.selector.unregister(source)
        source.close()


def encode(kind: str, **content: Any) -> bytes:
    """A message as a line."""
    return json.dumps({"kind": kind, **content}).encode()


def decode(line: bytes) -> dict[str, Any]:
    """A line as the message that it is; raises EndedError where it is none."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EndedError("has sent nonsense") from error
    if not isinstance(message, dict) or "kind" not in message:
        raise EndedError("has sent nonsense")
    return message


def identity() -> dict[str, Any]:
    """Who this process is, for messages."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


def name_of(rank: int, said: dict[str, Any]) -> str:
    """A process, to the user, by what it said of itself."""
    return f"process {rank} (host {said.get('host')}, pid {said.get('pid')})"


def listen(backlog: int) -> socket.socket:
    """A socket on a free port of all interfaces; so many may knock at once before the system makes them wait."""
    try:
        listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    except (OSError, ValueError):  # no IPv6 here
        listener = socket.create_server(("", 0), backlog=backlog)
    listener.setblocking(False)
    return listener


def answer_asker(listener: socket.socket) -> None:
    """Say that the user has been told to whoever asks by `was_told`."""
    asker, _ = listener.accept()
    with asker, contextlib.suppress(OSError):
        asker.send(_TOLD)


def was_told(host: str, port: int, seconds: float) -> bool:
    """Whether the process that listens there says within so long that the user has been told; not if it ends before."""
    try:
        with socket.create_connection((host, port), min(1.0, seconds)) as connection:
            connection.settimeout(seconds)
            return connection.recv(1) == _TOLD
    except OSError:
        return False


def silent_since(since: dict[str, float], after: float) -> list[str]:
    """A sentence on each that was heard too long ago."""
    now = time.monotonic()
    return [f"{name} has been silent for {now - then:.0f} s" for name, then in since.items() if now - then > after]
