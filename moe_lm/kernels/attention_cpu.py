"""Attention on a CPU with its probabilities written out and kept for the backward: about B·N·S·T/2 numbers per layer.

Every step is a plain matrix product or softmax over as many rows as a bound on the scores allows (one row at a time was
2× slower: starting threads dominates). Queries go in blocks of 128, each against the keys up to its own end, which
skips much of what causality hides. Heads that share keys are stacked as further queries, so that keys are never
expanded and their gradient is summed inside the product. Measured in `attention.py`.

Letters: B batch, S queries, T keys, N heads, G key/value heads, H head_dim, J = N/G heads that share a key/value head;
b, s, k of a block, M matrices of r rows.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lm.kernels import native

_QUERY_BLOCK = 128
_SCORES_AT_ONCE = 2**22
"""Scores computed at one time, unless one row has more: enough that starting threads is cheap, 8 MB in bf16."""


def attention(q_BSNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor, mask_BST: Tensor | None) -> Tensor:
    """See `attention.py`."""
    o_BSNH: Tensor = _ExplicitAttention.apply(q_BSNH, k_BTGH, v_BTGH, mask_BST)
    return o_BSNH


def causal_mask(length: int, device: torch.device) -> Tensor:
    """True where key j is not later than query i; [1, length, length]."""
    return torch.ones(1, length, length, dtype=torch.bool, device=device).tril()


def _query_blocks(queries: int, keys: int) -> list[tuple[int, int, int]]:
    """(first query, end of queries, end of keys) per block; causality bounds the keys when queries and keys align."""
    if queries != keys:
        return [(0, queries, keys)]
    ends = [min(start + _QUERY_BLOCK, queries) for start in range(0, queries, _QUERY_BLOCK)]
    return [(start, end, end) for start, end in zip(range(0, queries, _QUERY_BLOCK), ends, strict=True)]


def _batch_slices(q_BSNH: Tensor, keys: int) -> list[slice]:
    B, S, N, _ = q_BSNH.shape
    rows = max(1, _SCORES_AT_ONCE // (min(S, _QUERY_BLOCK) * keys * N))
    return [slice(start, min(start + rows, B)) for start in range(0, B, rows)]


def _stack_heads(x_bsNH: Tensor, key_heads: int) -> Tensor:
    """[b, s, N, H] to [b·G, J·s, H]: heads that share a key/value head become further rows of one matrix."""
    b, s, _, H = x_bsNH.shape
    return x_bsNH.view(b, s, key_heads, -1, H).permute(0, 2, 3, 1, 4).reshape(b * key_heads, -1, H)


def _unstack_heads(x_MrH: Tensor, like_bsNH: Tensor) -> Tensor:
    b, s, N, H = like_bsNH.shape
    return x_MrH.view(b, N, s, H).transpose(1, 2)


def _softmax_in_place(scores_bNsk: Tensor, mask_bsk: Tensor | None, first: int, scale: float) -> None:
    """Turn scores into softmax(scale · scores) over the keys that a query sees: without a mask, 0 to `first` + i."""
    b, N, s, k = scores_bNsk.shape
    if native.supports(scores_bNsk):
        if mask_bsk is not None and mask_bsk.stride(2) != 1:
            mask_bsk = mask_bsk.contiguous()
        strides = (0, 0) if mask_bsk is None else mask_bsk.stride()[:2]
        numbers = (*strides, b, N, s, k, first, scale)
        native.run("attention_softmax", scores_bNsk.dtype, scores_bNsk.numel(), scores_bNsk, mask_bsk, *numbers)
        return
    if mask_bsk is None:
        mask_bsk = causal_mask(k, scores_bNsk.device)[:, first : first + s]
    scores_bNsk.mul_(scale).masked_fill_(~mask_bsk.unsqueeze(1), -torch.inf)
    torch._softmax(scores_bNsk, -1, False, out=scores_bNsk)


def _softmax_backward(grad_Mrk: Tensor, p_Mrk: Tensor) -> Tensor:
    """The gradient of softmax's input, over that of its output."""
    if native.supports(grad_Mrk, p_Mrk):
        rows, keys = grad_Mrk.flatten(0, 1).shape
        native.run("attention_softmax_backward", grad_Mrk.dtype, grad_Mrk.numel(), grad_Mrk, p_Mrk, rows, keys)
        return grad_Mrk
    return torch.ops.aten._softmax_backward_data.out(grad_Mrk, p_Mrk, -1, grad_Mrk.dtype, grad_input=grad_Mrk)


class _ExplicitAttention(torch.autograd.Function):
    """Probabilities of each block of queries are one contiguous tensor [B·G, J·block, keys], kept for the backward."""

    @staticmethod
    def forward(ctx, q_BSNH, k_BTGH, v_BTGH, mask_BST):  # type: ignore[no-untyped-def]
        B, S, N, H = q_BSNH.shape
        T, G = k_BTGH.shape[1:3]
        o_BSNH = torch.empty_like(q_BSNH)
        blocks = _query_blocks(S, T)
        saved = [q_BSNH.new_empty(B * G, N // G * (end - start), keys) for start, end, keys in blocks]
        for rows in _batch_slices(q_BSNH, T):
            k, v = _stack_heads(k_BTGH[rows], G), _stack_heads(v_BTGH[rows], G)
            for probabilities, (start, end, keys) in zip(saved, blocks, strict=True):
                p = probabilities[rows.start * G : rows.stop * G]
                mask_bsk = None if mask_BST is None else mask_BST[rows, start:end, :keys]
                scores_bNsk = p.view(-1, N, end - start, keys)
                torch.bmm(_stack_heads(q_BSNH[rows, start:end], G), k[:, :keys].mT, out=p)
                _softmax_in_place(scores_bNsk, mask_bsk, start + T - S, 1 / math.sqrt(H))
                o_bsNH = o_BSNH[rows, start:end]
                o_bsNH.copy_(_unstack_heads(torch.bmm(p, v[:, :keys]), o_bsNH))
        ctx.save_for_backward(q_BSNH, k_BTGH, v_BTGH, *saved)
        return o_BSNH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_o_BSNH):  # type: ignore[no-untyped-def]
        q_BSNH, k_BTGH, v_BTGH, *saved = ctx.saved_tensors
        G, scale = k_BTGH.shape[2], 1 / math.sqrt(q_BSNH.shape[3])
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q_BSNH, k_BTGH, v_BTGH))
        blocks = list(zip(saved, _query_blocks(q_BSNH.shape[1], k_BTGH.shape[1]), strict=True))
        for rows in _batch_slices(q_BSNH, k_BTGH.shape[1]):
            k, v = _stack_heads(k_BTGH[rows], G), _stack_heads(v_BTGH[rows], G)
            dk, dv = torch.empty_like(k), torch.empty_like(v)
            # The last block sees every key, so it writes the whole gradient (beta 0) and the others add to it.
            for beta, (probabilities, (start, end, keys)) in enumerate(reversed(blocks)):
                p = probabilities[rows.start * G : rows.stop * G]
                q, do = _stack_heads(q_BSNH[rows, start:end], G), _stack_heads(grad_o_BSNH[rows, start:end], G)
                dp = torch.bmm(do, v[:, :keys].mT)
                ds = _softmax_backward(dp, p)
                dq = torch.baddbmm(torch.empty_like(q), ds, k[:, :keys], beta=0, alpha=scale)
                grad_q[rows, start:end] = _unstack_heads(dq, grad_q[rows, start:end])
                dv[:, :keys].baddbmm_(p.mT, do, beta=min(beta, 1))
                dk[:, :keys].baddbmm_(ds.mT, q, beta=min(beta, 1), alpha=scale)
            grad_k[rows], grad_v[rows] = _unstack_heads(dk, grad_k[rows]), _unstack_heads(dv, grad_v[rows])
        return grad_q, grad_k, grad_v, None
