"""A mixture against a dense model, at equal active FLOPs per token and equal tokens: which predicts text better.

    python scripts/mixture_against_dense.py DIRECTORY [--seeds 0 1 2] [--steps N] [OPTION=VALUE …]

Trains the default experiment with `model=mixture` and `model=dense` in turn, with each seed, on one prepared text, each
run a `moe-lm pretrain` of its own. The dense model is as wide as the experts that a token of the mixture uses; options
go to both, and learning rates of their own by `--mixture-learning-rate` and `--dense-learning-rate`: of several, the
one with the best mean counts, chosen on these very runs. Interrupted, it goes on by the same command, and finished runs
are not made again. Prints a table and writes `mixture-against-dense.json` into the directory. A run takes about as long
as `make train`.
"""

import argparse
import dataclasses
import itertools
import json
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from arguments import not_negative, place, positive, run_and_exit

from moe_lm.commands.changes import differences
from moe_lm.commands.run_directory import CONFIG_FILE, STATE_FILE
from moe_lm.config import load, load_saved
from moe_lm.data.prepare import prepare
from moe_lm.interrupts import STOPPED
from moe_lm.model.accounting import count_parameters, training_flops_per_token
from moe_lm.training.config import RunConfig

FAMILIES = ("mixture", "dense")
MOST_APART = 0.01
"""Share of the mixture's FLOPs per token that the dense model's may differ by: the router's own are 0.2 %."""

SAME = [
    "data=prepared",
    "data.paths=[prepared]",
    "trainer.log_interval=1",
    "checkpoint.keep_last=1",
    "checkpoint.keep_best=false",
    "finish.export=false",
    "finish.sample_prompt=null",
    "finish.compare_compressors=false",
]
"""Options of every run, after the user's."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """A model at a learning rate."""

    family: str
    learning_rate: float
    config: RunConfig
    """But for the seed."""
    options: list[str]
    """That make it."""

    @property
    def name(self) -> str:
        """Of its runs, but for the seed."""
        return f"{self.family}-{self.learning_rate:g}"

    @property
    def flops(self) -> int:
        """Active FLOPs per token, forward and backward."""
        return training_flops_per_token(self.config.model, self.config.data.sequence_length)

    def row(self, figures: list[dict[str, Any]]) -> list[str]:
        """Of the table."""
        count = count_parameters(self.config.model)
        mean = [said([one[name] for one in figures], 4) for name in ("bits_per_byte", "nats_per_token")]
        return [
            *(self.family, f"{self.learning_rate:g}", f"{count.total / 1e6:.2f} / {count.active / 1e6:.2f}"),
            f"{self.flops / 1e6:.2f}",
            *(f"{one['bits_per_byte']:.4f} ({one['nats_per_token']:.4f})" for one in figures),
            f"{mean[0]} ({mean[1]})",
            said([one["seconds"] for one in figures], 0),
        ]


def main(arguments: list[str]) -> None:
    """Train what is missing and say what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=place, help="for the prepared text, the runs and the result")
    parser.add_argument("--seeds", type=not_negative, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=positive, help="of each run (default: the experiment's)")
    for family in FAMILIES:
        parser.add_argument(f"--{family}-learning-rate", type=float, nargs="+", help="one or several to choose from")
    options = [argument for argument in arguments if re.match(r"[\w.]+=", argument)]
    given = parser.parse_args([argument for argument in arguments if argument not in options])
    steps = [] if given.steps is None else [f"trainer.max_steps={given.steps}"]
    contenders = contend([*options, *steps], {f: getattr(given, f"{f}_learning_rate") for f in FAMILIES})
    flops = compare_flops(contenders)
    text = load("pretrain", options)
    prepare(text.data, text.tokenizer, given.directory / "prepared", report=lambda line: print(line, flush=True))

    figures: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in contenders}
    for seed in given.seeds:
        for contender in contenders:
            figures[contender.name].append({"seed": seed, **result(given.directory, contender, seed)})
        if len({of[-1]["targets"] for of in figures.values()}) > 1:
            learned = ", ".join(f"{name} {of[-1]['targets']:,}" for name, of in figures.items())
            sys.exit(f"seed {seed}: the runs have not learned from the same number of tokens ({learned}).")
    report = {"options": options, "flops_per_token": flops, **describe(contenders, figures)}
    (given.directory / "mixture-against-dense.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{report['tokens']:,} tokens ({report['steps']} steps) each\n")
    print(table(contenders, figures, given.seeds))
    print("\ndense less mixture, each at its best learning rate, by seed: " + report["difference"]["said"])


def contend(options: list[str], learning_rates: dict[str, list[float] | None]) -> list[Contender]:
    """All contenders, in the order that they train in; without a learning rate of its own one has the options'."""
    mixture = load("pretrain", [*options, "model=mixture", *SAME])
    width = mixture.model.num_experts_per_tok * mixture.model.intermediate_size
    contenders = []
    for family in FAMILIES:
        shape = [f"model={family}", *([f"model.intermediate_size={width}"] if family == "dense" else [])]
        for rate in dict.fromkeys(learning_rates[family] or [mixture.optimizer.learning_rate]):
            own = [*options, *shape, *SAME, f"optimizer.learning_rate={rate}"]
            contenders.append(Contender(family, rate, load("pretrain", own), own))
    return contenders


def compare_flops(contenders: list[Contender]) -> dict[str, int]:
    """Active FLOPs per token of both models, printed; ends the script where the router makes them differ too much."""
    flops = {contender.family: contender.flops for contender in contenders}
    mixture, dense = (flops[family] for family in FAMILIES)
    apart = abs(mixture - dense) / mixture
    both = f"active FLOPs per token: mixture {mixture:,}, dense {dense:,}, {apart:.2%} apart"
    if apart > MOST_APART:
        sys.exit(f"{both}: more than {MOST_APART:.0%} is no equal work; take fewer experts, or wider ones.")
    print(both, flush=True)
    return flops


def result(directory: Path, contender: Contender, seed: int) -> dict[str, Any]:
    """Figures of a run, which is trained, or gone on with, if it is not finished."""
    name = f"{contender.name}-seed{seed}"
    run, own = directory / "runs" / name, [*contender.options, f"seed={seed}", f"run_name={name}", "output_dir=runs"]
    if not is_finished(run, own):
        train(directory, name, own)
    validation = json.loads((run / STATE_FILE).read_text())["validation"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    made = [line for line in lines if "tokens_per_second" in line]
    tokens = contender.config.trainer.global_batch_size * contender.config.data.sequence_length
    print(f"{name}: {validation['bits_per_byte']:.4f} bits per byte", flush=True)
    return {
        "bits_per_byte": validation["bits_per_byte"],
        "nats_per_token": validation["loss"],
        "targets": made[-1]["targets"],
        "seconds": sum(tokens / line["tokens_per_second"] for line in made),
    }


def is_finished(run: Path, options: list[str]) -> bool:
    """Whether the run has ended; another run of that name in its place ends the script."""
    state = run / STATE_FILE
    if not state.exists() or json.loads(state.read_text())["status"] != "finished":
        return False
    if changed := differences(load_saved(RunConfig, run / CONFIG_FILE), load("pretrain", options)):
        fields = "; ".join(f"{name}={change}" for name, change in changed.items())
        sys.exit(f"{run} was trained with another configuration: {fields}. Give another DIRECTORY, or the old values.")
    return True


def train(directory: Path, name: str, options: list[str]) -> None:
    """Train a run to its end; it saves and stops when this script is told to."""
    with (directory / f"{name}.log").open("a") as log:
        command = [sys.executable, "-m", "moe_lm", "pretrain", *options]
        process = subprocess.Popen(command, cwd=directory, stdout=log, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            code = STOPPED
    if code == STOPPED:
        print(f"{name}: stopped; the same command goes on", file=sys.stderr)
        sys.exit(STOPPED)
    if code:
        sys.exit(f"{name}: ended with exit code {code}; see {log.name}")


def describe(contenders: list[Contender], figures: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """All figures, and what the dense model at its best lacks against the mixture at its best, seed by seed."""
    best = {
        family: min(
            (contender.name for contender in contenders if contender.family == family),
            key=lambda name: statistics.mean(one["bits_per_byte"] for one in figures[name]),
        )
        for family in FAMILIES
    }
    pairs = list(zip(*(figures[best[family]] for family in FAMILIES), strict=True))
    bits, nats = (
        [dense[name] - mixture[name] for mixture, dense in pairs] for name in ("bits_per_byte", "nats_per_token")
    )
    slower = statistics.mean(mixture["seconds"] / dense["seconds"] for mixture, dense in pairs)
    config = contenders[0].config
    return {
        "steps": config.trainer.max_steps,
        "tokens": config.trainer.max_steps * config.trainer.global_batch_size * config.data.sequence_length,
        "parameters": {c.family: dataclasses.asdict(count_parameters(c.config.model)) for c in contenders},
        "runs": figures,
        "best": best,
        "difference": {
            "bits_per_byte": bits,
            "nats_per_token": nats,
            "seconds_ratio": slower,
            "said": f"{said(bits, 4)} bits per byte, {said(nats, 4)} nats per token; the mixture took {slower:.2f} "
            "times as long",
        },
    }


def table(contenders: list[Contender], figures: dict[str, list[dict[str, Any]]], seeds: list[int]) -> str:
    """In Markdown: bits per byte (nats per token) of the whole validation set; seconds are those of the steps."""
    heads = ["model", "learning rate", "parameters, M: total / active", "FLOPs per token, M"]
    heads += [*(f"seed {seed}" for seed in seeds), "mean ± standard deviation", "seconds"]
    rows = [contender.row(figures[contender.name]) for contender in contenders]
    return "\n".join(f"| {' | '.join(row)} |" for row in itertools.chain([heads, ["---"] * len(heads)], rows))


def said(values: list[float], digits: int) -> str:
    """Mean and, of several, standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_and_exit(lambda: main(sys.argv[1:]))
