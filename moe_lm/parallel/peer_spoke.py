"""The end of every rank but 0 of the connections between the processes of a job."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from moe_lm.errors import RunError
from moe_lm.parallel.peer_connections import (
    Connection,
    Departure,
    EndedError,
    Station,
    answer_asker,
    decode,
    encode,
    identity,
    listen,
    silent_since,
    was_told,
)

_CONNECT_SECONDS = 30.0

_ASK_SECONDS = 2.0
"""Within which the processes of lower ranks that are left have told the user."""

_ASK_EACH_SECONDS = 0.5
"""What is left for each, where one before it has not answered; but not for more than four of them: all of it should be
over before this process is ended (`peers.GRACE`)."""


class Spoke(Station):
    """The end of every other rank: hears of the others through rank 0."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        from_main: Callable[[str], str],
        report_departure: Callable[[Departure], None],
    ):
        super().__init__(report_departure)
        self._rank = rank
        main = json.loads(from_main(""))
        self._main, self._host, port = main["who"], os.environ.get("MASTER_ADDR", "localhost"), main["port"]
        try:
            connection = socket.create_connection((self._host, port), _CONNECT_SECONDS)
        except OSError as error:
            raise RunError(
                f"process {rank} can not reach {self._main} at {self._host}:{port} ({error.strerror or error}); the "
                "processes of a job must reach each other on any port."
            ) from error
        self._connection, self._is_open, self._main_said_bye = Connection(connection), True, False
        # Where the others knock once rank 0 has gone. They hear that the user has been told, or by the kernel that this
        # process has ended as well.
        self._ear = listen(world_size)
        self._ears: list[tuple[int, str, int]] = []
        hello = {"rank": rank, "ear": self._ear.getsockname()[1], **identity()}
        self._connection.send(main["token"].encode() + b" " + encode("hello", **hello))
        self.on_input(self._connection, self._hear)

    @property
    def done(self) -> bool:
        """Whether rank 0 has heard the farewell."""
        return self.leaving and not self._is_open

    def tells_the_user(self, departure: Departure) -> bool:
        """Whether this process is the one to tell the user: rank 0 does, or the lowest rank that is left."""
        if not departure.of_main:
            return False
        deadline = time.monotonic() + _ASK_SECONDS
        for rank, host, port in self._ears:
            left = deadline - time.monotonic()
            if rank >= self._rank or left < -4 * _ASK_EACH_SECONDS:
                break
            if was_told(host or self._host, port, max(_ASK_EACH_SECONDS, left)):
                return False
        return bool(self._ears) or self._rank == 1

    def answer_askers(self, departure: Departure, seconds: float) -> None:
        """Answer for so long the others that ask whether the user has been told."""
        until = time.monotonic() + seconds
        while departure.of_main and self._ear.fileno() >= 0 and (left := until - time.monotonic()) > 0:
            with contextlib.suppress(OSError):  # the time is over, or the socket closed meanwhile
                self._ear.settimeout(left)
                answer_asker(self._ear)

    def silent(self, after: float) -> list[str]:
        """Rank 0, if it has given no sign of life for so many seconds."""
        return silent_since({self._main: self._connection.heard} if self._is_open else {}, after)

    def beat(self) -> None:
        """Give a sign of life."""
        if self._is_open:
            self._connection.beat()

    def farewell(self, failure: Departure | None) -> None:
        """Tell rank 0 that this process ends, orderly or by a failure (its sentence without the subject)."""
        self.leaving = True
        if failure is not None:
            self._connection.send(failure.message())
        self._connection.send(encode("bye"))
        self._connection.finish()

    def close(self) -> None:
        """Close every socket."""
        super().close()
        self._ear.close()

    def _hear(self) -> None:
        try:
            for line in self._connection.lines():
                self._obey(decode(line))
        except EndedError as end:
            self._disconnect()
            if not self._main_said_bye and not self.leaving:
                self.report_departure(Departure(f"{self._main} {end}", of_main=True))

    def _obey(self, message: dict[str, Any]) -> None:
        if message["kind"] == "departed":
            self.report_departure(Departure.of(message))
        elif message["kind"] == "ears":
            self._ears = message["ears"]
        elif message["kind"] == "bye":
            self._main_said_bye = True

    def _disconnect(self) -> None:
        self._is_open = False
        self.part(self._connection)
