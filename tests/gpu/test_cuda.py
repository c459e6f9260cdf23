"""The CUDA paths against the CPU reference; skipped where there is no CUDA device."""

import pytest
import torch

from moe_lm.kernels.attention import attention, attention_mask
from moe_lm.kernels.experts import expert_swiglu
from moe_lm.kernels.loss import linear_cross_entropy
from moe_lm.model.config import ModelConfig
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours.cpu().double() - reference.double()).norm() / reference.double().norm()).item()


@pytest.mark.parametrize("groups", [[64, 0, 128, 8], [0, 0, 200, 0], [1, 2, 3, 4]])
def test_expert_swiglu_in_bf16(groups):
    """Catches a grouped product that mixes up experts, or garbage in rows past the last group, forward or backward."""
    ends = torch.tensor(groups).cumsum(0).to(torch.int32)
    rows = int(ends[-1]) + 16
    inputs = [torch.randn(rows, 64), torch.randn(4, 96, 64) / 8, torch.randn(4, 64, 48) / 7]
    results = []
    for device, dtype, backend in (("cpu", torch.float64, "reference"), ("cuda", torch.bfloat16, None)):
        leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
        y = expert_swiglu(leaves[0], ends.to(device), *leaves[1:], backend=backend)
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for ours, reference in zip(results[1], results[0], strict=True):
        assert _relative(ours, reference) < 0.03


def test_attention_in_bf16():
    """Catches a mask or a head grouping that the fused CUDA kernels read differently."""
    documents = torch.tensor([[1] * 40 + [2] * 88, [1] * 128])
    q, k, v = torch.randn(2, 128, 8, 64), torch.randn(2, 128, 2, 64), torch.randn(2, 128, 2, 64)
    mask = attention_mask(documents, documents)
    expected = attention(q.double(), k.double(), v.double(), mask, backend="reference")
    ours = attention(*(x.cuda().bfloat16() for x in (q, k, v)), mask.cuda())
    assert _relative(ours, expected) < 0.02


def test_a_training_step_in_bf16_follows_the_cpu():
    """Catches any CUDA path of the decoder or the loss that computes something else than the CPU in fp32."""
    config = ModelConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    model = CausalLM(config)
    initialize(model, 0)
    tokens = torch.randint(512, (4, 64))
    losses = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        moved = CausalLM(config).to(device, dtype)
        moved.load_state_dict(model.state_dict())
        hidden = moved(tokens.to(device)).hidden_BSD.flatten(0, 1)
        loss = linear_cross_entropy(hidden, moved.lm_head.weight, tokens.roll(-1, 1).flatten().to(device))
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for n, p in moved.named_parameters())
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
