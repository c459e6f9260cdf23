"""`moe-lm finetune`: go on from a trained model, on more text or on conversations, all of it or by LoRA."""

import dataclasses
from pathlib import Path

from moe_lm.commands.job import run_job
from moe_lm.commands.model_source import open_source
from moe_lm.config import written
from moe_lm.data.tokenizer import load_tokenizer
from moe_lm.errors import InputError
from moe_lm.finetune.base import FromBase, fingerprint
from moe_lm.finetune.config import FinetuneRunConfig
from moe_lm.model.source import ModelSource
from moe_lm.parallel.runtime import Runtime
from moe_lm.training.start import Start

OF_TRAINING = (
    "load_balancing",
    "load_balancing_source",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_drift_coef",
    "capacity_factor",
    "max_position_embeddings",
    "initializer_range",
)
"""Fields of the model that its weights do not depend on: they may differ from the base's."""


def run(config: FinetuneRunConfig) -> int:
    """Start a run, go on with it, or say that it is finished."""

    def begin(runtime: Runtime) -> Start:
        assert config.base is not None
        base = open_source(Path(config.base).expanduser(), "base")
        _check_model(config, base)
        runtime.on_main(lambda: _check_tokenizer(config, base))
        return FromBase(base, config.finetune, config.seed, runtime.decide(lambda: fingerprint(base)))

    return run_job(config, begin)


def _check_model(config: FinetuneRunConfig, base: ModelSource) -> None:
    """Refuse another shape than the base's."""
    for field in dataclasses.fields(base.config):
        given, has = getattr(config.model, field.name), getattr(base.config, field.name)
        if given != has and field.name not in OF_TRAINING:
            raise InputError(
                f"model.{field.name}={written(given)}: the base in {config.base} has {written(has)}; leave it out."
            )


def _check_tokenizer(config: FinetuneRunConfig, base: ModelSource) -> None:
    """Refuse another tokenizer than the base's: its embedding would mean nothing."""
    if config.tokenizer.path is None:
        raise InputError(f"tokenizer.path=null: there is no tokenizer beside {config.base}; give the one it needs.")
    if base.tokenizer_directory is None:
        return
    given, has = Path(config.tokenizer.path).expanduser(), base.tokenizer_directory
    if load_tokenizer(given).fingerprint != load_tokenizer(has).fingerprint:
        raise InputError(
            f"tokenizer.path={config.tokenizer.path}: is another tokenizer than that of the base, in {has}; leave it "
            "out."
        )
