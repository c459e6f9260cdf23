"""Bits per byte: what the model would need to transmit the validation text, per byte of it.

The sum of −log2 p over every target (the end mark of each document included), over the raw UTF-8 bytes of the
documents. Unlike perplexity it can be compared across tokenizers, and with compressors.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from moe_lm.data.batch import Batch
from moe_lm.data.shards import TokenShard
from moe_lm.kernels.loss import linear_cross_entropy
from moe_lm.model.decoder import CausalLM
from moe_lm.parallel.runtime import Runtime


@torch.no_grad()
def bits_per_byte(
    model: CausalLM,
    batches: Iterable[Batch],
    shards: Sequence[TokenShard],
    runtime: Runtime,
    interrupted: Callable[[], bool] = lambda: False,
) -> float | None:
    """Bits per byte of shards, from this process's share of their rows.

    With a part of the rows it is an estimate: their bits per target, times the targets per byte of all of them.

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
        sums[0] += linear_cross_entropy(output.hidden_BSD.flatten(0, 1), model.lm_head.weight, batch.labels.flatten())
        sums[1] += (batch.labels >= 0).sum()
    runtime.sum([sums])
    nats, targets = sums.tolist()
    num_targets = sum(shard.num_targets for shard in shards)
    num_bytes = sum(shard.header.num_bytes for shard in shards)
    return nats / math.log(2) / targets * num_targets / num_bytes
