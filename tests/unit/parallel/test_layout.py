"""Axes: what is chosen, and that every process has its place in each of them."""

import dataclasses

import pytest

from moe_lm.errors import InputError
from moe_lm.model.config import ModelConfig, ModelFamily
from moe_lm.parallel.config import ParallelConfig, ParallelMode
from moe_lm.parallel.layout import Layout, Machine, choose_layout

MODEL = ModelConfig(hidden_size=96, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
SMALL, LARGE = 1, 10**12
"""Bytes of training state: next to nothing, and more than any machine has."""


def _choose(mode, world, node=0, experts=8, state=LARGE, **axes):
    model = dataclasses.replace(MODEL, num_experts=experts)
    config = ParallelConfig(ParallelMode[mode], **axes)
    return choose_layout(config, model, Machine(world, node or world, 80 * 10**9), state)


@pytest.mark.parametrize(
    ("mode", "world", "node", "axes", "expected"),
    [
        ("single", 1, 1, {}, (1, 1, 1)),
        ("replicated", 6, 6, {}, (6, 1, 1)),
        ("fsdp", 6, 6, {}, (1, 6, 1)),
        ("fsdp_ep", 1, 1, {}, (1, 1, 1)),
        # Few experts on the busiest process, few partners, within a node.
        ("fsdp_ep", 2, 2, {}, (1, 2, 2)),
        ("fsdp_ep", 3, 3, {}, (1, 3, 3)),
        ("fsdp_ep", 5, 5, {}, (1, 5, 5)),
        ("fsdp_ep", 7, 7, {}, (1, 7, 7)),
        ("fsdp_ep", 12, 12, {}, (1, 12, 4)),
        ("fsdp_ep", 16, 8, {}, (1, 16, 8)),
        ("fsdp_ep", 64, 4, {}, (1, 64, 4)),
        ("fsdp_ep", 16, 8, {"ep": 2}, (1, 16, 2)),
        ("hsdp_ep", 32, 8, {}, (4, 8, 8)),
        ("hsdp_ep", 8, 8, {"dp_replicate": 2}, (2, 4, 4)),
        ("hsdp_ep", 12, 12, {"dp_replicate": 4, "ep": 3}, (4, 3, 3)),
    ],
)
def test_the_axes_of_each_mode(mode, world, node, axes, expected):
    """Catches axes that do not multiply to the number of processes, and an expert axis that leaves its node for
    nothing."""
    layout, _ = _choose(mode, world, node, **axes)
    assert (layout.dp_replicate, layout.dp_shard, layout.ep) == expected and layout.world_size == world


@pytest.mark.parametrize(
    ("world", "node", "state", "family", "mode"),
    [
        (1, 1, LARGE, "mixture", None),
        (8, 8, 39 * 10**9, "mixture", "replicated"),
        (8, 8, 41 * 10**9, "mixture", "fsdp_ep"),
        (8, 8, 41 * 10**9, "dense", "fsdp"),
        (32, 8, 300 * 10**9, "mixture", "hsdp_ep"),
        (32, 8, 400 * 10**9, "mixture", "fsdp_ep"),
    ],
)
def test_auto_goes_by_memory_and_says_why(world, node, state, family, mode):
    """Catches a small model that is sharded for nothing, a large one that is not, and a choice without a reason."""
    model = dataclasses.replace(MODEL, family=ModelFamily[family])
    layout, why = choose_layout(ParallelConfig(), model, Machine(world, node, 80 * 10**9), state)
    assert (
        layout == choose_layout(ParallelConfig(ParallelMode[mode or "single"]), model, Machine(world, node), state)[0]
    )
    assert why.startswith(f"parallel={mode}, for the training state of a whole model takes") if mode else why == ""


def test_auto_obeys_the_axes_that_are_given():
    """Catches a choice that ignores an axis, or is refused for a mode that nobody asked for."""
    assert _choose("auto", 4, state=SMALL, ep=2)[0] == Layout(1, 4, 2)
    assert _choose("auto", 4, state=SMALL, dp_replicate=2)[0] == Layout(2, 2, 2)
    said = "parallel=single, for one process was started; parallel.dp_replicate and parallel.ep not used"
    assert _choose("auto", 1, state=SMALL, dp_replicate=2, ep=2) == (Layout(), said)


def test_the_default_is_an_axis_that_fits():
    """Catches a default that is refused where another would do: 24 processes on nodes of 8 and 4096 rows."""
    model = ModelConfig()
    layout, _ = choose_layout(ParallelConfig(ParallelMode.fsdp_ep), model, Machine(24, 8, 80 * 10**9), LARGE)
    assert model.hidden_size % layout.expert_shards == 0 and layout.ep == 6


@pytest.mark.parametrize("layout", [Layout(2, 4, 2), Layout(1, 6, 3), Layout(3, 4, 4), Layout(2, 6, 1)])
def test_every_process_has_a_place_of_its_own(layout):
    """Catches two processes with the same part, or owners of experts that are not neighbours."""
    places = set()
    for rank in range(layout.world_size):
        replica = rank // layout.dp_shard
        places.add((replica, layout.expert_shard(rank), layout.ep_rank(rank)))
        assert layout.is_first_replica(rank) == (replica == 0)
    assert len(places) == layout.world_size
    assert [layout.ep_rank(rank) for rank in range(layout.ep)] == list(range(layout.ep))
    assert layout.expert_shards * layout.ep * layout.dp_replicate == layout.world_size


@pytest.mark.parametrize(
    ("mode", "world", "axes", "words"),
    [
        ("single", 2, {}, ["parallel=single", "2 processes"]),
        ("fsdp_ep", 4, {"ep": 3}, ["parallel.ep=3", "dp_shard=4", "1, 2, 4"]),
        ("fsdp_ep", 9, {"ep": 9}, ["parallel.ep=9", "model.num_experts=8"]),
        ("hsdp_ep", 4, {"dp_replicate": 3}, ["parallel.dp_replicate=3", "4", "1, 2, 4"]),
        ("hsdp_ep", 4, {}, ["parallel.dp_replicate=null", "one node"]),
        ("replicated", 4, {"ep": 2}, ["parallel.ep=2", "replicated"]),
        ("single", 1, {"ep": 2}, ["parallel.ep=2", "parallel=single", "leave it out"]),
        ("fsdp", 7, {}, ["model.intermediate_size=96", "dp_shard / ep = 7", "parallel=fsdp_ep parallel.ep=7"]),
    ],
)
def test_axes_that_do_not_fit_are_refused(mode, world, axes, words):
    """Catches a refusal that does not name the field, its value and what would do."""
    with pytest.raises(InputError) as refused:
        _choose(mode, world, **axes)
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize("mode", ["fsdp_ep", "hsdp_ep"])
def test_a_dense_model_has_no_experts_to_place(mode):
    """Catches an axis of experts that a dense model is cut along, or ignores."""
    config = ParallelConfig(ParallelMode[mode], dp_replicate=2 if mode == "hsdp_ep" else None)
    model = dataclasses.replace(MODEL, family=ModelFamily.dense)
    with pytest.raises(InputError, match=f"^parallel={mode}: a dense model has no experts .*; choose parallel=fsdp.$"):
        choose_layout(config, model, Machine(4, 4, 80 * 10**9), LARGE)


@pytest.mark.parametrize("field", ["ep", "dp_replicate"])
def test_an_axis_has_at_least_one_process(field):
    """Catches a division by zero."""
    with pytest.raises(InputError, match=f"parallel.{field}=0"):
        ParallelConfig(**{field: 0})
