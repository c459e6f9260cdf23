"""Peak memory of a training step by mode of activation checkpointing, against the formulas of `model/accounting.py`.

    python scripts/benchmark_memory.py [reference | wide | default] [--micro-batch-size N] [--precision fp32]

Each mode trains some steps in a process of its own (`benchmark_sides.py`, this trainer's side), in turn with the
others, so that the ratios of their times hold too. What is measured is the most that was resident, less what was after
the imports: the state, activations, and what operators need while they run.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from arguments import positive, run_and_exit
from benchmark import MODELS, SAME_WORK, Side, make_batches, processes

from moe_lm.config import load
from moe_lm.kernels import native
from moe_lm.model.accounting import activation_bytes, training_state_bytes
from moe_lm.model.config import Recompute
from moe_lm.training.config import Precision
from moe_lm.training.precision import compute_dtype

ROUNDS = 3


def main(model: str, micro_batch_size: int | None, precision: Precision) -> None:
    """Measure and print a table."""
    sizes = [] if micro_batch_size is None else [f"trainer.micro_batch_size={micro_batch_size}"]
    sizes += [f"trainer.global_batch_size={micro_batch_size}"] if sizes else []
    options = [*MODELS[model], *SAME_WORK, *sizes]
    config = load("pretrain", options)
    dtype = compute_dtype(precision, torch.device("cpu"))
    named = "bf16" if dtype is torch.bfloat16 else "fp32"
    sides = [Side(None, named, recompute=mode.value) for mode in Recompute]
    with tempfile.TemporaryDirectory() as directory:
        batches = make_batches(options, Path("runs/benchmark/data"), Path(directory) / "batches.safetensors")
        with processes(sides, options, batches, balanced=False) as running:
            answers = {side: [] for side in sides}
            for _ in range(ROUNDS):
                for side, process in running.items():
                    answers[side].append(process.steps(2, warm=1))
    tokens = config.trainer.micro_batch_size * config.data.sequence_length
    state = training_state_bytes(config.model, 2, dtype.itemsize)
    # in blocks of 128 queries, each against the keys up to its own end
    explicit = dtype is torch.bfloat16 and not native.has_amx()
    kept = (config.data.sequence_length + 128) // 2 if explicit else 0
    print(f"{model}, {tokens:,} tokens, {dtype}; state {state / 1e6:,.0f} MB")
    print("| mode | measured, MB | above the state | activations by formula | time |\n" + "| --- " * 5 + "|")
    for side in sides:
        peak = answers[side][-1]["memory"]
        again = explicit or native.library() is not None
        mode = Recompute(side.recompute)
        expected = activation_bytes(config.model, tokens, mode, dtype.itemsize, kept, attention_again=again)
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(answers[side], answers[sides[0]], strict=True)]
        print(
            f"| {side.recompute} | {peak / 1e6:,.0f} | {(peak - state) / 1e6:,.0f} | {expected / 1e6:,.0f} "
            f"| {statistics.median(ratios):.2f} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", choices=MODELS, default="reference")
    parser.add_argument("--micro-batch-size", type=positive)
    parser.add_argument("--precision", choices=[precision.value for precision in Precision], default="auto")
    given = parser.parse_args()
    run_and_exit(lambda: main(given.model, given.micro_batch_size, Precision(given.precision)))
