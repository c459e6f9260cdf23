"""Routing and local dispatch: no token lost, none doubled, weights and gradients where they belong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lm.kernels.grouping import Grouping
from moe_lm.model.config import ModelConfig
from moe_lm.model.dispatch import CapacityDispatcher, LocalDispatcher
from moe_lm.model.router import Assignments, Router, expert_capacity


def _assignments(tokens: int, experts: int, number: int, seed: int, dtype: torch.dtype) -> Assignments:
    generator = torch.Generator().manual_seed(seed)
    return Assignments(
        torch.randint(tokens, (number,), generator=generator),
        torch.randint(experts, (number,), generator=generator),
        torch.rand(number, generator=generator).to(dtype),
    )


def _number_times(x_ND: torch.Tensor, grouping: Grouping) -> torch.Tensor:
    """What experts would give that multiply by their own number, from 1, so that a wrong group shows."""
    y_ND, start = torch.zeros_like(x_ND), 0
    for expert, end in enumerate(grouping.end_E.tolist()):
        token_p, weight_p = grouping.token_P[start:end], grouping.weight_P[start:end]
        y_ND = y_ND.index_add(0, token_p, x_ND[token_p] * weight_p[:, None] * (expert + 1))
        start = end
    return y_ND


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40),
    experts=st.integers(1, 9),
    number=st.integers(0, 120),
    seed=st.integers(0, 2**30),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
)
def test_dispatch_and_combine_conserve_assignments(tokens, experts, number, seed, dtype):
    """Catches a row lost, doubled or given to another expert, whatever the alignment: any flat list of assignments."""
    assignments = _assignments(tokens, experts, number, seed, dtype)
    x_TD = torch.randn(tokens, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
    dispatcher = LocalDispatcher(experts)
    x_ND, grouping, handle = dispatcher.dispatch(x_TD, assignments)
    assert grouping.end_E.dtype == torch.int32 and len(grouping.end_E) == experts
    y_TD = dispatcher.combine(_number_times(x_ND, grouping), handle)
    expected = torch.zeros(tokens, 4, dtype=torch.float64)
    for token, expert, weight in zip(*assignments, strict=True):
        expected[token] += weight.double() * (expert + 1) * x_TD[token].double()
    tolerance = 1e-12 if dtype is torch.float64 else 0.05
    torch.testing.assert_close(y_TD.double(), expected, rtol=tolerance, atol=tolerance * 8)


@pytest.mark.parametrize(
    ("number", "align"), [(12, 1), (64, 1), (64, 8)], ids=["sorted in Python", "sorted by torch", "with filling rows"]
)
def test_gradients_reach_tokens_and_weights(number, align, monkeypatch):
    """Catches a combine that loses the router's gradient, or filling rows that leak one into token 0."""
    monkeypatch.setattr("moe_lm.model.dispatch.row_alignment", lambda *given: align)
    assignments = _assignments(6, 3, number, 0, torch.float64)
    x_TD = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    x_ND, grouping, handle = LocalDispatcher(3).dispatch(x_TD.detach(), assignments)
    expected = torch.zeros(6, 4, dtype=torch.float64)
    for token, expert, weight in zip(*assignments, strict=True):
        expected[token] += weight * (expert + 1) * x_TD[token].detach()
    torch.testing.assert_close(LocalDispatcher(3).combine(_number_times(x_ND, grouping), handle), expected)
    assert grouping.weight_P.count_nonzero() == number  # those of filling rows are exactly 0
    weight_R = assignments.weight_R.requires_grad_()

    def forward(x, weight):
        dispatcher = LocalDispatcher(3)
        x, grouping, handle = dispatcher.dispatch(x, Assignments(*assignments[:2], weight))
        assert (len(grouping.token_P) > number) == (align > 1)
        return dispatcher.combine(_number_times(x.sin(), grouping), handle)

    assert torch.autograd.gradcheck(forward, (x_TD, weight_R))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_router_chooses_the_k_largest_and_renormalises(top_k, dtype):
    """Catches a wrong expert, weights that do not sum to one, or logits rounded to the compute type before the
    choice."""
    router = Router(
        ModelConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=top_k)
    )
    torch.nn.init.normal_(router.weight)
    x_TD = torch.randn(50, 32).to(dtype)
    assignments, statistics = router(x_TD, None)
    logits = x_TD.float() @ router.weight.T
    top = logits.topk(top_k, dim=-1)
    assert torch.equal(assignments.token_R, torch.arange(50).repeat_interleave(top_k))
    assert torch.equal(assignments.expert_R, top.indices.flatten())
    torch.testing.assert_close(assignments.weight_R, top.values.softmax(-1).flatten().to(dtype))
    assert statistics.count_E.sum() == 50 * top_k
    torch.testing.assert_close(statistics.probability_sum_E.sum(), torch.tensor(50.0))
    torch.testing.assert_close(statistics.z_sum, logits.logsumexp(-1).square().sum())


def test_masked_tokens_do_not_count():
    """Catches padding in the balancing losses or in the loads."""
    router = Router(ModelConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2))
    torch.nn.init.normal_(router.weight)
    x_TD = torch.randn(20, 32)
    mask_T = torch.arange(20) % 3 != 0
    _, masked = router(x_TD, mask_T)
    _, alone = router(x_TD[mask_T], None)
    for ours, theirs in zip(masked, alone, strict=True):
        torch.testing.assert_close(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 30),
    experts=st.integers(1, 9),
    number=st.integers(1, 90),
    factor=st.sampled_from([0.1, 0.5, 1.0, 1.25, 3.0, 100.0]),
    seed=st.integers(0, 2**30),
)
def test_a_capacity_keeps_the_weightiest_assignments_of_each_expert(tokens, experts, number, factor, seed):
    """Catches shapes that depend on routing, a row over capacity that lands in the next expert's group, and drops of
    the wrong assignments; with room for all nothing is dropped."""
    assignments = _assignments(tokens, experts, number, seed, torch.float64)
    x_TD = torch.randn(tokens, 4, dtype=torch.float64)
    dispatcher, capacity = CapacityDispatcher(experts, factor), expert_capacity(factor, number, experts)
    x_ND, grouping, handle = dispatcher.dispatch(x_TD, assignments)
    assert grouping.end_E.tolist() == [capacity * (expert + 1) for expert in range(experts)]
    assert len(grouping.token_P) == capacity * experts
    y_TD = dispatcher.combine(_number_times(x_ND, grouping), handle)
    expected = torch.zeros_like(x_TD)
    for expert in range(experts):
        of_expert = [(w, t) for t, e, w in zip(*(a.tolist() for a in assignments), strict=True) if e == expert]
        for weight, token in sorted(of_expert, key=lambda one: -one[0])[:capacity]:
            expected[token] += weight * (expert + 1) * x_TD[token]
    torch.testing.assert_close(y_TD, expected, rtol=1e-12, atol=1e-11)


def test_what_a_capacity_drops_is_counted():
    """Catches drops that nobody sees: the router's count against its own assignments."""
    config = ModelConfig(
        hidden_size=8, num_attention_heads=1, num_key_value_heads=1, num_experts=4, capacity_factor=0.5
    )
    router = Router(config)
    torch.nn.init.normal_(router.weight)
    assignments, statistics = router(torch.randn(50, 8), torch.arange(50) < 40)
    over = [max(0, (assignments.expert_R == expert).sum().item() - 13) for expert in range(4)]  # ⌈0.5 · 100 / 4⌉
    assert statistics.dropped.item() == sum(over) > 0
