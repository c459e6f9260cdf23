"""Options that are given, and that the rest of the configuration has no use for: nobody should think they count."""

from collections.abc import Callable, Iterator
from typing import Any

from moe_lm.data.config import DataSource
from moe_lm.finetune.config import FinetuneRunConfig
from moe_lm.model.config import LoadBalancing
from moe_lm.training.config import OptimizerName, ScheduleName, TrackerName

_IDLE: list[tuple[str, Callable[[Any], bool], str]] = [
    ("schedule.final_factor", lambda c: c.schedule.name is ScheduleName.constant, "with schedule=constant"),
    ("schedule.decay_fraction", lambda c: c.schedule.name is not ScheduleName.wsd, "without schedule=wsd"),
    ("optimizer.muon_momentum", lambda c: c.optimizer.name is not OptimizerName.muon, "without optimizer=muon"),
    (
        "model.router_aux_loss_coef model.load_balancing_source",
        lambda c: c.model.is_mixture and c.model.load_balancing is LoadBalancing.none,
        "with model.load_balancing=none",
    ),
    (
        "model.num_experts model.num_experts_per_tok model.load_balancing "
        "model.load_balancing_source model.router_aux_loss_coef model.router_z_loss_coef model.router_drift_coef",
        lambda c: not c.model.is_mixture and not isinstance(c, FinetuneRunConfig),  # there they are refused
        "with model=dense",
    ),
    ("tracker.project tracker.mode", lambda c: c.tracker.name is TrackerName.none, "with tracker=none"),
    ("finish.sample_tokens", lambda c: c.finish.sample_prompt is None, "without finish.sample_prompt"),
    ("data.num_streams", lambda c: not c.data.streaming, "without data.streaming=true"),
    (
        "data.too_long data.route_prompts",
        lambda c: not c.data.has_chat and c.data.source is not DataSource.prepared,
        "without conversations (data.source=chat)",
    ),
    (
        "data.subset data.split data.revision",
        lambda c: DataSource.huggingface not in c.data.kinds,
        "without data.source=huggingface",
    ),
]
"""Options that a configuration has no use for: their names, when that is so, and how it is said."""


def given_in_vain(config: Any, given: set[str]) -> Iterator[str]:
    """A sentence for each option that was given in vain.

    Args:
        config: What the options made.
        given: Names on the command line; not those of a group or an experiment, which suits more than one use.
    """
    for names, is_idle, why in _IDLE:
        for name in names.split():
            if name in given and is_idle(config):
                yield f"{name} has no effect {why}"
