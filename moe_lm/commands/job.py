"""A training run from its first word to its last: prepare the data, train, evaluate, sample, export, and say where
everything is. `pretrain` and `finetune` differ in what it starts from.
"""

import math
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from moe_lm.checkpoint.checkpoint import Checkpoint
from moe_lm.checkpoint.saver import said
from moe_lm.checkpoint.store import most_kept, step_of
from moe_lm.checkpoint.tensor_file import CheckpointError
from moe_lm.commands.closing import finish
from moe_lm.commands.output import lasting_output, output_to_file
from moe_lm.commands.prepare import PreparationDisplay
from moe_lm.commands.run_directory import (
    end_recorded,
    has_checkpoints,
    is_finished,
    open_directory,
    save_config,
    warn,
    write_state,
)
from moe_lm.commands.sharing import PLACEMENT_FILE, check_alike, check_shared, share
from moe_lm.data.chunks import ChangedSourceError
from moe_lm.data.config import DataSource
from moe_lm.data.loader import make_mixture
from moe_lm.data.prepare import prepare
from moe_lm.data.prepared import PreparedData, load
from moe_lm.data.tokenizer import Tokenizer, load_tokenizer
from moe_lm.errors import InputError
from moe_lm.evaluation.bits_per_byte import Validation
from moe_lm.interrupts import STOPPED, interrupts
from moe_lm.model.accounting import count_parameters
from moe_lm.model.config import LoadBalancing, LoadSource
from moe_lm.parallel.peers import BEAT
from moe_lm.parallel.placement import write_placement
from moe_lm.parallel.runtime import Runtime
from moe_lm.training.config import RunConfig, SpikePolicy
from moe_lm.training.loop import train
from moe_lm.training.run import Run
from moe_lm.training.start import Start
from moe_lm.training.state import expected_tensors
from moe_lm.training.watchdog import Watchdog

Say = Callable[[str], None]

OF_THE_TEXT = (
    *("data.paths", "data.source", "data.validation", "data.text_field", "data.domain"),
    *("data.split", "data.subset"),
)
"""What the names of options begin with that say which text there is."""


def run_job(config: RunConfig, make_start: Callable[[Runtime], Start]) -> int:
    """Start a run, go on with it, or say that it is finished; the command's exit code.

    Args:
        config: Of the run.
        make_start: Opens what the run begins from, on every process.
    """
    with lasting_output():
        return _run(config, make_start)


def _run(config: RunConfig, make_start: Callable[[Runtime], Start]) -> int:
    began = time.monotonic()
    directory = Path(config.output_dir).expanduser() / config.run_name
    runtime = Runtime(config.trainer.device.value)

    def say(text: str) -> None:
        if runtime.is_main:
            print(text, flush=True)

    with runtime, ExitStack() as held:
        with ExitStack() as beginning:
            check_alike(config, runtime)
            start = make_start(runtime)
            layout, placement, said_of_sharing = share(config, runtime, directory, start)
            start.check_layout(layout, placement)
            runtime.on_main(lambda: open_directory(config, directory, held, beginning))
            check_shared(config, directory, runtime)
            held.enter_context(output_to_file(directory / "output", runtime.rank))
            has_data = (directory / "data").exists()
            data = _prepare(config, directory, runtime, say)
            training = Run(config, runtime, data, directory, warn, layout, placement, start)
            runtime.on_main(lambda: _open_store(training))
            held.callback(training.saver.close)
        if _resume(training, has_data, say):
            # Only now: a change that was insisted on, but does not fit the checkpoint, leaves the old one standing.
            runtime.on_main(lambda: save_config(config, directory))
            count, dtype = count_parameters(config.model), str(training.compute.dtype).removeprefix("torch.")
            if placement is not None:
                runtime.on_main(lambda: write_placement(directory / PLACEMENT_FILE, placement))
            for text in filter(None, [*said_of_sharing, start.said()]):
                say(text)
            details = [str(layout) if layout.sharded else "", training.environment["kernels"]]
            detailed = f" ({', '.join(filter(None, details))})" if any(details) else ""
            say(
                f"{count.total / 1e6:.1f} M parameters, {count.active / 1e6:.1f} M active per token; computing in "
                f"{dtype} on {runtime.world_size} x {runtime.device.type}{detailed}; ready after "
                f"{time.monotonic() - began:.0f} s"
            )
            with end_recorded(training, say):
                final = _train(training)
                runtime.on_main(lambda: finish(training, final, say))
        runtime.barrier()  # nobody takes the process group down while a peer still listens
    return 0


def _prepare(config: RunConfig, directory: Path, runtime: Runtime, say: Say) -> PreparedData:
    """The main process makes the tokenizer and the shards; then all load them.

    The tokenizer of a run that has checkpoints is never made or copied over: they mean nothing without it.
    """
    keep = has_checkpoints(config, directory)

    def make() -> None:
        if config.tokenizer.path is not None and not (directory / "data" / "manifest.json").exists():
            _check_vocabulary(config, load_tokenizer(Path(config.tokenizer.path).expanduser()))
        try:
            with PreparationDisplay() as display:
                prepare(
                    config.data,
                    config.tokenizer,
                    directory,
                    keep_tokenizer=keep,
                    report=display.line,
                    progress=display.progress,
                )
        except ChangedSourceError as error:
            # Of a run that was prepared, the shards are what counts; a stream is read anew, and must be the same.
            if config.data.streaming:
                raise InputError(f"{error.what}; bring the old text back, or give another run_name=.") from error
            if not (directory / "data" / "manifest.json").exists():
                raise
            say(f"note: {error.what}; the run goes on with the text that it was prepared from")

    if config.data.source is not DataSource.prepared:
        sources = config.data.resolved_sources()
        if any(source.weight is not None for source in sources.values()):
            make_mixture(config.data, dict.fromkeys(sources, ()), 1)  # a wrong weight before any text is read
        runtime.on_main(make)
        data = load(config.data, config.tokenizer, directory)
    else:
        # The main process copies the tokenizer into the run's directory before the others read anything.
        runtime.on_main(lambda: load(config.data, config.tokenizer, directory, keep_tokenizer=keep))
        data = load(config.data, config.tokenizer, directory, keep_tokenizer=keep)
    _check_vocabulary(config, data.tokenizer)
    if config.data.source is DataSource.prepared and config.model.vocab_size > data.tokenizer.vocab_size:
        ids = data.tokenizer.vocab_size
        say(f"note: model.vocab_size={config.model.vocab_size}, and the set's tokenizer has {ids} ids")
    return data


def _check_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer with ids that the model's embedding does not have."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"model.vocab_size={config.model.vocab_size}: must be at least the tokenizer's vocabulary, "
            f"{tokenizer.vocab_size}."
        )


def _resume(training: Run, has_data: bool, say: Say) -> bool:
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
        say(f"run {name} is finished {done}: see {training.directory}; another run_name= starts a new one")
        return False
    if step > max_steps:
        raise InputError(f"trainer.max_steps={max_steps}: must be at least {step}, the step that the run stands at.")
    training.runtime.on_main(lambda: _check_same_micro_batches(training, checkpoint))
    training.runtime.on_main(lambda: _check_same_start(training, checkpoint))
    training.runtime.on_main(lambda: _check_same_data(training, checkpoint, has_data))
    try:
        training.load(checkpoint)
    except CheckpointError as error:
        raise InputError(f"{error}; what changes these can not be insisted on.") from error
    progress = training.progress
    best = "" if progress.best_bits_per_byte is None else f", best estimate {progress.best_bits_per_byte:.4f} bits/byte"
    say(f"resumed {checkpoint.path} (step {step} of {max_steps}, {progress.targets:,} targets learned from{best})")
    before, now = checkpoint.state["environment"], training.environment
    if changed := [
        f"{name} {before[name]} → {value}" for name, value in now.items() if before.get(name, value) != value
    ]:
        say(f"note: other than when it was saved: {', '.join(changed)}; figures may differ by rounding from here on")
    return True


def _train(training: Run) -> Validation:
    """Train under a watchdog, with signals obeyed between steps."""
    peers = training.runtime.peers

    def last_words() -> None:
        peers.fail(f"not over in time after {interrupts.stop}", STOPPED)
        write_state(training, "stopped", step=training.progress.step, exit_code=STOPPED)

    def at_timeout(why: str) -> None:
        peers.fail(why)
        write_state(training, "failed", step=training.progress.step, exit_code=1, error=why)

    def silent() -> str:
        return "".join(f"; {sentence}" for sentence in peers.silent(2.5 * BEAT))

    trainer = training.config.trainer
    with (
        Watchdog(trainer.step_timeout, at_timeout, silent) as watchdog,
        interrupts.deferred(trainer.stop_deadline, last_words),
    ):
        return train(training, watchdog.beat)


def _open_store(training: Run) -> None:
    """Refuse a run whose checkpoints can not be written, or fit on the disk with its export, before its first step."""
    config, paths = training.config, training.store.paths()
    if paths and step_of(paths[-1]) >= config.trainer.max_steps and is_finished(training.directory, step_of(paths[-1])):
        return
    try:
        training.store.open()
    except OSError as error:
        raise InputError(
            f"output_dir={config.output_dir}: {training.store.directory} can not be written ({said(error)}); give "
            "another one."
        ) from error
    kinds = expected_tensors(config.model, training.optimizer, trained=True)
    size = sum(kind.num_bytes for kind in kinds.values())
    rewinds = config.guards.spike_policy is SpikePolicy.rewind
    kept = most_kept(config.trainer.max_steps, config.trainer.eval_interval, config.checkpoint, rewinds)
    export = 4 * count_parameters(config.model).total if config.finish.export else 0
    there = sum(file.stat().st_size for path in paths for file in path.iterdir())
    # One more while it is written, since nothing is deleted before the new one is verified.
    needed, free = (kept + 1) * size + export - there, shutil.disk_usage(training.store.directory).free
    if needed > free:
        raise InputError(
            f"output_dir={config.output_dir}: {kept} checkpoints of {size / 1e6:,.0f} MB, one more while it is written "
            f"and the export need {needed / 1e6:,.0f} MB, and the disk has {free / 1e6:,.0f} MB free; free some, keep "
            "fewer (checkpoint.keep_last, keep_every, keep_best), or give another output_dir."
        )


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
