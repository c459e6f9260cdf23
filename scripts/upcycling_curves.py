"""Upcycling against going on with the dense model, at equal further tokens and at equal further FLOPs.

    python scripts/upcycling_curves.py DIRECTORY [STEPS [OPTION=VALUE …]]

Trains a small dense model with the default experiment's recipe, then goes on from it in each of these ways, with that
recipe again: dense for as many steps, dense for as many FLOPs, and mixtures of 8 experts made of it. Prints a table of
validation bits per byte and draws `curves.svg`. What is there already is not made again. Half an hour on 2 quiet cores.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from arguments import place, positive

from moe_lm.config import load, written
from moe_lm.model.accounting import training_flops_per_token
from moe_lm.model.config import ModelFamily
from moe_lm.plain import flatten, to_plain

STEPS = 1000
"""Steps of the dense model, and further steps at equal tokens."""

RECIPE = ("optimizer.", "schedule.", "data.sequence_length", "trainer.global_batch_size", "trainer.micro_batch_size")
"""Options that all runs share."""

POINTS = 5
"""Validations of each run."""

SMALL = [
    "model.hidden_size=64",
    "model.intermediate_size=192",
    "model.num_hidden_layers=3",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "tokenizer.vocab_size=512",
]
"""A dense model that is near its best after `STEPS`: what upcycling is for."""


def main(directory: Path, steps: int, shape: list[str]) -> None:
    """Make all runs and say what came out."""
    directory.mkdir(parents=True, exist_ok=True)
    recipe = load("pretrain", ["model=dense", *shape])
    plain = flatten(to_plain(recipe))
    same = [f"{name}={written(plain[name])}" for name in plain if name.startswith(RECIPE)]
    length = recipe.data.sequence_length
    mixture = dataclasses.replace(recipe.model, family=ModelFamily.mixture)  # 8 experts, 2 per token
    flops = {
        "dense": training_flops_per_token(recipe.model, length),
        "mixture": training_flops_per_token(mixture, length),
    }
    ratio = flops["mixture"] / flops["dense"]
    more = round(steps * ratio)

    _run(directory, "pretrain", "dense", "model=dense", *shape, steps=steps)
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
    _draw(curves, tokens, directory / "curves.svg")


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


def _draw(curves: dict[str, dict[int, float]], tokens: int, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot([step * tokens / 1e6 for step in curve], list(curve.values()), label=name)
    axes.set_xlabel("further tokens, millions")
    axes.set_ylabel("validation, bits per byte")
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=place, help="for the runs and the curves")
    parser.add_argument("steps", type=positive, nargs="?", default=STEPS, help="of each run")
    parser.add_argument("shape", nargs="*", default=SMALL, help="options, as `moe-lm pretrain` takes them")
    given = parser.parse_args()
    main(given.directory, given.steps, given.shape or SMALL)
