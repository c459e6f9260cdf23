"""Catches: shares of sources that are off, rows of a source lost or given twice, weights that should be refused."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moe_lm.data.config import DataConfig, DataSource, SourceConfig
from moe_lm.data.mixture import FRAME, UNITS, Mixture, make_mixture, shares, shares_move
from moe_lm.data.shards import TokenArray
from moe_lm.errors import InputError

WINDOW = 1000
PERIOD = UNITS * FRAME
"""Rows after which the sources repeat: the grid of points moves by a ten-thousandth with each frame."""

# Weights of any sizes, some of them 0, which need not add up to one.
WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1.0), st.floats(1.0, 100.0)), min_size=2, max_size=8).filter(
    lambda weights: sum(weights) > 0
)


def drawn(mixture: Mixture, num_rows: int, first: int = 0) -> NDArray[np.int64]:
    """Rows [num_rows + 1, K] of each source among the 0, 1, 2 … from `first` on, after a check of the ordinals."""
    source, ordinal = mixture.locate(first + np.arange(num_rows))
    assert source.min() >= 0
    one_hot = source[:, None] == np.arange(mixture.num_sources)
    counts = np.zeros((num_rows + 1, mixture.num_sources), dtype=np.int64)
    np.cumsum(one_hot, axis=0, out=counts[1:])
    # Ordinals count up by one per source, and at the very beginning from 0.
    assert (ordinal == counts[np.arange(num_rows), source] + mixture.counts(first)[source]).all()
    assert first or not mixture.counts(0).any()
    return counts


@settings(deadline=None, max_examples=200)
@given(weights=WEIGHTS)
def test_shares_are_whole_ten_thousandths_of_one(weights: list[float]) -> None:
    """Catches shares that do not add up, that are off by a unit, or a source of weight 0 that gets the rest."""
    exact = np.array(weights) / sum(weights) * UNITS
    found = shares(np.array(weights))
    assert found.sum() == UNITS
    assert (np.abs(found - exact) < 1 + 1e-6).all()
    assert (found[exact == 0] == 0).all()
    assert np.array_equal(shares(np.array([weights, weights[::-1]]))[0], found)


@settings(deadline=None, max_examples=25)
@given(weights=WEIGHTS, first_frame=st.just(0) | st.integers(0, 10**7))
def test_every_window_is_within_one_row_of_the_weights(weights: list[float], first_frame: int) -> None:
    """The promise itself, at every one of 24,000 places and without rounding; and any ten frames are exact."""
    mixture = Mixture(np.array(weights))
    units = shares(np.array(weights))
    counts = drawn(mixture, 25_000, first_frame * FRAME)
    off = (counts[WINDOW:] - counts[:-WINDOW]) * (UNITS // WINDOW) - units  # in tenths of a row: whole numbers
    assert np.abs(off).max() <= UNITS // WINDOW
    frames = counts[::FRAME]
    assert (frames[10:] - frames[:-10] == units).all()


@pytest.mark.parametrize("weights", [[2, 1], [0.3333, 0.3333, 0.3334], [97, 2, 1], [1, 1], [1, 0, 1], [9999, 1]])
def test_shorter_and_longer_windows_are_even_too(weights: list[float]) -> None:
    """Catches sources that come in runs: a model that sees one for hundreds of rows."""
    counts = drawn(Mixture(np.array(weights)), 30_000)
    exact = shares(np.array(weights)) / UNITS
    for length, bound in ((16, 2), (100, 3), (500, 4), (2500, 5), (10_000, 1)):
        off = counts[length:] - counts[:-length] - length * exact
        assert np.abs(off).max() < bound + 1e-9, length


def test_weights_of_a_whole_run_by_hand() -> None:
    counts = drawn(Mixture(np.array([2, 1, 1])), 10_000)
    assert counts[10_000].tolist() == [5000, 2500, 2500]
    assert counts[1000].tolist() == [500, 250, 250]
    assert drawn(Mixture(np.array([1, 0, 3])), 1000)[-1].tolist() == [250, 0, 750]


@settings(deadline=None, max_examples=20)
@given(weights=WEIGHTS, final=st.none() | st.just(True), data=st.data())
def test_counts_agree_with_what_is_located(weights: list[float], final: bool | None, data: st.DataObject) -> None:
    """Catches an end of the data, or the epochs of a source, that fall on another row than where they are; asked in any
    order and on a fresh mixture."""
    begin = np.array(weights)

    def make() -> Mixture:
        return Mixture(begin) if final is None else Mixture(begin, begin[::-1], 15_000)

    counts = drawn(make(), 20_000)
    rows = [*data.draw(st.lists(st.integers(0, 20_000), max_size=8)), 0, 999, 1000, 1001, 20_000]
    for mixture in (make(), make()):
        for row in rows:
            assert np.array_equal(mixture.counts(row), counts[row]), row
        rows.reverse()
    asked = np.array(rows[:-1]) % 20_000
    source, ordinal = make().locate(asked)
    assert np.array_equal(ordinal, counts[asked, source])


@settings(deadline=None, max_examples=25)
@given(weights=WEIGHTS, far=st.integers(10**9, 10**15))
@example(weights=[0.625, 1.0], far=10**9 + 7)
def test_far_rows_repeat_the_first_ones(weights: list[float], far: int) -> None:
    """Catches numbers that overflow or lose digits, and time that grows with the row: what a row of the first period
    is, its like in every other period is, and each period adds its counts."""
    mixture = Mixture(np.array(weights))
    rows = np.unique(far // PERIOD * PERIOD + np.array([0, 7, 999, 1000, 9999, 10_007, far % PERIOD]))
    source, ordinal = mixture.locate(rows)
    first_source, first_ordinal = mixture.locate(rows % PERIOD)
    per_period = shares(np.array(weights)) * (PERIOD // UNITS)
    assert np.array_equal(source, first_source)
    assert np.array_equal(ordinal, first_ordinal + rows // PERIOD * per_period[source])
    assert np.array_equal(mixture.counts(far), far // PERIOD * per_period + mixture.counts(far % PERIOD))
    assert mixture.counts(far).sum() == far


def test_a_far_row_is_the_one_that_a_replay_gives() -> None:
    """Catches a closed formula that differs from counting one by one, behind many repetitions of the frames' counts."""
    weights = np.array([0.123, 0.456, 0.421])
    counts = drawn(Mixture(weights), 1_000_001)
    source, ordinal = Mixture(weights).locate(np.array([1_000_000]))
    assert counts[1_000_001, source[0]] - 1 == counts[1_000_000, source[0]] == ordinal[0]


def test_one_source_is_every_row() -> None:
    rows = np.array([0, 5, 10**12])
    source, ordinal = Mixture(np.array([0.3])).locate(rows)
    assert source.tolist() == [0, 0, 0]
    assert ordinal.tolist() == rows.tolist()
    assert Mixture(np.array([0.3])).counts(12_345).tolist() == [12_345]


def test_sources_are_dealt_evenly_to_processes_and_streams() -> None:
    """Catches a row's source tied to its number's remainder: a process, or a stream, that never sees a source."""
    source, _ = Mixture(np.array([0.8, 0.1, 0.1])).locate(np.arange(30_000))
    for world_size in (2, 3, 4, 8, 12):
        for rank in range(world_size):
            share = np.bincount(source[rank::world_size], minlength=3) * world_size / 30_000
            assert np.abs(share - [0.8, 0.1, 0.1]).max() < 0.02, (world_size, rank)


# Weights that change


@settings(deadline=None, max_examples=20)
@given(begin=WEIGHTS, data=st.data())
def test_scheduled_weights_follow_the_line(begin: list[float], data: st.DataObject) -> None:
    """Catches a schedule that lags, jumps, or forgets a source: any window of 1,000 rows is within 5 of its target."""
    num_rows, num_sources = 50_000, len(begin)
    final = data.draw(
        st.lists(st.floats(0, 100), min_size=num_sources, max_size=num_sources).filter(
            lambda values: sum(values) > 0.01
        )
    )
    counts = drawn(Mixture(np.array(begin), np.array(final), num_rows), num_rows)
    first, last = np.array(begin) / sum(begin), np.array(final) / sum(final)
    progress = (np.arange(num_rows) // FRAME + 0.5) * FRAME / num_rows
    target = np.concatenate([np.zeros((1, num_sources)), np.cumsum(first + progress[:, None] * (last - first), axis=0)])
    off = counts[WINDOW:] - counts[:-WINDOW] - (target[WINDOW:] - target[:-WINDOW])
    assert np.abs(off).max() <= 5
    for frame in (0, 25, 49):  # whole frames are exact
        there = counts[(frame + 1) * FRAME] - counts[frame * FRAME]
        assert np.abs(there - FRAME * (first + progress[frame * FRAME] * (last - first))).max() <= 1.1
    assert np.abs(counts[-1] / num_rows - (first + last) / 2).max() <= 5e-4


def test_a_source_fades_out_and_another_in() -> None:
    """Catches weights of 0 at an end that are rounded up, and rows behind the planned end that change course."""
    mixture = Mixture(np.array([1.0, 0, 1]), np.array([0, 1.0, 1]), 40_000)
    counts = drawn(mixture, 60_000)
    assert counts[FRAME].tolist() == [494, 6, 500]
    assert np.diff(counts[::FRAME], axis=0)[40:].tolist() == [[0, 500, 500]] * 20
    per_frame = np.diff(counts[::FRAME], axis=0)[:40]
    assert (np.diff(per_frame[:, 0]) <= 0).all()
    assert (np.diff(per_frame[:, 1]) >= 0).all()
    assert np.abs(counts[40_000] / 40_000 - [0.25, 0.25, 0.5]).max() < 1e-3


@pytest.mark.parametrize("num_rows", [999, 1000, 1600, 3001])
def test_a_run_of_few_frames_has_the_shares_of_the_line(num_rows: int) -> None:
    """Catches a schedule that is late by a frame: in a short run that is much of it."""
    counts = drawn(Mixture(np.array([3.0, 1]), np.array([0.0, 1]), num_rows), num_rows)
    assert np.abs(counts[-1] / num_rows - [0.375, 0.625]).max() < 4e-3


# From the configuration


def array_of(num_tokens: int) -> TokenArray:
    return TokenArray(np.ones(num_tokens, np.uint16), np.zeros(1, np.int64), np.zeros(1, np.uint16), ["text"])


def config_of(**sources: tuple[float | None, float | None]) -> DataConfig:
    return DataConfig(
        DataSource.text,
        sources={
            name: SourceConfig(paths=["x"], weight=weight, final_weight=final)
            for name, (weight, final) in sources.items()
        },
    )


def test_without_weights_sources_share_by_size() -> None:
    """Catches sizes counted over the first shard of a source, or a mixture in the order of the configuration."""
    config = config_of(b=(None, None), a=(None, None))
    mixture = make_mixture(config, {"b": [array_of(100), array_of(200)], "a": [array_of(100)]}, 10**6)
    assert mixture.counts(10_000).tolist() == [2500, 7500]
    single = make_mixture(DataConfig(), {"stdlib": []}, 10**6)
    assert single.counts(10_000).tolist() == [10_000]


def test_weights_go_by_name() -> None:
    config = config_of(b=(3, None), a=(1, None))
    mixture = make_mixture(config, {"b": [array_of(5)], "a": [array_of(500)]}, 10**6)
    assert mixture.counts(10_000).tolist() == [2500, 7500]


def test_a_final_weight_makes_a_schedule() -> None:
    """Catches a final weight that is ignored, that a source without one loses its weight to, or the same weights in
    other numbers taken for a change."""
    changing = make_mixture(config_of(a=(1, 0), b=(1, None)), {"a": [], "b": []}, 20_000)
    assert changing.counts(1000).tolist() == [488, 512]
    assert (changing.counts(22_000) - changing.counts(21_000)).tolist() == [0, 1000]
    same = make_mixture(config_of(a=(1, 2), b=(3, 6)), {"a": [], "b": []}, 20_000)
    assert same.counts(10**12).tolist() == [10**12 // 4, 3 * 10**12 // 4]


@pytest.mark.parametrize("scale", [3, 7, 10, 0.3, 1e-12, 1e12])
@pytest.mark.parametrize("weights", [(0.1, 0.2, 0.5), (0.1, 0.1, 0.9), (0.7, 0.1, 0), (1, 1, 1)])
def test_the_same_shares_in_other_numbers_do_not_move(weights: tuple[float, ...], scale: float) -> None:
    """Catches rounding taken for a move, which would fix a run's length, and rows that follow another verdict than what
    may change of a run does."""
    config = config_of(**{name: (weight, weight * scale) for name, weight in zip("abc", weights)})
    sources: dict[str, list[TokenArray]] = {"a": [], "b": [], "c": []}
    assert not shares_move(config.sources.values())
    assert np.array_equal(drawn(make_mixture(config, sources, 3000), 3000), drawn(Mixture(np.array(weights)), 3000))
    a = config.sources["a"]
    assert a.final_weight is not None
    a.final_weight *= 1 + 1e-9
    assert shares_move(config.sources.values())


def test_sources_without_weights_do_not_move() -> None:
    assert not shares_move([]) and not shares_move(config_of(a=(None, None), b=(None, None)).sources.values())


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        (
            {"a": (0, None), "b": (0, None)},
            r"data.sources.a.weight=0: the weights of all sources must add up",
        ),
        ({"a": (1, 0), "b": (1, 0)}, r"data.sources.a.final_weight=0: the weights of all sources"),
        ({"a": (float("inf"), None), "b": (1, None)}, r"data.sources.a.weight=inf: the weights of all sources"),
        ({"a": (float("nan"), None), "b": (1, None)}, r"data.sources.a.weight=nan: the weights of all sources"),
        ({"a": (1e308, None), "b": (1e308, None)}, r"data.sources.a.weight=1e\+308: the weights of all sources"),
        ({"a": (1, None), "b": (1e-5, None)}, r"data.sources.b.weight=1e-05: is less than one row in 10000"),
        ({"a": (1, None), "b": (1, 1e-6)}, r"data.sources.b.final_weight=1e-06: is less than one row in 10000"),
    ],
)
def test_weights_that_would_do_nothing_are_refused(sources: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make_mixture(config_of(**sources), {"a": [array_of(5)], "b": [array_of(5)]}, 1000)


def test_a_weight_that_rounding_takes_away_is_refused() -> None:
    """Catches a source above the limit that gets no row all the same, since others' remainders are larger."""
    config = config_of(a=(0.6, None), b=(3333.7, None), c=(6665.7, None))
    with pytest.raises(InputError, match=r"data.sources.a.weight=0.6: is less than one row in 10000"):
        make_mixture(config, {"a": [], "b": [], "c": []}, 1000)


def test_a_source_too_small_to_be_seen_is_refused() -> None:
    """Catches a source that is prepared and then never read, without a word."""
    sources = {"a": [array_of(10)], "b": [array_of(1_000_000)]}
    with pytest.raises(InputError, match=r"data.sources.a.weight=null: by its size it gets less than one row in 10000"):
        make_mixture(config_of(a=(None, None), b=(None, None)), sources, 1000)


def test_a_prepared_source_without_a_weight_is_refused() -> None:
    """Catches a source of a prepared set that gets no rows because the command line does not mention it."""
    config = DataConfig(DataSource.prepared, ["x"], sources={"a": SourceConfig(weight=1)})
    with pytest.raises(InputError, match=r"data.sources.b.weight=null: other sources have weights; give this one too"):
        make_mixture(config, {"a": [array_of(5)], "b": [array_of(5)]}, 1000)
