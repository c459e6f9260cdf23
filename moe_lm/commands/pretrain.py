"""`moe-lm pretrain`: prepare the data, train, evaluate, sample, export, and say where everything is."""

import contextlib
import functools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from moe_lm.checkpoint.checkpoint import Checkpoint
from moe_lm.checkpoint.saver import said
from moe_lm.checkpoint.store import CheckpointStore, most_kept
from moe_lm.checkpoint.tensor_file import CheckpointError
from moe_lm.commands.model_source import write_export
from moe_lm.commands.prepare import PreparationDisplay
from moe_lm.config import NEVER_TO_CHANGE, differences, load_saved, save
from moe_lm.data.chunks import ChangedSourceError
from moe_lm.data.config import DataSource
from moe_lm.data.loader import make_mixture, validate_batch_sizes
from moe_lm.data.prepare import prepare
from moe_lm.data.prepared import PreparedData, load
from moe_lm.data.streams import check_world_size
from moe_lm.data.tokenizer import Tokenizer, load_tokenizer
from moe_lm.errors import InputError, Stopped
from moe_lm.evaluation.compressors import document_bytes, gzip_bits_per_byte, xz_bits_per_byte
from moe_lm.evaluation.generation import generate
from moe_lm.files import locked, write_json
from moe_lm.hf.export import check_output
from moe_lm.interrupts import STOPPED, interrupts
from moe_lm.model.accounting import count_parameters, training_state_bytes
from moe_lm.parallel.runtime import Runtime, launched_world_size
from moe_lm.training.config import OptimizerName, ResumePolicy, RunConfig
from moe_lm.training.loop import train
from moe_lm.training.machine import total_memory
from moe_lm.training.requests import STOP_FILE
from moe_lm.training.run import Run, expected_tensors
from moe_lm.training.watchdog import Watchdog

Say = Callable[[str], None]

CONFIG_FILE = "config.yaml"
"""The fully resolved configuration, in the run's directory."""

STATE_FILE = "state.json"
"""How the run stands or ended, in the run's directory."""


def run(config: RunConfig) -> int:
    """Start a run, go on with it, or say that it is finished."""
    start = time.monotonic()
    directory = Path(config.output_dir) / config.run_name
    validate_batch_sizes(config.trainer.global_batch_size, config.trainer.micro_batch_size, launched_world_size())
    if config.data.streaming:
        check_world_size(config.data.num_streams, launched_world_size())
    runtime = Runtime(config.trainer.device.value)

    def say(text: str) -> None:
        if runtime.is_main:
            print(text, flush=True)

    with contextlib.closing(runtime), ExitStack() as held:
        with ExitStack() as beginning:
            _check_memory(config, runtime)
            runtime.on_main(lambda: _open_directory(config, directory, held, beginning))
            training = Run(config, runtime, _prepare(config, directory, runtime, say), directory, _warn)
            runtime.on_main(lambda: _open_store(training))
            held.callback(training.saver.close)
        if _resume(training, say):
            # Only now: a change that was insisted on, but does not fit the checkpoint, leaves the old one standing.
            runtime.on_main(lambda: save(config, directory / CONFIG_FILE))
            count, dtype = count_parameters(config.model), str(training.compute.dtype).removeprefix("torch.")
            say(
                f"{count.total / 1e6:.1f} M parameters, {count.active / 1e6:.1f} M active per token; computing in "
                f"{dtype} on {runtime.world_size} x {runtime.device.type}; ready after {time.monotonic() - start:.0f} s"
            )
            with _end_recorded(training, say):
                final = _train(training)
                runtime.on_main(lambda: _finish(training, final, say))
        runtime.barrier()  # nobody takes the process group down while a peer still listens
    return 0


def _check_memory(config: RunConfig, runtime: Runtime) -> None:
    """Refuse a model that can not fit before minutes go into its data, and before the system ends the process."""
    moments = 1 if config.optimizer.name is OptimizerName.muon else 2
    needed, there = training_state_bytes(config.model, moments), total_memory(runtime.device)
    if runtime.device.type == "cpu" and config.checkpoint.background:
        needed += 4 * (1 + moments) * count_parameters(config.model).total  # the copy that a save writes from
    if needed > there:
        billions = count_parameters(config.model).total / 1e9
        raise InputError(
            f"model: {billions:.1f} B parameters need {needed / 2**30:,.0f} GiB for weights, gradients, moments "
            f"and the copy for saving alone, and this {runtime.device.type} has {there / 2**30:,.0f} GiB; choose a "
            "smaller model."
        )


def _open_directory(config: RunConfig, directory: Path, held: ExitStack, beginning: ExitStack) -> None:
    """Create the run directory, or check that the run in it is the one asked for; lock it until `held` closes.

    A directory that was created here goes again if bad input is found before `beginning` closes.
    """
    if not config.output_dir:
        raise InputError("output_dir='': give a directory; '.' is the present one.")
    try:
        created = _create(directory)
        if not held.enter_context(locked(directory)):
            raise InputError(f"run_name={config.run_name}: another process is training in {directory}; wait for it.")
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            # One that an earlier run obeyed. A launcher that restarts what has stopped shall find it, and stop again.
            (directory / STOP_FILE).unlink(missing_ok=True)
        if created:
            beginning.push(functools.partial(_remove_after_bad_input, directory))
        if CheckpointStore(directory / "checkpoints", config.checkpoint).paths():
            _check_same_run(config, directory)
        if config.finish.export:
            check_output(directory / "hf", "give another run_name=, or finish.export=false")
    except OSError as error:
        raise InputError(
            f"output_dir={config.output_dir}: {directory} can not be written ({error.strerror}); give another one."
        ) from error


def _create(directory: Path) -> bool:
    """Make a directory; false where it stands already."""
    try:
        directory.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def _remove_after_bad_input(directory: Path, kind: type[BaseException] | None, *_: object) -> None:
    if kind is not None and issubclass(kind, InputError):
        shutil.rmtree(directory, ignore_errors=True)


def _check_same_run(config: RunConfig, directory: Path) -> None:
    if config.resume.policy is ResumePolicy.never:
        raise InputError(f"resume=never: {directory} holds a run already; give another run_name=, or resume=auto.")
    if changed := differences(load_saved(RunConfig, directory / CONFIG_FILE), config):
        fields = "; ".join(f"{name}={change}" for name, change in changed.items())
        names = ",".join(changed) if len(changed) <= 4 else "…"
        fixed = any(name in NEVER_TO_CHANGE for name in changed)
        insist = "" if fixed else f", or insist with resume.allow_change=[{names}]"
        raise InputError(
            f"{directory} was started with another configuration: {fields}. Give the old values to go on with it, or "
            f"another run_name= to start anew{insist}."
        )


def _prepare(config: RunConfig, directory: Path, runtime: Runtime, say: Say) -> PreparedData:
    """The main process makes the tokenizer and the shards; then all load them."""

    def make() -> None:
        if config.tokenizer.path is not None and not (directory / "data" / "manifest.json").exists():
            _check_vocabulary(config, load_tokenizer(Path(config.tokenizer.path).expanduser()))
        try:
            with PreparationDisplay() as display:
                prepare(config.data, config.tokenizer, directory, report=display.line, progress=display.progress)
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
        runtime.on_main(lambda: load(config.data, config.tokenizer, directory))
        data = load(config.data, config.tokenizer, directory)
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


def _resume(training: Run, say: Say) -> bool:
    """Load the newest good checkpoint, if there is one; false when nothing is left to do."""
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
    if _is_finished(training.directory / STATE_FILE, step) and not longer:
        name, done = training.config.run_name, f"({step} steps)"
        say(f"run {name} is finished {done}: see {training.directory}; another run_name= starts a new one")
        return False
    _check_same_data(training, checkpoint)
    try:
        training.load(checkpoint)
    except CheckpointError as error:
        raise InputError(f"{error}; it does not fit this configuration, see resume.allow_change.") from error
    progress = training.progress
    best = "" if progress.best_bits_per_byte is None else f", best estimate {progress.best_bits_per_byte:.4f} bits/byte"
    say(f"resumed {checkpoint.path} (step {step} of {max_steps}, {progress.targets:,} targets learned from{best})")
    before, now = checkpoint.state["environment"], training.environment
    if changed := [f"{name} {before.get(name)} → {value}" for name, value in now.items() if before.get(name) != value]:
        say(f"note: other than when it was saved: {', '.join(changed)}; figures may differ by rounding from here on")
    return True


def _train(training: Run) -> float:
    """Train under a watchdog, with signals obeyed between steps."""

    def at_deadline() -> None:
        _write_state(training, "stopped", exit_code=STOPPED)

    def at_timeout(why: str) -> None:
        _write_state(training, "failed", exit_code=1, error=why)

    trainer = training.config.trainer
    with (
        Watchdog(trainer.step_timeout, at_timeout) as watchdog,
        interrupts.deferred(trainer.stop_deadline, at_deadline),
    ):
        return train(training, watchdog.beat)


def _open_store(training: Run) -> None:
    """Refuse a run whose checkpoints can not be written, or fit on the disk with its export, before its first step."""
    config = training.config
    try:
        training.store.open()
    except OSError as error:
        raise InputError(
            f"output_dir={config.output_dir}: {training.store.directory} can not be written ({said(error)}); give "
            "another one."
        ) from error
    kinds = expected_tensors(training.model, training.optimizer, trained=True)
    size = sum(kind.num_bytes for kind in kinds.values())
    kept = most_kept(config.trainer.max_steps, config.trainer.eval_interval, config.checkpoint)
    export = 4 * count_parameters(config.model).total if config.finish.export else 0
    there = sum(file.stat().st_size for path in training.store.paths() for file in path.iterdir())
    # One more while it is written, since nothing is deleted before the new one is verified.
    needed, free = (kept + 1) * size + export - there, shutil.disk_usage(training.store.directory).free
    if needed > free:
        raise InputError(
            f"output_dir={config.output_dir}: {kept} checkpoints of {size / 1e6:,.0f} MB, one more while it is written "
            f"and the export need {needed / 1e6:,.0f} MB, and the disk has {free / 1e6:,.0f} MB free; free some, keep "
            "fewer (checkpoint.keep_last, keep_every, keep_best), or give another output_dir."
        )


def _warn(text: str) -> None:
    print(f"moe-lm: {text}", file=sys.stderr, flush=True)


def _is_finished(path: Path, step: int) -> bool:
    try:
        state = json.loads(path.read_bytes())
        return state["status"] == "finished" and state["step"] == step
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def _end_recorded(training: Run, say: Say) -> Iterator[None]:
    """Say in state.json how the run ends, if it does not end well; `_finish` says so if it does."""
    try:
        _write_state(training, "running")
        yield
    except Stopped:
        _write_state(training, "stopped", exit_code=STOPPED)
        raise
    except KeyboardInterrupt:
        training.saver.close()
        _write_state(training, "stopped", exit_code=STOPPED)
        say(f"stopped after step {training.progress.step}; the same command {training.said_next_start()}")
        raise
    except Exception as error:
        _write_state(training, "failed", exit_code=2 if isinstance(error, InputError) else 1, error=str(error))
        if training.runtime.all_failed:
            training.runtime.barrier()  # a launcher ends all processes as soon as one has gone
        raise


def _write_state(training: Run, status: str, **details: Any) -> None:
    if training.runtime.is_main:
        state = {"status": status, "step": training.progress.step, **details}
        try:
            write_json(training.directory / STATE_FILE, state)
        except OSError as error:  # a full disk must not change how a run ends
            _warn(f"{training.directory / STATE_FILE}: {error.strerror}")


def _check_same_data(training: Run, checkpoint: Checkpoint) -> None:
    """Refuse data that was deleted and prepared again from other text: resuming would be another run."""
    data = training.data
    now = {"corpus_fingerprint": data.corpus_fingerprint, "tokenizer_fingerprint": data.tokenizer.fingerprint}
    allowed = training.config.resume.allow_change
    may_differ = {
        "corpus_fingerprint": any(n in ("data", "data.paths", "data.source") or "data.sources" in n for n in allowed),
        "tokenizer_fingerprint": any(n.startswith("tokenizer") for n in allowed),
    }
    if changed := [n for n, value in now.items() if checkpoint.state[n] != value and not may_differ[n]]:
        raise InputError(
            f"{training.directory / 'data'} was prepared from other text than {checkpoint.path} was trained on "
            f"({', '.join(changed)}); bring that text back, or give another run_name= to start anew."
        )


def _finish(training: Run, bits_per_byte: float, say: Say) -> None:
    """Compare, sample, export, and say where everything is."""
    finish, directory, data = training.config.finish, training.directory, training.data
    figures = {"bits_per_byte": bits_per_byte}
    if finish.compare_compressors:
        content = document_bytes(data.validation, data.tokenizer)
        figures |= {"gzip_9": gzip_bits_per_byte(content), "xz_9": xz_bits_per_byte(content)}
        say(
            f"\nheld out: {data.counts['validation_documents']} documents, {len(content):,} bytes ({data.split}), "
            f"corpus {data.corpus_fingerprint[:12]}\n"
            f"bits per byte: this model {bits_per_byte:.3f}, gzip -9 {figures['gzip_9']:.3f}, "
            f"xz -9 {figures['xz_9']:.3f}"
        )
    if finish.sample_prompt is not None:
        say(f"\nsample:\n{_sample(training, finish.sample_prompt, finish.sample_tokens)}\n")
    if finish.export:
        parameters = training.model.named_parameters()
        write_export(training.config.model, parameters, data.tokenizer_directory, directory / "hf")
    _write_state(training, "finished", exit_code=0, validation=figures)
    say(f"run directory:      {directory}")
    if finish.export:
        say(f"Hugging Face model: {directory / 'hf'}")


def _sample(training: Run, prompt: str, tokens: int) -> str:
    tokenizer = training.data.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    choices = tokenizer.generated_ids
    new_ids = generate(training.model, ids, tokens, tokenizer.eos_id, temperature=0.7, top_k=50, choices=choices)
    return prompt + tokenizer.decode(list(new_ids))
