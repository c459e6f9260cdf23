"""What children of the warm parent do: runs and saves with one fault in them."""

import errno
import hashlib
import json
import os
import random
import select
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import moe_lm.checkpoint.saver as saving
import moe_lm.commands.job as job
import moe_lm.commands.sharing as sharing
import moe_lm.training.loop as loop
import moe_lm.training.run as run
import moe_lm.training.step as step_module
import moe_lm.training.telemetry as telemetry
import moe_lm.training.validation as validation
from moe_lm import cli
from moe_lm.checkpoint.config import CheckpointConfig, FailurePolicy
from moe_lm.checkpoint.saver import Saver
from moe_lm.checkpoint.store import CheckpointStore, TensorSlice
from moe_lm.interrupts import interrupts

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


def command_line(arguments: list[str], directory: str) -> int:
    """Any `moe-lm` command."""
    os.chdir(directory)
    return cli.main(arguments)


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
    """A whole run that says when it is in a phase for the n-th time, and then waits until it is asked for something."""
    seen = 0
    (name,) = [argument.partition("=")[2] for argument in arguments if argument.startswith("run_name=")]

    def until_asked() -> None:
        deadline = time.monotonic() + 60
        while not (interrupts.stop or interrupts.save or Path("runs", name, "stop").exists()):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def announced(original: Callable) -> Callable:
        def call(*positional, **named):
            nonlocal seen
            seen += 1
            if seen == occurrence:
                os.write(1, f"now in {phase}\n".encode())
                (hang if phase.startswith("hang") else until_asked)()
            return original(*positional, **named)

        return call

    def hang() -> None:
        """Never come back to the interpreter, as a collective without its peer."""
        if phase == "hang without output":
            read, write = os.pipe()
            os.dup2(write, 2)
            os.close(read)
            os.close(write)
        while True:
            select.select([os.pipe()[0]], [], [], None)

    if phase == "start":
        occurrence = 1
        job.Run.__init__ = announced(job.Run.__init__)
    elif phase == "step" or phase.startswith("hang"):
        loop.train_step = announced(loop.train_step)
    elif phase == "evaluation":
        validation.evaluate = announced(validation.evaluate)
    else:
        run.Saver.start = announced(run.Saver.start)
    return pretrain(arguments, directory)


def record_states(path: str) -> None:
    """Write down a hash of everything that a step can change, after each step."""
    original = telemetry.Telemetry.step

    def step(self, result, batch, data_step, learning_rate):
        run, digest = self._run, hashlib.sha256()
        for tensor in (
            *run.parallel.module.parameters(),
            *(t for *_, t in run.optimizer.state_tensors()),
            run.load_LE,
            *run.compute.module.parameters(),
        ):
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
        digest.update(json.dumps([run.spikes.losses, run.progress.targets, run.progress.updates]).encode())
        with open(path, "a") as file:
            file.write(f"{run.progress.step} {digest.hexdigest()}\n")
        original(self, result, batch, data_step, learning_rate)

    telemetry.Telemetry.step = step


def poison(steps: list[int], kind: str, states: str | None) -> None:
    """Put something that is not finite into the first micro-batch of some steps (numbered from 1)."""
    original, number = loop.train_step, 0

    def train_step(compute, *arguments):
        nonlocal number
        number += 1
        layers = compute.module.model.layers
        if number in steps and kind == "weight":
            with torch.no_grad():
                layers[1].mlp.gate.weight[0, 0] = float("nan")
        if number not in steps or kind == "weight":
            return original(compute, *arguments)
        calls = 0

        def bad_gradient(gradient):
            nonlocal calls
            calls += 1
            return gradient * float(kind) if calls == 1 else gradient

        def bad_output(module, inputs, output):
            return output * float("nan")

        if kind == "forward":
            layers[1].self_attn.register_forward_hook(bad_output)
            return original(compute, *arguments)
        hook = layers[0].self_attn.o_proj.weight.register_hook(bad_gradient)
        try:
            return original(compute, *arguments)
        finally:
            hook.remove()

    loop.train_step = train_step
    if states is not None:
        record_states(states)


def poisoned(arguments: list[str], directory: str, steps: list[int], kind: str, states: str | None) -> int:
    """A whole run with poisoned steps."""
    poison(steps, kind, states)
    return pretrain(arguments, directory)


def spiked(
    arguments: list[str], directory: str, data_steps: list[int], states: str | None, kill_at: int | None = None
) -> int:
    """A whole run in which the loss of some data steps is raised; killed when the n-th step after a rewind begins."""
    original, current = step_module.loss_shares, [0]
    between = loop.between_steps

    def loss_shares(*positional):
        shares = original(*positional)
        if current[0] not in data_steps:
            return shares
        return shares._replace(cross_entropy=shares.cross_entropy * 10)

    def between_steps(run, *rest):
        current[0] = run.progress.data_step
        if kill_at is not None and run.progress.step == kill_at and run.progress.skipped_data_steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return between(run, *rest)

    step_module.loss_shares, loop.between_steps = loss_shares, between_steps
    if states is not None:
        record_states(states)
    return pretrain(arguments, directory)


def random_state_kept(arguments: list[str], directory: str) -> int:
    """A whole run that must leave the global generators alone."""

    def states() -> tuple:
        generators = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2:]
        return (*generators, torch.get_rng_state().tolist())

    same = []

    def watched(*positional):
        before = states()
        result = loop.train(*positional)
        same.append(before == states())
        return result

    job.train = watched
    code = pretrain(arguments, directory)
    return code if same == [True] else 3


def failing_on_rank_one(arguments: list[str], directory: str) -> int:
    """A run in which the third step of the second process fails."""
    original, calls = loop.train_step, [0]

    def train_step(*positional, **named):
        calls[0] += 1
        if calls[0] == 3 and os.environ["RANK"] == "1":
            raise ValueError("a fault of this process alone")
        return original(*positional, **named)

    loop.train_step = train_step
    return pretrain(arguments, directory)


def failing_save_on_rank_one(arguments: list[str], directory: str) -> int:
    """A run in which the second process's part of a checkpoint meets a bug."""

    def write_part(*positional, **named):
        raise ValueError("a bug in a save of this process alone")

    if os.environ["RANK"] == "1":
        CheckpointStore.write_part = write_part
    return pretrain(arguments, directory)


def other_options(arguments: list[str], directory: str) -> int:
    """A run whose second process is given another seed."""
    return pretrain([*arguments, *(["seed=7"] if os.environ["RANK"] == "1" else [])], directory)


def other_code(arguments: list[str], directory: str) -> int:
    """A run whose second process runs code of another version."""
    if os.environ["RANK"] == "1":
        sharing._code_fingerprint = lambda: "0" * 64
    return pretrain(arguments, directory)


def other_machine(arguments: list[str], directory: str) -> int:
    """A run whose second process is on a machine that computes in bf16."""
    if os.environ["RANK"] == "1":
        sharing.compute_dtype = lambda precision, device: torch.bfloat16
    return pretrain(arguments, directory)


def other_disk(arguments: list[str], directory: str) -> int:
    """A run whose second process has the output directory on a disk of its own."""
    if os.environ["RANK"] == "1":
        directory = f"{directory}/other-disk"
        os.mkdir(directory)
    return pretrain(arguments, directory)


def talkative(arguments: list[str], directory: str) -> int:
    """A run in which every process warns and prints while it trains."""
    original, rank = loop.train_step, os.environ["RANK"]

    def train_step(*positional, **named):
        warnings.warn(f"a warning of process {rank}", stacklevel=1)
        print(f"printed by process {rank}")
        return original(*positional, **named)

    loop.train_step = train_step
    return pretrain(arguments, directory)
