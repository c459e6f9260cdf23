"""Bits per byte: what the model would need to transmit the validation text, per byte of it.

The sum of −log2 p over every target (the end mark of each document included), over the raw UTF-8 bytes of the
documents. Unlike perplexity it can be compared across tokenizers, and with compressors. Beside it the loss, nats per
target, which can not, but is what training lowers.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from moe_lm.data.batch import Batch
from moe_lm.data.shards import TokenShard
from moe_lm.kernels.loss import linear_cross_entropy
from moe_lm.model.decoder import CausalLM
from moe_lm.parallel.runtime import Runtime


class Validation(NamedTuple):
    """What a model scores on held-out text."""

    bits_per_byte: float
    """Bits per byte of text; of chat data, per byte of the assistant's answers."""
    loss: float
    """Nats per target; of chat data, per token of the assistant."""


@torch.no_grad()
def evaluate(
    model: CausalLM,
    batches: Iterable[Batch],
    shards: Sequence[TokenShard],
    runtime: Runtime,
    interrupted: Callable[[], bool] = lambda: False,
) -> Validation | None:
    """Scores a model on shards, from this process's share of their rows.

    With a part of the rows bits per byte are an estimate: their bits per target, times the targets per byte of all. NaN
    where none of the rows has a target.

    Args:
        model: The model.
        batches: This process's share.
        shards: What the batches are rows of.
        runtime: This process among its peers.
        interrupted: Asked before each batch; once it says yes on any process the result is null on all.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)  # nats, targets
    for batch in batches:
        # Together, since the forward pass of a sharded model needs every process.
        if runtime.any([interrupted()])[0]:
            return None
        batch = batch.to(runtime.device)
        output = model(batch.input_ids, batch.position_ids, batch.document_ids, batch.routing_mask)
        hidden_TD, head_VD = model.lm_head.factors(output.hidden_BSD.flatten(0, 1))
        sums[0] += linear_cross_entropy(hidden_TD, head_VD, batch.labels.flatten())
        sums[1] += (batch.labels >= 0).sum()
    runtime.sum([sums])
    nats, targets = sums.tolist()
    num_targets = sum(shard.num_targets for shard in shards)
    num_bytes = sum(shard.header.num_bytes for shard in shards)
    loss = nats / targets if targets else math.nan  # some rows of chat data may be a user's words alone
    return Validation(loss / math.log(2) * num_targets / num_bytes, loss)
