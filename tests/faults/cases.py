"""What children of the warm parent do: runs and saves with one fault in them."""

import errno
import hashlib
import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import moe_lm.checkpoint.saver as saving
import moe_lm.commands.pretrain as command
import moe_lm.training.loop as loop
import moe_lm.training.run as run
import moe_lm.training.telemetry as telemetry
from moe_lm import cli
from moe_lm.checkpoint.config import CheckpointConfig, FailurePolicy
from moe_lm.checkpoint.saver import Saver
from moe_lm.checkpoint.store import CheckpointStore, TensorSlice

torch.set_num_threads(1)

OPERATIONS = ("open", "write", "fsync", "close", "mkdir", "rmdir", "rename", "replace", "unlink")
"""Calls of the os module that a save is made of; shutil's deletions go through it as well."""


@contextmanager
def at_operations(act: Callable[[int, str, str, tuple], None]) -> Iterator[None]:
    """Call `act(number, name, moment, arguments)` before and after each operation on a file under way."""
    number = 0
    originals = {name: getattr(os, name) for name in OPERATIONS}

    def watched(name: str) -> Callable:
        def call(*arguments, **options):
            nonlocal number
            number += 1
            mine = number
            act(mine, name, "before", arguments)
            try:
                return originals[name](*arguments, **options)
            finally:
                act(mine, name, "after", arguments)

        return call

    for name in OPERATIONS:
        setattr(os, name, watched(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def slices_of(step: int) -> list[TensorSlice]:
    """A small state that says which step it is of."""
    tensors = {"model/a": torch.full((40, 30), float(step)), "optimizer/b": torch.arange(step, step + 50)}
    return [TensorSlice.whole(name, tensor) for name, tensor in tensors.items()]


def store_in(directory: str, keep_last: int = 2, policy: str = "wait") -> CheckpointStore:
    """A store as a run has it."""
    config = CheckpointConfig(keep_last=keep_last, keep_best=False, on_failure=FailurePolicy[policy])
    return CheckpointStore(Path(directory), config)


def save(directory: str, keep_last: int, step: int, background: bool) -> None:
    """Save one checkpoint."""
    store = store_in(directory, keep_last)
    if not background:
        store.save(step, slices_of(step), {"step": step})
        return
    saver = Saver(store, print)
    saver.start(step, slices_of(step), {"step": step})
    while saver.busy:
        saver._thread.join(1)
    assert saver.failure is None, saver.failure


def count_operations(directory: str, keep_last: int, step: int, background: bool, output: str) -> None:
    """Save one checkpoint and write down the operations that it took."""
    names: list[str] = []
    with at_operations(lambda number, name, moment, arguments: names.append(name) if moment == "before" else None):
        save(directory, keep_last, step, background)
    Path(output).write_text(json.dumps(names))


def killed_save(directory: str, keep_last: int, step: int, background: bool, target: int, moment: str) -> None:
    """Save one checkpoint and be killed before, after or in the middle of one operation."""

    def act(number: int, name: str, now: str, arguments: tuple) -> None:
        if number != target:
            return
        if moment == "middle" and now == "before" and name == "write":
            descriptor, content = arguments
            written = memoryview(content)[: len(content) // 2]
            os.pwrite(descriptor, written, os.lseek(descriptor, 0, os.SEEK_CUR))
        elif now != moment:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    with at_operations(act):
        save(directory, keep_last, step, background)


def full_disk_save(directory: str, policy: str, first: int, times: int, output: str) -> None:
    """Save step 3 on a disk that is full at the `first` write and at `times` in all; write down how it went."""
    writes = failed = 0

    def act(number: int, name: str, moment: str, arguments: tuple) -> None:
        nonlocal writes, failed
        if name == "write" and moment == "before":
            writes += 1
            if writes >= first and failed < times:
                failed += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    said: list[str] = []
    saving.PAUSES, saving.LATER_PAUSE = (0.001, 0.001), 0.001
    saver = Saver(store_in(directory, 1, policy), said.append)
    with at_operations(act):
        saver.start(3, slices_of(3), {"step": 3})
        while saver.busy:
            saver._thread.join(1)
    Path(output).write_text(json.dumps({"said": said, "failure": repr(saver.failure), "failed": failed}))


def pretrain(arguments: list[str], directory: str, ledger: str | None = None) -> int:
    """A whole `moe-lm pretrain`; what each step consumed is appended to a ledger, line by line."""
    os.chdir(directory)
    telemetry.matmul_rate = lambda device, dtype: 1e12
    if ledger is not None:
        original = telemetry.Telemetry.step

        def step(self, result, batch, data_step, learning_rate):
            samples = hashlib.sha1(b"".join(b.input_ids.numpy().tobytes() for b in batch.micro_batches)).hexdigest()
            line = {"step": self._run.progress.step, "data_step": data_step, "samples": samples}
            descriptor = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, (json.dumps(line) + "\n").encode())
            os.close(descriptor)
            original(self, result, batch, data_step, learning_rate)

        telemetry.Telemetry.step = step
    return cli.main(["pretrain", *arguments])


def signalled(arguments: list[str], directory: str, phase: str, occurrence: int) -> int:
    """A whole run that says when it is in a phase for the n-th time, and then waits a moment for its signal."""
    seen = 0

    def announced(original: Callable) -> Callable:
        def call(*positional, **named):
            nonlocal seen
            seen += 1
            if seen == occurrence:
                os.write(1, f"now in {phase}\n".encode())
                (hang if phase == "hang" else time.sleep)(0.3)
            return original(*positional, **named)

        return call

    def hang(seconds: float) -> None:
        """Never come back to the interpreter, as a collective without its peer."""
        while True:
            select.select([os.pipe()[0]], [], [], None)

    if phase == "start":
        occurrence = 1
        command.Run.__init__ = announced(command.Run.__init__)
    elif phase in ("step", "hang"):
        loop.train_step = announced(loop.train_step)
    elif phase == "evaluation":
        loop.bits_per_byte = announced(loop.bits_per_byte)
    else:
        run.Saver.start = announced(run.Saver.start)
    return pretrain(arguments, directory)
