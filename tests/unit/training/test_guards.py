"""Spikes of the loss: what is one, and that the window is all the state there is."""

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lm.training.config import GuardsConfig
from moe_lm.training.guards import MINIMUM, SpikeDetector

CONFIG = GuardsConfig(spike_threshold=10.0, spike_window=64)


def _losses(number: int, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [generator.gauss(3.0, 0.1) for _ in range(number)]


def test_nothing_is_a_spike_before_enough_losses_are_known():
    """Catches a run that stops at its first steps, whose losses fall fast."""
    detector = SpikeDetector(CONFIG, _losses(MINIMUM - 1))
    assert detector.limit() == math.inf
    detector.add(3.0)
    assert detector.limit() < 6


def test_the_limit_is_the_robust_z_score():
    """Catches another formula: the median, plus the threshold times 1.4826 times the median absolute deviation."""
    losses = _losses(64)
    median = statistics.median(losses)
    deviation = statistics.median([abs(loss - median) for loss in losses])
    expected = median + 10 * 1.4826 * deviation
    assert SpikeDetector(CONFIG, losses).limit() == pytest.approx(expected)
    assert 3.5 < expected < 5.5


def test_outliers_hardly_move_the_limit():
    """Catches a mean and a standard deviation, which one spike of a hundred raises tenfold."""
    losses = _losses(64)
    calm = SpikeDetector(CONFIG, losses).limit()
    assert SpikeDetector(CONFIG, [*losses[:60], 900.0, 1e6, 50.0, 70.0]).limit() < 1.5 * calm


def test_a_loss_that_hardly_varies_has_room_for_noise():
    """Catches ordinary noise taken for a spike where the deviation is almost nothing: 1 % of the median at least."""
    assert SpikeDetector(CONFIG, [2.0] * 64).limit() == pytest.approx(2.0 + 10 * 0.01 * 2.0)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 20), min_size=MINIMUM, max_size=200))
def test_the_window_is_the_state(losses):
    """Catches state beside the window: a detector made of another's losses gives the same limits from there on."""
    one = SpikeDetector(CONFIG)
    for loss in losses:
        one.add(loss)
    other = SpikeDetector(CONFIG, one.losses)
    assert one.losses == losses[-64:] and one.limit() == other.limit()
    for loss in (1.0, 2.5):
        one.add(loss)
        other.add(loss)
    assert one.limit() == other.limit() and one.losses == other.losses
