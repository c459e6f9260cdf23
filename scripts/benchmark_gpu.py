"""A ladder of mixtures on one GPU: model-FLOPs utilisation of this trainer and of transformers' Mixtral.

    python scripts/benchmark_gpu.py [--device cuda] [--only NAME …] [--output DIRECTORY]

8 experts, 2 per token, sequences of 4,096 tokens, natural routing on text, AdamW. One side after the other has the GPU
to itself; all compute in bf16: this trainer with fp32 master weights, transformers with autocast, and with the model
held in bf16 (whose weights then have no fp32 copy). Where a side runs out of memory, its micro-batch is halved, then it
recomputes activations; any other failure is its result, and the ladder goes on. Utilisation counts the model's own
FLOPs, against the best matrix product measured in the same run. Writes `benchmark-gpu.json`.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmark import SAME_WORK, OutOfMemoryError, Side, make_batches, processes

from moe_lm.config import load
from moe_lm.model.accounting import count_parameters, training_flops_per_token
from moe_lm.training.machine import matmul_rate

LADDER = {  # hidden size, intermediate size, layers
    "0.3B": (768, 2048, 8),
    "1B": (1024, 3584, 12),
    "2B": (1536, 5376, 12),
    "5B": (2048, 7168, 14),
}
SIDES = [Side(None, "bf16"), Side("grouped_mm", "bf16-autocast"), Side("grouped_mm", "bf16-held")]
ATTEMPTS = [(8, "none"), (4, "none"), (4, "selective"), (2, "selective"), (1, "full")]
"""Sequences and activation checkpointing, until a side fits."""

WARM, STEPS = 3, 10


def main() -> None:
    """Measure each rung, print it, and write all so far."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu tries the script, not the GPU")
    parser.add_argument("--only", nargs="*", default=list(LADDER), choices=LADDER, help="rungs")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="a directory")
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device is visible here")
    given.output.mkdir(parents=True, exist_ok=True)
    peak = matmul_rate(device, torch.bfloat16)
    print(f"best bf16 matrix product: {peak / 1e12:,.0f} TFLOP/s")
    report: list[dict[str, Any]] = []
    for name in given.only:
        for side in SIDES:
            report.append(measure(name, side, peak, given))
            print(line(report[-1]), flush=True)
            (given.output / "benchmark-gpu.json").write_text(json.dumps(report, indent=2) + "\n")


def measure(name: str, side: Side, peak: float, given: argparse.Namespace) -> dict[str, Any]:
    """The first attempt that fits, or the error of one that failed otherwise."""
    found = {"rung": name, "side": side.name}
    for sequences, recompute in ATTEMPTS:
        options = rung(name, sequences, given.length)
        config = load("pretrain", options)
        whole = Side(side.experts, side.precision, recompute=recompute, device=given.device)
        with tempfile.TemporaryDirectory() as directory:
            batches = make_batches(options, given.output / "data", Path(directory) / "batches.safetensors")
            try:
                with processes([whole], options, batches, balanced=False) as running:
                    running[whole].steps(WARM)
                    answer = running[whole].steps(STEPS)
            except OutOfMemoryError:
                continue
            except RuntimeError as error:
                return found | {"error": str(error)}
        speed = STEPS * sequences * given.length / answer["seconds"]
        return found | {
            "parameters": count_parameters(config.model).total,
            "sequences": sequences,
            "recompute": recompute,
            "tokens_per_second": speed,
            "utilisation": speed * training_flops_per_token(config.model, given.length) / peak,
            "memory": answer["memory"],
        }
    return found


def rung(name: str, sequences: int, length: int) -> list[str]:
    """Options of a rung."""
    hidden, inner, layers = LADDER[name]
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": max(1, hidden // 128), "num_key_value_heads": max(1, hidden // 256)}
    sizes = [f"trainer.{kind}_batch_size={sequences}" for kind in ("global", "micro")]
    text = ["tokenizer.vocab_size=8192", f"data.sequence_length={length}"]
    return [*text, *(f"model.{name}={value}" for name, value in shape.items()), *sizes, *SAME_WORK]


def line(found: dict[str, Any]) -> str:
    """One rung of one side, for people."""
    if "error" in found:
        return f"{found['rung']} {found['side']}: failed, {found['error']}"
    if "utilisation" not in found:
        return f"{found['rung']} {found['side']}: does not fit"
    return (
        f"{found['rung']} {found['side']}: {found['parameters'] / 1e9:.2f} B parameters, "
        f"{found['tokens_per_second']:,.0f} tokens/s, MFU {found['utilisation']:.1%}, {found['memory'] / 1e9:.1f} GB "
        f"({found['sequences']} sequences, recompute {found['recompute']})"
    )


if __name__ == "__main__":
    main()
