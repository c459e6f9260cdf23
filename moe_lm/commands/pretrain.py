"""`moe-lm pretrain`: train a model from scratch, or go on with a run."""

from moe_lm.commands.job import run_job
from moe_lm.errors import InputError
from moe_lm.training.config import RunConfig
from moe_lm.training.start import FromSeed


def run(config: RunConfig) -> int:
    """Start a run, go on with it, or say that it is finished."""
    if config.model.router_drift_coef > 0:
        raise InputError(
            f"model.router_drift_coef={config.model.router_drift_coef}: a run from scratch has no router to stay near; "
            "leave it out, or give it to `finetune`."
        )
    return run_job(config, lambda runtime: FromSeed(config.model, config.seed))
