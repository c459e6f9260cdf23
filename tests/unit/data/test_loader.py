"""Catches: batches that depend on ranks or history; rows or targets lost or repeated; counts that disagree."""

from collections.abc import Callable, Sequence

import pytest
import torch

from moe_lm.data.batch import IGNORED, num_rows
from moe_lm.data.loader import StepBatch, StepLoader, validation_batches
from moe_lm.data.shards import TokenShard
from moe_lm.errors import InputError

MakeShard = Callable[[Sequence[str]], TokenShard]


def loader(shard: TokenShard, **values: int) -> StepLoader:
    sizes = {"seed": 5, "global_batch_size": 12, "micro_batch_size": 2, "sequence_length": 16, **values}
    return StepLoader(shard, **sizes)  # type: ignore[arg-type]


def joined(steps: Sequence[StepBatch], field: str) -> torch.Tensor:
    return torch.cat([getattr(batch, field) for step in steps for batch in step.micro_batches])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_ranks_together_are_the_single_process(make_shard: MakeShard, random_texts: list[str], world_size: int) -> None:
    shard = make_shard(random_texts)
    micro_batch_size = 12 // world_size
    for data_step in (0, 3, 29, 30, 31, 1000):
        whole = loader(shard).step(data_step)
        shares = [
            loader(shard, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size).step(data_step)
            for rank in range(world_size)
        ]
        for field in ("input_ids", "labels", "position_ids", "document_ids", "routing_mask", "domain_ids"):
            assert torch.equal(joined(shares, field), joined([whole], field))
        for share in shares:
            assert share.rows == whole.rows
            assert (share.num_targets, share.num_routed_tokens) == (whole.num_targets, whole.num_routed_tokens)


def test_counts_are_those_of_the_batch(make_shard: MakeShard, random_texts: list[str]) -> None:
    steps = loader(make_shard(random_texts))
    for data_step in range(60):
        step = steps.step(data_step)
        assert step.num_targets == int((joined([step], "labels") != IGNORED).sum())
        assert step.num_routed_tokens == int(joined([step], "routing_mask").sum())
        assert [len(batch.input_ids) for batch in step.micro_batches] == [2] * 6


def test_steps_do_not_depend_on_history(make_shard: MakeShard, random_texts: list[str]) -> None:
    shard = make_shard(random_texts)
    one = loader(shard)
    forward = [one.step(data_step) for data_step in range(50)]
    for data_step in (49, 0, 31, 30, 17):
        fresh = loader(shard).step(data_step)
        assert fresh.rows == forward[data_step].rows
        assert torch.equal(joined([fresh], "input_ids"), joined([forward[data_step]], "input_ids"))


@pytest.mark.parametrize("global_batch_size", [1, 6, 12, 1000])
def test_every_epoch_has_every_row_once_in_another_order(
    make_shard: MakeShard, random_texts: list[str], global_batch_size: int
) -> None:
    """Also where a batch straddles epochs, and where it is larger than the whole shard."""
    shard = make_shard(random_texts)
    steps = loader(shard, global_batch_size=global_batch_size, micro_batch_size=1)
    count = num_rows(shard, 16)
    assert steps.num_rows == count
    rows: list[int] = []
    while len(rows) < 3 * count:
        rows += steps.rows_of(len(rows) // global_batch_size).tolist()
    epochs = [rows[epoch * count : (epoch + 1) * count] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != sorted(epochs[0])


def test_seeds_give_other_orders(make_shard: MakeShard, random_texts: list[str]) -> None:
    shard = make_shard(random_texts)
    assert loader(shard, seed=0).step(0).rows != loader(shard, seed=1).step(0).rows


def test_one_epoch_predicts_every_target_once(make_shard: MakeShard, random_texts: list[str]) -> None:
    shard = make_shard(random_texts)
    count = num_rows(shard, 16)
    steps = loader(shard, global_batch_size=count, micro_batch_size=count)
    step = steps.step(0)
    assert step.num_targets == shard.num_targets
    order = torch.tensor(step.rows).argsort()
    labels = joined([step], "labels")[order]
    targets = labels[labels != IGNORED].tolist()
    documents = bytes(0 if token == shard.bos_id + 1 else token - 4 for token in targets).split(b"\0")[:-1]
    assert [document.decode() for document in documents] == random_texts


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"global_batch_size": 0}, "trainer.global_batch_size=0: must be at least 1"),
        ({"micro_batch_size": -1}, "trainer.micro_batch_size=-1: must be at least 1"),
        ({"micro_batch_size": 5}, "trainer.global_batch_size=12: .*micro_batch_size=5 times 1 process, such as 10"),
        ({"world_size": 5}, "trainer.global_batch_size=12: .*micro_batch_size=2 times 5 processes, such as 10"),
        ({"micro_batch_size": 100}, "such as 100"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make_shard: MakeShard, sizes: dict[str, int], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        loader(make_shard(["some text"]), **sizes)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_validation_reads_every_target_once_over_all_ranks(
    make_shard: MakeShard, random_texts: list[str], world_size: int
) -> None:
    shard = make_shard(random_texts)
    shares = [list(validation_batches(shard, 7, 16, rank=rank, world_size=world_size)) for rank in range(world_size)]
    shapes = [[tuple(batch.input_ids.shape) for batch in share] for share in shares]
    assert all(shape == shapes[0] for shape in shapes)
    labels = torch.cat([batch.labels for share in shares for batch in share])
    assert labels[labels != IGNORED].tolist() == [token for token in shard.tokens.tolist() if token != shard.bos_id]


@pytest.mark.parametrize("max_rows", [1, 5, 10_000])
def test_fewer_validation_rows_are_evenly_spaced(make_shard: MakeShard, random_texts: list[str], max_rows: int) -> None:
    shard = make_shard(random_texts)
    total = num_rows(shard, 16)
    whole = torch.cat([batch.input_ids for batch in validation_batches(shard, 8, 16)])
    some = torch.cat([batch.input_ids for batch in validation_batches(shard, 8, 16, max_rows=max_rows)])
    count = min(max_rows, total)
    assert torch.equal(some, whole[[index * total // count for index in range(count)]])
