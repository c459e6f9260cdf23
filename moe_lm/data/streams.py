"""Steps from text that is tokenized while training: virtual streams, whatever the number of processes.

    source ──▶ blocks ──▶ shuffled, dealt ──▶ stream 0 ─▶ tokens ─▶ rows ┐
    (documents in order)   like cards         …                          ├─▶ row n of the run: stream n mod V
                                       └─▶ stream V−1 ─▶ tokens ─▶ rows ┘

A block is the next documents of a source, up to a number of characters; it is shuffled by a key of (seed, source,
epoch, block) and dealt to the V streams, so a stream's documents in a block, their order and their rows are a function
of that block. A stream's state is therefore (epoch, block, row) and the position in the source where that block begins.
The last row of a stream's share of a block is padded: no tokens are carried over.

Row n of the run belongs to stream n mod V of the source that the mixture names, and to process n mod W. Where W divides
V, a process has whole streams: it reads all text (which is cheap), and tokenizes its own streams' share.
"""

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_lm.data.documents import Document, Split
from moe_lm.data.encode import Encoded, Encoder
from moe_lm.data.loader import BatchPlan, StepBatch
from moe_lm.data.mixture import Mixture
from moe_lm.data.permutation import epoch_key, permute_array
from moe_lm.data.rows import Pieces, Rows, cut
from moe_lm.data.shards import TokenArray
from moe_lm.data.sources import Position, Source
from moe_lm.errors import InputError

STREAM_CHARACTERS = 250_000
"""Text of one block for one stream, at least: what is read, shuffled and tokenized at a time."""

STREAM_ROWS = 64
"""Rows of one block for one stream, about, at least, so that the padding of its last row is little."""


@dataclass
class _Block:
    """One stream's share of a block, on its way through the tokenizer."""

    epoch: int
    number: int
    position: Position | None
    domains: list[str]
    encoded: "Future[Encoded]"


@dataclass
class _Cursor:
    """Where a stream stands: the next row it gives."""

    epoch: int = 0
    block: int = 0
    row: int = 0
    position: Position | None = None
    """Where the block begins in the source."""


class SourceStreams:
    """The streams of one source that belong to this process."""

    def __init__(
        self,
        source: Source,
        split: Split,
        encoder: Encoder,
        plan: BatchPlan,
        num_streams: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Places the streams.

        Args:
            source: Where documents come from.
            split: Which of them are held out, and so passed over here.
            encoder: Tokenizes.
            plan: Seed, sequence length, packing, epochs, and which process this is.
            num_streams: V.
            state: What `state` gave, of this process or of all; null begins at the beginning.
        """
        self._source, self._split, self._encoder, self._plan = source, split, encoder, plan
        self.num_streams = num_streams
        self._block_characters = num_streams * max(STREAM_CHARACTERS, 4 * STREAM_ROWS * plan.sequence_length)
        self._cursors = {stream: _Cursor() for stream in range(plan.rank, num_streams, plan.world_size)}
        for stream, cursor in self._cursors.items():
            if state is not None:
                epoch, block, row = state["streams"][str(stream)]
                cursor.epoch, cursor.block, cursor.row = epoch, block, row
                cursor.position = state["positions"][f"{epoch}:{block}"]
        self._waiting: dict[int, deque[_Block]] = {stream: deque() for stream in self._cursors}
        self._rows: dict[int, tuple[TokenArray, Rows]] = {}
        self._reached: set[int] | None = set() if state is None else None
        """Of a run's first epoch, the streams that have got a document so far; not of one that goes on."""
        self._blocks = self._read_blocks()

    def state(self) -> dict[str, Any]:
        """Where the streams stand, JSON."""
        return {
            "streams": {str(stream): [c.epoch, c.block, c.row] for stream, c in self._cursors.items()},
            "positions": {f"{c.epoch}:{c.block}": c.position for c in self._cursors.values()},
        }

    def num_live(self) -> int:
        """How many of these streams have another row."""
        if self._plan.epochs is None:
            return len(self._cursors)
        return sum(self._advance(stream) for stream in self._cursors)

    def next_row(self, stream: int) -> tuple[TokenArray, Rows, int] | None:
        """A stream's next row, as its number within an array; null when the epochs are over."""
        if not self._advance(stream):
            return None
        cursor = self._cursors[stream]
        cursor.row += 1
        return *self._rows[stream], cursor.row - 1

    def _advance(self, stream: int) -> bool:
        """Moves a stream to the block of its next row; false when there is none."""
        cursor, waiting = self._cursors[stream], self._waiting[stream]
        while True:
            if stream in self._rows and cursor.row < self._rows[stream][1].num_rows:
                return True
            # One block stays ahead, so that the workers have it ready when it is wanted.
            while len(waiting) < 2 and self._deal(next(self._blocks, None)):
                pass
            if not waiting:
                return False
            block = waiting.popleft()
            if (block.epoch, block.number) != (cursor.epoch, cursor.block):
                cursor.row = 0
            cursor.epoch, cursor.block, cursor.position = block.epoch, block.number, block.position
            self._rows[stream] = self._cut(block)

    def _cut(self, block: _Block) -> tuple[TokenArray, Rows]:
        encoded = self._encoder.result(block.encoded)
        starts = np.cumsum(encoded.lengths) - encoded.lengths
        names = sorted(set(block.domains))
        number = {name: index for index, name in enumerate(names)}
        domains = np.array([number[domain] for domain in block.domains])
        array = TokenArray(encoded.tokens, starts, domains, names)
        return array, cut(array, self._plan.sequence_length, self._plan.packing)

    def _deal(self, block: "tuple[int, int, Position | None, list[Document]] | None") -> bool:
        """Gives each stream its documents of a block, unless it has passed that block; false without a block."""
        if self._reached is not None and (block is None or block[0] > 0):
            self._check_reached(len(self._reached))
            self._reached = None
        if block is None:
            return False
        epoch, number, position, documents = block
        key = epoch_key(self._plan.seed, self._source.name, epoch, number)
        order = permute_array(np.arange(len(documents)), len(documents), key).tolist()
        hands = _deal_by_length([documents[index] for index in order], self.num_streams)
        if self._reached is not None:
            self._reached |= {(hand + epoch + number) % self.num_streams for hand in range(len(hands)) if hands[hand]}
        for stream, cursor in self._cursors.items():
            # The turn changes with every block, so that blocks of few documents reach every stream in time.
            chosen = hands[(stream - epoch - number) % self.num_streams]
            if chosen and (epoch, number) >= (cursor.epoch, cursor.block):
                encoded = self._encoder.submit([document.text for document in chosen])
                domains = [document.domain for document in chosen]
                self._waiting[stream].append(_Block(epoch, number, position, domains, encoded))
        return True

    def _check_reached(self, reached: int) -> None:
        """Refuse a source that gives some streams nothing in an epoch.

        They would go ahead to later ones, and all give the same rows of the same text at once.
        """
        if reached < self.num_streams:
            raise InputError(
                f"data.num_streams={self.num_streams}: the documents of {self._source.option} reach {reached} of so "
                "many streams; give that number or fewer, or prepare the text instead (data.streaming=false)."
            )

    def _read_blocks(self) -> Iterator[tuple[int, int, Position | None, list[Document]]]:
        """Blocks of training documents, from the earliest that any stream stands in, epoch after epoch."""
        first = min(self._cursors.values(), key=lambda cursor: (cursor.epoch, cursor.block))
        epoch, number, position = first.epoch, first.block, first.position
        while self._plan.epochs is None or epoch < self._plan.epochs:
            documents: list[Document] = []
            characters = 0
            begin, any_documents = position, number > 0
            for document, behind in self._source.read(position):
                part = self._split.sides(document)[0]
                if part is None:
                    continue
                documents.append(part)
                characters += len(part.text)
                if characters >= self._block_characters:
                    yield epoch, number, begin, documents
                    documents, characters, begin, number, any_documents = [], 0, behind, number + 1, True
            if documents:
                yield epoch, number, begin, documents
            elif not any_documents:
                raise InputError(f"{self._source.option}: there is no text to train on in it; give files with text.")
            epoch, number, position = epoch + 1, 0, None


def _deal_by_length(documents: list[Document], num_hands: int) -> list[list[Document]]:
    """Gives each document to the hand with the least text so far, so that streams stay abreast of each other: what one
    has too much of waits in memory until the others have caught up.
    """
    hands: list[list[Document]] = [[] for _ in range(num_hands)]
    least = [(0, hand) for hand in range(num_hands)]
    for document in documents:
        characters, hand = least[0]
        hands[hand].append(document)
        heapq.heapreplace(least, (characters + len(document.text), hand))
    return hands


class StreamLoader:
    """Steps of streams, one after the other."""

    num_steps = None

    def __init__(
        self, streams: Sequence[SourceStreams], names: Sequence[str], mixture: Mixture, plan: BatchPlan
    ) -> None:
        """Takes the streams of every source, in the mixture's order."""
        self._streams, self._names, self._mixture, self._plan = streams, names, mixture, plan
        self._num_streams = streams[0].num_streams

    def step(self, data_step: int) -> StepBatch:
        """This process's share of the next data step."""
        live = np.array([streams.num_live() for streams in self._streams])
        numbers = self._plan.own_rows(data_step)
        sources, _ = self._mixture.locate(numbers)
        pieces: list[tuple[TokenArray, Pieces]] = []
        for place, (number, source) in enumerate(zip(numbers.tolist(), sources.tolist())):
            found = self._streams[source].next_row(number % self._num_streams)
            if found is not None:
                array, rows, row = found
                of_row = rows.pieces(np.array([row]))
                pieces.append((array, of_row._replace(row_P=of_row.row_P + place)))
        state = {name: streams.state() for name, streams in zip(self._names, self._streams)}
        return self._plan.assemble(pieces, live, state)


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of all streams from those of each process."""
    merged: dict[str, Any] = {}
    for state in states:
        for source, of_source in state.items():
            whole = merged.setdefault(source, {"streams": {}, "positions": {}})
            for part in whole:
                whole[part] |= of_source[part]
    return merged


def check_world_size(num_streams: int, world_size: int) -> None:
    """Checks that every process has the same number of streams.

    Raises:
        InputError: It has not.
    """
    if num_streams % world_size:
        raise InputError(
            f"data.num_streams={num_streams}: must be a multiple of the number of processes, {world_size}; a run that "
            "has begun keeps its number of streams, and goes on with a number of processes that divides it."
        )
