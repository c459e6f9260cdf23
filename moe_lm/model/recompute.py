"""Activation checkpointing that keeps the routing decision.

Backward runs a layer's forward again. Its router would choose again, and where two experts nearly tie, a matrix product
that rounds differently (another thread count, another kernel) would choose otherwise: the gradient of a routing that
never happened. So the top-k result is kept in every mode, [T, K] numbers a layer.
Statistics are returned by the forward, not counted by a side effect, so that the second run does not count twice.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import moe_lm.kernels.experts_cpu
import moe_lm.kernels.grouped_linear
import moe_lm.kernels.linear  # noqa: F401 -- all three make operators
from moe_lm.model.config import Recompute

_aten = torch.ops.aten
_KEPT = {
    Recompute.selective: {
        _aten.topk.default,
        _aten.mm.default,
        _aten._grouped_mm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.moe_lm.expert_mixture.default,
        torch.ops.moe_lm.linear.default,
        torch.ops.moe_lm.linear_loop.default,
    },
    Recompute.full: {_aten.topk.default},
}
_KEPT_BY_NAME = {Recompute.selective: {"torch_attn::_varlen_attn"}, Recompute.full: set()}
"""Operators that exist only once something slow is imported."""


def recompute_in_backward(layer: Callable[..., Any], mode: Recompute) -> Callable[..., Any]:
    """Wrap a layer so that of its forward pass only its inputs survive, and what the mode keeps."""
    if mode is Recompute.none:
        return layer

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operator in _KEPT[mode] or operator.name() in _KEPT_BY_NAME[mode]
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(
        checkpoint,
        layer,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, policy),
        preserve_rng_state=False,
        determinism_check="default",
    )
