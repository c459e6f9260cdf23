"""Catches: batches that depend on ranks or history; rows or targets lost or repeated; counts that disagree."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from moe_lm.data.batch import IGNORED
from moe_lm.data.config import Packing
from moe_lm.data.loader import BatchPlan, ShardLoader, StepBatch, validation_batches
from moe_lm.data.mixture import Mixture
from moe_lm.data.rows import RowSet
from moe_lm.data.shards import TokenArray
from moe_lm.errors import InputError

MakeArray = Callable[..., TokenArray]
FIELDS = ("input_ids", "labels", "position_ids", "document_ids", "routing_mask", "domain_ids")
DOMAINS = ("a", "b", "c")
BOS, EOS, PAD = 1, 2, 3


@pytest.fixture(scope="session")
def arrays(make_array: MakeArray, random_texts: list[str]) -> list[TokenArray]:
    """The random texts as two arrays of three domains."""
    domains = [DOMAINS[len(text) % 3] for text in random_texts]
    return [make_array(random_texts[:20], domains[:20]), make_array(random_texts[20:], domains[20:])]


@pytest.fixture(scope="session")
def other(make_array: MakeArray) -> list[TokenArray]:
    """A second, smaller source."""
    return [make_array([f"other text {index}" for index in range(25)], ["b"] * 25)]


def loader(*sources: Sequence[TokenArray], weights: Sequence[float] | None = None, **values: Any) -> ShardLoader:
    options = {"seed": 5, "global_batch_size": 12, "micro_batch_size": 2, "sequence_length": 16, **values}
    names = [f"source{index}" for index in range(len(sources))]
    mixture = Mixture(np.array(weights or [1.0] * len(sources)))
    return ShardLoader(sources, names, mixture, BatchPlan(pad_id=PAD, domains=DOMAINS, **options))


def joined(steps: Sequence[StepBatch], field: str) -> torch.Tensor:
    return torch.cat([getattr(batch, field) for step in steps for batch in step.micro_batches])


def rows_of(steps: ShardLoader, data_step: int) -> list[tuple[int, int]]:
    """Source and row of each place of a step's share, in order."""
    placed = [
        (place, (source, row))
        for source, (rows, places) in steps.rows_of(data_step).items()
        for row, place in zip(rows.tolist(), places.tolist(), strict=True)
    ]
    assert [place for place, _ in sorted(placed)] == list(range(len(placed)))
    return [row for _, row in sorted(placed)]


# Shares of processes


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("epochs", [None, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_ranks_together_are_the_single_process(
    arrays: list[TokenArray], other: list[TokenArray], world_size: int, epochs: int | None, packing: Packing
) -> None:
    """Row n belongs to process n mod W: dealt back like cards, the shares are the batch of one process; also in the
    last step before the data ends, where some processes have more padding than others."""
    options: dict[str, Any] = {"weights": (3, 1), "epochs": epochs, "packing": packing}
    one = loader(arrays, other, **options)
    last = 1000 if one.num_steps is None else one.num_steps - 1
    for data_step in (0, 3, last - 1, last):
        whole = one.step(data_step)
        shares = [
            loader(arrays, other, rank=rank, world_size=world_size, micro_batch_size=12 // world_size, **options).step(
                data_step
            )
            for rank in range(world_size)
        ]
        for field in FIELDS:
            dealt = torch.stack([joined([share], field) for share in shares], dim=1).flatten(0, 1)
            assert torch.equal(dealt, joined([whole], field)), field
        assert sum(share.num_targets for share in shares) == whole.num_targets
        assert sum(share.domain_tokens for share in shares).tolist() == whole.domain_tokens.tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_a_process_has_the_rows_of_its_remainder(arrays: list[TokenArray], world_size: int) -> None:
    """Catches shares by blocks, or by the place in the batch alone, which streams could not follow."""
    for rank in range(world_size):
        steps = loader(arrays, rank=rank, world_size=world_size, micro_batch_size=12 // world_size)
        for data_step in (0, 7, 10**12):
            numbers = steps._plan.own_rows(data_step)
            assert (numbers % world_size == rank).all()
            assert (numbers // 12 == data_step).all()
            assert len(numbers) == 12 // world_size


def test_more_epochs_than_anybody_reads_do_not_end_at_once(arrays: list[TokenArray], other: list[TokenArray]) -> None:
    """Catches a product that leaves 64 bits: a run of no step that says that its data has ended, or a traceback."""
    for sources, weights in (((arrays,), None), ((arrays, other), (1, 9999))):
        endless = loader(*sources, weights=weights)
        for epochs in (10**9, 10**17, 10**40):
            steps = loader(*sources, weights=weights, epochs=epochs)
            assert steps.num_steps is not None and steps.num_steps > 10**8
            assert rows_of(steps, 7) == rows_of(endless, 7)


def test_counts_are_those_of_the_batch(arrays: list[TokenArray]) -> None:
    steps = loader(arrays, epochs=3)
    for data_step in range(steps.num_steps or 0):
        step = steps.step(data_step)
        assert step.num_targets == int((joined([step], "labels") != IGNORED).sum())
        mask = joined([step], "routing_mask")
        assert step.domain_tokens.tolist() == joined([step], "domain_ids")[mask].bincount(minlength=3).tolist()
        assert step.domain_tokens.sum() == mask.sum()
        assert [len(batch.input_ids) for batch in step.micro_batches] == [2] * 6
        assert step.live_sources.tolist() == [1]
        assert step.state == {}


def test_one_domain_is_counted_as_well(make_array: MakeArray) -> None:
    """Catches a run of one domain, which skips the count by domain, that counts padding."""
    plan = BatchPlan(1, 4, 2, 16, PAD, ["text"], epochs=1)
    steps = ShardLoader([[make_array(["some text of more than one row", "x"])]], ["s"], Mixture(np.ones(1)), plan)
    assert steps.num_steps == 1
    assert steps.step(0).domain_tokens.tolist() == [34]  # of 35 tokens; the last is a label only


def test_steps_do_not_depend_on_history(arrays: list[TokenArray], other: list[TokenArray]) -> None:
    one = loader(arrays, other)
    forward = [one.step(data_step) for data_step in range(50)]
    for data_step in (49, 0, 31, 30, 17):
        fresh = loader(arrays, other).step(data_step)
        for field in FIELDS:
            assert torch.equal(joined([fresh], field), joined([forward[data_step]], field))
        assert rows_of(one, data_step) == rows_of(loader(arrays, other), data_step)


def test_a_row_is_read_from_its_source(arrays: list[TokenArray], other: list[TokenArray]) -> None:
    """Catches rows of one source given in the places of another."""
    steps = loader(arrays, other, micro_batch_size=12)
    sets = [RowSet(source, 16, Packing.sequential) for source in (arrays, other)]
    for data_step in range(20):
        inputs = steps.step(data_step).micro_batches[0].input_ids
        for row, (source, number) in zip(inputs, rows_of(steps, data_step), strict=True):
            [(array, pieces)] = sets[source].pieces(np.array([number]), np.array([0]))
            first, length = int(pieces.first_P[0]), int(pieces.length_P[0])
            assert row[:length].tolist() == array.tokens[first : first + length].tolist()


# Epochs


@pytest.mark.parametrize("global_batch_size", [1, 6, 12, 1000])
def test_every_epoch_has_every_row_once_in_another_order(arrays: list[TokenArray], global_batch_size: int) -> None:
    """Also where a batch straddles epochs, and where it is larger than the whole source."""
    steps = loader(arrays, global_batch_size=global_batch_size, micro_batch_size=1)
    count = RowSet(arrays, 16, Packing.sequential).num_rows
    assert steps.num_steps is None
    rows: list[tuple[int, int]] = []
    while len(rows) < 3 * count:
        rows += rows_of(steps, len(rows) // global_batch_size)
    epochs = [rows[epoch * count : (epoch + 1) * count] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == [(0, row) for row in range(count)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != sorted(epochs[0])


def test_an_epoch_of_many_rows_has_each_once(make_array: MakeArray) -> None:
    """Catches an order that is computed in parts which do not fit together: more rows than one part has."""
    source = [make_array(["x" * 10_000, "y" * 9_000])]
    steps = loader(source, sequence_length=2, global_batch_size=1000, micro_batch_size=1000, epochs=2)
    count = RowSet(source, 2, Packing.sequential).num_rows
    assert count > 2 * 4096
    rows = [row for data_step in range(steps.num_steps or 0) for _, row in rows_of(steps, data_step)]
    assert sorted(rows[:count]) == sorted(rows[count:]) == list(range(count))
    assert rows[:count] != rows[count:]


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("global_batch_size", [1, 12, 1000])
def test_two_epochs_are_every_row_twice_and_then_padding(
    arrays: list[TokenArray], global_batch_size: int, packing: Packing
) -> None:
    options: dict[str, Any] = {"global_batch_size": global_batch_size, "micro_batch_size": 1, "packing": packing}
    steps = loader(arrays, epochs=2, **options)
    count = RowSet(arrays, 16, packing).num_rows
    assert steps.num_steps == -(-2 * count // global_batch_size)
    rows = [row for data_step in range(steps.num_steps) for row in rows_of(steps, data_step)]
    assert sorted(rows) == sorted(2 * [(0, row) for row in range(count)])
    taken = [steps.step(data_step) for data_step in range(steps.num_steps)]
    assert sum(step.num_targets for step in taken) == 2 * sum(array.num_targets for array in arrays)
    last = taken[-1]
    assert len(last.micro_batches) == global_batch_size
    filled = 2 * count - (steps.num_steps - 1) * global_batch_size
    assert joined([last], "routing_mask").any(1).tolist() == [True] * filled + [False] * (global_batch_size - filled)
    assert (joined([last], "input_ids")[filled:] == PAD).all()
    assert (joined([last], "labels")[filled:] == IGNORED).all()
    # As long as there is text, an end that is still to come changes nothing.
    endless = loader(arrays, **options).step(0)
    assert torch.equal(joined([endless], "input_ids")[:filled], joined([taken[0]], "input_ids")[:filled])
    assert rows_of(steps, steps.num_steps) == []


@pytest.mark.parametrize("weights", [(1, 1), (1, 20), (997, 3)])
@pytest.mark.parametrize("epochs", [1, 3])
def test_the_run_ends_before_the_first_source_is_used_up_once_more(
    arrays: list[TokenArray], other: list[TokenArray], weights: tuple[float, float], epochs: int
) -> None:
    """Catches an end one row early or late, at the wrong source, or when all sources are used up."""
    steps = loader(arrays, other, weights=weights, epochs=epochs, global_batch_size=7, micro_batch_size=1)
    sizes = [RowSet(source, 16, Packing.sequential).num_rows for source in (arrays, other)]
    mixture = Mixture(np.array(weights, dtype=float))
    total = 0
    while (mixture.counts(total + 1) <= np.array(sizes) * epochs).all():
        total += 1
    assert steps.num_steps == -(-total // 7)
    rows = [row for data_step in range(steps.num_steps) for row in rows_of(steps, data_step)]
    assert len(rows) == total
    taken = [sum(source == index for source, _ in rows) for index in range(2)]
    used_up = [index for index in range(2) if taken[index] == sizes[index] * epochs]
    assert used_up
    for index in used_up:
        assert sorted(rows.count((index, row)) for row in range(sizes[index])) == [epochs] * sizes[index]
    assert all(taken[index] <= sizes[index] * epochs for index in range(2))


def test_a_source_without_weight_does_not_end_the_run(arrays: list[TokenArray], other: list[TokenArray]) -> None:
    """Catches a search for the end that never ends, and an end by a source that is not read."""
    steps = loader(arrays, other, weights=(1, 0), epochs=2, global_batch_size=1, micro_batch_size=1)
    assert steps.num_steps == 2 * RowSet(arrays, 16, Packing.sequential).num_rows


def test_epochs_end_scheduled_mixtures_too(arrays: list[TokenArray], other: list[TokenArray]) -> None:
    mixture = Mixture(np.array([1.0, 0.0]), np.array([0.0, 1.0]), 5000)
    plan = BatchPlan(1, 4, 4, 16, PAD, DOMAINS, epochs=20)
    steps = ShardLoader([arrays, other], ["a", "b"], mixture, plan)
    limits = [20 * RowSet(source, 16, Packing.sequential).num_rows for source in (arrays, other)]
    rows = [row for data_step in range(steps.num_steps or 0) for row in rows_of(steps, data_step)]
    taken = [sum(source == index for source, _ in rows) for index in range(2)]
    assert any(count == limit for count, limit in zip(taken, limits))
    assert all(0 < count <= limit for count, limit in zip(taken, limits))


def test_seeds_and_sources_give_other_orders(arrays: list[TokenArray]) -> None:
    """Catches a seed that does not decide, and sources of one size that are read in the same order."""
    orders = [rows_of(loader(arrays, seed=seed), 0) for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    steps = loader(arrays, arrays)
    rows = [row for data_step in range(20) for row in rows_of(steps, data_step)]
    one, two = ([row for source, row in rows if source == index] for index in range(2))
    assert one[:50] != two[:50]


def test_one_epoch_predicts_every_target_once(arrays: list[TokenArray], random_texts: list[str]) -> None:
    count = RowSet(arrays, 16, Packing.sequential).num_rows
    steps = loader(arrays, global_batch_size=count, micro_batch_size=count)
    step = steps.step(0)
    assert step.num_targets == sum(array.num_targets for array in arrays)
    order = torch.tensor([row for _, row in rows_of(steps, 0)]).argsort()
    labels = joined([step], "labels")[order]
    documents = bytes(0 if token == EOS else token - 4 for token in labels[labels != IGNORED].tolist()).split(b"\0")
    assert [document.decode() for document in documents[:-1]] == random_texts


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"micro_batch_size": 5}, "trainer.global_batch_size=12: .*micro_batch_size=5 times 1 process, such as 10"),
        ({"world_size": 5}, "trainer.global_batch_size=12: .*micro_batch_size=2 times 5 processes, such as 10"),
        ({"micro_batch_size": 100}, "such as 100"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make_array: MakeArray, sizes: dict[str, int], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        loader([make_array(["some text"])], **sizes)


# Validation


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_validation_reads_every_target_once_over_all_ranks(arrays: list[TokenArray], world_size: int) -> None:
    shares = [
        list(validation_batches(arrays, 7, 16, pad_id=PAD, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    shapes = [[tuple(batch.input_ids.shape) for batch in share] for share in shares]
    assert all(shape == shapes[0] for shape in shapes)
    labels = torch.cat([batch.labels for share in shares for batch in share])
    expected = [token for array in arrays for token in array.tokens.tolist() if token != BOS]
    assert labels[labels != IGNORED].tolist() == expected


@pytest.mark.parametrize("world_size", [5, 7])
def test_ranks_without_a_row_get_padding(make_array: MakeArray, world_size: int) -> None:
    """Catches a rank that gives no batch where its peers wait in a collective: fewer rows than ranks."""
    array = make_array(["a" * 40])  # 41 inputs: 3 rows
    for rank in range(world_size):
        [batch] = validation_batches([array], 4, 16, pad_id=PAD, rank=rank, world_size=world_size)
        assert batch.input_ids.shape == (1, 16)
        assert bool(batch.routing_mask.any()) == (rank < 3)
        assert rank < 3 or (batch.input_ids == PAD).all()


@pytest.mark.parametrize("max_rows", [1, 5, 10_000])
def test_fewer_validation_rows_are_evenly_spaced(arrays: list[TokenArray], max_rows: int) -> None:
    total = RowSet(arrays, 16, Packing.sequential).num_rows
    whole = torch.cat([batch.input_ids for batch in validation_batches(arrays, 8, 16)])
    some = torch.cat([batch.input_ids for batch in validation_batches(arrays, 8, 16, max_rows=max_rows)])
    count = min(max_rows, total)
    assert torch.equal(some, whole[[index * total // count for index in range(count)]])
