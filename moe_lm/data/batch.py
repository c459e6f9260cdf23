"""Rows of a shard as tensors.

Row i is tokens [i·S, i·S + S + 1): the first S are the inputs, the last S the labels, so neighbouring rows share one
token and every token but the first is a label exactly once. A label that would be the `<s>` of the next document is
no target. The last row is padded, in training too: dropping it would leave its targets out of every epoch.

Letters: B rows, S sequence length.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_lm.data.shards import TokenShard

IGNORED = -100
"""Label of a position that predicts nothing; what torch's cross-entropy ignores by default."""

EMPTY_ROW = -1
"""A row id for a row of padding, which fills up a rank's share."""


@dataclass
class Batch:
    """Rows of tokens, all fields [B, S]; integers are int64."""

    input_ids: Tensor
    labels: Tensor
    """The next token, or -100 where nothing is predicted (padding, and before another document)."""
    position_ids: Tensor
    """From 0, restarting at each document if documents are masked; 0 in padding."""
    document_ids: Tensor
    """From 1 within each row, 0 in padding; attention stays among equal ids. All 1 if documents are not masked."""
    routing_mask: Tensor
    """bool: real tokens, which count in balancing and telemetry; False in padding."""
    domain_ids: Tensor
    """Which source of a mixture a token came from: 0 where there is one source."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(**{field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)})


def num_rows(shard: TokenShard, sequence_length: int) -> int:
    """Rows of a shard, the padded last one included."""
    return max(0, -(-(shard.num_tokens - 1) // sequence_length))


def count_tokens(shard: TokenShard, rows: NDArray[np.int64], sequence_length: int) -> tuple[int, int]:
    """Counts targets and routed tokens of rows, from the document index alone.

    Returns:
        Number of targets (labels that are not ignored) and of real input tokens.
    """
    first_BS = rows[rows != EMPTY_ROW] * sequence_length
    last_BS = np.minimum(first_BS + sequence_length, shard.num_tokens - 1)
    num_inputs = int((last_BS - first_BS).sum())
    starts_B = shard.starts.searchsorted(last_BS, side="right") - shard.starts.searchsorted(first_BS, side="right")
    return num_inputs - int(starts_B.sum()), num_inputs


def make_batch(shard: TokenShard, rows: NDArray[np.int64], sequence_length: int, mask_documents: bool = True) -> Batch:
    """Reads rows of a shard.

    Args:
        shard: The shard.
        rows: Row ids [B], in any order; `EMPTY_ROW` gives a row of padding.
        sequence_length: S.
        mask_documents: Whether positions and document ids restart at each document.
    """
    offset_S1 = np.arange(sequence_length + 1)
    index_BS1 = rows[:, None] * sequence_length + offset_S1
    real_BS1 = (index_BS1 < shard.num_tokens) & (rows != EMPTY_ROW)[:, None]
    if real_BS1.all():
        tokens_BS1 = shard.tokens[index_BS1].astype(np.int64)
    else:
        tokens_BS1 = np.where(real_BS1, shard.tokens[np.where(real_BS1, index_BS1, 0)].astype(np.int64), shard.pad_id)
    # An input counts when it has a next token: the shard's very last token is a label only.
    routing_BS = real_BS1[:, 1:]
    input_BS = np.where(routing_BS, tokens_BS1[:, :-1], shard.pad_id)
    next_BS = tokens_BS1[:, 1:]
    label_BS = np.where(routing_BS & (next_BS != shard.bos_id), next_BS, IGNORED)
    if mask_documents:
        starts_BS = input_BS == shard.bos_id
        starts_BS[:, 0] = True
        document_BS = np.cumsum(starts_BS, axis=1)
        position_BS = offset_S1[:-1] - np.maximum.accumulate(np.where(starts_BS, offset_S1[:-1], 0), axis=1)
    else:
        document_BS = np.ones_like(input_BS)
        position_BS = np.broadcast_to(offset_S1[:-1], input_BS.shape)
    return Batch(
        input_ids=torch.from_numpy(input_BS),
        labels=torch.from_numpy(label_BS),
        position_ids=torch.from_numpy(position_BS * routing_BS),
        document_ids=torch.from_numpy(document_BS * routing_BS),
        routing_mask=torch.from_numpy(routing_BS.copy()),
        domain_ids=torch.zeros(input_BS.shape, dtype=torch.int64),
    )
