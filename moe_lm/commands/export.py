"""`moe-lm export`: a checkpoint as a Hugging Face directory, behind the gate of its verification."""

import contextlib
from pathlib import Path

import torch

from moe_lm.commands.config import ExportConfig, ExportType
from moe_lm.commands.model_source import (
    MergedSource,
    NativeSource,
    check_belongs,
    check_outside,
    is_foreign,
    open_source,
    open_tokenizer,
)
from moe_lm.commands.training_facts import training_of
from moe_lm.errors import InputError
from moe_lm.files import write_json
from moe_lm.finetune.adapter import write_adapter
from moe_lm.finetune.base import fingerprint
from moe_lm.hf.export import SHARD_BYTES, check_output, export, new_export
from moe_lm.hf.files import has_consolidated
from moe_lm.hf.model_card import UNKNOWN_LICENSE, model_card
from moe_lm.hf.receipt import RECEIPT, Receipt
from moe_lm.model.source import ModelSource

BASE = "base.json"
"""In an adapter's directory: the model that it belongs on, and the fingerprint of its weights."""


def run(config: ExportConfig) -> int:
    """Export the checkpoint."""
    assert config.checkpoint is not None
    base = None if config.base is None else Path(config.base).expanduser()
    source = open_source(Path(config.checkpoint).expanduser(), base=base)
    if base is not None and not isinstance(source, MergedSource):
        raise InputError(f"base={base}: {source.path} is of no LoRA run, and needs no base; leave it out.")
    if config.output is not None:
        output = Path(config.output).expanduser()
        check_outside(output, source)
    elif isinstance(source, NativeSource):
        output = source.run_directory / ("adapter" if config.adapter else "hf")
    else:
        raise InputError(f"output=null: {source.path} is no run that has a place for it; give output=DIRECTORY.")
    if config.adapter:
        if not isinstance(source, MergedSource):
            raise InputError(f"adapter=true: {source.path} has no adapters, for it is of no LoRA run; leave it out.")
        export_adapter(source, output)
        print(f"exported the adapters of {source.path} to {output}; they belong on {said_base(source)}")
        return 0
    dtype = torch.float32 if config.dtype is ExportType.fp32 else torch.bfloat16
    receipt = write_export(source, output, dtype, config.max_shard_bytes, config.license, config.whole_model)
    print(f"exported {source.path} to {output}\n\n{receipt.table()}\n")
    print(f"{receipt.line()}\n{receipt.why}; receipt: {output / RECEIPT}")
    return 0


def export_adapter(source: MergedSource, output: Path) -> None:
    """Write a LoRA run's adapters as peft's files, with the tokenizer; read back before they take their name.

    Args:
        source: The run's checkpoint.
        output: Directory to make, or an earlier export to replace.
    """
    check_output(output)
    with new_export(output) as directory:
        place = base_of_adapter(source)
        write_adapter(directory, source.checkpoint, source.config, source.finetune, place)
        write_json(directory / BASE, {"base": place, "base_fingerprint": source.base_fingerprint})
        open_tokenizer(source).save(directory, source.config.max_position_embeddings)


def base_of_adapter(source: MergedSource) -> str:
    """What peft shall load the adapters on: the base in Hugging Face's format, where that can be found; by its weights,
    for the export of a run may be of another checkpoint.
    """
    base = source.base
    if not isinstance(base, NativeSource):
        return str(base.path.absolute())
    origin = base.checkpoint.state.get("origin", {})
    imported = [Path(origin["checkpoint"])] if origin.get("command") == "import" else []
    for place in (base.run_directory / "hf", *imported):
        with contextlib.suppress(InputError, OSError):
            if _peft_reads(place) and fingerprint(open_source(place)) == source.base_fingerprint:
                return str(place.absolute())
    return str(base.path.absolute())


def said_base(source: MergedSource) -> str:
    """Where the base of adapters is, in words."""
    place = Path(base_of_adapter(source))
    return str(place) if _peft_reads(place) else f"an fp32 export of {place}"


def _peft_reads(place: Path) -> bool:
    """Whether a directory is in Hugging Face's format: Mistral's own is nothing to transformers."""
    return is_foreign(place) and not has_consolidated(place)


def write_export(
    source: ModelSource,
    output: Path,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = SHARD_BYTES,
    license_name: str = UNKNOWN_LICENSE,
    whole: bool | None = None,
) -> Receipt:
    """Export a model with the tokenizer beside it, and a model card of what its run says.

    Args:
        source: The model.
        output: Directory to make, or an earlier export to replace.
        dtype: Type of the weights on disk.
        max_shard_bytes: Largest file of weights.
        license_name: For the model card.
        whole: Whether to run the whole model for the comparison; null means where it fits into memory.
    """
    check_output(output)
    tokenizer = open_tokenizer(source)
    check_belongs(tokenizer, source.tokenizer_directory, source.config)
    training, said_type = training_of(source), str(dtype).removeprefix("torch.")

    def card(receipt: Receipt) -> str:
        return model_card(source.config, training, license_name, said_type, receipt)

    return export(source, tokenizer, output, dtype, card, max_shard_bytes, whole)
