"""`moe-lm pretrain`: prepare the data, train, evaluate, sample, export, and say where everything is."""

import json
import os
import sys
import time
from pathlib import Path

from moe_lm.checkpoint.store import Checkpoint
from moe_lm.commands.model_source import write_export
from moe_lm.config import differences, load_saved, save
from moe_lm.data.loader import validate_batch_sizes
from moe_lm.data.prepare import prepare
from moe_lm.errors import InputError
from moe_lm.evaluation.compressors import document_bytes, gzip_bits_per_byte, xz_bits_per_byte
from moe_lm.evaluation.generation import generate
from moe_lm.hf.export import check_output
from moe_lm.model.accounting import count_parameters
from moe_lm.parallel.runtime import Runtime, distributed_rank
from moe_lm.training.config import ResumePolicy, RunConfig, TrackerName
from moe_lm.training.loop import train
from moe_lm.training.run import Run


def run(config: RunConfig) -> int:
    """Run or resume a pretraining run."""
    start = time.monotonic()
    directory = Path(config.output_dir) / config.run_name
    if distributed_rank() == 0:
        _open_directory(config, directory)
        if config.finish.export:
            check_output(directory / "hf")
    trackers = [] if config.tracker.name is TrackerName.none else [config.tracker.name.value]
    runtime = Runtime(config.trainer.device.value, trackers, str(directory))
    try:
        _train_and_finish(config, runtime, directory, start)
    finally:
        runtime.close()
    return 0


def _train_and_finish(config: RunConfig, runtime: Runtime, directory: Path, start: float) -> None:
    say = _printer(runtime)
    validate_batch_sizes(config.trainer.global_batch_size, config.trainer.micro_batch_size, runtime.world_size)
    if not runtime.is_main:
        runtime.barrier()  # the main process prepares the data, the others load what it wrote
    data = prepare(config.data, config.tokenizer, directory, threads=os.cpu_count() or 1, report=say)
    if runtime.is_main:
        runtime.barrier()
    run = Run(config, runtime, data, directory)
    checkpoint = run.store.newest(refused=lambda reason: say(f"refused checkpoint {reason}"))
    if checkpoint is not None:
        if _is_finished(directory, checkpoint, config):
            say(f"run {config.run_name} is finished ({checkpoint.step} steps): {directory}; "
                "another run_name= starts a new one")
            return
        run.load(checkpoint)
        say(f"resumed {checkpoint.path} (step {checkpoint.step} of {config.trainer.max_steps})")
    count = count_parameters(config.model)
    say(
        f"{count.total / 1e6:.1f} M parameters, {count.active / 1e6:.1f} M active per token; compute in "
        f"{str(run.compute.dtype).removeprefix('torch.')} on {runtime.world_size} × {runtime.device.type}; "
        f"first step {time.monotonic() - start:.0f} s after the start"
    )
    final = train(run)
    if runtime.is_main:
        _finish(run, final, say)
    runtime.barrier()


def _open_directory(config: RunConfig, directory: Path) -> None:
    """Create the run directory, or check that the run in it is the one asked for."""
    saved = directory / "config.yaml"
    if saved.exists():
        if config.resume is ResumePolicy.never:
            raise InputError(f"resume=never: {directory} holds a run already; give another run_name=, or resume=auto.")
        if changed := differences(load_saved(RunConfig, saved), config):
            raise InputError(
                f"{directory} was started with another configuration: {'; '.join(changed)}. Give the old values to go on with it, "
                "or another run_name= to start anew."
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save(config, saved)
    except OSError as error:
        raise InputError(
            f"output_dir={config.output_dir}: {directory} can not be written ({error.strerror}); give another output_dir=."
        ) from error


def _is_finished(directory: Path, checkpoint: Checkpoint, config: RunConfig) -> bool:
    return (directory / "state.json").exists() and checkpoint.step >= config.trainer.max_steps


def _finish(run: Run, final: float, say) -> None:  # type: ignore[no-untyped-def]
    """Compare, sample, export, and print where everything is."""
    config, directory, tokenizer = run.config, run.directory, run.data.tokenizer
    figures = {"bits_per_byte": final}
    if config.finish.compare_compressors:
        content = document_bytes(run.data.validation, tokenizer)
        figures |= {"gzip_bits_per_byte": gzip_bits_per_byte(content), "xz_bits_per_byte": xz_bits_per_byte(content)}
        say(
            f"\nvalidation, bits per byte:  model {final:.3f}   gzip -9 {figures['gzip_bits_per_byte']:.3f}   "
            f"xz -9 {figures['xz_bits_per_byte']:.3f}\n({run.data.split}; corpus {run.data.corpus_fingerprint[:12]})"
        )
    if config.finish.sample_prompt is not None:
        prompt = config.finish.sample_prompt
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        new_ids = generate(run.model, ids, config.finish.sample_tokens, tokenizer.eos_id, temperature=0.7, top_k=50)
        say(f"\nsample:\n{prompt}{tokenizer.decode(list(new_ids))}\n")
    if config.finish.export:
        parameters = ((name, p.detach()) for name, p in run.model.named_parameters())
        write_export(config.model, parameters, directory / "tokenizer", directory / "hf")
    state = {"status": "finished", "exit_code": 0, "step": run.progress.step, "validation": figures}
    (directory / "state.json").write_text(json.dumps(state, indent=1) + "\n")
    say(f"run directory      {directory}")
    if config.finish.export:
        say(f"Hugging Face model {directory / 'hf'}")


def _printer(runtime: Runtime):  # type: ignore[no-untyped-def]
    def say(text: str) -> None:
        if runtime.is_main:
            print(text, file=sys.stdout, flush=True)

    return say
