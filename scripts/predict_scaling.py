"""Predicted weak scaling of Mixtral 8x7B and 8x22B from 8 to 1,024 GPUs: the tables of docs/parallelism.md.

python scripts/predict_scaling.py

Nothing of it is measured. Bytes come from the formulas of moe_lm/parallel/cost.py, which tests hold to every byte; the
rest are the assumptions below.
"""

import argparse
import dataclasses

from moe_lm.model.accounting import count_parameters, training_flops_per_token, training_state_bytes
from moe_lm.model.config import ModelConfig
from moe_lm.parallel.cost import Work, step_traffic
from moe_lm.parallel.layout import Layout
from moe_lm.parallel.placement import contiguous

NODE = 8
PEAK = 989e12  # FLOP/s of an H200 in bf16, dense
EFFICIENCY = 0.5  # of it, while computing
LARGEST = 0.8 * 141e9  # bytes of an H200 that weights, gradients and moments can take
IN_NODE = 0.8 * 450e9  # bytes/s of one GPU to others of its node
OF_NODE = 0.9 * 400e9  # bytes/s of a node to others: eight links of 400 Gbit/s
SEQUENCE, MICRO_BATCHES = 4096, 8  # one sequence at a time, eight to a step on each GPU

MODELS = {
    "Mixtral 8x7B": ModelConfig(),
    "Mixtral 8x22B": ModelConfig(
        hidden_size=6144, intermediate_size=16384, num_hidden_layers=56, num_attention_heads=48
    ),
}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one step."""

    compute: float
    """Seconds."""
    sharing: float
    """Seconds of collectives that run beside it."""
    exchange: float
    """Seconds of the exchange of tokens, which nothing runs beside."""
    memory: float
    """Bytes of weights, gradients, moments and nothing else, on one GPU."""

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return max(self.compute, self.sharing) + self.exchange


def predict(model: ModelConfig, layout: Layout) -> Prediction:
    """One step with the load perfectly balanced."""
    rows = model.num_hidden_layers * MICRO_BATCHES * SEQUENCE * model.num_experts_per_tok * (layout.ep - 1) // layout.ep
    work = Work(MICRO_BATCHES, rows_sent=rows, rows_received=rows)
    placement = contiguous(model.num_hidden_layers, model.num_experts, layout.ep)
    groups = step_traffic(model, layout, work, placement)
    nodes = layout.world_size // NODE
    # Rings over all GPUs of several nodes enter and leave a node once, over all its links; groups with one GPU of each
    # node share them. One after the other: all use the same links.
    rates = {
        "all": OF_NODE if nodes > 1 else IN_NODE,
        "dense shards": OF_NODE if layout.dp_shard > NODE else IN_NODE,
        "dense replicas": OF_NODE / NODE,
        "expert shards": OF_NODE / NODE,
        "expert replicas": OF_NODE / NODE,
        "expert parallel": IN_NODE,
    }
    seconds = {name: float(traffic.total) / rates[name] for name, traffic in groups.items()}
    exchange = seconds.pop("expert parallel")
    tokens = MICRO_BATCHES * SEQUENCE
    compute = tokens * training_flops_per_token(model, SEQUENCE) / (PEAK * EFFICIENCY)
    state = training_state_bytes(model, 2, 4) / layout.dp_shard
    return Prediction(compute, sum(seconds.values()), exchange, state)


def main() -> None:
    """Print a table for each model and mode."""
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    for name, model in MODELS.items():
        count = count_parameters(model)
        print(f"{name}: {count.total / 1e9:.1f} B parameters, {count.active / 1e9:.1f} B active")
        print("GPUs  mode     dp_replicate  dp_shard  ep  compute  sharing  exchange  step     GB/GPU  tok/s/GPU  MFU")
        for gpus in (8, 16, 32, 64, 128, 256, 512, 1024):
            smallest = next((n for n in (8, 16, 32, 64) if predict(model, Layout(1, n, NODE)).memory <= LARGEST), 64)
            layouts = {"fsdp_ep": Layout(1, gpus, NODE), "hsdp_ep": Layout(gpus // smallest, smallest, NODE)}
            for mode, layout in layouts.items():
                if mode == "hsdp_ep" and layout.dp_replicate < 2:
                    continue
                found = predict(model, layout)
                begin = f"{gpus:<6}{mode:<9}{layout.dp_replicate:<14}{layout.dp_shard:<10}{layout.ep:<4}"
                if found.memory > LARGEST:
                    print(f"{begin}does not fit: {found.memory / 1e9:,.0f} GB of weights, gradients and moments a GPU")
                    continue
                rate = MICRO_BATCHES * SEQUENCE / found.seconds
                utilization = found.compute * EFFICIENCY / found.seconds
                print(
                    f"{begin}{found.compute:<9.2f}{found.sharing:<9.2f}{found.exchange:<10.2f}{found.seconds:<9.2f}"
                    f"{found.memory / 1e9:<8.0f}{rate:<11,.0f}{utilization:.0%}"
                )
        print()


if __name__ == "__main__":
    main()
