"""The directory of a run: who may write in it, whether the run in it is the one asked for, and how it stands."""

import contextlib
import functools
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from moe_lm.checkpoint.saver import said
from moe_lm.checkpoint.store import CheckpointStore, most_kept, step_of
from moe_lm.commands.changes import check_allowed, differences, is_fixed
from moe_lm.config import load_saved, save
from moe_lm.data.tokenizer_sentencepiece import SentencePieceTokenizer
from moe_lm.errors import InputError, RunError, Stopped
from moe_lm.files import locked, write_json
from moe_lm.hf.export import check_expressible, check_output
from moe_lm.interrupts import STOPPED
from moe_lm.model.accounting import count_parameters
from moe_lm.process import rank, signature, was_restarted
from moe_lm.training.config import ResumePolicy, RunConfig, SpikePolicy, TrackerName
from moe_lm.training.requests import STOP_FILE
from moe_lm.training.run import Run
from moe_lm.training.state import expected_tensors

CONFIG_FILE = "config.yaml"
"""The fully resolved configuration."""

STATE_FILE = "state.json"
"""How the run stands or ended."""


def warn(text: str) -> None:
    """A sentence on the error output; of another process than the main one, past the file that its output goes to."""
    stream = sys.stderr if rank() == 0 else sys.__stderr__
    if stream is not None:
        print(f"{signature()}: {text}", file=stream, flush=True)


def open_directory(config: RunConfig, directory: Path, held: ExitStack, beginning: ExitStack) -> None:
    """Create the directory, or check that the run in it is the one asked for; lock it until `held` closes.

    A directory that was created here goes again if bad input is found before `beginning` closes.

    Raises:
        InputError: It can not be written, is in use, or holds another run, or one whose checkpoints are gone.
    """
    if not config.output_dir:
        raise InputError("output_dir='': give a directory; '.' is the present one.")
    check_allowed(config)
    if config.tracker.name is TrackerName.wandb and importlib.util.find_spec("wandb") is None:
        raise InputError("tracker=wandb: wandb is not installed here; `pip install wandb`, or leave it out.")
    try:
        created = _create(directory)
        if not held.enter_context(locked(directory)):
            raise InputError(f"run_name={config.run_name}: another process is training in {directory}; wait for it.")
        if not was_restarted() and (directory / STOP_FILE).is_file():
            # One that an earlier run obeyed. A launcher that restarts what has stopped shall find it, and stop again.
            (directory / STOP_FILE).unlink()
        if created:
            beginning.push(functools.partial(_remove_after_bad_input, directory))
        if has_checkpoints(config, directory):
            _check_same_run(config, directory)
        else:
            _check_not_lost(directory)
        if config.finish.export:
            check_expressible(config.model, "give finish.export=false, or model.capacity_factor=null")
            for name in ("hf", "adapter"):
                check_output(directory / name, "give another run_name=, or finish.export=false")
    except OSError as error:
        raise InputError(
            f"output_dir={config.output_dir}: {directory} can not be written ({error.strerror}); give another one."
        ) from error


def has_checkpoints(config: RunConfig, directory: Path) -> bool:
    """Whether a run in this directory has been saved."""
    return bool(CheckpointStore(directory / "checkpoints", config.checkpoint).paths())


def save_config(config: RunConfig, directory: Path) -> None:
    """Write the configuration that the run goes on with."""
    save(config, directory / CONFIG_FILE)


def is_finished(directory: Path, step: int) -> bool:
    """Whether the run ended, at this step."""
    state = _read_state(directory)
    return state.get("status") == "finished" and state.get("step") == step


def open_store(training: Run) -> None:
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


def keep_whole(training: Run) -> None:
    """Put back what a run's checkpoints mean nothing without, where somebody has moved or cleaned its directory while
    it trains; the main process alone.
    """
    directory, tokenizer = training.directory, training.data.tokenizer
    if not training.runtime.is_main:
        return
    try:
        gone = [name for name in (CONFIG_FILE, "tokenizer") if not (directory / name).exists()]
        if not gone:
            return
        directory.mkdir(parents=True, exist_ok=True)
        save_config(training.config, directory)
        if "tokenizer" in gone and isinstance(tokenizer, SentencePieceTokenizer):  # the other kind is its files
            tokenizer.save(directory / "tokenizer", training.config.data.sequence_length)
        lost = [name for name in gone if not (directory / name).exists()]
    except OSError:
        return  # the save will meet it as well, and does as the policy says
    warn(
        f"{directory}: {' and '.join(gone)} went while the run trains (was it moved, or cleaned?); "
        + (f"{' and '.join(lost)} can not be put back, bring a copy" if lost else "put back, and the run goes on there")
    )


def write_state(training: Run, status: str, **details: Any) -> None:
    """Say how the run stands; the main process alone."""
    if training.runtime.is_main:
        state = {"status": status, **details, "checkpoint": next((p.name for p in training.store.paths()[::-1]), None)}
        try:
            write_json(training.directory / STATE_FILE, state)
        except OSError as error:  # a full disk must not change how a run ends
            warn(f"{training.directory / STATE_FILE}: {error.strerror}")


@contextlib.contextmanager
def end_recorded(training: Run, say: Callable[[str], None]) -> Iterator[None]:
    """Say in state.json how the run ends, if it does not end well; whoever finishes it says so if it does."""
    peers = training.runtime.peers
    peers.last_words = lambda sentence: _record_failure(training, RunError(sentence))
    try:
        write_state(training, "running")
        yield
    except Stopped:
        write_state(training, "stopped", step=training.progress.step, exit_code=STOPPED)
        raise
    except (Exception, KeyboardInterrupt) as raised:
        error = peers.named(raised)
        peers.announce_failure(error)  # before anything that takes time: they wait in a collective
        if isinstance(error, KeyboardInterrupt):
            training.saver.close()
            write_state(training, "stopped", step=training.progress.step, exit_code=STOPPED)
            say(f"stopped after step {training.progress.step}; {training.saving.said_next_start()}")
        else:
            _record_failure(training, error)
        if training.runtime.all_failed:
            training.runtime.barrier()  # a launcher ends all processes as soon as one has gone
        raise error from (None if error is raised else raised)


def _record_failure(training: Run, error: BaseException) -> None:
    code = error.code if isinstance(error, (InputError, RunError)) else 1
    write_state(training, "failed", step=training.progress.step, exit_code=code, error=str(error))


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
    for command in ("import", "upcycle"):
        if (directory / f"{command}.json").exists():
            raise InputError(
                f"run_name={config.run_name}: {directory} holds a model that `moe-lm {command}` wrote, and no run; "
                "give another run_name=."
            )
    begun = load_saved(type(config), directory / CONFIG_FILE)
    if changed := differences(begun, config):
        fields = "; ".join(f"{name}={change}" for name, change in changed.items())
        names = list(dict.fromkeys([*config.resume.allow_change, *changed]))
        insist = f"[{','.join(names)}]" if len(names) <= 4 else "[…], with the name of each"
        insist = f", or insist with resume.allow_change={insist}"
        if "base" in changed:
            insist += " if the base is a copy with the same weights"
        if fixed := [name for name in changed if is_fixed(name, begun)]:
            insist = f" ({', '.join(fixed)} can not change)"
        raise InputError(
            f"{directory} was started with another configuration: {fields}. Give the old values to go on with it, or "
            f"another run_name= to start anew{insist}."
        )


def _check_not_lost(directory: Path) -> None:
    """Refuse to begin anew, in silence, where there were checkpoints."""
    if not (directory / STATE_FILE).exists():
        return
    if (known := _read_state(directory).get("checkpoint")) or not (directory / "checkpoints").exists():
        raise InputError(
            f"{directory}: holds a run whose checkpoints are gone ({known or 'checkpoints/'}); bring them back, give "
            f"another run_name=, or remove {directory / STATE_FILE} to start anew."
        )


def _read_state(directory: Path) -> dict[str, Any]:
    try:
        state = json.loads((directory / STATE_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}
