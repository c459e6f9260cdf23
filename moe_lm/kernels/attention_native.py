"""Attention in native code: bf16 on AMX tiles (`amx_attention.inc`) and fp32 on vectors (`fp32_attention.inc`).

Probabilities never leave the cache, next to nothing is kept, and keys of other documents are passed over. Measured in
`attention.py`.

Letters: B batch, S queries, T keys, N heads, G key/value heads, H head_dim.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lm.kernels import native

_LANES = 16
_NAMES = {torch.bfloat16: "amx_attention", torch.float32: "fp32_attention"}


def begins(q_BSNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor, mask_BST: Tensor | None) -> Tensor | None:
    """The first key that each query sees, int32 [B, S], if the native kernels take these tensors; else null.

    They take as many queries as keys, on a CPU, and a mask by which each query sees all keys from one to itself; bf16
    where there are matrix tiles, with a head width and a length that are multiples of 32; fp32 with a head width that
    is one of 16.
    """
    (B, S, N, H), G = q_BSNH.shape, k_BTGH.shape[2]
    if not (k_BTGH.shape == v_BTGH.shape == (B, S, G, H) and N % G == 0):
        return None
    tensors = q_BSNH, k_BTGH, v_BTGH
    on_vectors = q_BSNH.dtype is torch.float32 and H % _LANES == 0 and native.supports(*tensors)
    if not (on_vectors or native.takes_tiles((S, H), *tensors)):
        return None
    if mask_BST is None:
        return torch.zeros(B, S, dtype=torch.int32, device=q_BSNH.device)
    begins_BS = torch.empty(B, S, dtype=torch.int32, device=q_BSNH.device)
    mask_BST = mask_BST.contiguous()
    return begins_BS if native.run("mask_begins", None, mask_BST.numel(), mask_BST, begins_BS, B, S) else None


def attention(q_BSNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor, begins_BS: Tensor) -> Tensor:
    """O [B, S, N, H] of q [B, S, N, H], k and v [B, S, G, H], and of what `begins` says of them."""
    if torch.is_grad_enabled():
        o_BSNH: Tensor = _NativeAttention.apply(q_BSNH, k_BTGH, v_BTGH, begins_BS)
        return o_BSNH
    return _forward(q_BSNH, k_BTGH, v_BTGH, begins_BS)[0]


def _forward(q_BSNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor, begins_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and what the backward needs of each softmax: [1, B, N, S] in bf16, in fp32 [2, B, N, S]."""
    B, S, N, H = q_BSNH.shape
    o_BSNH = torch.empty_like(q_BSNH)
    kept = q_BSNH.new_empty(2 if q_BSNH.dtype is torch.float32 else 1, B, N, S, dtype=torch.float32)
    pointers, sizes = (q_BSNH, k_BTGH, v_BTGH, begins_BS, o_BSNH, kept), (B, S, N, k_BTGH.shape[2], H)
    native.run(_NAMES[q_BSNH.dtype], None, B * S * S * N, *pointers, *sizes, 1 / math.sqrt(H))
    return o_BSNH, kept


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BSNH, k_BTGH, v_BTGH, begins_BS):  # type: ignore[no-untyped-def]
        o_BSNH, kept = _forward(q_BSNH, k_BTGH, v_BTGH, begins_BS)
        ctx.save_for_backward(q_BSNH, k_BTGH, v_BTGH, begins_BS, o_BSNH, kept)
        return o_BSNH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_o_BSNH):  # type: ignore[no-untyped-def]
        saved = ctx.saved_tensors
        grads = tuple(torch.empty_like(x) for x in saved[:3])
        B, S, N, H = grad_o_BSNH.shape
        sizes = (B, S, N, saved[1].shape[2], H)
        pointers = (*saved, grad_o_BSNH.contiguous(), *grads)
        name = f"{_NAMES[grad_o_BSNH.dtype]}_backward"
        native.run(name, None, B * S * S * N, *pointers, *sizes, 1 / math.sqrt(H))
        return *grads, None
