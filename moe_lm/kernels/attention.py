"""Causal grouped-query attention with document boundaries and a sliding window: one interface, five backends.

Letters: B batch, S queries, T keys, N heads, G key/value heads, H head_dim, J = N/G heads that share a key/value head.

"native" (`attention_native.py`) is for training and prompts on a CPU in shapes that it takes. Milliseconds at B 8 S 512
N 8 G 2 H 32, forward (forward and backward): on tiles 5.2 (14), with documents of 200 tokens 3.2 (7.7), where "cpu"
with its native softmax took 9.5 (21) and 8 (19) in the same minutes; in fp32 9.3 (26), where torch's flash kernel took
13 (40) and "cpu" 13 (35).

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
part: there "cpu" (`attention_cpu.py`) is taken. CUDA takes its fused kernels, unmeasured here: "sdpa", or "varlen" for
packed documents (`documents.py`).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lm.kernels import attention_cpu, attention_native
from moe_lm.kernels.documents import PackedDocuments, packed_attention

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
            mask and size. "native" takes what `attention_native.begins` does.

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
        begins_BS = attention_native.begins(q_BSNH, k_BTGH, v_BTGH, mask_BST)
        if begins_BS is not None and (backend or q_BSNH.shape[0] * k_BTGH.shape[2] >= torch.get_num_threads()):
            return attention_native.attention(q_BSNH, k_BTGH, v_BTGH, begins_BS)
        assert backend is None, (q_BSNH.shape, q_BSNH.dtype, k_BTGH.shape)
        backend = _default_backend(q_BSNH, k_BTGH, v_BTGH)
    if backend == "reference":
        return _reference(q_BSNH, k_BTGH, v_BTGH, mask_BST)
    if backend == "sdpa":
        return _sdpa(q_BSNH, k_BTGH, v_BTGH, mask_BST)
    if backend == "cpu":
        return attention_cpu.attention(q_BSNH, k_BTGH, v_BTGH, mask_BST)
    raise ValueError(f"backend={backend!r}: choose reference, sdpa, cpu, native or (for documents) varlen")


def _default_backend(*tensors: Tensor) -> str:
    if tensors[0].dtype == torch.float64:
        return "reference"
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    on_cpu_in_bf16 = tensors[0].device.type == "cpu" and tensors[0].dtype == torch.bfloat16
    return "cpu" if training and on_cpu_in_bf16 and tensors[1].shape[1] <= _LONGEST_KEPT else "sdpa"


def _reference(q_BSNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor, mask_BST: Tensor | None) -> Tensor:
    B, S, N, H = q_BSNH.shape
    q_BSGJH = q_BSNH.unflatten(2, (k_BTGH.shape[2], -1))
    wide = torch.promote_types(q_BSNH.dtype, torch.float32)
    scores_BGJST = torch.einsum("bsgjh,btgh->bgjst", q_BSGJH.to(wide), k_BTGH.to(wide)) / math.sqrt(H)
    if mask_BST is None and S > 1:
        mask_BST = attention_cpu.causal_mask(S, q_BSNH.device)
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
