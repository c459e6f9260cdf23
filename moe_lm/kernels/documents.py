"""Attention within packed documents on a GPU, without a table of who sees whom.

Letters: B batch, S sequence, N heads or documents, G key/value heads, H head width, T tokens (B·S).

The mask of `attention_mask` is [B, S, S]: at 8 sequences of 4,096 tokens 134 MB, and no flash kernel takes it. Rows of
packed documents are as well one long row of documents of different lengths, which flash attention takes as the places
where they end (`torch.nn.attention.varlen`, bf16 and fp16 on Ampere and later; shared keys and windows included).
Rather than FlexAttention, which masks by blocks of 128 without knowing the documents on the host, but is to be compiled
first, and whose kernels are Triton's instead of CUDA's. Neither is measured here.

Where documents end has to be known on the host, for the kernel's grid is as large as they are many. So batches keep
their document ids there (`Batch.to`); ids on a device are waited for, once per micro-batch. That happens where FSDP2
shards a model, which moves to the device whatever that is called with.
"""

import functools
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_lm.transfer import copied_to


class PackedDocuments(NamedTuple):
    """Every query sees the keys of its own document that are not later, nor before its window."""

    ends_N: Tensor
    """Places in [B·S] where documents begin, and the end of the last; int32 [documents + 1], on the device."""
    longest: int
    """Tokens of the longest document, or more."""
    sliding_window: int | None
    """Visible keys are i − window < j ≤ i; null for no window."""

    def document_ids(self, batch: int) -> Tensor:
        """A number [B, S] for each token, equal within documents."""
        places_T = torch.arange(int(self.ends_N[-1]), device=self.ends_N.device, dtype=torch.int32)
        return torch.searchsorted(self.ends_N, places_T, right=True).view(batch, -1)


def takes_packed(x: Tensor, head_dim: int) -> bool:
    """Whether attention of tensors like `x` takes `PackedDocuments`: bf16 or fp16, on a GPU that has flash kernels."""
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return head_dim % 8 == 0 and head_dim <= 256 and torch.cuda.get_device_capability(x.device) >= (8, 0)


def packed_documents(
    document_ids_BS: Tensor | None, shape_BS: tuple[int, int], device: torch.device, sliding_window: int | None = None
) -> PackedDocuments:
    """Where the runs of equal ids end.

    Args:
        document_ids_BS: document number of each token, those of one document side by side; best on the host. Null for
            one document per row.
        shape_BS: B and S.
        device: where attention is computed.
        sliding_window: See `PackedDocuments`.
    """
    (B, S), begins_BS = shape_BS, torch.zeros(shape_BS, dtype=torch.bool)
    begins_BS[:, 0] = True
    if document_ids_BS is not None:
        document_ids_BS = document_ids_BS.cpu()
        begins_BS[:, 1:] = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
    ends_N = torch.cat((begins_BS.flatten().nonzero().squeeze(1), torch.tensor([B * S]))).to(torch.int32)
    return PackedDocuments(copied_to(ends_N, device), int(ends_N.diff().max()), sliding_window)


def packed_attention(q_BSNH: Tensor, k_BSGH: Tensor, v_BSGH: Tensor, documents: PackedDocuments) -> Tensor:
    """Attention as of `moe_lm/kernels/attention.py`, by torch's flash kernels for documents of different lengths."""
    attend, options = _varlen_attention()
    q_TNH, k_TGH, v_TGH = (x.flatten(0, 1) for x in (q_BSNH, k_BSGH, v_BSGH))
    window = -1 if documents.sliding_window is None else documents.sliding_window - 1
    ends = documents.ends_N, documents.ends_N, documents.longest, documents.longest
    o_TNH: Tensor = attend(q_TNH, k_TGH, v_TGH, *ends, window_size=(window, 0), **options)
    return o_TNH.view_as(q_BSNH)


@functools.cache
def _varlen_attention() -> tuple[Any, dict[str, bool]]:
    """The function, imported when needed (1.4 s), and what lets query heads share keys: torch 2.11 does not ask."""
    from torch.nn.attention.varlen import varlen_attn

    asks = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return varlen_attn, {"enable_gqa": True} if asks else {}
