"""The training loop."""

from moe_lm.data.loader import validation_batches
from moe_lm.errors import RunError
from moe_lm.evaluation.bits_per_byte import bits_per_byte
from moe_lm.training.run import Run
from moe_lm.training.schedule import is_due, learning_rate_factor
from moe_lm.training.step import next_load, train_step
from moe_lm.training.telemetry import Telemetry

MAX_SKIPPED_IN_A_ROW = 10


def train(run: Run) -> float:
    """Train from where the run stands to its last step; return bits per byte of the whole validation set."""
    config, progress, trainer = run.config, run.progress, run.config.trainer
    skipped_in_a_row = 0
    with run.open_feed() as feed, Telemetry(run, feed) as telemetry:
        while progress.step < feed.total_steps and (batch := feed.next()) is not None:
            factor = learning_rate_factor(progress.step, feed.total_steps, config.schedule)
            result = train_step(run.compute, run.optimizer, run.runtime, batch, run.load_LE, factor)
            run.load_LE = next_load(result, run.load_LE)
            progress.step += 1
            progress.data_step += 1
            if result.applied:
                progress.count(batch, run.data.domains)
            run.data_state = batch.state
            telemetry.step(result, batch.num_routed_tokens, factor * config.optimizer.learning_rate)
            skipped_in_a_row = 0 if result.applied else skipped_in_a_row + 1
            if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise RunError(
                    f"loss or gradient was not finite {skipped_in_a_row} times in a row, last at step {progress.step}: "
                    "lower optimizer.learning_rate, lengthen schedule.warmup_steps, or try trainer.precision=fp32."
                )
            last = progress.step == feed.total_steps
            if not last and is_due(progress.step, trainer.eval_interval):
                telemetry.validation(validate(run, trainer.eval_sequences), complete=False)
            if last or is_due(progress.step, config.checkpoint.interval):
                run.save(feed)
                telemetry.restart_clock()
        if run.saved_step != progress.step:
            run.save(feed)  # a stream has ended
        telemetry.close_data()
        final = validate(run, None)
        telemetry.validation(final, complete=True)
    return final


def validate(run: Run, max_rows: int | None) -> float:
    """Bits per byte of the validation set, or of `max_rows` rows of it."""
    shards, runtime, config = run.data.validation, run.runtime, run.config
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
    return bits_per_byte(run.compute.module, batches, shards, runtime)
