"""`moe-lm plan placement`: which rank should own which expert, and what that saves."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_lm.commands.config import PlanPlacementConfig
from moe_lm.errors import InputError
from moe_lm.parallel.placement import Cluster, Placement, contiguous, is_placement, straggler, write_placement
from moe_lm.parallel.placement_search import Balanced, balanced
from moe_lm.parallel.trace import read_steps, summed


def run(config: PlanPlacementConfig) -> int:
    """Print what a contiguous and a balanced placement cost under a run's expert counts; write the balanced one."""
    assert config.trace is not None and config.ep is not None
    steps = read_steps(Path(config.trace).expanduser(), config.last)
    count_LE = summed(steps)
    layers, experts = len(count_LE), len(count_LE[0])
    cluster = _cluster(config, experts)
    in_order, found = contiguous(layers, experts, config.ep), balanced(count_LE, cluster)
    nodes = len(cluster.nodes)
    print(
        f"expert counts of {len(steps)} logged step{'s' * (len(steps) > 1)}; {layers} layers of {experts} experts over "
        f"{config.ep} ranks on {nodes} node{'s' * (nodes > 1)}\n"
        "busiest: the share of the layer's rows that its busiest expert has; contiguous, balanced: the slowest rank's\n"
        "time over the mean rank's; best possible: whether the balanced placement is proven to be\n"
    )
    for line in _table(in_order, found, count_LE, cluster):
        print(line)
    before, after = (straggler(placement, count_LE, cluster) for placement in (in_order, found.placement))
    print(
        "\nwhole step, predicted for one group that takes the global batch: "
        f"contiguous {before.ratio:.3f}, {_said(before.seconds / len(steps))}; "
        f"balanced {after.ratio:.3f}, {_said(after.seconds / len(steps))}"
    )
    if config.output is not None:
        _write(Path(config.output).expanduser(), found.placement)
    return 0


def _cluster(config: PlanPlacementConfig, experts: int) -> Cluster:
    """The group; `InputError` where the experts can not be spread over it."""
    assert config.ep is not None
    if config.ep > experts:
        raise InputError(f"ep={config.ep}: must be at most {experts}, the run's experts, or a rank has none.")
    if config.max_experts_per_rank is not None and config.max_experts_per_rank * config.ep < experts:
        raise InputError(
            f"max_experts_per_rank={config.max_experts_per_rank}: {config.ep} ranks can not hold {experts} experts; "
            f"give at least {-(-experts // config.ep)}, or a larger ep."
        )
    return Cluster(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Cluster)})


def _table(in_order: Placement, found: Balanced, count_LE: Sequence[Sequence[int]], cluster: Cluster) -> Iterator[str]:
    """A heading, and a line for each layer."""
    yield f"{'layer':>5}  {'busiest':>7}  {'contiguous':>10}  {'balanced':>8}  best possible"
    for layer, (count_E, gap, optimal) in enumerate(zip(count_LE, found.gap_L, found.optimal)):
        share = max(count_E) / max(sum(count_E), 1)
        before, after = (
            straggler(Placement((placement.owners[layer],), cluster.ep), [count_E], cluster).ratio
            for placement in (in_order, found.placement)
        )
        proof = "yes" if optimal else f"within {gap:.2%}"
        yield f"{layer:>5}  {share:>7.1%}  {before:>10.3f}  {after:>8.3f}  {proof}"


def _said(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.3f} ms"


def _write(path: Path, placement: Placement) -> None:
    if path.is_file() and not is_placement(path):
        raise InputError(f"output={path}: is another file than a placement, and would be lost; give another one.")
    try:
        write_placement(path, placement)
    except OSError as error:
        raise InputError(f"output={path}: can not be written ({error.strerror}); give another file.") from error
    print(f"\nwrote {path}; train with parallel.placement=file parallel.placement_file={path}")
