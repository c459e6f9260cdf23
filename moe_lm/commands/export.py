"""`moe-lm export`: a run's checkpoint as a Hugging Face directory."""

from pathlib import Path

import torch

from moe_lm.commands.config import ExportConfig, ExportType
from moe_lm.commands.model_source import open_native, write_export
from moe_lm.hf.export import check_output


def run(config: ExportConfig) -> int:
    """Export the checkpoint."""
    assert config.checkpoint is not None
    source = open_native(Path(config.checkpoint))
    output = Path(config.output) if config.output is not None else source.run_directory / "hf"
    check_output(output)
    dtype = torch.float32 if config.dtype is ExportType.fp32 else torch.bfloat16
    write_export(source.config, source.parameters(), source.tokenizer_directory, output, dtype)
    print(f"exported {source.checkpoint.path} to {output}")
    return 0
