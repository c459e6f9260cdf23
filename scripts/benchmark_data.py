"""Speed of the data path: `moe-lm prepare` end to end with its peak memory, reading shards, and streaming.

    python scripts/benchmark_data.py

The text is Python's standard library as JSON lines, repeated to 30 and 300 MB. Figures are of this machine and hour;
what should hold anywhere is that memory does not grow with the input.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from moe_lm.data.config import DataConfig, DataSource, TokenizerConfig
from moe_lm.data.documents import Split, SplitWay
from moe_lm.data.encode import Encoder
from moe_lm.data.loader import BatchPlan, Loader, ShardLoader
from moe_lm.data.mixture import Mixture
from moe_lm.data.prepared import load
from moe_lm.data.sources import open_sources, stdlib_files
from moe_lm.data.streams import SourceStreams, StreamLoader

PREPARE = """
import resource, sys
from moe_lm import cli
code = cli.main(sys.argv[1:])
own, workers = (resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(f"peak memory: {own} MiB, of the largest worker at most {workers} MiB")
sys.exit(code)
"""


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        for megabytes in (30, 300):
            size = write_text(directory / f"{megabytes}.jsonl", megabytes * 1_000_000)
            measure_prepare(directory, megabytes, size)
        torch.set_num_threads(1)
        measure_shards(directory / "prepared-300")
        measure_streaming(directory / "300.jsonl", directory / "prepared-30")


def write_text(path: Path, num_bytes: int) -> int:
    """Python's standard library over and over, each document with a line of its own; returns the bytes of text."""
    texts = [file.path.read_text(errors="ignore") for file in stdlib_files(Path(sysconfig.get_path("stdlib")))]
    size = number = 0
    with path.open("w") as out:
        while size < num_bytes:
            text = f"# {number}\n{texts[number % len(texts)]}"
            out.write(json.dumps({"text": text}) + "\n")
            size, number = size + len(text.encode()), number + 1
    return size


def measure_prepare(directory: Path, megabytes: int, size: int) -> None:
    """`moe-lm prepare`, the training of the tokenizer and the start of Python included."""
    options = ["prepare", "data=jsonl", f"data.paths={directory / f'{megabytes}.jsonl'}"]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, *options, f"output={directory / f'prepared-{megabytes}'}"],
        check=True,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    print(f"prepare, {size / 1e6:.0f} MB of text, {os.cpu_count()} cores: {size / seconds / 1e6:.2f} MB/s end to end")
    print("   ", next(line for line in done.stdout.splitlines() if line.startswith("peak memory")), flush=True)


def measure_shards(directory: Path) -> None:
    """Whole steps out of shards, warm, on one core."""
    data = load(DataConfig(), TokenizerConfig(), directory)
    for batch, length in ((16, 256), (256, 256), (16, 4096)):
        plan = BatchPlan(1, batch, batch, length, data.tokenizer.pad_id, data.domains)
        loader = ShardLoader([data.train["jsonl"]], ["jsonl"], Mixture(np.ones(1)), plan)
        rate = measure(loader, batch * length, warm=2000)
        print(f"shards, steps of {batch} x {length}: {rate / 1e6:.0f} million tokens/s on one core", flush=True)


def measure_streaming(path: Path, prepared: Path) -> None:
    """Whole steps out of a stream, reading and tokenizing included, on one core."""
    data = load(DataConfig(), TokenizerConfig(), prepared)
    source = open_sources(DataConfig(source=DataSource.jsonl, paths=[str(path)], streaming=True))[0]
    plan = BatchPlan(1, 16, 16, 256, data.tokenizer.pad_id, data.domains)
    encoder = Encoder(data.tokenizer, data.tokenizer_directory, workers=0)
    streams = SourceStreams(source, Split(SplitWay.hash, 0.05), encoder, plan, 12)
    loader = StreamLoader([streams], ["jsonl"], Mixture(np.ones(1)), plan)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    tokens, start = 0, time.perf_counter()
    for step in range(2000):
        tokens += int(loader.step(step).domain_tokens.sum())
    seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_utime - used
    size = tokens * data.counts["train_bytes"] / data.counts["train_tokens"]
    print(f"streaming: {size / seconds / 1e6:.2f} MB/s of text on one core ({used / seconds:.0%} of it busy)")
    print(f"    {tokens / (2000 * 16 * 256):.2%} of the places in a row are tokens, the rest is padding")


def measure(loader: Loader, tokens_per_step: int, warm: int, seconds: float = 3.0) -> float:
    """Tokens per second."""
    for step in range(warm):
        loader.step(step)
    start, step = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        loader.step(step)
        step += 1
    return step * tokens_per_step / (time.perf_counter() - start)


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    main()
