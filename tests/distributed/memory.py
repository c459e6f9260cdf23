"""Memory of one process of several: torchrun … -m tests.distributed.memory DIRECTORY, as a test starts it.

Builds a model of 43 M parameters, fills it and its moments, saves it from a copy as training does, and loads it again;
writes how much more memory each process has held than before, at most.
"""

import importlib
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from moe_lm.checkpoint.checkpoint import Checkpoint
from moe_lm.checkpoint.config import CheckpointConfig
from moe_lm.checkpoint.saver import Saver
from moe_lm.checkpoint.store import CheckpointStore
from moe_lm.model.config import ModelConfig
from moe_lm.model.initialization import initial_value
from moe_lm.parallel.layout import Layout
from moe_lm.parallel.parallelize import parallelize
from moe_lm.parallel.placement import contiguous
from moe_lm.parallel.runtime import Runtime
from moe_lm.training.config import OptimizerConfig
from moe_lm.training.optimizer import Optimizer
from moe_lm.training.state import initial_load, load_tensors, saved_slices

CONFIG = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def peak() -> int:
    """Most memory resident since it was reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    torch.set_num_threads(1)
    runtime, directory = Runtime("cpu"), Path(sys.argv[1])
    world, cpu = runtime.world_size, torch.device("cpu")
    layout = Layout(1, world, world) if world > 1 else Layout()
    placement = contiguous(CONFIG.num_hidden_layers, CONFIG.num_experts, world) if world > 1 else None
    if find_spec("triton"):  # FSDP2 imports it where it is installed: 18 MB, and no part of the model
        importlib.import_module("triton")
    Path("/proc/self/clear_refs").write_text("5")  # what the peak is reset by; it comes from the parent otherwise
    before = peak()
    parallel = parallelize(CONFIG, layout, placement, runtime.rank, cpu, torch.float32)
    for shard in parallel.shards:
        shard.fill(initial_value(CONFIG, 1, shard.name, shard.shape, cpu, torch.float32))
    optimizer = Optimizer(parallel.shards, OptimizerConfig())
    for shard in parallel.shards:
        shard.parameter.grad = torch.ones_like(shard.parameter)
    optimizer.step(1.0, 1.0)
    optimizer.zero_grad()
    load_LE = initial_load(CONFIG)
    store = CheckpointStore(directory / f"saved-by-{world}", CheckpointConfig())
    saver = Saver(store, print)
    saver.start_part(1, saved_slices(optimizer, load_LE, runtime.is_main), runtime.rank)
    saver._thread.join()
    runtime.barrier()
    if runtime.is_main:
        store.join(1, world, {})
    runtime.barrier()
    saver._thread = None
    # The copy that was saved from is gone; what the other layouts saved is read in its place.
    for path in sorted(directory.glob("saved-by-*/step-*")):
        load_tensors(Checkpoint(path), optimizer, load_LE, trained=True)
    grown = runtime.gather(str(peak() - before))
    if runtime.is_main:
        (directory / f"memory-{world}.json").write_text(json.dumps([int(text) for text in grown]))
    runtime.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
