"""The model card of an export (its README.md): what is known of the model, and nothing that is not."""

import dataclasses
import json
from collections.abc import Mapping

from moe_lm.hf.layout import model_type
from moe_lm.hf.receipt import Receipt
from moe_lm.model.accounting import count_parameters
from moe_lm.model.config import ModelConfig

UNKNOWN_LICENSE = "unknown"
"""The Hub's word for a licence that nobody stated."""


@dataclasses.dataclass(frozen=True)
class Training:
    """How a model came to be, as far as its run says."""

    name: str
    """Of the model."""
    origin: str
    """What it was made from, in a sentence."""
    rows: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Figures of its training by what they are of."""
    configuration: str = ""
    """What the run was configured with, as JSON; empty where there was no run."""


def model_card(config: ModelConfig, training: Training, license_name: str, dtype: str, receipt: Receipt) -> str:
    """Markdown with the Hub's front matter.

    Args:
        config: The model.
        training: How it came to be.
        license_name: One of the Hub's names of licences; `UNKNOWN_LICENSE` where it was not stated.
        dtype: Type of the weights.
        receipt: Of the verification that the export passed.
    """
    front = {
        "license": license_name,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe-lm", model_type(config)],
    }
    # A JSON text is YAML too, whatever characters a name holds.
    lines = ["---", *(f"{name}: {json.dumps(value)}" for name, value in front.items()), "---"]
    parts = [
        "\n".join(lines),
        f"# {training.name}",
        training.origin,
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")\n'
        'model = AutoModelForCausalLM.from_pretrained("DIRECTORY")\n'
        "```",
        "## Model",
        _table(_model_rows(config, dtype)),
        "## Training",
        _table(training.rows) if training.rows else "Nothing is known of it.",
        "## Licence",
        f"The licence is `{license_name}`, as stated by whoever exported the model."
        if license_name != UNKNOWN_LICENSE
        else "No licence was stated when this model was exported. That of its training data is not known here either.",
        "## Verification",
        f"Before this directory was put in place it was read back and checked against the checkpoint; the tier is "
        f"{receipt.tier} ({receipt.why}). `verification.json` holds the same, with a SHA-256 of every tensor.",
        receipt.table(),
    ]
    if training.configuration:
        parts += ["## Configuration of the run", f"```json\n{training.configuration.strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _model_rows(config: ModelConfig, dtype: str) -> dict[str, str]:
    count = count_parameters(config)
    rows = {
        "architecture": f"{model_type(config).capitalize()}ForCausalLM",
        "parameters": f"{count.total:,}",
        "layers, hidden size": f"{config.num_hidden_layers}, {config.hidden_size}",
        "attention": f"{config.num_attention_heads} heads of {config.width_of_head}, {config.num_key_value_heads} for "
        f"keys and values, {'full' if config.sliding_window is None else f'window of {config.sliding_window:,}'}",
        "feed-forward": f"width {config.intermediate_size}",
        "vocabulary": f"{config.vocab_size:,}",
        "context": f"{config.max_position_embeddings:,} tokens",
        "weights": dtype,
    }
    if config.is_mixture:
        rows["parameters"] += f", {count.active:,} active per token"
        rows["feed-forward"] = (
            f"{config.num_experts} experts of width {config.intermediate_size}, {config.num_experts_per_tok} per token"
        )
    return rows


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(
        ["| | |", "| --- | --- |", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())]
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
