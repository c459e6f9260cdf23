"""Packed documents as the places where they end: the same attention as by a mask, on a CPU by a stand-in for the flash
kernel, whose arguments torch's own shape function checks.
"""

import pytest
import torch
from torch import Tensor

from moe_lm.kernels import documents
from moe_lm.kernels.attention import attention, attention_mask
from moe_lm.kernels.documents import PackedDocuments, packed_documents
from moe_lm.model import decoder
from moe_lm.model.config import ModelConfig, Recompute
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize

CPU = torch.device("cpu")
IDS_BS = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2], [1] * 8])


def flash(
    q_TNH: Tensor,
    k_TGH: Tensor,
    v_TGH: Tensor,
    q_ends: Tensor,
    k_ends: Tensor,
    longest_q: int,
    longest_k: int,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What torch documents of `varlen_attn`: attention within each sequence, to `window_size` of the places around."""
    assert q_ends is k_ends and q_ends.dtype is torch.int32 and longest_q == longest_k and enable_gqa
    before, behind = window_size
    parts = []
    for begin, end in zip(q_ends[:-1].tolist(), q_ends[1:].tolist()):
        assert end - begin <= longest_q
        place = torch.arange(end - begin)
        shift = place[:, None] - place[None, :]
        seen = (shift >= -behind) & ((shift <= before) | (before < 0))
        qkv = (x[begin:end].transpose(0, 1)[None] for x in (q_TNH, k_TGH, v_TGH))
        o = torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=seen, enable_gqa=True)
        parts.append(o[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(documents, "_varlen_attention", lambda: (flash, {"enable_gqa": True}))


def test_documents_end_where_ids_change_and_rows_end():
    """Catches a document that goes on in the next row with the same id, and the end of the last one missing."""
    packed = packed_documents(IDS_BS, (3, 8), CPU)
    assert packed.ends_N.tolist() == [0, 3, 5, 6, 8, 9, 16, 24] and packed.ends_N.dtype is torch.int32
    assert packed.longest == 8
    assert packed_documents(None, (2, 5), CPU, 3) == (pytest.approx([0, 5, 10]), 5, 3)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("ids_BS", [IDS_BS, None], ids=["documents", "rows"])
def test_attention_is_that_of_the_mask(ids_BS, window):
    """Catches a window that is off by one, and heads or rows that come back in another order."""
    q, k, v = (torch.randn(3, 8, heads, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    dense_BS = torch.ones(3, 8, dtype=torch.int64) if ids_BS is None else ids_BS
    packed = packed_documents(ids_BS, (3, 8), CPU, window)
    masks = attention_mask(dense_BS, dense_BS, 0, window), packed, packed
    results = []
    for mask, backend in zip(masks, ("reference", None, "reference"), strict=True):
        o = attention(q, k, v, mask, backend)
        results.append([o, *torch.autograd.grad(o.square().sum(), (q, k, v))])
    for other in results[1:]:
        for ours, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, expected)


CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("recompute", Recompute)
def test_a_decoder_with_packed_documents(recompute, monkeypatch):
    """Catches documents that are not handed to every layer, or lost where a layer is computed again."""
    model = CausalLM(CONFIG).double()
    initialize(model, 0)
    tokens_BS, results = torch.randint(32, IDS_BS.shape), []
    for packed in (False, True):
        monkeypatch.setattr(decoder, "takes_packed", lambda x, head_dim, packed=packed: packed)
        model.model.recompute = recompute if packed else Recompute.none
        model.zero_grad()
        hidden_BSD = model(tokens_BS, document_ids_BS=IDS_BS).hidden_BSD
        hidden_BSD.square().sum().backward()
        results.append([hidden_BSD.detach(), *(parameter.grad.clone() for parameter in model.model.parameters())])
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("window", [None, 5])
def test_torch_takes_the_arguments(window):
    """Catches an argument that this version of torch does not know, or a shape that it would not give back."""
    q, k, v = (torch.empty(2, 16, heads, 64, dtype=torch.bfloat16, device="meta") for heads in (8, 2, 2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = attention(*leaves, PackedDocuments(torch.empty(5, dtype=torch.int32, device="meta"), 9, window))
    o.sum().backward()
    assert o.shape == q.shape and all(leaf.grad.shape == leaf.shape for leaf in leaves)
