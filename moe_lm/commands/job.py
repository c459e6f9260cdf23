"""A training run from its first word to its last: prepare the data, train, evaluate, sample, export, and say where
everything is. `pretrain` and `finetune` differ in what it starts from.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from moe_lm.commands.closing import finish
from moe_lm.commands.output import lasting_output, output_to_file
from moe_lm.commands.prepare import PreparationDisplay
from moe_lm.commands.resuming import resume
from moe_lm.commands.run_directory import (
    end_recorded,
    has_checkpoints,
    keep_whole,
    open_directory,
    open_store,
    save_config,
    warn,
    write_state,
)
from moe_lm.commands.sharing import PLACEMENT_FILE, check_alike, check_shared, share
from moe_lm.data.chunks import ChangedSourceError
from moe_lm.data.config import DataSource
from moe_lm.data.mixture import make_mixture
from moe_lm.data.prepare import prepare
from moe_lm.data.prepared import PreparedData, load
from moe_lm.data.tokenizer import Tokenizer, load_tokenizer
from moe_lm.errors import InputError
from moe_lm.evaluation.bits_per_byte import Validation
from moe_lm.finetune.config import FinetuneRunConfig
from moe_lm.interrupts import STOPPED, interrupts
from moe_lm.model.accounting import count_parameters
from moe_lm.parallel.peers import BEAT
from moe_lm.parallel.placement import write_placement
from moe_lm.parallel.runtime import Runtime
from moe_lm.training.config import RunConfig
from moe_lm.training.loop import train
from moe_lm.training.run import Run
from moe_lm.training.start import Start
from moe_lm.training.watchdog import Watchdog

Say = Callable[[str], None]


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
            runtime.on_main(lambda: open_store(training))
            held.callback(training.saver.close)
        if resume(training, has_data, say):
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
            training.before_save = lambda: keep_whole(training)
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
    given = config.data.source is DataSource.prepared or config.tokenizer.path is not None
    if given and not isinstance(config, FinetuneRunConfig) and config.model.vocab_size > data.tokenizer.vocab_size:
        ids = data.tokenizer.vocab_size
        say(f"note: the tokenizer has {ids} ids, and the model {config.model.vocab_size} rows (model.vocab_size)")
    return data


def _check_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer with ids that the model's embedding does not have."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"model.vocab_size={config.model.vocab_size}: must be at least the tokenizer's vocabulary, "
            f"{tokenizer.vocab_size}."
        )


def _train(training: Run) -> Validation:
    """Train under a watchdog, with signals obeyed between steps."""
    peers = training.runtime.peers

    def last_words() -> None:
        peers.announce_end(f"not over in time after {interrupts.stop}", STOPPED)
        write_state(training, "stopped", step=training.progress.step, exit_code=STOPPED)

    def at_timeout(why: str) -> None:
        peers.announce_end(why)
        write_state(training, "failed", step=training.progress.step, exit_code=1, error=why)

    def silent() -> str:
        return "".join(f"; {sentence}" for sentence in peers.silent(2.5 * BEAT))

    trainer = training.config.trainer
    with (
        Watchdog(trainer.step_timeout, at_timeout, silent) as watchdog,
        interrupts.deferred(trainer.stop_deadline, last_words),
    ):
        return train(training, watchdog.beat)
