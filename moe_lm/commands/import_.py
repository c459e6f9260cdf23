"""`moe-lm import`: somebody else's checkpoint as a native one."""

from pathlib import Path
from typing import Any

from moe_lm.commands.config import ImportConfig
from moe_lm.commands.model_directory import copy_tokenizer, new_model_directory, said_tokenizer, save_parameters
from moe_lm.commands.model_source import check_outside, open_source
from moe_lm.errors import InputError
from moe_lm.files import write_json
from moe_lm.hf.load import HuggingFaceSource
from moe_lm.model.accounting import count_parameters

RECEIPT = "import.json"


def run(config: ImportConfig) -> int:
    """Read a Hugging Face directory or Mistral's own files, and write a directory like a run's."""
    assert config.checkpoint is not None and config.output is not None
    path, output = Path(config.checkpoint).expanduser(), Path(config.output).expanduser()
    source = open_source(path)
    if not isinstance(source, HuggingFaceSource):
        raise InputError(
            f"checkpoint={path}: is a native checkpoint already, which finetune, upcycle and export take as it is."
        )
    check_outside(output, source)
    with new_model_directory(output) as directory:
        copy_tokenizer(source.tokenizer_directory, directory, source.config)
        origin = {"command": "import", "checkpoint": str(path.absolute()), "layout": source.layout.value}
        written = save_parameters(directory, source.config, source.parameters(), origin)
        write_json(directory / RECEIPT, _receipt(source, origin, written))
    _report(source, written, output)
    return 0


def _receipt(source: HuggingFaceSource, origin: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """What became of each tensor: of each parameter, those on disk that it was made of."""
    on_disk = source.on_disk
    count = count_parameters(source.config)
    return {
        **origin,
        "files": sorted({source.stored(disk).path.name for names in on_disk.values() for disk in names}),
        "parameters": {"total": count.total, "active": count.active},
        "ignored": source.ignored,
        "tensors": {name: {"from": on_disk[name], **entry} for name, entry in written.items()},
    }


def _report(source: HuggingFaceSource, written: dict[str, Any], output: Path) -> None:
    config, count = source.config, count_parameters(source.config)
    kind = f"{config.num_experts} experts, {config.num_experts_per_tok} per token" if config.is_mixture else "dense"
    tensors = sum(map(len, source.on_disk.values()))
    print(f"imported {source.path} to {output}")
    print(f"  model:      {count.total:,} parameters, {count.active:,} active; {kind}")
    print(f"  tensors:    {tensors:,} on disk ({source.layout.value}) made {len(written):,} parameters, each once")
    print(f"  types:      {', '.join(sorted({entry['dtype'] for entry in written.values()}))}, kept as they were")
    if source.ignored:
        print(f"  ignored:    {', '.join(source.ignored)}, which transformers does not use either")
    if source.has_code:
        print("  code:       config.json names Python of its own (auto_map); it was not run, and is not needed")
    print(f"  tokenizer:  {said_tokenizer(source.tokenizer_directory)}")
    print(f"  receipt:    {output / RECEIPT}")
