"""Validations of a run: of a part of the validation set now and then, of all of it at its end."""

import math

from moe_lm.data.loader import validation_batches
from moe_lm.errors import RunError
from moe_lm.evaluation.bits_per_byte import Validation, evaluate
from moe_lm.training.run import Run
from moe_lm.training.telemetry import Telemetry
from moe_lm.training.watchdog import Pulse


def validate(run: Run, max_rows: int | None, pulse: Pulse) -> Validation | None:
    """Figures of the validation set, or of `max_rows` rows of it; null where a stop was asked for meanwhile."""
    shards, runtime, config = run.data.validation, run.runtime, run.config

    def interrupted() -> bool:
        pulse()
        return run.requests.stopping

    batches = validation_batches(
        shards,
        batch_size=config.trainer.micro_batch_size,
        sequence_length=config.data.sequence_length,
        mask_documents=config.data.mask_documents,
        pad_id=run.data.tokenizer.pad_id,
        rank=runtime.rank,
        world_size=runtime.world_size,
        max_rows=max_rows,
    )
    figures = evaluate(run.compute.module, batches, shards, runtime, interrupted)
    run.parallel.release()
    return figures


def validate_start(run: Run, telemetry: Telemetry, pulse: Pulse) -> None:
    """Find out how good the model is that the run began from; all of the validation set, as at its end.

    Raises:
        RunError: Its loss is not finite, so there is nothing to go on from.
    """
    if (figures := validate(run, None, pulse)) is not None:
        if not math.isfinite(figures.loss):
            raise run.runtime.failed_everywhere(
                RunError(
                    f"the base's validation loss is {figures.loss} before the first step: it has diverged in training, "
                    "or trainer.precision is too narrow for it; take another base, or an earlier checkpoint of it, or "
                    "trainer.precision=fp32."
                )
            )
        run.progress.start_loss = figures.loss
        telemetry.validation(figures, complete=True)


def estimate(run: Run, telemetry: Telemetry, pulse: Pulse) -> None:
    """Find out how good the model is by now, on a part of the validation set."""
    if (figures := validate(run, run.config.trainer.eval_sequences, pulse)) is not None:
        run.progress.validated(figures.bits_per_byte)
        if not math.isfinite(figures.bits_per_byte):
            run.progress.bits_per_byte = None  # checkpoints keep it as JSON, which has no NaN
        telemetry.validation(figures, complete=False)
