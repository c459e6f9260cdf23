"""Causal grouped-query attention with document boundaries and a sliding window: one interface, five backends.

Letters: B batch, S queries, T keys, N heads, G key/value heads, H head_dim, J = N/G heads that share a key/value head.

"native", where training and prompts have a shape that it takes, is bf16 on AMX tiles (`amx_attention.inc`) and fp32 on
vectors (`fp32_attention.inc`): probabilities never leave the cache, next to nothing is kept, and keys of other
documents are passed over. B 8 S 512 N 8 G 2 H 32 on tiles: 5.2 (14) milliseconds, with documents of 200 tokens 3.2
(7.7), where "cpu" with its native softmax took 9.5 (21) and 8 (19) in the same minutes; in fp32 9.3 (26),
where torch's flash kernel took 13 (40) and "cpu" 13 (35).

Which of the others: milliseconds forward (forward and backward), two AMX cores, torch 2.13, tuned allocator, document
mask, "cpu" with torch's softmax:

                                    scaled_dot_product_attention    "cpu"
    bf16  B 16 S 128 N 8 G 2 H 32        1.6 (26)                  2.1 (4.9)
    bf16  B 16 S 256 N 4 G 4 H 64        2.9 (20)                  3.9 (9.3)
    bf16  B 16 S 256 N 8 G 2 H 32        5.1 (38)                  5.1 (11)
    bf16  B 8  S 512 N 8 G 2 H 32        8.8 (53)                  8.8 (20)
    bf16  B 8  S 512 N 8 G 8 H 64        9.5 (63)                  13 (33)
    fp32  B 16 S 256 N 4 G 4 H 64        6.3 (19)                  7.6 (22)
    fp32  B 8  S 512 N 8 G 2 H 32        15 (44)                   17 (39)

So the flash kernel wins without gradients and ties in fp32, but loses in bf16 training, where its backward is the slow
part: there the probabilities are written out and kept (about B·N·S·T/2 numbers per layer), and every step is a plain
matrix product or softmax over as many rows as a bound on the scores allows (one row at a time was 2× slower: starting
threads dominates). Queries go in blocks of 128, each against the keys up to its own end, which skips much of what
causality hides. Heads that share keys are stacked as further queries, so that keys are never expanded and their
gradient is summed inside the product. CUDA takes its fused kernels, unmeasured here: "sdpa", or "varlen" for packed
documents (`documents.py`).
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_lm.kernels import native
from moe_lm.kernels.documents import PackedDocuments, packed_attention

_LANES = 16
_NATIVE = {torch.bfloat16: "amx_attention", torch.float32: "fp32_attention"}
_QUERY_BLOCK = 128
_SCORES_AT_ONCE = 2**22
"""Scores computed at one time, unless one row has more: enough that starting threads is cheap, 8 MB in bf16."""

_LONGEST_KEPT = 1024
"""Most keys for which probabilities are kept for the backward: 16 sequences of 4 heads then take 64 MB per layer."""


def attention_mask(
    query_documents_BS: Tensor, key_documents_BT: Tensor, offset: int = 0, sliding_window: int | None = None
) -> Tensor:
    """True where query i may look at key j: j is not later, not outside the window, and of the same document.

    Args:
        query_documents_BS: document number of each query.
        key_documents_BT: document number of each key.
        offset: index of the first query among the keys (the length of the cache before this step).
        sliding_window: visible keys are i − window < j ≤ i, as in transformers; None for no window.

    Returns:
        bool [B, S, T].
    """
    device = query_documents_BS.device
    query_S1 = torch.arange(offset, offset + query_documents_BS.shape[1], device=device).unsqueeze(1)
    key_T = torch.arange(key_documents_BT.shape[1], device=device)
    visible_ST = key_T <= query_S1
    if sliding_window is not None:
        visible_ST &= key_T > query_S1 - sliding_window
    return (query_documents_BS.unsqueeze(2) == key_documents_BT.unsqueeze(1)) & visible_ST


def attention(
    q_BSNH: Tensor,
    k_BTGH: Tensor,
    v_BTGH: Tensor,
    visible: Tensor | PackedDocuments | None,
    backend: str | None = None,
) -> Tensor:
    """softmax(q·kᵀ / sqrt(H))·v with N/G query heads to each key/value head.

    Args:
        visible: [B, S, T], true where a query sees a key (`attention_mask`), never a later one; or documents that say
            the same (S = T); None for plain causal attention with S = T, or for one query that sees all keys.
        backend: "reference", "sdpa", "cpu", "native", "varlen" (for documents), or None to choose by device, dtype,
            mask and size. "native" takes what `native_begins` does.

    Returns:
        o_BSNH in q's dtype.

    Raises:
        ValueError: on an unknown backend.
    """
    sizes_BST = (*q_BSNH.shape[:2], k_BTGH.shape[1])
    if isinstance(visible, PackedDocuments):
        if backend in (None, "varlen"):
            return packed_attention(q_BSNH, k_BTGH, v_BTGH, visible)
        document_ids_BS = visible.document_ids(sizes_BST[0])
        visible = attention_mask(document_ids_BS, document_ids_BS, 0, visible.sliding_window)
    mask_BST = visible
    if mask_BST is None:
        assert sizes_BST[1] in (1, sizes_BST[2]), sizes_BST
    else:
        assert mask_BST.dtype == torch.bool and mask_BST.shape == sizes_BST, (mask_BST.dtype, mask_BST.shape, sizes_BST)
    if backend in (None, "native"):
        begins_BS = native_begins(q_BSNH, k_BTGH, v_BTGH, mask_BST)
        if begins_BS is not None and (backend or q_BSNH.shape[0] * k_BTGH.shape[2] >= torch.get_num_threads()):
            return _native(q_BSNH, k_BTGH, v_BTGH, begins_BS)
        assert backend is None, (q_BSNH.shape, q_BSNH.dtype, k_BTGH.shape)
        backend = _default_backend(q_BSNH, k_BTGH, v_BTGH)
    if backend == "reference":
        return _reference(q_BSNH, k_BTGH, v_BTGH, mask_BST)
    if backend == "sdpa":
        return _sdpa(q_BSNH, k_BTGH, v_BTGH, mask_BST)
    if backend == "cpu":
        o_BSNH: Tensor = _ExplicitAttention.apply(q_BSNH, k_BTGH, v_BTGH, mask_BST)
        return o_BSNH
    raise ValueError(f"backend={backend!r}: choose reference, sdpa, cpu, native or (for documents) varlen")


def _default_backend(*tensors: Tensor) -> str:
    if tensors[0].dtype == torch.float64:
        return "reference"
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    on_cpu_in_bf16 = tensors[0].device.type == "cpu" and tensors[0].dtype == torch.bfloat16
    return "cpu" if training and on_cpu_in_bf16 and tensors[1].shape[1] <= _LONGEST_KEPT else "sdpa"


def _causal_mask(length: int, device: torch.device) -> Tensor:
    return torch.ones(1, length, length, dtype=torch.bool, device=device).tril()


def _reference(q_BSNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor, mask_BST: Tensor | None) -> Tensor:
    B, S, N, H = q_BSNH.shape
    q_BSGJH = q_BSNH.unflatten(2, (k_BTGH.shape[2], -1))
    wide = torch.promote_types(q_BSNH.dtype, torch.float32)
    scores_BGJST = torch.einsum("bsgjh,btgh->bgjst", q_BSGJH.to(wide), k_BTGH.to(wide)) / math.sqrt(H)
    if mask_BST is None and S > 1:
        mask_BST = _causal_mask(S, q_BSNH.device)
    if mask_BST is not None:
        scores_BGJST = scores_BGJST.masked_fill(~mask_BST[:, None, None], -torch.inf)
    o_BSGJH = torch.einsum("bgjst,btgh->bsgjh", scores_BGJST.softmax(-1), v_BTGH.to(wide))
    return o_BSGJH.reshape(B, S, N, H).to(q_BSNH.dtype)


def _sdpa(q_BSNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor, mask_BST: Tensor | None) -> Tensor:
    B, S, N, H = q_BSNH.shape
    mask = None if mask_BST is None else mask_BST.unsqueeze(1)
    if S == 1:  # heads that share keys are so many queries, and no key has to be copied
        q_BGJH = q_BSNH.view(B, k_BTGH.shape[2], -1, H)
        o_BGJH = F.scaled_dot_product_attention(q_BGJH, k_BTGH.transpose(1, 2), v_BTGH.transpose(1, 2), attn_mask=mask)
        return o_BGJH.reshape(B, 1, N, H)
    shared = N // k_BTGH.shape[2]
    if shared > 1 and mask is not None:  # enable_gqa would fall back to the unfused kernel; expanding keys is cheaper
        k_BTGH, v_BTGH = k_BTGH.repeat_interleave(shared, dim=2), v_BTGH.repeat_interleave(shared, dim=2)
        shared = 1
    q_BNSH, k_BGTH, v_BGTH = (x.transpose(1, 2) for x in (q_BSNH, k_BTGH, v_BTGH))
    causal, grouped = mask is None, shared > 1
    o_BNSH = F.scaled_dot_product_attention(q_BNSH, k_BGTH, v_BGTH, mask, is_causal=causal, enable_gqa=grouped)
    return o_BNSH.transpose(1, 2)


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
        mask_bsk = _causal_mask(k, scores_bNsk.device)[:, first : first + s]
    scores_bNsk.mul_(scale).masked_fill_(~mask_bsk.unsqueeze(1), -torch.inf)
    torch._softmax(scores_bNsk, -1, False, out=scores_bNsk)


def _softmax_backward(grad_Mrk: Tensor, p_Mrk: Tensor) -> Tensor:
    """The gradient of softmax's input, over that of its output."""
    if native.supports(grad_Mrk, p_Mrk):
        rows, keys = grad_Mrk.flatten(0, 1).shape
        native.run("attention_softmax_backward", grad_Mrk.dtype, grad_Mrk.numel(), grad_Mrk, p_Mrk, rows, keys)
        return grad_Mrk
    return torch.ops.aten._softmax_backward_data.out(grad_Mrk, p_Mrk, -1, grad_Mrk.dtype, grad_input=grad_Mrk)


def native_begins(q_BSNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor, mask_BST: Tensor | None) -> Tensor | None:
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


def _native(q_BSNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor, begins_BS: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        o_BSNH: Tensor = _NativeAttention.apply(q_BSNH, k_BTGH, v_BTGH, begins_BS)
        return o_BSNH
    return _native_forward(q_BSNH, k_BTGH, v_BTGH, begins_BS)[0]


def _native_forward(q_BSNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor, begins_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and what the backward needs of each softmax: [1, B, N, S] in bf16, in fp32 [2, B, N, S]."""
    B, S, N, H = q_BSNH.shape
    o_BSNH = torch.empty_like(q_BSNH)
    kept = q_BSNH.new_empty(2 if q_BSNH.dtype is torch.float32 else 1, B, N, S, dtype=torch.float32)
    pointers, sizes = (q_BSNH, k_BTGH, v_BTGH, begins_BS, o_BSNH, kept), (B, S, N, k_BTGH.shape[2], H)
    native.run(_NATIVE[q_BSNH.dtype], None, B * S * S * N, *pointers, *sizes, 1 / math.sqrt(H))
    return o_BSNH, kept


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BSNH, k_BTGH, v_BTGH, begins_BS):  # type: ignore[no-untyped-def]
        o_BSNH, kept = _native_forward(q_BSNH, k_BTGH, v_BTGH, begins_BS)
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
        name = f"{_NATIVE[grad_o_BSNH.dtype]}_backward"
        native.run(name, None, B * S * S * N, *pointers, *sizes, 1 / math.sqrt(H))
        return *grads, None


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
