"""Activation checkpointing that keeps the routing decision.

Backward runs the layer's forward again. Its router would choose again, and where two experts nearly tie, a matrix
product that rounds differently (another thread count, another kernel) would choose otherwise: the gradient of a routing
that never happened. So the top-k result is kept, [T, K] numbers a layer, and everything else is computed again.
Statistics are returned by the forward, not counted by a side effect, so that the second run does not count twice.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def _keep_top_k(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator is torch.ops.aten.topk.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def recompute_in_backward(layer: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a layer so that only its inputs and its router's top-k survive its forward pass."""
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_top_k)
    return functools.partial(
        checkpoint,
        layer,
        use_reentrant=False,
        context_fn=contexts,
        preserve_rng_state=False,
        determinism_check="default",
    )
