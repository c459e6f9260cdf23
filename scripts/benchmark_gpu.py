"""A ladder of mixtures on one GPU: model-FLOPs utilisation of this trainer and of transformers' Mixtral.

    python scripts/benchmark_gpu.py [--device cuda] [--only NAME …] [--minutes 10] [--output DIRECTORY]

8 experts, 2 per token, sequences of 4,096 tokens, natural routing on text, AdamW after every 4 micro-batches. One side
after the other has the GPU to itself, this trainer before and after the other in bf16, so that a GPU that has become
warm and slow is seen; all compute in bf16: this trainer with fp32 master weights, transformers with the model held in
bf16 (whose weights then have no fp32 copy). Last, when all rungs are done, comes transformers under autocast, which
leaves its experts in fp32 (TF32 in products), and those are a loop over experts in torch. Where a side runs out of
memory, its micro-batch is halved, then it recomputes activations, and the table says so; any other failure is its
result, and the ladder goes on. The largest rung is the first; nothing is begun that would probably end after the
minutes given, and what has not ended by then is ended.

Utilisation counts the model's own FLOPs, against what the data sheet promises for dense bf16 (MFU), and against the
best matrix product measured in the same run. Writes `benchmark-gpu.json`.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from arguments import place, positive, run_and_exit
from benchmark import SAME_WORK, OutOfMemoryError, Side, make_batches, processes

from moe_lm.config import load
from moe_lm.kernels import native
from moe_lm.model.accounting import activation_bytes, count_parameters, training_flops_per_token, training_state_bytes
from moe_lm.model.config import ModelConfig, Recompute
from moe_lm.training.machine import matmul_rate, total_memory

LADDER = {  # hidden size, intermediate size, layers
    "5B": (2048, 7168, 14),
    "2B": (1536, 5376, 12),
    "1B": (1024, 3584, 12),
    "0.3B": (768, 2048, 8),
}
OURS = Side(None, "bf16")
SIDES = [OURS, Side("grouped_mm", "bf16-held"), OURS]
LAST = Side("grouped_mm", "bf16-autocast")
ATTEMPTS = [(8, "none"), (4, "none"), (4, "selective"), (2, "selective"), (1, "full")]
"""Sequences of a micro-batch and activation checkpointing, until a side fits."""
ACCUMULATION = 4
"""Micro-batches of a step: 131,072 tokens where 8 sequences fit, still few for 5 B parameters."""
BYTES_OF_STATE = {"bf16-held": 8, "bf16-autocast": 16}
"""Of transformers, for each parameter: weights, gradients and two moments."""

DATA_SHEET = {
    **{"H200 NVL": 835.5e12, "H200": 989.4e12, "H100 NVL": 835.5e12, "H100 PCIe": 756e12, "H100 80GB HBM3": 989.4e12},
    **{"B200": 2250e12, "A100": 312e12},
}
"""NVIDIA's FLOP/s of dense bf16 products, by what the GPU's name contains; the first that it does counts."""

WARM, STEPS = 2, 4
"""Steps before the measured ones: moments are made at the end of the first, so the second is the first at the peak."""


def main() -> None:
    """Measure each rung, print it, and write all so far."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu tries the script, not the GPU")
    parser.add_argument("--only", nargs="+", default=list(LADDER), choices=LADDER, help="rungs")
    parser.add_argument("--length", type=positive, default=4096, help="tokens of a sequence")
    parser.add_argument("--minutes", type=float, default=10.0, help="after which all is ended")
    parser.add_argument("--output", type=place, default=Path("runs/benchmark"), help="a directory")
    given = parser.parse_args()
    began, device = time.monotonic(), torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device is visible here")
    # Activations and moments of many sizes: without it, holes between them decide what fits.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    given.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(device), "sides": []}
    print("\n".join(f"{key}: {value}" for key, value in report["machine"].items()), flush=True)
    end, took = began + 60 * given.minutes, dict.fromkeys((*SIDES, LAST), ("", 0.0))
    turns = [*((name, side) for name in given.only for side in SIDES), *((name, LAST) for name in given.only)]
    for name, side in turns:
        begin = time.monotonic()
        before, seconds = took[side]
        # The next rung has half as many parameters, or fewer.
        if begin + (seconds if before == name else seconds / 2) > end:
            found = {"rung": name, "side": side.name, "error": f"no time left of {given.minutes:g} minutes"}
        else:
            found = measure(name, side, report["machine"], given, end)
            took[side] = name, time.monotonic() - begin
        report["sides"].append(found | {"seconds": time.monotonic() - begin})
        print(line(found), flush=True)
        (given.output / "benchmark-gpu.json").write_text(json.dumps(report, indent=2) + "\n")
    print("\n" + table(report["sides"]))


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures hold for."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else platform.processor()
    return {
        "device": name,
        "memory, GB": round(total_memory(device) / 1e9, 1),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"cuDNN {torch.backends.cudnn.version()}, transformers {transformers.__version__}",
        "kernels": native.described(device, torch.bfloat16),
        "best bf16 matrix product, FLOP/s": matmul_rate(device, torch.bfloat16),
        "bf16 by the data sheet, FLOP/s": next((rate for part, rate in DATA_SHEET.items() if part in name), None),
    }


def measure(name: str, side: Side, host: dict[str, Any], given: argparse.Namespace, end: float) -> dict[str, Any]:
    """The first attempt that fits, or the error of one that failed otherwise or is not done by the end."""
    found = {"rung": name, "side": side.name}
    for sequences, recompute in ATTEMPTS:
        options = rung(name, sequences, given.length)
        config = load("pretrain", options)
        if needed_bytes(config.model, side, sequences * given.length, recompute) > 1e9 * host["memory, GB"]:
            continue
        whole = Side(side.experts, side.precision, recompute=recompute, accumulation=ACCUMULATION, device=given.device)
        with tempfile.TemporaryDirectory() as directory:
            batches = make_batches(options, given.output / "data", Path(directory) / "batches.safetensors")
            try:
                with processes([whole], options, batches, balanced=False, deadline=end) as running:
                    answer = running[whole].steps(STEPS, warm=WARM)
            except OutOfMemoryError:
                continue
            except RuntimeError as error:
                return found | {"error": str(error)}
        speed = STEPS * ACCUMULATION * sequences * given.length / answer["seconds"]
        flops = speed * training_flops_per_token(config.model, given.length)
        promised = host["bf16 by the data sheet, FLOP/s"]
        return found | {
            "parameters": count_parameters(config.model).total,
            "sequences": sequences,
            "recompute": recompute,
            "tokens_per_second": speed,
            "mfu": flops / promised if promised else None,
            "of_best_product": flops / host["best bf16 matrix product, FLOP/s"],
            "memory": answer["memory"],
            "loss": answer["loss"],
        }
    return found


def needed_bytes(model: ModelConfig, side: Side, tokens: int, recompute: str) -> int:
    """The least that a side needs: its state, and of ours what the layers keep; gradients are there as well from the
    second micro-batch of a step on. (What transformers keeps has no formula here.)
    """
    if side.experts is None:
        return training_state_bytes(model, 2, 2) + activation_bytes(model, tokens, Recompute(recompute), 2)
    return BYTES_OF_STATE[side.precision] * count_parameters(model).total


def rung(name: str, sequences: int, length: int) -> list[str]:
    """Options of a rung."""
    hidden, inner, layers = LADDER[name]
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": max(1, hidden // 128), "num_key_value_heads": max(1, hidden // 256)}
    sizes = [f"trainer.global_batch_size={ACCUMULATION * sequences}", f"trainer.micro_batch_size={sequences}"]
    text = ["tokenizer.vocab_size=8192", f"data.sequence_length={length}"]
    return [*text, *(f"model.{name}={value}" for name, value in shape.items()), *sizes, *SAME_WORK]


def line(found: dict[str, Any]) -> str:
    """One rung of one side, for people."""
    if "error" in found:
        return f"{found['rung']} {found['side']}: failed, {found['error']}"
    if "tokens_per_second" not in found:
        return f"{found['rung']} {found['side']}: does not fit"
    mfu = "–" if found["mfu"] is None else f"{found['mfu']:.1%}"
    return (
        f"{found['rung']} {found['side']}: {found['parameters'] / 1e9:.2f} B parameters, "
        f"{found['tokens_per_second']:,.0f} tokens/s, MFU {mfu}, {found['of_best_product']:.1%} of the best product, "
        f"{found['memory'] / 1e9:.1f} GB ({found['sequences']} sequences, recompute {found['recompute']})"
    )


def table(sides: list[dict[str, Any]]) -> str:
    """Of each rung the mean of this trainer's turns, and how many times as fast it is as each other side; with what
    fitted: sequences of a micro-batch, and what is recomputed.
    """
    lines = ["| model | moe-lm tokens/s, by turn | MFU | of the best product | times as fast as |", "| --- " * 5 + "|"]

    def fitted(found: dict[str, Any]) -> str:
        return f"{found['sequences']}, {found['recompute']}"

    for rung in dict.fromkeys(found["rung"] for found in sides):
        measured = [found for found in sides if found["rung"] == rung and "tokens_per_second" in found]
        ours = [found for found in measured if found["side"] == OURS.name]
        if not ours:
            lines.append(f"| {rung} | – | – | – | – |")
            continue
        mean = {key: sum(found[key] or 0.0 for found in ours) / len(ours) for key in ("tokens_per_second", "mfu")}
        best = sum(found["of_best_product"] for found in ours) / len(ours)
        ratios = [
            f"{found['side']} ({fitted(found)}) {mean['tokens_per_second'] / found['tokens_per_second']:.2f}"
            for found in measured
            if found["side"] != OURS.name
        ]
        turns = ", ".join(f"{found['tokens_per_second']:,.0f} ({fitted(found)})" for found in ours)
        mfu = f"{mean['mfu']:.1%}" if ours[0]["mfu"] is not None else "–"
        lines.append(f"| {rung} | {turns} | {mfu} | {best:.1%} | {', '.join(ratios) or '–'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_and_exit(main)
