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

OF_ROUTING = (
    "load_balancing",
    "load_balancing_source",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_drift_coef",
    "capacity_factor",
)
"""Fields of the model that training a dense one has no use for."""

OF_TRAINING = (*OF_ROUTING, "max_position_embeddings", "initializer_range")
"""Fields of the model that its weights do not depend on: they may differ from the base's."""


def run(config: FinetuneRunConfig) -> int:
    """Start a run, go on with it, or say that it is finished."""

    def begin(runtime: Runtime) -> Start:
        assert config.base is not None
        base = _open_base(config.base, runtime)
        _check_model(config, base)
        runtime.on_main(lambda: _check_tokenizer(config, base))
        return FromBase(base, config.finetune, config.seed, _agreed_fingerprint(config.base, base, runtime))

    return run_job(config, begin)


def _open_base(given: str, runtime: Runtime) -> ModelSource:
    """The base, the same on every process: the main one chooses the checkpoint, for a run that is still training has
    another newest one a moment later.
    """
    opened: list[ModelSource] = []

    def choose() -> str:
        opened.append(open_source(Path(given).expanduser(), "base"))
        return str(opened[0].path)

    path = runtime.decide(choose)
    return runtime.together(lambda: opened[0] if opened else open_source(Path(path), "base"))


def _agreed_fingerprint(given: str, base: ModelSource, runtime: Runtime) -> str:
    """The fingerprint of the base, by each process's own files."""
    found = runtime.together(lambda: fingerprint(base))
    everyone = runtime.gather(found)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise InputError(f"base={given}: process {rank} finds other weights there than process 0; copy them anew.")
    return found


def _check_model(config: FinetuneRunConfig, base: ModelSource) -> None:
    """Refuse another shape than the base's, and of a dense base what would do nothing."""
    for field in dataclasses.fields(base.config):
        given, has = getattr(config.model, field.name), getattr(base.config, field.name)
        if given != has and field.name in OF_ROUTING and not base.config.is_mixture:
            raise InputError(
                f"model.{field.name}={written(given)}: the base in {config.base} is a dense model, which routes "
                "nothing; leave it out."
            )
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
