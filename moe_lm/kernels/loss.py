"""Cross-entropy straight from hidden states: the [T, V] logits never exist.

Letters: T tokens, D hidden, V vocabulary. The "chunked" backend takes some rows at a time and, since the gradient of a
sum of losses needs nothing from later layers, computes it right there in the forward (Liger's and Cut cross-entropy's
idea); the backward only scales. Measured at T 4096, V 4096, D 256 in bf16, two AMX cores, before the softmax was
native: 36–47 ms against 51 for the whole logits, and 1/8 of their memory; larger chunks gain little. On AMX tiles
(`amx_loss.inc`) a block's logits stay in a core's cache until they are exponentials, and go to memory once, for the
gradient of the head. torch's own `F.linear_cross_entropy` is missing in 2.11.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_lm.kernels import native
from moe_lm.kernels.gemm import gemm
from moe_lm.kernels.triton import launch

IGNORED_LABEL = -100
_LOGITS_AT_ONCE = {2: 2**24, 4: 2**22, 8: 2**22}
"""By bytes of a logit. In bf16 (32 MB) a step of 4,096 tokens, V 8192, is slower by 2 to 9 % with a quarter of it: the
head is packed anew for every chunk. In fp32 that costs little, and more would be the peak of a step's memory."""
_LOGITS_AT_ONCE_ON_GPU = 2**27
"""256 MB in bf16: few chunks, for each adds to the fp32 gradient of the whole head. Not measured."""


def linear_cross_entropy(
    hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor, chunk_rows: int | None = None, backend: str | None = None
) -> Tensor:
    """Sum over targets of the negative log-likelihood, in nats, of logits = hidden · headᵀ.

    Args:
        hidden_TD: last hidden states.
        head_VD: output embedding in hidden's dtype; may be the (tied) input embedding.
        labels_T: int64 targets; -100 is ignored. Any other that is outside the vocabulary makes the loss NaN in the
            native and Triton kernels, which can not raise, and an error of torch's in the plain version.
        chunk_rows: rows whose logits exist at one time; None for as many as have 16 M logits, 4 M in fp32, 128 M on a
            GPU, in whole tiles.
        backend: "reference", "chunked", or None to choose.

    Returns:
        An fp32 scalar (fp64 for fp64 input).

    Raises:
        ValueError: on an unknown backend.
    """
    assert hidden_TD.dtype == head_VD.dtype, (hidden_TD.dtype, head_VD.dtype)
    assert labels_T.dtype == torch.int64 and len(labels_T) == len(hidden_TD), (labels_T.dtype, labels_T.shape)
    if backend == "reference":
        logits_TV = hidden_TD @ head_VD.t()
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        return F.cross_entropy(logits_TV.to(wide), labels_T, ignore_index=IGNORED_LABEL, reduction="sum")
    if backend in (None, "chunked"):
        at_once = _LOGITS_AT_ONCE_ON_GPU if head_VD.is_cuda else _LOGITS_AT_ONCE[head_VD.element_size()]
        # Whole tiles: with a vocabulary of 32,000 the bound alone makes chunks of 524 rows, which those kernels refuse.
        chunk_rows = chunk_rows or max(native.TILE, at_once // head_VD.shape[0] // native.TILE * native.TILE)
        if torch.is_grad_enabled() and (hidden_TD.requires_grad or head_VD.requires_grad):
            total: Tensor = _ChunkedCrossEntropy.apply(hidden_TD, head_VD, labels_T, chunk_rows)
            return total
        return _loss_and_gradients(hidden_TD, head_VD, labels_T, chunk_rows, False, False)[0]
    raise ValueError(f"backend={backend!r}: choose reference or chunked")


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, head_VD, labels_T, chunk_rows):  # type: ignore[no-untyped-def]
        total, grad_hidden, grad_head = _loss_and_gradients(
            hidden_TD, head_VD, labels_T, chunk_rows, ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        )
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):  # type: ignore[no-untyped-def]
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            None if grad_hidden is None else (grad_hidden * grad_total).to(grad_hidden.dtype),
            None if grad_head is None else (grad_head * grad_total).to(ctx.head_dtype),
            None,
            None,
        )


def _loss_and_gradients(
    hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor, chunk_rows: int, needs_hidden: bool, needs_head: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=hidden_TD.device)
    grad_hidden = torch.empty_like(hidden_TD) if needs_hidden else None
    grad_head = torch.zeros_like(head_VD, dtype=wide) if needs_head else None
    for start in range(0, len(hidden_TD), chunk_rows):
        rows = slice(start, start + chunk_rows)
        grad_rows = None if grad_hidden is None else grad_hidden[rows]
        total += _loss_of_chunk(hidden_TD[rows], head_VD, labels_T[rows], grad_rows, grad_head)
    return total, grad_hidden, grad_head


def _loss_of_chunk(
    hidden_rD: Tensor, head_VD: Tensor, labels_r: Tensor, grad_hidden_rD: Tensor | None, grad_head_VD: Tensor | None
) -> Tensor:
    """Sum of the losses; writes one gradient and adds to the other, where they are wanted."""
    if native.takes_tiles((*hidden_rD.shape, len(head_VD)), hidden_rD, head_VD):
        return _loss_on_tiles(hidden_rD, head_VD, labels_r, grad_hidden_rD, grad_head_VD)
    logits_rV = gemm(hidden_rD, head_VD.t())
    if not (native.supports(logits_rV) or launch.supports(logits_rV)):
        return _loss_by_torch(logits_rV, hidden_rD, head_VD, labels_r, grad_hidden_rD, grad_head_VD)
    loss = _loss_in_place(logits_rV, labels_r, grad_hidden_rD is not None or grad_head_VD is not None)
    if grad_hidden_rD is not None:
        gemm(logits_rV, head_VD, out=grad_hidden_rD)
    if grad_head_VD is not None:
        _add_product(grad_head_VD, logits_rV, hidden_rD)
    return loss


def _loss_on_tiles(
    hidden_rD: Tensor, head_VD: Tensor, labels_r: Tensor, grad_hidden_rD: Tensor | None, grad_head_VD: Tensor | None
) -> Tensor:
    (r, D), V = hidden_rD.shape, len(head_VD)
    labels_r, losses_r = labels_r.contiguous(), hidden_rD.new_empty(r, dtype=torch.float32)
    room = (2 * V + native.TILE) * D, (r + native.TILE) * V, (r + native.TILE) * D
    packed, columns, packed_hidden = (hidden_rD.new_empty(size) for size in room)
    pointers = hidden_rD, head_VD, labels_r, packed, columns, packed_hidden, losses_r, grad_hidden_rD, grad_head_VD
    native.run("amx_cross_entropy", None, r * V, *pointers, r, D, V)
    return losses_r.sum()


def _loss_in_place(logits_rV: Tensor, labels_r: Tensor, gradients: bool) -> Tensor:
    """Sum of the losses; if wanted, the logits become their gradient, zero where the label is ignored."""
    if launch.supports(logits_rV):
        from moe_lm.kernels.triton.cross_entropy import cross_entropy

        return cross_entropy(logits_rV, labels_r, gradients, IGNORED_LABEL)
    labels_r, losses_r = labels_r.contiguous(), logits_rV.new_empty(len(logits_rV), dtype=torch.float32)
    pointers = logits_rV, labels_r, losses_r
    native.run("cross_entropy", logits_rV.dtype, logits_rV.numel(), *pointers, *logits_rV.shape, gradients)
    return losses_r.sum()


def _loss_by_torch(
    logits_rV: Tensor,
    hidden_rD: Tensor,
    head_VD: Tensor,
    labels_r: Tensor,
    grad_hidden_rD: Tensor | None,
    grad_head_VD: Tensor | None,
) -> Tensor:
    kept_r1 = (labels_r != IGNORED_LABEL).unsqueeze(1)
    labels_r1 = labels_r.unsqueeze(1).where(kept_r1, 0)
    wide = torch.promote_types(logits_rV.dtype, torch.float32)
    log_probability_rV = torch.log_softmax(logits_rV.to(wide), dim=-1)
    loss = -log_probability_rV.gather(1, labels_r1).where(kept_r1, 0).sum()
    if grad_hidden_rD is None and grad_head_VD is None:
        return loss
    # d loss / d logits = softmax − one-hot, written over the logits. Ignored rows are taken out of the two products'
    # D-wide sides, not of this V-wide one.
    minus_one_r1 = torch.full_like(labels_r1, -1, dtype=wide)
    gradient_rV = log_probability_rV.exp_().scatter_add_(1, labels_r1, minus_one_r1)
    if logits_rV.dtype is not wide:
        gradient_rV = logits_rV.copy_(gradient_rV)
    if grad_hidden_rD is not None:
        gemm(gradient_rV, head_VD, out=grad_hidden_rD).masked_fill_(~kept_r1, 0)
    if grad_head_VD is not None:
        _add_product(grad_head_VD, gradient_rV, hidden_rD.masked_fill(~kept_r1, 0))
    return loss


def _add_product(grad_head_VD: Tensor, gradient_rV: Tensor, hidden_rD: Tensor) -> None:
    if gradient_rV.dtype is grad_head_VD.dtype:
        gemm(gradient_rV.t(), hidden_rD, out=grad_head_VD, accumulate=True)
    else:
        grad_head_VD += gradient_rV.t() @ hidden_rD
