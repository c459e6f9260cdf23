"""Tiny real runs for tests: the options that make one, processes that run it, and what to compare afterwards."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from moe_lm.checkpoint.config import CheckpointConfig
from moe_lm.checkpoint.store import CheckpointStore

TINY = [
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.num_key_value_heads=2",
    "tokenizer.vocab_size=400",
    "data=text",
    "data.sequence_length=32",
    "trainer.precision=fp32",
    "trainer.global_batch_size=12",
    "trainer.micro_batch_size=12",
    "trainer.log_interval=1",
    "trainer.eval_interval=5",
    "trainer.eval_sequences=8",
    "schedule.warmup_steps=2",
    "optimizer.learning_rate=0.002",
    "checkpoint.interval=4",
    "finish.sample_tokens=5",
]

ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_RANK"))},
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}


def write_corpus(directory: Path, files: int = 30) -> Path:
    """Text files with something to learn in them."""
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        lines = [f"line {j} of file {i}: {j} times {i} makes {i * j}, and nothing else." for j in range(40)]
        (directory / f"text{i:02}.txt").write_text("\n".join(lines) + "\n")
    return directory


def prepare(directory: Path) -> None:
    """A corpus, and the set `prepared` made of it, so that many runs need not make their own."""
    write_corpus(directory / "corpus")
    options = ["data=text", "data.paths=[corpus]", "tokenizer.vocab_size=400", "output=prepared"]
    moe_lm("prepare", *options, cwd=directory)


def moe_lm(*arguments: str, cwd: Path, launcher: list[str] | None = None, check: bool = True):
    """Run the command line in a process of its own, directly or under a launcher."""
    command = [*(launcher or [sys.executable]), "-m", "moe_lm", *arguments]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def metrics(run: Path, name: str = "loss") -> dict[int, float]:
    """One figure of metrics.jsonl by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint."""
    checkpoint = CheckpointStore(run / "checkpoints", CheckpointConfig()).newest(refused=print)
    assert checkpoint is not None
    return {name: checkpoint.tensor(name) for name in checkpoint.kinds()}


def wait_for(holds):
    """Wait until something holds; two minutes are a failure."""
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children_of(pid, word):
    """Processes that a process has started and whose command line has a word in it."""
    children = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread or a child that ends meanwhile
            children += (task / "children").read_text().split()
    found = []
    for child in children:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if word in Path(f"/proc/{child}/cmdline").read_text():
                found.append(int(child))
    return found
