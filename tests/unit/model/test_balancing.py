"""Balancing losses as functions of statistics."""

import pytest
import torch

from moe_lm.model.balancing import load_balancing_loss, load_fraction, load_violation, router_z_loss
from moe_lm.model.config import LoadBalancing


@pytest.mark.parametrize("formula", [LoadBalancing.per_layer, LoadBalancing.pooled])
@pytest.mark.parametrize("top_k", [1, 2])
def test_value_at_balance_and_at_collapse(formula, top_k):
    """Catches a missing factor of E or K: 1 (pooled: K) at balance, E (K·E for top-1 pooled) when one expert takes
    all."""
    unit = top_k if formula is LoadBalancing.pooled else 1
    balanced = torch.full((3, 8), 100 / 8)
    loss = load_balancing_loss(balanced, load_fraction(balanced * top_k), 100, top_k, formula)
    assert loss.item() == pytest.approx(unit)
    collapsed = torch.zeros(3, 8)
    collapsed[:, 0] = 100
    assert load_balancing_loss(collapsed, load_fraction(collapsed), 100, top_k, formula).item() == pytest.approx(
        8 * unit
    )


def test_parts_of_a_batch_add_up():
    """Catches a normalisation by the part instead of the whole batch: what makes accumulation change the gradient."""
    load = load_fraction(torch.rand(2, 4))
    parts = torch.rand(3, 2, 4)
    whole = load_balancing_loss(parts.sum(0), load, 30, 2, LoadBalancing.per_layer)
    pieces = sum(load_balancing_loss(part, load, 30, 2, LoadBalancing.per_layer) for part in parts)
    torch.testing.assert_close(whole, pieces)
    z = torch.rand(3, 2)
    torch.testing.assert_close(router_z_loss(z.sum(0), 30), sum(router_z_loss(part, 30) for part in z))


def test_pooling_hides_what_the_per_layer_loss_sees():
    """Catches the two formulas being mixed up: opposite imbalances in two layers cancel only when pooled."""
    probability = torch.tensor([[10.0, 0.0], [0.0, 10.0]])
    load = load_fraction(probability)
    assert load_balancing_loss(probability, load, 10, 1, LoadBalancing.pooled).item() == pytest.approx(1)
    assert load_balancing_loss(probability, load, 10, 1, LoadBalancing.per_layer).item() == pytest.approx(2)


def test_loads():
    """Catches NaN for a layer that routed nothing, and a violation that is not zero at balance."""
    counts = torch.tensor([[4.0, 4.0], [8.0, 0.0], [0.0, 0.0]])
    assert load_fraction(counts).tolist() == [[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]]
    assert load_violation(counts[:2]).tolist() == [0.0, 1.0]
