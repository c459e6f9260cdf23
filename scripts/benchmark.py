"""This trainer against transformers' Mixtral, whole training steps, on the same work in one run.

    python scripts/benchmark.py [reference | wide | default] [--rounds N] [--steps N] [--balanced] [--output DIRECTORY]

Every side is a process of its own (`benchmark_sides.py`) that waits while another one trains; sides take turns, so
that a machine that slows down slows all of them. Ratios are taken within a round. Prints a table, and writes
`benchmark-MODEL.json` and `.svg` (with `--only`, `benchmark-MODEL-some`). Five sides of the reference model, 5 rounds
of 2 steps, took 3 minutes on 2 cores in fp32; all fourteen take longer, the more so where bf16 is emulated.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import platform
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from arguments import place, positive, run_and_exit
from safetensors.torch import save_file

from moe_lm.config import load
from moe_lm.data.loader import BatchPlan, ShardLoader
from moe_lm.data.mixture import make_mixture
from moe_lm.data.prepare import prepare
from moe_lm.data.prepared import load as load_data
from moe_lm.model.accounting import count_parameters, training_flops_per_token
from moe_lm.training.machine import matmul_rate

_REFERENCE = [
    "tokenizer.vocab_size=8192",
    "data.sequence_length=512",
    "model.hidden_size=256",
    "model.intermediate_size=896",
    "model.num_hidden_layers=6",
    "model.num_attention_heads=8",
    "model.num_key_value_heads=2",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=8",
]
_WIDE = ["model.hidden_size=512", "model.intermediate_size=1792", "model.num_hidden_layers=8"]
_TINY = [
    "tokenizer.vocab_size=400",
    "data.sequence_length=32",
    "model.hidden_size=64",
    "model.intermediate_size=32",
    "model.num_hidden_layers=2",
    "trainer.global_batch_size=4",
    "trainer.micro_batch_size=4",
]
MODELS = {"reference": _REFERENCE, "wide": [*_REFERENCE, *_WIDE], "default": [], "tiny": _TINY}
"""Options on top of the default experiment; `tiny` is for trying the script."""

SAME_WORK = [
    "data.mask_documents=false",
    "model.load_balancing=pooled",
    "model.load_balancing_source=micro_batch",
    "model.router_z_loss_coef=0",
]
"""What transformers' Mixtral has: one balancing loss over all layers, by the batch's own load, and no z-loss."""

BATCHES = 8
"""Different batches; sides go round them."""


@dataclasses.dataclass(frozen=True)
class Side:
    """A way to train."""

    experts: str | None
    """transformers' experts implementation; null for this trainer."""
    precision: str
    """Ours: `bf16` or `fp32`. Theirs: `fp32`, `bf16-autocast`, `bf16-held` (the model itself in bf16)."""
    trainer: bool = False
    """Whether transformers' Trainer drives it, or a loop by hand."""
    recompute: str = "none"
    """The mode of activation checkpointing; of theirs anything but `none` is all that they have."""
    accumulation: int = 1
    """Micro-batches of a step; transformers' Trainer takes one."""
    device: str = "cpu"
    tuned_allocator: bool = False
    """Whether theirs gets the allocator settings that this trainer makes for itself."""

    @property
    def name(self) -> str:
        """What the table calls it."""
        if self.experts is None:
            return f"moe-lm {self.precision}"
        driver = "Trainer" if self.trainer else "bare loop"
        return f"{self.experts} {self.precision}, {driver}{', tuned allocator' if self.tuned_allocator else ''}"

    @property
    def yardstick(self) -> str:
        """The type whose best product it is measured by, and in which it is compared with ours."""
        return "float32" if self.precision == "fp32" else "bfloat16"


SIDES = [
    Side(None, "bf16"),
    Side(None, "fp32"),
    *(Side(e, p) for e in ("eager", "grouped_mm") for p in ("fp32", "bf16-autocast", "bf16-held")),
    *(Side("grouped_mm", p, trainer=True) for p in ("fp32", "bf16-autocast", "bf16-held")),
    *(Side("grouped_mm", p, tuned_allocator=True) for p in ("fp32", "bf16-autocast", "bf16-held")),
]
"""Without batched_mm, which gathers the weights of its experts for every token (`batched_mm_bytes`)."""


LAST_LINES = 20
"""How much of what a side that failed has written is shown."""


class OutOfMemoryError(RuntimeError):
    """A side has ended for want of memory."""


class Process:
    """A side's process. Every method, the constructor too, raises RuntimeError where it has ended, or where it has not
    answered by the deadline (of `time.monotonic`) and is therefore ended.
    """

    def __init__(self, side: Side, options: list[str], batches: Path, balanced: bool, deadline: float = math.inf):
        told = {**dataclasses.asdict(side), "options": options, "batches": str(batches), "balanced": balanced}
        script = Path(__file__).parent / "benchmark_sides.py"
        self._name, self._deadline = side.name, deadline
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 -- needed as long as the process
        self._process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # as the command line sets it for itself (`cli.wait_briefly_for_threads`)
            env=os.environ | ({"GOMP_SPINCOUNT": "10000"} if side.experts is None or side.tuned_allocator else {}),
        )
        self._answer()

    def steps(self, count: int, warm: int = 0) -> dict[str, Any]:
        """Train so many steps, after some that are not timed; what they took.

        A side that waits has given its freed memory back, so that the first step of a turn faults it in again.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_answer` says why
            self._process.stdin.write(f"{warm} {count}\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        left = None if self._deadline == math.inf else max(0.0, self._deadline - time.monotonic())
        # One line answers one request, so that none lies in the stream's buffer, where select does not look.
        if not select.select([self._process.stdout], [], [], left)[0]:
            self.end()
            raise RuntimeError(f"{self._name} was ended: no time left")
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            last = "".join(self._errors.readlines()[-LAST_LINES:]).rstrip()
            # Linux kills who takes the last of it; cuBLAS and cuDNN say ALLOC_FAILED.
            memory = code == -signal.SIGKILL or "out of memory" in last or "ALLOC_FAILED" in last
            raise (OutOfMemoryError if memory else RuntimeError)(f"{self._name} ended with exit code {code}:\n{last}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Let it go."""
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", choices=MODELS, default="reference")
    parser.add_argument("--rounds", type=positive, default=3, help="how often every side trains in turn")
    parser.add_argument("--steps", type=positive, default=5, help="steps of a turn")
    parser.add_argument("--balanced", action="store_true", help="route by force, the same number of tokens to each")
    parser.add_argument("--only", nargs="*", default=[""], help="sides whose name contains one of these")
    parser.add_argument("--output", type=place, default=Path("runs/benchmark"), help="a directory")
    given = parser.parse_args()
    wanted = [side for side in SIDES if any(part in side.name for part in given.only)]
    if not wanted:
        parser.error(f"--only {' '.join(given.only)}: no side's name contains it; {', '.join(s.name for s in SIDES)}")
    options = [*MODELS[given.model], *SAME_WORK]
    given.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        batches = make_batches(options, given.output / "data", Path(directory) / "batches.safetensors")
        rounds = measure(wanted, options, batches, given)
    report = describe(options, rounds, given)
    print(table(report))
    # Some sides alone do not take the place of a report of all.
    name = f"benchmark-{given.model}{'-balanced' * given.balanced}{'-some' * (len(wanted) < len(SIDES))}"
    (given.output / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(report, given.output / f"{name}.svg")


def make_batches(options: list[str], directory: Path, path: Path) -> Path:
    """The first batches of the default text, as training would see them."""
    config = load("pretrain", options)
    directory = directory / f"vocabulary-{config.tokenizer.vocab_size}"
    prepare(config.data, config.tokenizer, directory, report=lambda text: None, progress=lambda done, total: None)
    data = load_data(config.data, config.tokenizer, directory)
    size = config.trainer.global_batch_size
    plan = BatchPlan(
        seed=0,
        global_batch_size=size,
        micro_batch_size=size,
        sequence_length=config.data.sequence_length,
        pad_id=data.tokenizer.pad_id,
        domains=data.domains,
        mask_documents=False,
        route_prompts=True,
        packing=config.data.packing,
        epochs=None,
        rank=0,
        world_size=1,
    )
    names = sorted(data.train)
    mixture = make_mixture(config.data, data.train, size * BATCHES)
    loader = ShardLoader([data.train[name] for name in names], names, mixture, plan)
    batches = [loader.step(number).micro_batches[0].input_ids for number in range(BATCHES)]
    save_file({"input_ids": torch.stack(batches)}, path)
    return path


def measure(sides: list[Side], options: list[str], batches: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """What every side took in every round."""
    tokens = given.steps * count_tokens(options)
    rounds: list[dict[str, Any]] = []
    with processes(sides, options, batches, given.balanced) as running:
        losses = {side.name: process.steps(1)["loss"] for side, process in running.items()}
        print("loss of the first step: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if loss))
        for number in range(given.rounds):
            answers = {}
            peaks = {side.yardstick: 0.0 for side in sides}  # one of bf16 takes minutes where that is emulated
            for side, process in running.items():
                # Before each turn: one look now and then misses the minutes in which the machine is fast.
                peaks = {
                    kind: max(peak, matmul_rate(torch.device("cpu"), getattr(torch, kind)))
                    for kind, peak in peaks.items()
                }
                answers[side.name] = process.steps(given.steps, warm=1)
            speeds = {name: tokens / answer["seconds"] for name, answer in answers.items()}
            memory = {name: answer["memory"] for name, answer in answers.items()}
            rounds.append({"peaks": peaks, "tokens_per_second": speeds, "memory": memory})
            print(f"round {number + 1}: " + ", ".join(f"{n} {s:,.0f}" for n, s in speeds.items()), flush=True)
    return rounds


@contextlib.contextmanager
def processes(
    sides: list[Side], options: list[str], batches: Path, balanced: bool, deadline: float = math.inf
) -> Iterator[dict[Side, Process]]:
    """All sides, ready to train; see `Process`."""
    running: dict[Side, Process] = {}
    try:
        for side in sides:
            running[side] = Process(side, options, batches, balanced, deadline)
        yield running
    finally:
        for process in running.values():
            process.end()


def count_tokens(options: list[str]) -> int:
    """Tokens of a step."""
    config = load("pretrain", options)
    return config.trainer.global_batch_size * config.data.sequence_length


def batched_mm_bytes(options: list[str]) -> int:
    """What batched_mm would gather of one layer's weights, in fp32: those of its K experts for every token."""
    model = load("pretrain", options).model
    return count_tokens(options) * model.num_experts_per_tok * 3 * model.hidden_size * model.intermediate_size * 4


def describe(options: list[str], rounds: list[dict[str, Any]], given: argparse.Namespace) -> dict[str, Any]:
    """The report as plain values; ratios are this trainer's best speed to the other's, round by round."""
    config = load("pretrain", options)
    flops = training_flops_per_token(config.model, config.data.sequence_length)
    peaks = {kind: max(one["peaks"][kind] for one in rounds) for kind in rounds[0]["peaks"]}
    state = 8 * count_parameters(config.model).total
    sides = {}
    for name in rounds[0]["tokens_per_second"]:
        speeds = [one["tokens_per_second"][name] for one in rounds]
        yardstick = next(side.yardstick for side in SIDES if side.name == name)
        own = "moe-lm fp32" if yardstick == "float32" else "moe-lm bf16"
        ratios = [one["tokens_per_second"].get(own, float("nan")) / one["tokens_per_second"][name] for one in rounds]
        sides[name] = {
            "tokens_per_second": statistics.median(speeds),
            "share_of_peak": statistics.median(speeds) * flops / peaks[yardstick],
            "memory_without_moments": rounds[-1]["memory"][name] - (state // 2 if "held" in name else state),
            "ratios": sorted(ratios),
        }
    return {
        "model": given.model,
        "options": options,
        "parameters": count_parameters(config.model).total,
        "routing": "forced to be balanced" if given.balanced else "natural",
        "machine": machine(),
        "torch": torch.__version__,
        "flops_per_token": flops,
        "peak_flops": peaks,
        "batched_mm_bytes_per_layer": batched_mm_bytes(options),
        "sides": sides,
        "rounds": rounds,
    }


def machine() -> str:
    """The processor, its cores for this process, and what it multiplies bf16 matrices with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    units = [unit for unit in ("amx_bf16", "avx512_bf16") if unit in told.get("flags", "").split()]
    name = told.get("model name") or platform.processor()
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {units[0] if units else 'no bf16 products in hardware'}"


def table(report: dict[str, Any]) -> str:
    """The report for people, in Markdown."""
    peaks = ", ".join(f"{kind} {rate / 1e9:,.0f}" for kind, rate in report["peak_flops"].items())
    lines = [
        f"{report['model']}: {report['parameters'] / 1e6:.1f} M parameters, routing {report['routing']}; "
        f"{report['machine']}, torch {report['torch']}; best matrix products {peaks} GFLOP/s",
        f"batched_mm would gather {report['batched_mm_bytes_per_layer'] / 1e9:.1f} GB of weights per layer: not run",
        "",
        "| | tokens/s | of its type's best product | memory, MB | moe-lm is faster by (least to most) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, side in report["sides"].items():
        low, *_, high = (*side["ratios"], side["ratios"][-1])
        ratio = "" if name.startswith("moe-lm") else f"{statistics.median(side['ratios']):.2f} ({low:.2f}–{high:.2f})"
        share, memory = f"{side['share_of_peak']:.1%}", f"{side['memory_without_moments'] / 1e6:,.0f}"
        lines.append(f"| {name} | {side['tokens_per_second']:,.0f} | {share} | {memory} | {ratio} |")
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Speeds as bars, with the spread between rounds."""
    from matplotlib.figure import Figure

    names = list(report["sides"])
    speeds = [[one["tokens_per_second"][name] for one in report["rounds"]] for name in names]
    middles = [statistics.median(values) for values in speeds]
    spread = [[m - min(v) for m, v in zip(middles, speeds)], [max(v) - m for m, v in zip(middles, speeds)]]
    figure = Figure(figsize=(8, 0.4 * len(names) + 1), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, middles, xerr=spread, color=["#c0392b" if "moe-lm" in name else "#7f8c8d" for name in names])
    axes.invert_yaxis()
    axes.set_xlabel(f"tokens/s, {report['model']} model, {report['machine']}")
    figure.savefig(path)


if __name__ == "__main__":
    run_and_exit(main)
