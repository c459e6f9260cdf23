"""One case of the invariance contract: a model, a global batch, and how processes share them.

    torchrun … -m tests.distributed.cases JOBS.json DIRECTORY       what `run_jobs` starts

Every process runs its part of the case; results are whole tensors, written as a checkpoint that all processes write.
A job may also load the training state that other processes saved, and save it again.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from moe_lm.checkpoint.checkpoint import Checkpoint
from moe_lm.checkpoint.config import CheckpointConfig
from moe_lm.checkpoint.store import CheckpointStore, TensorSlice
from moe_lm.data.batch import IGNORED, Batch
from moe_lm.finetune.base import FromBase
from moe_lm.finetune.config import LORA_PARTS, FinetuneConfig, Method
from moe_lm.kernels import newton_schulz
from moe_lm.model.config import LoadBalancing, LoadSource, ModelConfig, ModelFamily, Recompute
from moe_lm.model.initialization import initial_value
from moe_lm.parallel.cost import Traffic, Work, step_traffic
from moe_lm.parallel.dispatch import AllToAllDispatcher
from moe_lm.parallel.layout import Layout
from moe_lm.parallel.parallelize import parallelize
from moe_lm.parallel.placement import Placement, contiguous
from moe_lm.parallel.runtime import Runtime
from moe_lm.training import optimizer
from moe_lm.training.config import OptimizerConfig, OptimizerName
from moe_lm.training.feed import GlobalBatch
from moe_lm.training.optimizer import Optimizer
from moe_lm.training.precision import ComputeModel
from moe_lm.training.state import expected_tensors, initial_load, load_tensors, saved_slices
from moe_lm.training.step import next_load, train_step
from tests.distributed.traffic import CountTraffic, said
from tests.runs import ENVIRONMENT

ROWS, LENGTH, VOCABULARY, STEPS = 12, 24, 61, 3


@dataclasses.dataclass(frozen=True)
class Case:
    """How processes share the work."""

    world: int = 1
    replicas: int = 1
    ep: int = 1
    micro: int = 12
    """Rows of a micro-batch."""
    packed: bool = False
    """Several documents to a row, the last row empty; otherwise one, with padding behind."""
    dtype: str = "float64"
    """What is computed with; master weights are fp32 under bfloat16."""
    optimizer: str = "adamw"
    scattered: bool = False
    """Experts placed otherwise in each layer, instead of in order."""
    recompute: str = "none"
    lora: int = 0
    """Rank of adapters on all that can have some, which alone are trained; 0 trains the model itself."""
    experts: tuple[int, ...] = ()
    """The experts that are trained; empty means all."""
    model: tuple[tuple[str, object], ...] = ()

    @property
    def layout(self) -> Layout:
        return Layout(self.replicas, self.world // self.replicas, self.ep)

    @property
    def alone(self) -> "Case":
        """The same work in one process, undivided."""
        return dataclasses.replace(self, world=1, replicas=1, ep=1, micro=ROWS, scattered=False, recompute="none")

    @property
    def name(self) -> str:
        flags = [flag for flag in ("packed", "scattered") if getattr(self, flag)]
        if self.recompute != "none":
            flags.append(self.recompute)
        of_model = [f"{key}={value}" for key, value in self.model]
        return "-".join(
            [
                f"w{self.world}",
                f"r{self.replicas}",
                f"ep{self.ep}",
                f"m{self.micro}",
                self.dtype,
                self.optimizer,
                *flags,
                *([f"lora{self.lora}"] if self.lora else []),
                *([f"experts{'+'.join(map(str, self.experts))}"] if self.experts else []),
                *of_model,
            ]
        )

    def model_config(self) -> ModelConfig:
        shape = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.1,
            "router_aux_loss_coef": 0.1,
            "router_z_loss_coef": 0.01,
        }
        enums = {"family": ModelFamily, "load_balancing": LoadBalancing, "load_balancing_source": LoadSource}
        given = {name: enums[name](value) if name in enums else value for name, value in self.model}
        return ModelConfig(**{**shape, **given})

    def finetune(self) -> FinetuneConfig:
        method = Method.lora if self.lora else Method.full
        parts = [part.name for part in LORA_PARTS] if self.lora else []
        return FinetuneConfig(method, parts, [str(number) for number in self.experts], self.lora or 8)

    def work(self, rows_sent: int, rows_received: int) -> Work:
        size = getattr(torch, self.dtype).itemsize
        micro_batches = ROWS // self.world // self.micro
        muon_bytes = self.iteration_dtype.itemsize if self.optimizer == "muon" else 0
        return Work(
            micro_batches,
            size,
            max(size, 4),
            self.recompute != "none",
            muon_bytes,
            rows_sent,
            rows_received,
            self.micro * LENGTH,
        )

    @property
    def iteration_dtype(self) -> torch.dtype:
        """Muon's. In bf16 rounding hides what is compared: a third of a matrix's whole movement."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    def placement(self) -> Placement | None:
        if self.ep == 1:
            return None
        config = self.model_config()
        layers, experts = config.num_hidden_layers, config.num_experts
        if not self.scattered:
            return contiguous(layers, experts, self.ep)
        owners = [
            [(3 * expert + layer) % experts * self.ep // experts for expert in range(experts)]
            for layer in range(layers)
        ]
        return Placement(tuple(map(tuple, owners)), self.ep)


@dataclasses.dataclass(frozen=True)
class Base:
    """As much of a base model as says what is trained."""

    config: ModelConfig
    path: Path = Path()


def job(case: Case, output: str, source: str = "", keep_state: bool = False) -> dict:
    """What to run, the directories of what is read and written, and whether the training state shall be."""
    return {"case": dataclasses.asdict(case), "output": output, "source": source, "keep_state": keep_state}


def run_jobs(jobs: list[dict], directory: Path) -> None:
    """Run jobs of one number of processes, one after the other, in processes started once."""
    (world,) = {job["case"]["world"] for job in jobs}
    file = directory / f"jobs-{world}-{len(list(directory.glob('jobs-*')))}.json"
    file.write_text(json.dumps(jobs))
    launcher = [sys.executable]
    if world > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command = [*launcher, "-m", "tests.distributed.cases", file, directory]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]


def rows_of(step: int, packed: bool) -> list[Batch]:
    """A global batch, row by row."""
    rows = []
    for row in range(ROWS):
        generator = torch.Generator().manual_seed(1000 * step + row)
        tokens = torch.randint(3, VOCABULARY, (1, LENGTH), generator=generator)
        position = torch.arange(LENGTH)[None]
        if packed:
            first = 5 + row
            document = torch.where(position < first, 1, 2)
            position = torch.where(position < first, position, position - first)
            mask = torch.full_like(tokens, row < ROWS - 1, dtype=torch.bool)
        else:
            mask = position < LENGTH - row
            document = mask.long()
        document = document * mask
        labels = torch.where(mask & (document == document.roll(-1, 1)), tokens.roll(-1, 1), IGNORED)
        labels[:, -1] = IGNORED
        rows.append(Batch(torch.where(mask, tokens, 0), labels, position, document, mask, torch.zeros_like(tokens)))
    return rows


def join(rows: list[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(row, field) for row in rows]) for field in rows[0].__dataclass_fields__))


def global_batch(step: int, case: Case, rank: int) -> GlobalBatch:
    """A process's part of a global batch."""
    rows = rows_of(step, case.packed)
    whole, mine = join(rows), rows[rank :: case.world]
    micro = [join(mine[i : i + case.micro]) for i in range(0, len(mine), case.micro)]
    routed = int(whole.routing_mask.sum())
    return GlobalBatch(micro, int((whole.labels != IGNORED).sum()), routed, [routed], {})


def run_case(case: Case, runtime: Runtime, directory: Path, keep_state: bool) -> None:
    """Run the steps and write a checkpoint of everything that must not depend on the case."""
    dtype = getattr(torch, case.dtype)
    torch.set_default_dtype(torch.float64 if dtype is torch.float64 else torch.float32)
    config = case.model_config()
    parallel = parallelize(
        config,
        case.layout,
        case.placement(),
        runtime.rank,
        runtime.device,
        dtype,
        lambda model: FromBase(Base(config), case.finetune(), 0, "").adapt(model, dtype),
    )
    parallel.module.model.recompute = Recompute(case.recompute)
    for shard in parallel.shards:
        # Drawn in fp32 for both, so that all types begin with the same weights. (Adapters, too: a B of zeros would
        # leave its A without a gradient.)
        whole = initial_value(config, 3, shard.name, shard.shape, runtime.device, torch.float32)
        shard.fill(whole.to(shard.value.dtype))
    shards = [shard for shard in parallel.shards if shard.parameter.requires_grad]
    if case.experts:
        shards = [s.training_only(case.experts) if ".mlp.experts." in s.name else s for s in shards]
    compute = ComputeModel(parallel, dtype)
    name = OptimizerName[case.optimizer]
    optimizer = Optimizer(shards, OptimizerConfig(name, learning_rate=1e-2, max_grad_norm=0.5))
    load_LE = initial_load(config)
    slices: list[TensorSlice] = []

    def add(prefix: str, tensors: list[torch.Tensor]) -> None:
        for shard, local in zip(shards, tensors, strict=True):
            if shard.counts:
                slices.extend(
                    TensorSlice(f"{prefix}/{shard.name}", box.of(local).detach().clone(), shard.shape, box.offsets)
                    for box in shard.boxes
                )

    add_hidden(slices, compute, case, runtime)
    parallel.release()
    update = optimizer.step

    def recorded(norm: torch.Tensor, factor: float) -> None:
        # One process keeps those of its only micro-batch in bf16.
        wide = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in optimizer.gradients()]
        add(f"gradient{step}", wide)
        update(norm, factor)

    optimizer.step = recorded  # type: ignore[method-assign]
    figures, traffic, dropped = [], [], []
    for step in range(STEPS):
        batch = global_batch(step, case, runtime.rank)
        with CountTraffic() as counted, count_rows(runtime.rank % case.ep) as rows:
            result = train_step(compute, optimizer, runtime, batch, load_LE, 1.0)
        load_LE = next_load(result, load_LE)
        times = 1 if case.recompute == "none" else 2  # that a dispatch was made, and counted
        rows = [number // times for number in rows]
        predicted = step_traffic(config, case.layout, case.work(*rows), parallel.placement, runtime.rank % case.ep)
        traffic.append(
            {"calls": counted.calls, "bytes": counted.said(), "predicted": said(sum(predicted.values(), Traffic()))}
        )
        losses = [result.cross_entropy, result.load_balancing, result.router_z, result.gradient_norm]
        dropped.append(result.dropped)
        figures.append({"losses": losses, "counts": result.count_LE.tolist(), "applied": result.applied})
    add("weight", [shard.value for shard in shards])
    write(directory, slices, {"figures": figures, "traffic": traffic, "dropped": dropped}, runtime)
    if keep_state:
        write_state(directory / "state", optimizer, load_LE, runtime)


@torch.no_grad()
def add_hidden(slices: list[TensorSlice], compute: ComputeModel, case: Case, runtime: Runtime) -> None:
    """The final hidden states of this process's rows."""
    mine = list(range(ROWS))[runtime.rank :: case.world]
    batch = join([rows_of(0, case.packed)[row] for row in mine])
    hidden = compute.module(batch.input_ids, batch.position_ids, batch.document_ids, batch.routing_mask).hidden_BSD
    hidden = hidden * batch.routing_mask[:, :, None]  # what padding gives is nobody's business
    for place, row in enumerate(mine):
        shape = [ROWS, *hidden.shape[1:]]
        slices.append(TensorSlice("hidden", hidden[place : place + 1].clone(), shape, [row, 0, 0]))


@contextlib.contextmanager
def count_rows(own: int):
    """Rows that this process sends to other owners of experts, and receives from them."""
    rows, original = [0, 0], AllToAllDispatcher.dispatch

    def dispatch(self, x_TD, assignments):
        result = original(self, x_TD, assignments)
        handle = result[-1]
        rows[0] += sum(handle.sent) - handle.sent[own]
        rows[1] += sum(handle.received) - handle.received[own]
        return result

    AllToAllDispatcher.dispatch = dispatch
    try:
        yield rows
    finally:
        AllToAllDispatcher.dispatch = original


def write(directory: Path, slices: list[TensorSlice], figures: dict, runtime: Runtime) -> None:
    store = CheckpointStore(directory, CheckpointConfig())
    store.write_part(1, runtime.rank, slices)
    everyone = [json.loads(text) for text in runtime.gather(json.dumps(figures))]
    if runtime.is_main:
        store.join(1, runtime.world_size, {"processes": everyone})
    runtime.barrier()


def write_state(directory: Path, optimizer: Optimizer, load_LE: torch.Tensor, runtime: Runtime) -> None:
    """Save all of a training state, as a run does."""
    write(directory, list(saved_slices(optimizer, load_LE, runtime.is_main)), {}, runtime)


def reshard(source: Path, case: Case, runtime: Runtime, directory: Path) -> None:
    """Load a training state that other processes saved, and save it again."""
    torch.set_default_dtype(torch.float32)
    config = case.model_config()
    parallel = parallelize(config, case.layout, case.placement(), runtime.rank, runtime.device, torch.float32)
    optimizer = Optimizer(parallel.shards, OptimizerConfig(OptimizerName[case.optimizer]))
    load_LE, checkpoint = initial_load(config), result_of(source)
    checkpoint.expect(expected_tensors(config, optimizer, trained=True))
    load_tensors(checkpoint, optimizer, load_LE, trained=True)
    write_state(directory, optimizer, load_LE, runtime)


def result_of(directory: Path) -> Checkpoint:
    return Checkpoint(CheckpointStore(directory, CheckpointConfig()).path(1))


def main() -> None:
    torch.set_num_threads(1)
    runtime = Runtime("cpu")
    jobs, directory = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for job in jobs:
        job["case"]["model"] = tuple(map(tuple, job["case"]["model"]))
        job["case"]["experts"] = tuple(job["case"]["experts"])
        case = Case(**job["case"])
        newton_schulz.iteration_dtype = optimizer.iteration_dtype = lambda device, case=case: case.iteration_dtype
        if job["source"]:
            reshard(directory / job["source"], case, runtime, directory / job["output"])
        else:
            run_case(case, runtime, directory / job["output"], job["keep_state"])
    runtime.barrier()
    os._exit(0)  # as the command line does under a launcher, see cli.run_and_exit


if __name__ == "__main__":
    main()
