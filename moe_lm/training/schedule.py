"""What happens at which step: pure functions of the step."""

import math

from moe_lm.training.config import ScheduleConfig, ScheduleName


def learning_rate_factor(step: int, max_steps: int, config: ScheduleConfig) -> float:
    """Factor of the peak learning rate for the update that follows `step` finished ones, 0 <= step < max_steps.

    Warm-up is linear and reaches 1 with its last step. `cosine`: Loshchilov and Hutter 2016, eq. 5; `wsd`: Hu et al.
    2024 (MiniCPM), section 4, with a linear decay. Both would reach `final_factor` one step after the last, so that
    even a factor of 0 leaves no step without effect.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.name is ScheduleName.constant:
        return 1.0
    if config.name is ScheduleName.cosine:
        decay_steps = max_steps - config.warmup_steps
    else:
        decay_steps = min(round(config.decay_fraction * max_steps), max_steps - config.warmup_steps)
    remaining = max_steps - step
    if remaining > decay_steps:
        return 1.0
    progress = 1 - remaining / (decay_steps + 1)
    fall = 0.5 * (1 - math.cos(math.pi * progress)) if config.name is ScheduleName.cosine else progress
    return 1.0 - (1.0 - config.final_factor) * fall


def is_due(step: int, interval: int) -> bool:
    """Whether something done every `interval` steps is due after `step` finished ones; an interval of 0 means never."""
    return interval > 0 and step > 0 and step % interval == 0
