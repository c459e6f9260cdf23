"""The training loop."""

import contextlib
import math
from collections import Counter

from moe_lm.data.loader import validation_batches
from moe_lm.errors import RunError, Stopped
from moe_lm.evaluation.bits_per_byte import Validation, evaluate
from moe_lm.training.config import SpikePolicy
from moe_lm.training.feed import Feed, GlobalBatch
from moe_lm.training.guards import skipped_too_often
from moe_lm.training.run import Run
from moe_lm.training.schedule import is_due, learning_rate_factor
from moe_lm.training.step import next_load, train_step
from moe_lm.training.telemetry import Telemetry
from moe_lm.training.watchdog import Pulse


def train(run: Run, pulse: Pulse) -> Validation:
    """Train from where the run stands to its last step; return the figures of the whole validation set.

    Raises:
        Stopped: The run was asked to stop, and is saved.
        RunError: Too many updates in a row were skipped.
    """
    most = run.config.guards.max_rewinds
    rewinds: Counter[int] = Counter()
    with Telemetry(run) as telemetry:
        try:
            while (final := _train_until_rewind(run, telemetry, pulse)) is None:
                step = run.progress.step
                rewinds[step] += 1
                if rewinds[step] > most:
                    raise run.runtime.failed_everywhere(
                        RunError(
                            f"the loss leapt again after {most} rewinds to step {step}: lower optimizer.learning_rate, "
                            "or look at the data there."
                        )
                    )
        except Stopped:
            raise
        except Exception:  # whatever it was: on the others it is what they were told of it
            if run.runtime.all_failed:  # all are here: a checkpoint that all have written their parts of is not lost
                with run.runtime.still_together(), contextlib.suppress(Stopped):
                    run.saver.hurry()
                    run.saving.finish(pulse)
            raise
    return final


def _train_until_rewind(run: Run, telemetry: Telemetry, pulse: Pulse) -> Validation | None:
    """Train to the last step; null once the run was rewound, to be called again."""
    config, progress, policy = run.config, run.progress, run.config.guards.spike_policy
    with run.open_feed() as feed:
        telemetry.begin(feed)
        if run.start.has_learned and progress.step == 0 and progress.start_loss is None:
            _validate_start(run, telemetry, pulse)
        while _between_steps(run, feed, telemetry, pulse) and (batch := _next(run, feed, pulse)) is not None:
            data_step, run.data_state = progress.data_step, batch.state
            progress.data_step += 1
            if data_step in progress.skipped_data_steps:
                continue
            if config.data.streaming and not any(batch.domain_tokens):
                continue  # padding alone: the streams that it falls to have ended
            factor = learning_rate_factor(progress.step, feed.total_steps, config.schedule)
            limit = run.spikes.limit()
            loss_limit = math.inf if policy is SpikePolicy.warn else limit
            result = train_step(run.compute, run.optimizer, run.runtime, batch, run.load_LE, factor, loss_limit)
            run.load_LE = next_load(result, run.load_LE)
            progress.step += 1
            if result.finite and result.cross_entropy > limit:
                telemetry.spike(result, data_step, limit)
                if policy is SpikePolicy.rewind:
                    run.rewind(data_step, pulse, telemetry.line)
                    telemetry.rewound(progress.step, data_step)
                    return None
            if result.applied:
                progress.learned(batch.num_targets, zip(run.data.domains, batch.domain_tokens))
                run.spikes.add(result.cross_entropy)
            progress.skipped_in_a_row = 0 if result.applied else progress.skipped_in_a_row + 1
            telemetry.step(result, batch, data_step, factor * config.optimizer.learning_rate)
            if progress.skipped_in_a_row >= config.guards.max_skipped:
                raise skipped_too_often(run.compute, run.optimizer, run.runtime, progress, batch, result)
        if run.saving.newest_step != progress.step:
            run.save(feed, pulse)  # a stream has ended
        telemetry.close_data()
        if run.parallel.layout.sharded:
            run.saving.finish(pulse)  # parts that lie there for the length of a validation are no checkpoint yet
        final = validate(run, None, pulse)
        run.saving.finish(pulse)
        if run.requests.agreed(run.saver).stop or final is None:
            raise Stopped(f"stopped in the last validation ({run.requests.reason}); {run.saving.said_next_start()}")
        telemetry.validation(final, complete=True)
    return final


def _validate_start(run: Run, telemetry: Telemetry, pulse: Pulse) -> None:
    """Find out how good the model is that the run began from; all of the validation set, as at its end."""
    if (figures := validate(run, None, pulse)) is not None:
        run.progress.start_loss = figures.loss
        telemetry.validation(figures, complete=True)


def _between_steps(run: Run, feed: Feed, telemetry: Telemetry, pulse: Pulse) -> bool:
    """Validate, save and stop where it is due or asked for; false after the last step."""
    pulse()
    config, progress = run.config, run.progress
    last = progress.step >= feed.last_step
    if is_due(progress.step, config.trainer.eval_interval) and progress.validated_step != progress.step:
        estimate = validate(run, config.trainer.eval_sequences, pulse)
        if estimate is not None:
            progress.validated(estimate.bits_per_byte)
            telemetry.validation(estimate, complete=False)
    asked = run.requests.agreed(run.saver)
    if asked.failed:
        run.saving.raise_failure()
    run.saving.go_on(asked.saving)
    if asked.save:
        telemetry.line(f"step {progress.step}: saving, as asked")
    due = last or asked.save or is_due(progress.step, config.checkpoint.interval)
    if due and run.saving.newest_step != progress.step:
        run.save(feed, pulse)
        telemetry.restart_clock()
    if asked.stop:
        _stop(run, feed, pulse)
    return not last


def _next(run: Run, feed: Feed, pulse: Pulse) -> GlobalBatch | None:
    """The next batch; null where the data has ended."""
    try:
        return feed.next()
    except Exception:
        # A signal to the whole process group has ended the tokenizing workers, too: that is no failure of theirs.
        if run.requests.agreed(run.saver).stop:
            _stop(run, feed, pulse)
        raise


def _stop(run: Run, feed: Feed, pulse: Pulse) -> None:
    if run.saving.newest_step != run.progress.step:
        run.save(feed, pulse)
    run.saving.finish(pulse)
    raise Stopped(f"stopped after step {run.progress.step} ({run.requests.reason}); {run.saving.said_next_start()}")


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
