"""What a run does at the boundaries of its steps: validate, save and stop; get the next batch; close.

Every process does all of it at the same boundaries, for each part needs the others.
"""

from typing import NoReturn

from moe_lm.errors import Stopped
from moe_lm.evaluation.bits_per_byte import Validation
from moe_lm.training.feed import Feed, GlobalBatch
from moe_lm.training.run import Run
from moe_lm.training.schedule import is_due
from moe_lm.training.telemetry import Telemetry
from moe_lm.training.validation import estimate, validate
from moe_lm.training.watchdog import Pulse


def between_steps(run: Run, feed: Feed, telemetry: Telemetry, pulse: Pulse) -> bool:
    """Validate, save and stop where it is due or asked for; false after the last step.

    Raises:
        Stopped: The run was asked to stop, and is saved; or its last checkpoint can not be written.
    """
    pulse()
    config, progress = run.config, run.progress
    last = progress.step >= feed.last_step
    if is_due(progress.step, config.trainer.eval_interval) and progress.validated_step != progress.step:
        estimate(run, telemetry, pulse)
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


def next_batch(run: Run, feed: Feed, pulse: Pulse) -> GlobalBatch | None:
    """The next batch; null where the data has ended.

    Raises:
        Stopped: A stop was asked for while it was waited for.
    """
    try:
        return feed.next()
    except Exception:
        # A signal to the whole process group has ended the tokenizing workers, too: that is no failure of theirs.
        if run.requests.agreed(run.saver).stop:
            _stop(run, feed, pulse)
        raise


def after_last_step(run: Run, feed: Feed, telemetry: Telemetry, pulse: Pulse) -> Validation:
    """Save what is not saved yet, and give the figures of the whole validation set.

    Raises:
        Stopped: A stop was asked for before they were known.
    """
    if run.saving.newest_step != run.progress.step:
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


def _stop(run: Run, feed: Feed, pulse: Pulse) -> NoReturn:
    if run.saving.newest_step != run.progress.step:
        run.save(feed, pulse)
    run.saving.finish(pulse)
    raise Stopped(f"stopped after step {run.progress.step} ({run.requests.reason}); {run.saving.said_next_start()}")
