"""One case of the invariance contract: a model, a global batch, and how processes share them.

    torchrun … -m tests.distributed.cases CASES.json OUTPUT      runs those of as many processes; called by the tests

Every process runs its part of the case; results are whole tensors, written as a checkpoint that all processes write.
"""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import torch

from moe_lm.checkpoint.checkpoint import Checkpoint
from moe_lm.checkpoint.config import CheckpointConfig
from moe_lm.checkpoint.store import CheckpointStore, Part, TensorSlice
from moe_lm.data.batch import IGNORED, Batch
from moe_lm.model.config import LoadBalancing, LoadSource, ModelConfig, ModelFamily
from moe_lm.model.initialization import initial_value
from moe_lm.parallel.cost import Work, step_traffic
from moe_lm.parallel.dispatch import AllToAllDispatcher
from moe_lm.parallel.layout import Layout
from moe_lm.parallel.parallelize import parallelize
from moe_lm.parallel.placement import Placement, contiguous
from moe_lm.parallel.runtime import Runtime
from moe_lm.training.config import OptimizerConfig, OptimizerName
from moe_lm.training.feed import GlobalBatch
from moe_lm.training.optimizer import Optimizer
from moe_lm.training.precision import ComputeModel
from moe_lm.training.state import initial_load
from moe_lm.training.step import next_load, train_step
from tests.distributed.traffic import CountTraffic, said

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
    recompute: bool = False
    model: tuple[tuple[str, object], ...] = ()

    @property
    def layout(self) -> Layout:
        return Layout(self.replicas, self.world // self.replicas, self.ep)

    @property
    def alone(self) -> "Case":
        """The same work in one process, undivided."""
        return dataclasses.replace(self, world=1, replicas=1, ep=1, micro=ROWS, scattered=False, recompute=False)

    @property
    def name(self) -> str:
        flags = [flag for flag in ("packed", "scattered", "recompute") if getattr(self, flag)]
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

    def work(self, rows_sent: int, rows_received: int) -> Work:
        size = getattr(torch, self.dtype).itemsize
        micro_batches = ROWS // self.world // self.micro
        return Work(micro_batches, size, max(size, 4), self.optimizer == "muon", rows_sent, rows_received)

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


def run_case(case: Case, runtime: Runtime, directory: Path) -> None:
    """Run the steps and write a checkpoint of everything that must not depend on the case."""
    dtype = getattr(torch, case.dtype)
    torch.set_default_dtype(torch.float64 if dtype is torch.float64 else torch.float32)
    config = case.model_config()
    parallel = parallelize(config, case.layout, case.placement(), runtime.rank, runtime.device, dtype)
    parallel.module.model.recompute_layers = case.recompute
    for shard in parallel.shards:
        # Drawn in fp32 for both, so that all types begin with the same weights.
        whole = initial_value(config, 3, shard.name, shard.shape, runtime.device, torch.float32)
        shard.fill(whole.to(shard.value.dtype))
    compute = ComputeModel(parallel, dtype)
    name = OptimizerName[case.optimizer]
    optimizer = Optimizer(parallel.shards, OptimizerConfig(name, learning_rate=1e-2, max_grad_norm=0.5))
    load_LE = initial_load(config)
    slices: list[TensorSlice] = []

    def add(prefix: str, tensors: list[torch.Tensor]) -> None:
        for shard, local in zip(parallel.shards, tensors, strict=True):
            if shard.counts:
                slices.extend(
                    TensorSlice(f"{prefix}/{shard.name}", box.of(local).detach().clone(), shard.shape, box.offsets)
                    for box in shard.boxes
                )

    add_hidden(slices, compute, case, runtime)
    parallel.release()
    update = optimizer.step

    def recorded(norm: torch.Tensor, factor: float) -> None:
        add(f"gradient{step}", optimizer.gradients())
        update(norm, factor)

    optimizer.step = recorded  # type: ignore[method-assign]
    figures, traffic = [], []
    for step in range(STEPS):
        batch = global_batch(step, case, runtime.rank)
        with CountTraffic() as counted, count_rows(runtime.rank % case.ep) as rows:
            result = train_step(compute, optimizer, runtime, batch, load_LE, 1.0)
        load_LE = next_load(result, load_LE)
        predicted = step_traffic(config, case.layout, case.work(*rows), parallel.placement, runtime.rank % case.ep)
        traffic.append({"calls": counted.calls, "bytes": counted.said(), "predicted": said(predicted)})
        losses = [result.cross_entropy, result.load_balancing, result.router_z, result.gradient_norm]
        figures.append({"losses": losses, "counts": result.count_LE.tolist(), "applied": result.applied})
    add("weight", [shard.value for shard in parallel.shards])
    write(directory, slices, {"figures": figures, "traffic": traffic}, runtime)


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
    part = store.write_part(1, runtime.rank, slices)
    texts = runtime.gather(json.dumps({"part": dataclasses.asdict(part), "figures": figures}))
    everyone = [json.loads(text) for text in texts]
    if runtime.is_main:
        store.join(1, [Part(**one["part"]) for one in everyone], {"processes": [one["figures"] for one in everyone]})
    runtime.barrier()


def result_of(directory: Path) -> Checkpoint:
    return Checkpoint(CheckpointStore(directory, CheckpointConfig()).path(1))


def main() -> None:
    torch.set_num_threads(1)
    runtime = Runtime("cpu")
    specifications, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for specification in specifications:
        specification["model"] = tuple(map(tuple, specification["model"]))
        case = Case(**specification)
        run_case(case, runtime, output / case.name)
    runtime.close()


if __name__ == "__main__":
    main()
