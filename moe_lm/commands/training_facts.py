"""What a run's directory says of how a model came to be, for its model card."""

import json
from pathlib import Path
from typing import Any

from moe_lm.commands.model_source import MergedSource, NativeSource
from moe_lm.hf.model_card import Training
from moe_lm.model.source import ModelSource

_SECTIONS = ("model", "data", "tokenizer", "optimizer", "schedule", "trainer", "finetune", "guards", "seed")
"""Sections of a run's configuration that decide what comes of it."""


def training_of(source: ModelSource) -> Training:
    """How a model came to be.

    Args:
        source: The model; of a run, the directory beside its checkpoint is looked at.
    """
    if not isinstance(source, NativeSource):
        return Training(source.path.absolute().name, f"Converted by moe-lm from the model in `{_said(source.path)}`.")
    state, run = source.checkpoint.state, source.run_directory.absolute()
    if "progress" not in state:
        origin = state.get("origin", {})
        made = {"import": "Imported", "upcycle": "Upcycled"}.get(origin.get("command", ""), "Made")
        return Training(run.name, f"{made} by moe-lm from the model in `{_said(Path(origin.get('checkpoint', '')))}`.")
    origin = "Trained from scratch by moe-lm."
    if base := state.get("start", {}).get("base"):
        how = "by LoRA, merged into the weights, " if isinstance(source, MergedSource) else ""
        origin = f"Fine-tuned by moe-lm, {how}from the model in `{_said(Path(base))}`."
    sections = {name: section for name, section in state["config"].items() if name in _SECTIONS}
    if sections["data"]["source"] == "prepared" or sections["tokenizer"]["path"] is not None:
        # What a tokenizer is trained with says nothing of one that was there.
        sections["tokenizer"] = {"path": sections["tokenizer"]["path"]}
    configuration = {name: _without_places(section) for name, section in sections.items()}
    return Training(run.name, origin, _rows(state, run), json.dumps(configuration, indent=2))


def _said(path: Path) -> str:
    """The name of a model's directory; of a checkpoint, with that of its run."""
    parts = path.absolute().parts
    return f"{parts[-3]}/{parts[-1]}" if parts[-2:-1] == ("checkpoints",) and len(parts) > 3 else parts[-1]


def _rows(state: dict[str, Any], run: Path) -> dict[str, str]:
    progress, data = state["progress"], state["config"]["data"]
    names = [Path(path).name for path in data.get("paths", [])] or list(data.get("sources", {}))
    rows = {
        "data": f"{data['source']}{': ' + ', '.join(names) if names else ''}",
        "corpus": f"`{state['corpus_fingerprint'][:16]}` (fingerprint)",
        "steps": f"{progress['step']:,}",
        "tokens learned from": f"{progress['targets']:,}",
    }
    if len(domains := progress["tokens_by_domain"]) > 1:
        rows["by domain"] = ", ".join(f"{name} {tokens:,}" for name, tokens in domains.items())
    metrics = _metrics(run, progress["step"])
    for name, figure, unit in (
        ("validation_bits_per_byte", "validation", "bits per byte"),
        ("validation_loss", "validation loss", "nats per target"),
    ):
        if line := next((m for m in reversed(metrics) if m.get(name) is not None), None):
            extent = "the whole validation set" if line.get("complete") else "an estimate on a part of it"
            rows[figure] = f"{line[name]:.4f} {unit} ({extent}, step {line['step']:,})"
    if line := next((m for m in reversed(metrics) if m.get("expert_counts")), None):
        rows["expert balance"] = (
            f"at step {line['step']:,} the busiest expert of any layer took {1 + line['load_violation']:.2f} times its "
            "even share"
        )
    return rows


def _metrics(run: Path, step: int) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl up to a step, or none where there are none."""
    try:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["step"] <= step]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _without_places(value: Any) -> Any:
    """Without the directories of the machine that a run was made on: a card is published."""
    if isinstance(value, dict):
        return {name: _without_places(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    is_place = isinstance(value, str) and value.startswith(("/", "~", "./", "../"))
    return f"…/{Path(value).name}" if is_place else value
