"""Signals of this process: raised at once at first, remembered while training, and given back afterwards."""

import os
import signal
import time

import pytest

from moe_lm.errors import Stopped
from moe_lm.interrupts import Interrupts

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _a_terminal():
    """As a terminal starts a process, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def _until(holds) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("number", STOPPING)
def test_a_stop_is_raised_at_first(number):
    """Catches a signal that waits for a training loop which has not begun."""

    def killed() -> None:
        with Interrupts():
            os.kill(os.getpid(), number)
            time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        killed()


@pytest.mark.parametrize("number", STOPPING)
def test_a_stop_is_remembered_while_training(number):
    """Catches a signal that tears a step apart, is lost, or is not named."""
    with Interrupts() as interrupts, interrupts.deferred(25, lambda: None):
        assert interrupts.stop is None
        os.kill(os.getpid(), number)
        _until(lambda: interrupts.stop is not None)
        assert interrupts.stop == signal.Signals(number).name and not interrupts.save


@pytest.mark.parametrize("number", STOPPING)
def test_a_stop_that_is_obeyed_is_not_torn(number):
    """Catches what a stopped run still writes being interrupted, since a launcher sends SIGTERM once a peer has ended;
    and one that hangs there and can not be stopped any more."""
    with Interrupts() as interrupts:
        with pytest.raises(Stopped), interrupts.deferred(25, lambda: None):
            raise Stopped
        os.kill(os.getpid(), number)
        _until(lambda: interrupts._deadline is not None)
        assert interrupts.stop == signal.Signals(number).name


def test_a_request_to_save_is_no_stop():
    """Catches SIGUSR1 that ends a run, also one that has not begun to train."""
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGUSR1)
        _until(lambda: interrupts.save)
        assert interrupts.stop is None


def test_a_hangup_that_is_ignored_stays_ignored():
    """Catches a run under nohup that the closed terminal ends all the same."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupts() as interrupts, interrupts.deferred(25, lambda: None):
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGUSR1)
        _until(lambda: interrupts.save)
        assert interrupts.stop is None


def test_handlers_are_given_back():
    """Catches a command that leaves its handlers, or its pipe, to whoever called it."""
    numbers = (*STOPPING, signal.SIGUSR1)
    before, descriptors = [signal.getsignal(n) for n in numbers], os.listdir("/proc/self/fd")
    for _ in range(3):
        with Interrupts():
            pass
    assert [signal.getsignal(n) for n in numbers] == before and signal.set_wakeup_fd(-1) == -1
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
