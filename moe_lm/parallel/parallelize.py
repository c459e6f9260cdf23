"""A model for the processes of a run: one ordered function, applied from outside; the model knows nothing of it.

0. Adapters, where fine-tuning adds some: they are cut and placed like what they adapt.
1. Experts: each process keeps those that the placement gives its owner, and a dispatcher that exchanges tokens.
2. FSDP2: experts over the processes that share them, everything else over all processes of the group.
3. Memory: everything is built without any, then each process allocates its own part alone.

Gradients are sums, never means: losses are divided by the global batch's tokens before backward. FSDP2 divides by the
number of processes unless both of its switches are set (gloo: the factor alone fails, the forced sum alone divides).
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from moe_lm.model.config import ModelConfig
from moe_lm.model.decoder import CausalLM
from moe_lm.model.moe import MixtureOfExperts
from moe_lm.parallel.dispatch import AllToAllDispatcher, CapacityAllToAllDispatcher
from moe_lm.parallel.layout import Layout
from moe_lm.parallel.placement import Placement
from moe_lm.parallel.shards import ParameterShard, dense_shard, expert_shard, whole_shards


@dataclasses.dataclass(frozen=True)
class ParallelModel:
    """A model whose parameters are not filled yet, and this process's part of each."""

    module: CausalLM
    shards: list[ParameterShard]
    layout: Layout = Layout()  # noqa: RUF009 -- frozen
    placement: Placement | None = None
    """Who owns which expert; null without expert parallelism."""

    def begin_backward(self, last: bool) -> None:
        """Say whether the micro-batch whose backward comes is the step's last: only then do replicas exchange sums."""
        if self.layout.sharded and self.layout.dp_replicate > 1:
            _as_fsdp(self.module).set_requires_all_reduce(last)

    def release(self) -> None:
        """Let go of whole parameters that a forward pass without backward has left."""
        if self.layout.sharded:
            _as_fsdp(self.module).reshard()


def parallelize(
    config: ModelConfig,
    layout: Layout,
    placement: Placement | None,
    rank: int,
    device: torch.device,
    compute_dtype: torch.dtype,
    adapt: Callable[[CausalLM], None] = lambda model: None,
) -> ParallelModel:
    """Build a model and share it among the processes; every process must call it.

    Args:
        config: The model.
        layout: The axes.
        placement: Who owns which expert; needed where `layout.ep` is above 1.
        rank: This process.
        device: Where its part is.
        compute_dtype: What sharded parameters are computed with, the router's excepted.
        adapt: Adds parameters to the model just built, or freezes some.
    """
    if not layout.sharded:
        with torch.device(device):
            model = CausalLM(config)
            adapt(model)
        return ParallelModel(model, whole_shards(model, rank == 0), layout)
    dense_mesh, expert_mesh = _meshes(layout, device.type)
    with torch.device("meta"):
        model = CausalLM(config)
        adapt(model)
    if layout.ep > 1:
        assert placement is not None
        _distribute_experts(model, placement, layout.ep_rank(rank), expert_mesh["ep"].get_group(), device)
    _shard(model, layout, dense_mesh, expert_mesh, compute_dtype)
    model.to_empty(device=device)
    shards = _shards_of(model, layout, placement, rank, dense_mesh["dp_shard"], expert_mesh["expert_shard"])
    return ParallelModel(model, shards, layout, placement)


def _meshes(layout: Layout, device_type: str) -> tuple[DeviceMesh, DeviceMesh]:
    """The same processes twice, as `layout.py` numbers them: by the axes of dense parameters and of experts."""
    dense = init_device_mesh(
        device_type, (layout.dp_replicate, layout.dp_shard), mesh_dim_names=("dp_replicate", "dp_shard")
    )
    experts = init_device_mesh(
        device_type,
        (layout.dp_replicate, layout.expert_shards, layout.ep),
        mesh_dim_names=("dp_replicate", "expert_shard", "ep"),
    )
    return dense, experts


def _mixtures(model: CausalLM) -> Iterator[tuple[int, MixtureOfExperts]]:
    for index, layer in enumerate(model.model.layers):
        if isinstance(layer.mlp, MixtureOfExperts):
            yield index, layer.mlp


def _distribute_experts(
    model: CausalLM, placement: Placement, ep_rank: int, group: dist.ProcessGroup, device: torch.device
) -> None:
    """Keep the experts that this process's owner has, and reach the others through the group."""
    for layer, mixture in _mixtures(model):
        owned = len(placement.experts_of(layer, ep_rank))
        for name, parameter in mixture.experts.named_parameters():
            mine = parameter.new_empty(owned, *parameter.shape[1:])
            setattr(mixture.experts, name, nn.Parameter(mine, parameter.requires_grad))
        factor = model.config.capacity_factor
        if factor is None:
            mixture.dispatcher = AllToAllDispatcher(placement.owners[layer], group, device)
        else:
            mixture.dispatcher = CapacityAllToAllDispatcher(placement.owners[layer], group, device, factor)


def _shard(
    model: CausalLM, layout: Layout, dense_mesh: DeviceMesh, expert_mesh: DeviceMesh, compute_dtype: torch.dtype
) -> None:
    """Cut every parameter over its processes, innermost modules first."""
    low = compute_dtype.itemsize < 4
    policy = MixedPrecisionPolicy(compute_dtype, torch.float32) if low else MixedPrecisionPolicy()
    replicated = layout.dp_replicate > 1
    dense = dense_mesh if replicated else dense_mesh["dp_shard"]
    of_experts = expert_mesh["dp_replicate", "expert_shard"] if replicated else expert_mesh["expert_shard"]
    # FSDP2 warns where a module's output is a view, since one that is changed in place loses its hooks; none is here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for _, mixture in _mixtures(model):
        cut = Shard(expert_dim(mixture.experts.gate_up_proj.shape[0], layout))

        def cut_along(parameter: nn.Parameter, cut: Shard = cut) -> Shard:
            return cut

        fully_shard(mixture.experts, mesh=of_experts, mp_policy=policy, shard_placement_fn=cut_along)
        if low:  # rounding the gate's weights would change which experts are chosen
            fully_shard(mixture.gate, mesh=dense, mp_policy=MixedPrecisionPolicy())
    for layer in model.model.layers:
        fully_shard(layer, mesh=dense, mp_policy=policy)
    fully_shard(model, mesh=dense, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def expert_dim(owned: int, layout: Layout) -> int:
    """The dimension that an owner's stacked experts are cut along: whole experts where they can be dealt out evenly."""
    return 0 if owned % layout.expert_shards == 0 else 1


def _shards_of(
    model: CausalLM,
    layout: Layout,
    placement: Placement | None,
    rank: int,
    dense_mesh: DeviceMesh,
    expert_mesh: DeviceMesh,
) -> list[ParameterShard]:
    counts = layout.is_first_replica(rank)
    layer_of = {id(p): layer for layer, mixture in _mixtures(model) for p in mixture.experts.parameters()}
    shards = []
    for name, parameter in model.named_parameters():
        if (layer := layer_of.get(id(parameter))) is None:
            shards.append(dense_shard(name, parameter, counts, dense_mesh.get_group()))
            continue
        every = range(model.config.num_experts)
        experts = every if placement is None else placement.experts_of(layer, layout.ep_rank(rank))
        dim, group = expert_dim(len(experts), layout), expert_mesh.get_group()
        shards.append(expert_shard(name, parameter, len(every), experts, counts, group, dim))
    return shards


def _as_fsdp(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule)
    return module
