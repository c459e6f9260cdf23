"""fp32 master weights, computed with in bf16: a low-precision twin of the model, refreshed once per optimizer step.

Autocast casts each weight again at every use, and does not reach grouped matrix products at all. A twin is cast once a
step, by one multi-tensor copy, and its gradients are added to the master's in fp32 as soon as backward has produced
them; of a step's only micro-batch they stay as they are, where the update takes them so. Sharded models have no twin:
FSDP2 casts what it gathers, and rounds in the same places.
"""

import copy

import torch
from torch import Tensor

from moe_lm.kernels.hardware import has_fast_bf16
from moe_lm.kernels.updates import takes_low_gradients
from moe_lm.model.router import Router
from moe_lm.parallel.parallelize import ParallelModel
from moe_lm.training.config import Precision


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Resolve `auto`: bf16 where the hardware multiplies it natively, else fp32."""
    if precision is Precision.fp32:
        return torch.float32
    if precision is Precision.bf16 or has_fast_bf16(device):
        return torch.bfloat16
    return torch.float32


class ComputeModel:
    """The model that forward and backward run on, and its link to the fp32 master weights."""

    def __init__(self, parallel: ParallelModel, dtype: torch.dtype):
        self.dtype = dtype
        self.parallel = parallel
        self.module = master = parallel.module
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._frozen: list[tuple[Tensor, Tensor]] = []
        if parallel.layout.sharded or all(parameter.dtype is dtype for parameter in master.parameters()):
            return
        # The gate stays the master's own parameter: rounding its weights would change which experts are chosen. So
        # does what is frozen and has the type already.
        shared = {id(p): p for m in master.modules() if isinstance(m, Router) for p in m.parameters()}
        shared |= {id(p): p for p in master.parameters() if not p.requires_grad and p.dtype is dtype}
        self.module = copy.deepcopy(master, memo=dict(shared))
        # Sums over processes are taken in fp32.
        stay = parallel.layout.world_size == 1
        for mine, theirs in zip(master.parameters(), self.module.parameters(), strict=True):
            if theirs is mine:
                continue
            theirs.data = theirs.data.to(dtype)
            if mine.requires_grad:
                if stay and takes_low_gradients(mine.device):
                    mine.grad_dtype = None  # any
                theirs.register_post_accumulate_grad_hook(lambda low, high=mine: _accumulate(high, low))
                self._pairs.append((mine, theirs))
            else:
                self._frozen.append((mine, theirs))

    @torch.no_grad()
    def refresh(self, also_frozen: bool = False) -> None:
        """Copy the master weights into the twin; call once after every update.

        Args:
            also_frozen: Also those that no update changes; call so where the master was loaded.
        """
        if pairs := [*self._pairs, *(self._frozen if also_frozen else ())]:
            masters, twins = zip(*pairs)
            torch._foreach_copy_(twins, masters)


def _accumulate(master: Tensor, twin: Tensor) -> None:
    """Move a gradient that backward just finished from the twin to the master; a sum of several is in fp32."""
    gradient, twin.grad = twin.grad, None
    assert gradient is not None
    if master.grad is None:
        master.grad = gradient if master.grad_dtype is None else gradient.to(master.dtype)
    else:
        master.grad = master.grad.to(master.dtype).add_(gradient)
