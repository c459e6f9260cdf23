"""Processes: who we are, where we compute, and the few collectives that replicated training needs.

Accelerate owns launch, process group and device; `torchrun`, `accelerate launch` and plain `python -m` all
end here. It does not wrap the model: experts that are sharded over processes need meshes of their own, which it does
not know.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from moe_lm import process
from moe_lm.errors import InputError, RunError, Stopped
from moe_lm.interrupts import interrupts
from moe_lm.kernels.allocator import keep_freed_memory
from moe_lm.parallel.peers import PeerWatch

T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""How long a process waits for another one in a collective. The backends' 10 or 30 minutes are less than an export or
the preparation of much text by the main process takes; processes that have gone are found by `PeerWatch`, those that
hang by the watchdog."""


class Runtime:
    """This process among its peers."""

    def __init__(self, device: str = "auto"):
        """Join the other processes of the launcher, if there is one.

        Raises:
            InputError: There is no such device, or the launcher's variables do not say which process this is.
        """
        _check_launcher()
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("trainer.device=cuda: no CUDA device is visible here; use trainer.device=auto or cpu.")
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        if on_cpu:
            keep_freed_memory()
        if process.world_size() > 1 and process.was_restarted():
            _meet_again("gloo" if on_cpu else "nccl")
        # Said outright, because Accelerate guesses otherwise: under torchrun on a CPU every rank takes itself for the
        # main one. Its own mixed precision stays off, whatever the launcher's environment says.
        patience = InitProcessGroupKwargs(timeout=PATIENCE)
        accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=[patience])
        self.device: torch.device = accelerator.device
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self._all_failed = False
        self.peers = PeerWatch(
            self.rank,
            self.world_size,
            self.from_main,
            agreed=lambda: self._all_failed,
            at_departure=lambda sentence: interrupts.ignore(),
        )
        """Ends this process soon after another one has gone; watches while the runtime's context is open."""

    def __enter__(self) -> "Runtime":
        self.peers.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.peers.__exit__(kind, error, trace)
        # After a failure the group is left as it is: to take it down can wait for a peer that has gone.
        orderly = error is None or isinstance(error, Stopped)
        if orderly and self.peers.departed is None and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    @property
    def all_failed(self) -> bool:
        """Whether every process knows of the failure that ends it, and so may still wait for its peers."""
        return self._all_failed

    def failed_everywhere(self, failure: RunError) -> RunError:
        """The failure, to be raised: by every process at this very place, so that none has to tell the others."""
        self._all_failed = True
        return failure

    @contextlib.contextmanager
    def still_together(self) -> Iterator[None]:
        """Work of all processes that know of the failure which ends them, before they end by it; what only one of them
        meets in the block, and raises out of it, is again for it to tell.
        """
        self._all_failed = False
        yield
        self._all_failed = True

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place. Every process gives the same shapes in the same
        order.

        Sums, never means: losses are divided by the global token count before backward, and gloo's AVG has summed
        silently.
        """
        if self.world_size > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def on_main(self, work: Callable[[], object]) -> None:
        """Run `work` on the main process while the others wait for it to end.

        What it raises there is raised on the others as well, a user's mistake as such: none is left waiting for a peer
        that has gone, and none dies of the missing peer with a traceback of its own.
        """
        failure: Exception | None = None
        if self.is_main:
            try:
                work()
            except Exception as error:
                failure = error
        said = self.from_main(_as_text(failure))
        self._all_failed = bool(said)
        if failure is not None:
            raise failure
        if said:
            theirs = _from_text(said, "the main process")
            theirs.told = True
            raise theirs

    def decide(self, work: Callable[[], Any]) -> Any:
        """What `work`, run on the main process alone, gives there, on every process; JSON. Raises as `on_main` does."""
        decided: list[Any] = [None]

        def run() -> None:
            decided[0] = work()

        self.on_main(run)
        return json.loads(self.from_main(json.dumps(decided[0])))

    def agree(self, failure: Exception | None) -> None:
        """Raise on every process what any of them met: none goes on into a collective that a peer will never reach.

        Args:
            failure: what this process met, or null.
        """
        if self.world_size > 1:
            failed = torch.tensor([failure is not None], dtype=torch.int64, device=self.device)
            self.sum([failed])
            self._all_failed = bool(failed)
            if failure is None and self._all_failed:
                texts = self.gather("")
                rank = next(rank for rank, text in enumerate(texts) if text)
                theirs = _from_text(texts[rank], f"process {rank}")
                theirs.told = True
                raise theirs
            if failure is not None:
                self.gather(_as_text(failure))
        if failure is not None:
            raise failure

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives here; where it raises on any process, every one raises (see `agree`)."""
        failure: Exception | None = None
        try:
            given = work()
        except Exception as error:  # perhaps of this process alone: a file that its machine lacks
            failure = error
        self.agree(failure)
        return given

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Of each flag, whether it is set on any process; the same on every process."""
        if self.world_size == 1:
            return list(flags)
        counts = torch.tensor([int(flag) for flag in flags], device=self.device)
        self.sum([counts])
        return [count > 0 for count in counts.tolist()]

    def gather(self, text: str) -> list[str]:
        """Every process's text, on every process, in order of ranks."""
        if self.world_size == 1:
            return [text]
        content = torch.tensor(list(text.encode(errors="backslashreplace")), dtype=torch.uint8, device=self.device)
        sizes = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        sizes[self.rank] = len(content)
        self.sum([sizes])
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8, device=self.device)
        padded[: len(content)] = content
        gathered = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(gathered, padded)
        return [bytes(of_rank[:size].tolist()).decode() for of_rank, size in zip(gathered, sizes.tolist())]

    def from_main(self, text: str) -> str:
        """The main process's text, on every process; as plain bytes, since broadcasting objects would unpickle them."""
        if self.world_size == 1:
            return text
        content = torch.tensor(list(text.encode(errors="backslashreplace")), dtype=torch.uint8, device=self.device)
        length = torch.tensor([len(content)], device=self.device)
        dist.broadcast(length, 0)
        content = content if self.is_main else torch.empty(int(length), dtype=torch.uint8, device=self.device)
        if len(content):
            dist.broadcast(content, 0)
        return bytes(content.tolist()).decode()


def _check_launcher() -> None:
    """Refuse a part of a launcher's variables, such as a shell script sets or a batch system leaves behind."""
    rank, world_size, start = process.rank(), process.world_size(), "start several with torchrun or accelerate launch"
    others = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT") if world_size > 1 else ()
    for name in ("RANK", "WORLD_SIZE", *others):
        value = os.environ.get(name)
        if value and not value.isdecimal():
            raise InputError(
                f"{name}={value} in the environment: must be a whole number; unset {name} to run one process, or "
                f"{start}."
            )
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world_size > 1 and missing:
        raise InputError(
            f"WORLD_SIZE={world_size} in the environment: {' and '.join(missing)} must be set beside it; unset "
            f"WORLD_SIZE to run one process, or {start}."
        )
    if not 0 <= rank < world_size:
        raise InputError(
            f"RANK={rank} in the environment: must be less than WORLD_SIZE={world_size}; unset RANK to run one "
            f"process, or {start}."
        )


def _as_text(failure: Exception | None) -> str:
    if failure is None:
        return ""
    return f"{'input' if isinstance(failure, InputError) else 'run'}:{failure}"


def _from_text(said: str, who: str) -> InputError | RunError:
    """What another process said, as the exception that it was."""
    kind, _, sentence = said.partition(":")
    return InputError(sentence) if kind == "input" else RunError(f"{who} failed: {sentence}")


def _meet_again(backend: str) -> None:
    """Join the process group after a restart by torchrun, under names of this very attempt.

    torchrun (2.13) keeps one store for all attempts, in which the addresses of the processes that have gone still
    stand. A process that comes up before its peer has written its new address connects to the old one: refused, or
    waiting for half an hour.
    """
    environment = os.environ
    rank, world_size = process.rank(), process.world_size()
    is_master = environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and rank == 0
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = dist.TCPStore(address, port, world_size, is_master=is_master)  # type: ignore[attr-defined]
    if backend == "nccl":
        torch.cuda.set_device(int(environment["LOCAL_RANK"]))
    name = f"attempt-{environment['TORCHELASTIC_RESTART_COUNT']}"
    attempt = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=world_size, timeout=PATIENCE)
