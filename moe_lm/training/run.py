"""Everything a training run is made of, assembled from its configuration, and what of it a checkpoint holds."""

import dataclasses
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lm.checkpoint.store import Checkpoint, CheckpointStore
from moe_lm.data.loader import make_mixture
from moe_lm.data.prepared import PreparedData
from moe_lm.model.balancing import load_fraction
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize
from moe_lm.parallel.runtime import Runtime
from moe_lm.training.config import RunConfig, to_plain
from moe_lm.training.feed import Feed, GlobalBatch
from moe_lm.training.optimizer import Optimizer
from moe_lm.training.precision import ComputeModel, compute_dtype


@dataclasses.dataclass
class Progress:
    """How far a run is: the counters that a checkpoint keeps."""

    step: int = 0
    """Finished optimizer steps, skipped updates included."""
    data_step: int = 0
    """Global batches consumed."""
    targets: int = 0
    """Target tokens learned from."""
    tokens_by_domain: dict[str, int] = dataclasses.field(default_factory=dict)
    """Input tokens learned from, by domain."""
    best_bits_per_byte: float | None = None
    """Lowest validation figure so far."""

    def count(self, batch: GlobalBatch, domains: list[str]) -> None:
        """Add what a step learned from."""
        self.targets += batch.num_targets
        for name, tokens in zip(domains, batch.domain_tokens):
            self.tokens_by_domain[name] = self.tokens_by_domain.get(name, 0) + tokens


class Run:
    """A training run: model, optimizer, data and progress."""

    def __init__(self, config: RunConfig, runtime: Runtime, data: PreparedData, directory: Path):
        self.config, self.runtime, self.data, self.directory = config, runtime, data, directory
        trainer = config.trainer
        with torch.device(runtime.device):
            self.model = CausalLM(config.model)
        initialize(self.model, config.seed)
        self.model.model.recompute_layers = trainer.activation_checkpointing
        self.compute = ComputeModel(self.model, compute_dtype(trainer.precision, runtime.device))
        self.optimizer = Optimizer(self.model, config.optimizer)
        self.load_LE = initial_load(self.model).to(runtime.device)
        total_rows = trainer.max_steps * trainer.global_batch_size
        self.mixture = make_mixture(config.data, data.train, total_rows)
        self.store = CheckpointStore(directory / "checkpoints", config.checkpoint.keep_last)
        self.progress = Progress()
        self.data_state: dict[str, Any] = {}
        """Where the data stands besides `progress.data_step`: of this process, or in a checkpoint of all."""
        self.saved_step: int | None = None
        """Step of the newest checkpoint."""

    def open_feed(self) -> Feed:
        """The batches from where the run stands on; to be used as a context manager."""
        feed: Feed | None = None
        failure: Exception | None = None
        try:
            feed = Feed(self.config, self.runtime, self.data, self.mixture, self.progress.data_step, self.data_state)
        except Exception as error:  # a file that only this process's machine lacks
            failure = error
        self.runtime.agree(failure)
        assert feed is not None
        return feed

    def save(self, feed: Feed) -> None:
        """Write a checkpoint of the present state; every process must call it."""
        data_state = feed.whole_state(self.data_state)
        if self.runtime.is_main:
            state = {
                "progress": dataclasses.asdict(self.progress),
                "versions": versions(),
                "world_size": self.runtime.world_size,
                "threads": torch.get_num_threads(),
                "corpus_fingerprint": self.data.corpus_fingerprint,
                "tokenizer_fingerprint": self.data.tokenizer.fingerprint,
                "config": to_plain(self.config),
                "data": data_state,
            }
            self.store.save(self.progress.step, self._tensors(), state)
        self.saved_step = self.progress.step
        self.runtime.barrier()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((f"model/{name}", p) for name, p in self.model.named_parameters())
        yield from ((f"optimizer/{name}", t) for name, t in self.optimizer.state_tensors())
        yield "balancing/load", self.load_LE

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Take the state of a checkpoint of this very run."""
        checkpoint.fill("model/", dict(self.model.named_parameters()))
        self.compute.refresh()
        prefix = "optimizer/"
        moments = {name.removeprefix(prefix): checkpoint.tensor(name) for name in checkpoint.names(prefix)}
        self.optimizer.load_state_tensors(moments)
        self.load_LE.copy_(checkpoint.tensor("balancing/load"))
        self.progress = Progress(**checkpoint.state["progress"])
        self.data_state = checkpoint.state["data"]
        self.saved_step = checkpoint.step


def initial_load(model: CausalLM) -> Tensor:
    """Uniform load [L, E] of a mixture; [0, 1] for a dense model, which balances nothing."""
    config = model.config
    return load_fraction(
        torch.zeros(config.num_hidden_layers, config.num_experts) if config.is_mixture else torch.zeros(0, 1)
    )


def versions() -> dict[str, str]:
    """Versions that a bit-exact resume depends on."""
    packages = {name: version(name) for name in ("moe-lm", "torch", "transformers", "accelerate")}
    return {"python": platform.python_version(), **packages}
