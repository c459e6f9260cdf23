"""Rank 0's end of the connections between the processes of a job.

Nobody but the processes of this very job is heard: the first line of a connection must begin with the job's token, and
nothing is parsed before that. Once all have come, nobody else can connect.
"""

import dataclasses
import functools
import hmac
import json
import secrets
import selectors
import time
from collections.abc import Callable

from moe_lm.parallel.peer_connections import (
    LONGEST,
    Connection,
    Departure,
    EndedError,
    Station,
    decode,
    encode,
    identity,
    listen,
    name_of,
    silent_since,
)

_CONNECT_SECONDS = 60.0
"""Within which every process must have connected."""

_HELLO_SECONDS = 5.0
"""Within which whoever has connected must have said who they are."""

_HELLO_BYTES = 1024
_MOST_STRANGERS = 64
_MOST_EARS = 64
"""Ranks of which the others know how to ask whether they live."""


@dataclasses.dataclass
class _Peer:
    name: str
    connection: Connection
    ear: tuple[str, int]
    said_bye: bool = False
    is_open: bool = True


class Hub(Station):
    """Rank 0's end: hears of every other process, and tells the others."""

    def __init__(self, world_size: int, from_main: Callable[[str], str], report_departure: Callable[[Departure], None]):
        super().__init__(report_departure)
        self._world_size, self._token = world_size, secrets.token_hex(16)
        self._listener = listen(world_size + _MOST_STRANGERS)
        invitation = {"port": self._listener.getsockname()[1], "token": self._token, "who": name_of(0, identity())}
        self._strangers: dict[Connection, float] = {}
        self._peers: dict[int, _Peer] = {}
        self._news: list[bytes] = []
        """What whoever connects late has to know: of a departure, of the end of this process."""
        self.on_input(self._listener, self._accept)
        from_main(json.dumps(invitation))
        self._begin = time.monotonic()

    @property
    def done(self) -> bool:
        """Whether every process has heard the farewell."""
        return self.leaving and not self._missing() and not any(peer.is_open for peer in self._peers.values())

    def tells_the_user(self, departure: Departure) -> bool:
        """Whether this process is the one to tell the user."""
        return not departure.of_main

    def answer_askers(self, departure: Departure, seconds: float) -> None:
        """Nothing: nobody asks rank 0, which tells the others of a departure as soon as it knows."""

    def silent(self, after: float) -> list[str]:
        """The processes that have given no sign of life for so many seconds."""
        since = {peer.name: peer.connection.heard for peer in list(self._peers.values()) if peer.is_open}
        since |= {f"process {rank}": self._begin for rank in self._missing()}
        return silent_since(since, after)

    def beat(self) -> None:
        """Give a sign of life, and look who has given none at all."""
        for peer in self._peers.values():
            if peer.is_open:
                peer.connection.beat()
        now = time.monotonic()
        for connection in [c for c, since in self._strangers.items() if now - since > _HELLO_SECONDS]:
            self._turn_away(connection)
        if now - self._begin > _CONNECT_SECONDS:
            for rank in self._missing():
                self._spread(Departure(f"process {rank} has not connected to process 0 within {_CONNECT_SECONDS:g} s"))

    def farewell(self, failure: Departure | None) -> None:
        """Tell everybody that this process ends, orderly or by a failure (its sentence without the subject)."""
        self.leaving = True
        if failure is not None:
            sentence = f"{name_of(0, identity())} {failure.sentence}"
            self._tell_all(dataclasses.replace(failure, sentence=sentence, of_main=True).message())
        self._tell_all(encode("bye"))
        for peer in self._peers.values():
            peer.connection.finish()

    def _tell_all(self, news: bytes) -> None:
        self._news.append(news)
        for peer in self._peers.values():
            peer.connection.send(news)

    def _spread(self, departure: Departure) -> None:
        if not self._news:  # those that it brings about among the others are none
            self._tell_all(departure.message())
            self.report_departure(departure)

    def _missing(self) -> list[int]:
        return [rank for rank in range(1, self._world_size) if rank not in self._peers]

    def _accept(self) -> None:
        try:
            sock, address = self._listener.accept()
        except OSError:
            time.sleep(0.05)  # out of file descriptors: whoever knocks still stands there, and this must not spin
            return
        connection = Connection(sock, _HELLO_BYTES)
        self._strangers[connection] = time.monotonic()
        self.on_input(connection, functools.partial(self._greet, connection, address[0]))
        if len(self._strangers) > self._world_size + _MOST_STRANGERS:
            self._turn_away(next(iter(self._strangers)))

    def _turn_away(self, connection: Connection) -> None:
        del self._strangers[connection]
        self.part(connection)

    def _greet(self, connection: Connection, address: str) -> None:
        try:
            lines = connection.lines()
            if not lines:
                return
            token, _, hello = lines[0].partition(b" ")
            if not hmac.compare_digest(token, self._token.encode()):
                raise EndedError("is a stranger")
            message = decode(hello)
            rank = message["rank"]
            if rank not in self._missing():
                raise EndedError("is there already")
            # A loopback address means rank 0's own machine, which the others know by another one.
            address = address.removeprefix("::ffff:")
            address = "" if address.startswith("127.") or address == "::1" else address
            peer = _Peer(name_of(rank, message), connection, (address, message["ear"]))
        except (EndedError, KeyError):
            self._turn_away(connection)
            return
        del self._strangers[connection]
        connection.longest = LONGEST
        self._peers[rank] = peer
        self.selector.modify(connection, selectors.EVENT_READ, functools.partial(self._hear, peer))
        self._welcome(peer)
        self._obey(peer, lines[1:])

    def _welcome(self, peer: _Peer) -> None:
        for news in self._news:
            peer.connection.send(news)
        if not self._missing():
            self.part(self._listener)
            for connection in list(self._strangers):
                self._turn_away(connection)
            ears = [(rank, *self._peers[rank].ear) for rank in sorted(self._peers)[:_MOST_EARS]]
            for each in self._peers.values():
                each.connection.send(encode("ears", ears=ears))
        if self.leaving:
            peer.connection.finish()

    def _hear(self, peer: _Peer) -> None:
        try:
            self._obey(peer, peer.connection.lines())
        except EndedError as end:
            peer.is_open = False
            self.part(peer.connection)
            if not peer.said_bye:
                self._spread(Departure(f"{peer.name} {end}"))

    def _obey(self, peer: _Peer, lines: list[bytes]) -> None:
        for message in map(decode, lines):
            if message["kind"] == "bye":
                peer.said_bye = True
            elif message["kind"] == "departed":
                failure = Departure.of(message)
                self._spread(dataclasses.replace(failure, sentence=f"{peer.name} {failure.sentence}"))
