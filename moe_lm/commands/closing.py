"""What a run does after its last step: compare, sample, export, and say where everything is."""

import math
from collections.abc import Callable

from moe_lm.commands.export import export_adapter, said_base, write_export
from moe_lm.commands.model_source import MergedSource, open_model, open_source
from moe_lm.commands.run_directory import write_state
from moe_lm.errors import RunError
from moe_lm.evaluation.bits_per_byte import Validation
from moe_lm.evaluation.compressors import document_bytes, gzip_bits_per_byte, xz_bits_per_byte
from moe_lm.evaluation.generation import continuation, generate
from moe_lm.model.accounting import count_parameters
from moe_lm.training.machine import total_memory
from moe_lm.training.run import Run

Say = Callable[[str], None]

MOST_COMPRESSED = 100_000_000
"""Bytes of held-out text that compressors are tried on; they take a minute, and several times that in memory."""


def finish(training: Run, validation: Validation, say: Say) -> None:
    """Compare, sample, export, and say where everything is.

    Raises:
        RunError: The model is not one that gives finite figures.
    """
    if not math.isfinite(validation.loss):
        raise RunError(
            f"the validation loss after step {training.progress.step} is {validation.loss}: the run has diverged, and "
            "nothing is exported; lower optimizer.learning_rate, or lengthen schedule.warmup_steps, and start anew "
            "with another run_name=."
        )
    wanted, directory, data = training.config.finish, training.directory, training.data
    figures = validation._asdict()
    size = sum(shard.header.num_bytes for shard in data.validation)
    if wanted.compare_compressors and size > MOST_COMPRESSED:
        say(f"\nbits per byte: {validation.bits_per_byte:.3f} (gzip and xz would take long over {size / 1e6:,.0f} MB)")
    elif wanted.compare_compressors:
        content = document_bytes(data.validation, data.tokenizer)
        figures |= {"gzip_9": gzip_bits_per_byte(content), "xz_9": xz_bits_per_byte(content)}
        say(
            f"\nheld out: {data.counts['validation_documents']} documents, {len(content):,} bytes ({data.split}), "
            f"corpus {data.corpus_fingerprint[:12]}\n"
            f"bits per byte: this model {validation.bits_per_byte:.3f}, gzip -9 {figures['gzip_9']:.3f}, "
            f"xz -9 {figures['xz_9']:.3f}"
        )
    if (before := training.progress.start_loss) is not None:
        figures["start_loss"] = before
        change = 100 * (validation.loss / before - 1)
        say(f"\nvalidation loss: {before:.3f} before, {validation.loss:.3f} now ({change:+.1f} %), nats per target")
    if wanted.sample_prompt is not None:
        say(f"\nsample:\n{_sample(training, wanted.sample_prompt, wanted.sample_tokens)}\n")
    if wanted.export:
        # From the checkpoint: a process of a sharded run has only a part of the model.
        source = open_source(training.store.path(training.progress.step))
        receipt = write_export(source, directory / "hf")
        if isinstance(source, MergedSource):
            export_adapter(source, directory / "adapter")
    write_state(training, "finished", step=training.progress.step, exit_code=0, validation=figures)
    say(f"run directory:      {directory}")
    if wanted.export:
        say(f"Hugging Face model: {directory / 'hf'}")
        say(f"                    {receipt.line()}")
        if isinstance(source, MergedSource):
            say(f"adapter for peft:   {directory / 'adapter'} (on {said_base(source)})")


def _sample(training: Run, prompt: str, tokens: int) -> str:
    tokenizer, device = training.data.tokenizer, training.runtime.device
    model = training.parallel.module
    if training.parallel.layout.sharded or training.has_adapters:
        size = 4 * count_parameters(training.config.model).total
        if size > total_memory(device) // 4:
            return f"(none: {size / 2**30:,.0f} GiB of weights do not fit beside the training state of one process)"
        model, _ = open_model(training.store.path(training.progress.step), device)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    tokens = min(tokens, training.config.model.max_position_embeddings - len(ids))
    if tokens < 1:
        return f"(none: finish.sample_prompt fills the {len(ids) + tokens} tokens of the model's context)"
    ends, choices = tokenizer.end_ids, tokenizer.generated_ids
    (new_ids,) = generate(model, [ids], tokens, ends, temperature=0.7, top_k=50, choices=choices)
    return prompt + continuation(tokenizer, ids, new_ids)
