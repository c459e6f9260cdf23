"""Going on with a run: its newest good checkpoint, and whether this start asks for the run that was saved there."""

import math
import shutil
from collections.abc import Callable

from moe_lm.checkpoint.checkpoint import Checkpoint
from moe_lm.checkpoint.tensor_file import CheckpointError
from moe_lm.commands.run_directory import is_finished
from moe_lm.errors import InputError
from moe_lm.model.config import LoadBalancing, LoadSource
from moe_lm.training.run import Run

OF_THE_TEXT = (
    *("data.paths", "data.source", "data.validation", "data.text_field", "data.domain"),
    *("data.split", "data.subset", "data.revision"),
)
"""What the names of options begin with that say which text there is."""


def resume(training: Run, has_data: bool, say: Callable[[str], None]) -> bool:
    """Load the newest good checkpoint, if there is one; false when nothing is left to do.

    Args:
        training: At its beginning.
        has_data: Whether its data was there before this start.
        say: Tells the user.
    """
    checkpoint = training.newest_checkpoint(refused=lambda reason: say(f"refused checkpoint {reason}"))
    if checkpoint is None:
        if training.store.paths():
            raise InputError(
                f"{training.store.directory}: none of its checkpoints can be trusted; bring a good copy back, or give "
                "another run_name= to start anew."
            )
        return True
    max_steps = training.config.trainer.max_steps
    step = checkpoint.state["progress"]["step"]
    longer = max_steps > checkpoint.state["config"]["trainer"]["max_steps"]
    if training.runtime.decide(lambda: is_finished(training.directory, step)) and not longer:
        name, done = training.config.run_name, f"({step} steps)"
        unmade = training.config.finish.export and not (training.directory / "hf").exists()
        export = f"; `moe-lm export checkpoint={training.directory}` writes its hf/" if unmade else ""
        say(f"run {name} is finished {done}: see {training.directory}{export}; another run_name= starts a new one")
        return False
    if step > max_steps:
        raise InputError(f"trainer.max_steps={max_steps}: must be at least {step}, the step that the run stands at.")
    training.runtime.on_main(lambda: _check_same_micro_batches(training, checkpoint))
    training.runtime.on_main(lambda: _check_same_start(training, checkpoint))
    training.runtime.on_main(lambda: _check_same_data(training, checkpoint, has_data))
    try:
        training.load(checkpoint)
    except CheckpointError as error:
        raise InputError(f"{error}; resume.allow_change does not cover these.") from error
    progress = training.progress
    best = "" if progress.best_bits_per_byte is None else f", best estimate {progress.best_bits_per_byte:.4f} bits/byte"
    say(f"resumed {checkpoint.path} (step {step} of {max_steps}, {progress.targets:,} targets learned from{best})")
    before, now = checkpoint.state["environment"], training.environment
    if changed := [
        f"{name} {before[name]} → {value}" for name, value in now.items() if before.get(name, value) != value
    ]:
        say(f"note: other than when it was saved: {', '.join(changed)}; figures may differ by rounding from here on")
    return True


def _check_same_micro_batches(training: Run, checkpoint: Checkpoint) -> None:
    """Refuse other micro-batches, unless it is insisted on them, where what is learned depends on them: on each
    process's own where experts have a capacity, on those of all together where the load is balanced in each.
    """
    config, processes = training.config, training.runtime.world_size
    model, size = config.model, config.trainer.micro_batch_size
    insisted = any("trainer.micro_batch_size".startswith(name) for name in config.resume.allow_change)
    if insisted or not model.is_mixture:
        return
    is_balanced = model.load_balancing is not LoadBalancing.none and model.router_aux_loss_coef > 0
    by_micro_batch = is_balanced and model.load_balancing_source is LoadSource.micro_batch
    before = checkpoint.state["config"]["trainer"]["micro_batch_size"], checkpoint.state["environment"]["processes"]
    if model.capacity_factor is not None and before != (size, processes):
        why = f"model.capacity_factor={model.capacity_factor}"
    elif by_micro_batch and math.prod(before) != size * processes:
        why = "model.load_balancing_source=micro_batch"
    else:
        return
    raise InputError(
        f"trainer.micro_batch_size={size} on {processes} process{'es' * (processes > 1)}: with {why} the loss depends "
        f"on them, and {checkpoint.path} was trained with {before[0]} on {before[1]}; go on with those, or insist with "
        "resume.allow_change=[trainer.micro_batch_size]."
    )


def _check_same_start(training: Run, checkpoint: Checkpoint) -> None:
    """Refuse a base that is not the one that the run began from, where the run goes on with its weights: beneath
    adapters, or for the router to stay near.
    """
    if not training.has_adapters and training.config.model.router_drift_coef == 0:
        return
    before, now = checkpoint.state.get("start", {}), training.start.state
    if before.get("base_fingerprint") != now.get("base_fingerprint"):
        raise InputError(
            f"base={now.get('base')}: its weights are not those that {checkpoint.path} was trained from (then in "
            f"{before.get('base')}); bring that model back, or give another run_name= to start anew."
        )


def _check_same_data(training: Run, checkpoint: Checkpoint, has_data: bool) -> None:
    """Refuse data that was deleted and prepared again from other text: resuming would be another run."""
    data = training.data
    now = {"corpus_fingerprint": data.corpus_fingerprint, "tokenizer_fingerprint": data.tokenizer.fingerprint}
    allowed = training.config.resume.allow_change
    may_differ = {
        "corpus_fingerprint": any(n == "data" or n.startswith(OF_THE_TEXT) for n in allowed),
        "tokenizer_fingerprint": any(n.startswith("tokenizer") for n in allowed),
    }
    if changed := [n for n, value in now.items() if checkpoint.state[n] != value and not may_differ[n]]:
        made, which = training.directory / "data", ", ".join(changed)
        if not has_data:
            shutil.rmtree(made, ignore_errors=True)  # made just now: the next start shall make it of the right text
        again = f" and remove {made}" if has_data else ""
        raise InputError(
            f"{made} was prepared from other text than {checkpoint.path} was trained on ({which}); bring that text "
            f"back{again}, or give another run_name= to start anew."
        )
