"""Learning rates by step."""

import math

import pytest

from moe_lm.training.config import ScheduleConfig, ScheduleName
from moe_lm.training.schedule import is_due, learning_rate_factor


def _factors(name: ScheduleName, max_steps: int = 100, **options) -> list[float]:
    config = ScheduleConfig(name=name, warmup_steps=10, final_factor=0.1, **options)
    return [learning_rate_factor(step, max_steps, config) for step in range(max_steps)]


@pytest.mark.parametrize("name", ScheduleName)
def test_warmup_is_linear_and_reaches_the_peak(name):
    """Catches a first step with a rate of zero, or a warm-up that is one step too long."""
    factors = _factors(name)
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(factors) == 1.0


def test_shapes_after_warmup():
    """Catches a schedule that does not end where it says, rises again, or decays at the wrong time."""
    cosine, wsd, constant = (_factors(name, decay_fraction=0.4) for name in ScheduleName)
    # Cosine decays over 90 steps, wsd over 40; one step after the last they would be at 0.1.
    assert cosine[-1] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 90 / 91)) / 2)
    assert wsd[-1] == pytest.approx(0.1 + 0.9 / 41) and constant[-1] == 1.0
    assert cosine[9:] == sorted(cosine[9:], reverse=True)
    assert wsd[9:60] == [1.0] * 51 and wsd[60] == pytest.approx(1 - 0.9 / 41)
    assert wsd[60:] == sorted(wsd[60:], reverse=True)


def test_no_step_is_without_effect():
    """Catches a last step with a learning rate of exactly zero."""
    for name in ScheduleName:
        config = ScheduleConfig(name=name, warmup_steps=3, decay_fraction=0.5, final_factor=0.0)
        assert all(learning_rate_factor(step, 20, config) > 0 for step in range(20))


def test_degenerate_lengths():
    """Catches divisions by zero: no warm-up, warm-up as long as the run, no decay."""
    for name in ScheduleName:
        assert learning_rate_factor(0, 1, ScheduleConfig(name=name, warmup_steps=0)) <= 1.0
        assert learning_rate_factor(4, 5, ScheduleConfig(name=name, warmup_steps=5)) == 1.0
    assert learning_rate_factor(9, 10, ScheduleConfig(ScheduleName.wsd, 0, decay_fraction=0.0)) == 1.0


def test_is_due():
    """Catches an interval of 0 that divides, or something due at the wrong step."""
    assert [s for s in range(1, 10) if is_due(s, 3)] == [3, 6, 9]
    assert not any(is_due(s, 0) for s in range(10))
