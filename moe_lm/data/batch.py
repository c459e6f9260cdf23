"""Rows of token arrays as tensors.

Letters: B rows, P pieces of them (`rows.py`), N segments (runs of one document within a row), S sequence length.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_lm.data.rows import Pieces, ranges
from moe_lm.data.shards import TokenArray
from moe_lm.transfer import copied_to

IGNORED = -100
"""Label of a position that predicts nothing; what torch's cross-entropy ignores by default."""


@dataclass
class Batch:
    """Rows of tokens; fields are [B, S], or null; integers are int64."""

    input_ids: Tensor
    labels: Tensor
    """The next token, or -100 where nothing is predicted (padding, before another document, and what is not the
    assistant's in a conversation)."""
    position_ids: Tensor
    """From 0, restarting at each document if documents are masked; 0 in padding."""
    document_ids: Tensor | None
    """From 1 within each row, 0 in padding; attention stays among equal ids. Null if documents are not masked: a row is
    then one document, and padding behind it is seen by nothing that counts."""
    routing_mask: Tensor
    """bool: tokens that count in balancing and telemetry: all real ones, or (by `route_prompts`) of conversations only
    those before the assistant's; False in padding."""
    domain_ids: Tensor
    """Number of each token's domain; 0 in padding."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device, but for `document_ids`, whose ends attention has to know on the host, and
        `domain_ids`, which are counted there.
        """
        device = torch.device(device)
        return self._map(lambda tensor: copied_to(tensor, device), but=("document_ids", "domain_ids"))

    def split(self, size: int) -> list["Batch"]:
        """The same rows as batches of `size` rows; the last may be smaller."""
        starts = range(0, len(self.input_ids), size)
        return [self._map(operator.itemgetter(slice(start, start + size))) for start in starts]

    def _map(self, change: Callable[[Tensor], Tensor], but: Sequence[str] = ()) -> "Batch":
        """Every field changed, but those that are null or named."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in but}
        return replace(self, **{name: change(value) for name, value in values.items() if value is not None})


@dataclass
class _Segments:
    """Runs of one document within a row, in no particular order."""

    start_N: NDArray[np.int64]
    """Flat position in [B·S]."""
    domain_N: NDArray[np.int64]


def make_batch(
    pieces: Sequence[tuple[TokenArray, Pieces]],
    num_rows: int,
    sequence_length: int,
    *,
    mask_documents: bool = True,
    pad_id: int = 0,
    domain_ids: dict[str, int] | None = None,
    route_prompts: bool = True,
) -> Batch:
    """Puts pieces together to rows; what they leave free is padding.

    Args:
        pieces: Of each array, the pieces that are wanted and where they go.
        num_rows: B.
        sequence_length: S.
        mask_documents: Whether positions and document ids restart at each document.
        pad_id: Id of padding.
        domain_ids: Number of each domain; null gives 0 to all.
        route_prompts: Whether tokens of conversations that predict nothing of the assistant's count in routing.

    Raises:
        InputError: A shard's file is not what was written.
    """
    assert num_rows > 0
    size = num_rows * sequence_length
    input_T, label_T = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    used_B = np.zeros(num_rows, dtype=np.int64)
    unrouted_T = np.zeros(size, dtype=np.bool_)
    segments = [_Segments(np.arange(num_rows) * sequence_length, np.zeros(num_rows, dtype=np.int64))]
    for array, (row_P, column_P, first_P, length_P) in pieces:
        array.check(first_P, first_P + length_P)
        place_P = row_P * sequence_length + column_P
        tokens = array.tokens
        for place, first, length in zip(place_P.tolist(), first_P.tolist(), length_P.tolist()):
            input_T[place : place + length] = tokens[first : first + length]
            label_T[place : place + length] = tokens[first + 1 : first + length + 1]
        np.maximum.at(used_B, row_P, column_P + length_P)
        segments.append(_find_segments(array, place_P, first_P, length_P, label_T, domain_ids))
        if array.spans is not None:
            others_T = _find_others(array.spans, place_P, first_P, length_P, size)
            label_T[others_T] = IGNORED
            unrouted_T |= others_T
    _pad(input_T, label_T, used_B, sequence_length, pad_id)
    real_BS = np.arange(sequence_length) < used_B[:, None]
    document_BS, position_BS, domain_BS = _number_segments(segments, num_rows, sequence_length, mask_documents)
    if used_B.min(initial=sequence_length) < sequence_length:
        for numbers_BS in (document_BS, position_BS, domain_BS):
            if numbers_BS is not None:
                numbers_BS *= real_BS
    shape = (num_rows, sequence_length)
    routing_BS = real_BS if route_prompts else real_BS & ~unrouted_T.reshape(shape)
    return Batch(
        input_ids=torch.from_numpy(input_T.reshape(shape)),
        labels=torch.from_numpy(label_T.reshape(shape)),
        position_ids=torch.from_numpy(position_BS),
        document_ids=None if document_BS is None else torch.from_numpy(document_BS),
        routing_mask=torch.from_numpy(routing_BS),
        domain_ids=torch.from_numpy(domain_BS),
    )


def _find_segments(
    array: TokenArray,
    place_P: NDArray[np.int64],
    first_P: NDArray[np.int64],
    length_P: NDArray[np.int64],
    label_T: NDArray[np.int64],
    domain_ids: dict[str, int] | None,
) -> _Segments:
    """Where documents begin in pieces; labels that would be a document's first token are taken out of `label_T`."""
    starts = array.starts
    # Documents [before, behind) begin in tokens (first, first + length].
    before_P = starts.searchsorted(first_P, side="right")
    behind_P = starts.searchsorted(first_P + length_P, side="right")
    count_P = behind_P - before_P
    document_N = ranges(before_P, count_P)
    place_N = starts[document_N] + np.repeat(place_P - first_P, count_P)
    label_T[place_N - 1] = IGNORED
    # One that begins at the last label is no input of this piece.
    inside_N = place_N < np.repeat(place_P + length_P, count_P)
    start_N = np.concatenate([place_P, place_N[inside_N]])
    if domain_ids is None:
        return _Segments(start_N, np.zeros_like(start_N))
    number = np.array([domain_ids[name] for name in array.domain_names])
    document_N = np.concatenate([before_P - 1, document_N[inside_N]])
    return _Segments(start_N, number[array.domains[document_N]])


def _find_others(
    span_N2: NDArray[np.int64],
    place_P: NDArray[np.int64],
    first_P: NDArray[np.int64],
    length_P: NDArray[np.int64],
    size: int,
) -> NDArray[np.bool_]:
    """Which places [size] of pieces have a label that is in no span."""
    # A label is the token behind its place: those of a piece are tokens (first, first + length].
    begin_N, end_N = span_N2[:, 0], span_N2[:, 1]
    before_P = end_N.searchsorted(first_P + 1, side="right")
    behind_P = begin_N.searchsorted(first_P + length_P, side="right")
    count_P = np.maximum(behind_P - before_P, 0)
    index_N = ranges(before_P, count_P)
    shift_N = np.repeat(place_P - first_P - 1, count_P)
    low_N, high_N = np.repeat(place_P, count_P), np.repeat(place_P + length_P, count_P)
    inside = _cover(
        (begin_N[index_N] + shift_N).clip(low_N, high_N), (end_N[index_N] + shift_N).clip(low_N, high_N), size
    )
    return _cover(place_P, place_P + length_P, size) & ~inside


def _cover(begin_N: NDArray[np.int64], end_N: NDArray[np.int64], size: int) -> NDArray[np.bool_]:
    """Which places [size] are in any of [begin, end)."""
    step = np.bincount(begin_N, minlength=size + 1) - np.bincount(end_N, minlength=size + 1)
    return np.cumsum(step[:size]) > 0


def _pad(
    input_T: NDArray[np.int64], label_T: NDArray[np.int64], used_B: NDArray[np.int64], length: int, pad_id: int
) -> None:
    for row in np.flatnonzero(used_B < length).tolist():
        free = slice(row * length + int(used_B[row]), (row + 1) * length)
        input_T[free], label_T[free] = pad_id, IGNORED


def _number_segments(
    segments: list[_Segments], num_rows: int, length: int, mask_documents: bool
) -> tuple[NDArray[np.int64] | None, NDArray[np.int64], NDArray[np.int64]]:
    """Document ids (null without masks), positions and domains [B, S], padding not yet taken out."""
    mark_T = np.zeros(num_rows * length, dtype=np.bool_)
    start_N = np.concatenate([part.start_N for part in segments])
    mark_T[start_N] = True
    # Segments by their place: each row has one at its first column, by its first piece or (without one) of padding.
    index_T = np.cumsum(mark_T, dtype=np.int64)
    domain_N = np.empty(int(index_T[-1]), dtype=np.int64)
    domain_N[index_T[start_N] - 1] = np.concatenate([part.domain_N for part in segments])
    start_of_N = np.flatnonzero(mark_T)
    index_BS = index_T.reshape(num_rows, length)
    count_N = np.diff(np.append(start_of_N, num_rows * length))
    domain_BS = np.repeat(domain_N, count_N).reshape(num_rows, length)
    if not mask_documents:
        column_S = np.arange(length, dtype=np.int64)
        return None, np.broadcast_to(column_S, index_BS.shape).copy(), domain_BS
    position_T = np.arange(num_rows * length) - np.repeat(start_of_N, count_N)
    return index_BS - (index_BS[:, :1] - 1), position_T.reshape(num_rows, length), domain_BS
