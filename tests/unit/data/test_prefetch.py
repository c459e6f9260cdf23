"""Catches: steps out of order, too many or missing, errors that are swallowed, threads that outlive their run."""

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from moe_lm.data.loader import StepBatch
from moe_lm.data.prefetch import DEPTH, Prefetcher
from moe_lm.errors import InputError


class Steps:
    """A loader whose steps carry nothing but their number; it fails at step `broken`."""

    def __init__(self, num_steps: int | None = None, broken: int | None = None) -> None:
        self.num_steps, self.broken = num_steps, broken
        self.made: list[int] = []
        self.more = threading.Condition()

    def step(self, data_step: int) -> StepBatch:
        with self.more:
            self.made.append(data_step)
            self.more.notify_all()
        if data_step == self.broken:
            raise InputError(f"step {data_step} is broken.")
        return StepBatch([], data_step, np.zeros(1, np.int64), np.ones(1, np.int64), {})

    def wait_for(self, count: int) -> None:
        """Waits until so many steps have been asked for."""
        with self.more:
            assert self.more.wait_for(lambda: len(self.made) >= count, timeout=30)


def ends(work: Callable[[], object]) -> BaseException | None:
    """Runs what might wait for ever, so that the suite does not; gives what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "still waiting"
    return raised[0] if raised else None


def prefetching() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.fixture(autouse=True)
def _no_thread_stays():
    """Every test here ends with its thread gone."""
    yield
    assert prefetching() == []


@pytest.mark.parametrize("first", [0, 17])
def test_steps_come_in_order_from_the_first_on(first: int) -> None:
    steps = Steps()
    with Prefetcher(steps, first) as prefetcher:
        assert [prefetcher.next().num_targets for _ in range(50)] == list(range(first, first + 50))


def test_steps_are_ready_before_they_are_asked_for_but_not_without_bound() -> None:
    """Catches a thread that makes a step only when asked, and one that fills the memory."""
    steps = Steps()
    with Prefetcher(steps, 0) as prefetcher:
        steps.wait_for(DEPTH + 1)  # the last of them waits for room
        assert steps.made == list(range(DEPTH + 1))
        prefetcher.next()
        steps.wait_for(DEPTH + 2)
        assert steps.made == list(range(DEPTH + 2))


@pytest.mark.parametrize("broken", [0, 1, 3])
def test_an_error_is_raised_where_the_step_is_wanted(broken: int) -> None:
    """Catches an error that ends the thread silently, so that `next` waits for ever, or that overtakes good steps."""
    taken: list[int] = []

    def run() -> None:
        with Prefetcher(Steps(broken=broken), 0) as prefetcher:
            while True:
                taken.append(prefetcher.next().num_targets)

    error = ends(run)
    assert isinstance(error, InputError) and str(error) == f"step {broken} is broken."
    assert taken == list(range(broken))


@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_no_more_steps_are_made_than_there_are(num_steps: int) -> None:
    steps = Steps(num_steps=num_steps)
    with Prefetcher(steps, 0) as prefetcher:
        assert [prefetcher.next().num_targets for _ in range(num_steps)] == list(range(num_steps))
        prefetcher._thread.join(30)
        assert not prefetcher._thread.is_alive()
    assert steps.made == list(range(num_steps))
    with Prefetcher(steps, num_steps):
        pass
    assert steps.made == list(range(num_steps))


def test_leaving_at_a_full_queue_ends_the_thread() -> None:
    """Catches a run that hangs when it ends early: the thread waits for room that nobody would make."""
    steps = Steps()

    def run() -> None:
        with Prefetcher(steps, 0):
            steps.wait_for(DEPTH + 1)
            assert prefetching()

    assert ends(run) is None
    assert len(steps.made) == DEPTH + 1  # room is made for the step that waits, not for more


def test_leaving_with_an_error_that_waits_ends_the_thread() -> None:
    """Catches the thread stuck at putting down its error, which nobody takes any more; the run's own error stays."""
    steps = Steps(broken=DEPTH)

    def run() -> None:
        with Prefetcher(steps, 0):
            steps.wait_for(DEPTH + 1)
            raise KeyError("the run's own")

    assert repr(ends(run)) == repr(KeyError("the run's own"))


def test_leaving_while_a_step_is_made_waits_for_it() -> None:
    """Catches encoders closed, and interpreters ended, under a thread that still uses them."""
    steps, release = Steps(), threading.Event()
    original, ended = steps.step, []

    def slow(data_step: int) -> StepBatch:
        step = original(data_step)
        release.wait(30)
        ended.append(data_step)
        return step

    steps.step = slow  # type: ignore[method-assign]
    with Prefetcher(steps, 0):
        steps.wait_for(1)
        threading.Timer(0.05, release.set).start()
    assert ended[0] == 0


def test_waiting_is_counted() -> None:
    """Catches a run that waits for its data and does not say so."""
    steps = Steps()
    original = steps.step
    steps.step = lambda data_step: (time.sleep(0.02), original(data_step))[1]  # type: ignore[method-assign]
    with Prefetcher(steps, 0) as prefetcher:
        assert prefetcher.waited == 0
        for _ in range(DEPTH + 3):
            prefetcher.next()
        assert prefetcher.waited > 0
