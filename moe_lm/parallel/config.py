"""How the processes of a run share its model."""

import dataclasses
import enum

from moe_lm.errors import InputError


class ParallelMode(enum.Enum):
    """What the processes share."""

    auto = "auto"
    single = "single"
    replicated = "replicated"
    fsdp = "fsdp"
    fsdp_ep = "fsdp_ep"
    hsdp_ep = "hsdp_ep"


class PlacementPolicy(enum.Enum):
    """Which process owns which expert."""

    contiguous = "contiguous"
    balanced = "balanced"
    file = "file"


@dataclasses.dataclass
class ParallelConfig:
    """How processes share the model. Every one has its own part of the batch; none of this changes what is learned."""

    mode: ParallelMode = ParallelMode.auto
    """`single`: one process. `replicated`: a whole model on each. `fsdp`: weights, gradients and moments sharded over
    all. `fsdp_ep`: the same, and experts owned by different processes. `hsdp_ep`: several such groups, each with a
    whole model. `auto` chooses by number of processes, memory and model, and says so. `parallel=fsdp_ep` is a
    shorthand."""
    dp_replicate: int | None = None
    """Groups with a whole model each (`hsdp_ep`); null means one for each node."""
    ep: int | None = None
    """Processes that a layer's experts are spread over: must divide the processes of a group (dp_shard) and be at most
    model.num_experts, but need not divide it. null chooses for the fewest experts on the busiest process, within a
    node."""
    placement: PlacementPolicy = PlacementPolicy.contiguous
    """Which process owns which expert: `contiguous` in order; `balanced` by the run's expert counts so far, as
    `moe-lm plan placement` would; `file` as given by placement_file."""
    placement_file: str | None = None
    """What `moe-lm plan placement output=FILE` wrote."""

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "ep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"parallel.{name}={value}: must be at least 1, or null.")
        if self.placement is PlacementPolicy.file and self.placement_file is None:
            raise InputError("parallel.placement_file=null: parallel.placement=file needs the file.")
        if self.placement is not PlacementPolicy.file and self.placement_file is not None:
            raise InputError(
                f"parallel.placement_file={self.placement_file}: is not read with parallel.placement="
                f"{self.placement.name}; set parallel.placement=file, or leave it out."
            )
