"""The training loop.

The order of things, the same on every process:

1. Between two steps (`boundary.py`): validate where it is due; agree on what was asked for; end the run if its last
   checkpoint can not be written; save where it is due or asked for; stop if asked to.
2. Take the next global batch. One that a rewind left out, or that is padding alone, is no step.
3. Step (`step.py`): forward, backward, update at the schedule's learning rate. Where loss or gradients are not finite,
   or the loss is a spike and not to be learned from, the update is skipped.
4. Treat a spike by `guards.spike_policy`; a rewind goes back to a checkpoint, and the loop begins anew from there.
5. Count what was learned from, record the figures, and give up after too many skipped updates in a row.

After the last step the whole validation set is scored.
"""

import contextlib
import math
from collections import Counter

from moe_lm.errors import RunError, Stopped
from moe_lm.evaluation.bits_per_byte import Validation
from moe_lm.training.boundary import after_last_step, between_steps, next_batch
from moe_lm.training.config import SpikePolicy
from moe_lm.training.guards import skipped_too_often
from moe_lm.training.run import Run
from moe_lm.training.schedule import learning_rate_factor
from moe_lm.training.step import next_load, train_step
from moe_lm.training.telemetry import Telemetry
from moe_lm.training.validation import validate_start
from moe_lm.training.watchdog import Pulse


def train(run: Run, pulse: Pulse) -> Validation:
    """Train from where the run stands to its last step; return the figures of the whole validation set.

    Raises:
        Stopped: The run was asked to stop, and is saved.
        RunError: Too many updates in a row were skipped, or rewinds did not help.
    """
    most, rewinds = run.config.guards.max_rewinds, Counter[int]()
    with Telemetry(run) as telemetry:
        try:
            while (final := _train_until_rewind(run, telemetry, pulse)) is None:
                step = run.progress.step
                rewinds[step] += 1
                if rewinds[step] > most:
                    said = f"the loss leapt again after {most} rewinds to step {step}"
                    remedy = "lower optimizer.learning_rate, or look at the data there"
                    raise run.runtime.failed_everywhere(RunError(f"{said}: {remedy}."))
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
            validate_start(run, telemetry, pulse)
        while between_steps(run, feed, telemetry, pulse) and (batch := next_batch(run, feed, pulse)) is not None:
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
        return after_last_step(run, feed, telemetry, pulse)
