"""Upcycling against going on with the dense model, at equal further tokens and at equal further FLOPs.

    python scripts/upcycling_curves.py DIRECTORY [STEPS]

Trains the dense model of the default experiment with its recipe, then goes on from it in each of these ways, with that
recipe again: dense for as many steps, dense for as many FLOPs, and mixtures of 8 experts made of it. Prints a table of
validation bits per byte and draws `curves.svg`. What is there already is not made again. About 15 minutes on 2 quiet
cores with 400 steps.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from moe_lm.commands.changes import flatten
from moe_lm.config import load, written
from moe_lm.model.accounting import training_flops_per_token
from moe_lm.model.config import ModelFamily
from moe_lm.training.config import to_plain

POINTS = 8
"""Validations of each run."""

COLOURS = ("#777777", "#000000", "#c0392b", "#2471a3")


def main(directory: Path, steps: int) -> None:
    """Make all runs and say what came out."""
    directory.mkdir(parents=True, exist_ok=True)
    recipe = load("pretrain", [])
    plain = flatten(to_plain(recipe))
    same = [f"{name}={written(plain[name])}" for name in plain if name.startswith(("optimizer.", "schedule."))]
    length = recipe.data.sequence_length
    dense = load("pretrain", ["model=dense"]).model
    models = {
        "dense": dense,
        "mixture": dataclasses.replace(dense, family=ModelFamily.mixture),
    }  # 8 experts, 2 per token
    flops = {name: training_flops_per_token(model, length) for name, model in models.items()}
    ratio = flops["mixture"] / flops["dense"]
    more = round(steps * ratio)

    _run(directory, "pretrain", "dense", "model=dense", steps=steps)
    for name, options in (("copies", []), ("half-new", ["reinitialize=0.5"])):
        if not (directory / name).exists():
            _moe_lm(directory, "upcycle", "checkpoint=runs/dense", f"output={name}", *options)
    balance = f"model.router_aux_loss_coef={recipe.model.router_aux_loss_coef}"
    curves = {
        "dense, as many tokens": _run(directory, "finetune", "dense-tokens", "base=runs/dense", *same, steps=steps)
    }
    curves["dense, as many FLOPs"] = _run(directory, "finetune", "dense-flops", "base=runs/dense", *same, steps=more)
    for name, title in (("copies", "8 experts, copies"), ("half-new", "8 experts, reinitialize=0.5")):
        curves[title] = _run(directory, "finetune", f"moe-{name}", f"base={name}", *same, balance, steps=steps)

    tokens = recipe.trainer.global_batch_size * length
    print(f"\nFLOPs per token: dense {flops['dense']:,}, mixture {flops['mixture']:,} ({ratio:.2f} times)")
    print("| further tokens (M) | " + " | ".join(curves) + " |\n" + "| --- " * (len(curves) + 1) + "|")
    for step in sorted({step for curve in curves.values() for step in curve}):
        cells = [f"{curve[step]:.4f}" if step in curve else "" for curve in curves.values()]
        print(f"| {step * tokens / 1e6:.2f} | " + " | ".join(cells) + " |")
    (directory / "curves.svg").write_text(_svg({name: _scaled(curve, tokens) for name, curve in curves.items()}))


def _moe_lm(directory: Path, *arguments: str) -> None:
    print("moe-lm", *arguments, flush=True)
    done = subprocess.run([sys.executable, "-m", "moe_lm", *arguments], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _run(directory: Path, command: str, name: str, *options: str, steps: int) -> dict[int, float]:
    """A run's validation bits per byte by step, each over all of the validation set."""
    state = directory / "runs" / name / "state.json"
    if not state.exists() or json.loads(state.read_text())["status"] != "finished":
        rest = [
            f"trainer.max_steps={steps}",
            f"trainer.eval_interval={steps // POINTS}",
            "trainer.eval_sequences=1000000",
        ]
        data = ["data=stdlib"] if command == "finetune" else []
        _moe_lm(directory, command, f"run_name={name}", *data, *options, *rest, "finish.export=false")
    lines = [json.loads(line) for line in (state.parent / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["validation_bits_per_byte"] for line in lines if "validation_bits_per_byte" in line}


def _scaled(curve: dict[int, float], tokens: int) -> list[tuple[float, float]]:
    return [(step * tokens / 1e6, value) for step, value in curve.items()]


def _svg(curves: dict[str, list[tuple[float, float]]], width: int = 640, height: int = 400) -> str:
    """Lines of (x, y) points, with a legend."""
    margin = 60
    xs, ys = zip(*(point for curve in curves.values() for point in curve))
    right, low, high = max(xs), min(ys), max(ys)

    def place(x: float, y: float) -> str:
        across = margin + x / right * (width - 2 * margin)
        return f"{across:.1f},{margin + (high - y) / (high - low) * (height - 2 * margin):.1f}"

    parts = [f'<rect width="{width}" height="{height}" fill="white"/>']
    for share in range(5):
        value = low + (high - low) * share / 4
        x, y = place(0, value).split(",")
        parts.append(f'<line x1="{x}" y1="{y}" x2="{width - margin}" y2="{y}" stroke="#dddddd"/>')
        parts.append(f'<text x="{float(x) - 6}" y="{float(y) + 4}" text-anchor="end">{value:.3f}</text>')
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number]
        points = " ".join(place(*point) for point in curve)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        down = margin + 16 * number
        parts.append(f'<text x="{width - margin}" y="{down}" text-anchor="end" fill="{colour}">{name}</text>')
    parts.append(f'<text x="{margin}" y="{height - 20}">further tokens, 0 to {right:.2f} M</text>')
    parts.append(f'<text x="{margin}" y="{margin - 20}">validation, bits per byte</text>')
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    style = 'font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 400)
