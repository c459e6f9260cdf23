"""Everything a training run is made of, assembled from its configuration, and what of it a checkpoint holds.

There is no random state among it: nothing draws from a global generator while training. Initial weights come from the
seed or from another model (`start.py`), data order from (seed, step).
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe_lm.checkpoint.checkpoint import Checkpoint
from moe_lm.checkpoint.saver import Saver
from moe_lm.checkpoint.store import SCORE, CheckpointStore
from moe_lm.checkpoint.tensor_file import CheckpointError
from moe_lm.data.mixture import make_mixture
from moe_lm.data.prepared import PreparedData
from moe_lm.model.router import Router
from moe_lm.parallel.layout import Layout
from moe_lm.parallel.parallelize import parallelize
from moe_lm.parallel.placement import Placement
from moe_lm.parallel.runtime import Runtime
from moe_lm.parallel.shards import ParameterShard
from moe_lm.plain import to_plain
from moe_lm.training.config import RunConfig, SpikePolicy
from moe_lm.training.feed import Feed
from moe_lm.training.guards import SpikeDetector
from moe_lm.training.optimizer import Optimizer
from moe_lm.training.precision import ComputeModel, compute_dtype
from moe_lm.training.progress import Progress
from moe_lm.training.requests import Requests
from moe_lm.training.saving import Saving
from moe_lm.training.start import FromSeed, Start
from moe_lm.training.state import (
    environment,
    expected_tensors,
    initial_load,
    load_tensors,
    progress_of,
    saved_slices,
)
from moe_lm.training.watchdog import Pulse


class Run:
    """A training run: model, optimizer, data and progress."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        data: PreparedData,
        directory: Path,
        report: Callable[[str], None] = lambda text: None,
        layout: Layout = Layout(),  # noqa: B008 -- frozen
        placement: Placement | None = None,
        start: Start | None = None,
    ):
        """Assemble a run at its beginning.

        Args:
            config: The run's configuration.
            runtime: This process among its peers.
            data: Shards, or of streams their tokenizer and how they are split.
            directory: The run's directory.
            report: Is told in a sentence of saves that fail, from another thread.
            layout: How processes share the model.
            placement: Who owns which expert; needed under expert parallelism.
            start: Where the weights come from; null draws them from the seed.
        """
        self.config, self.runtime, self.data, self.directory = config, runtime, data, directory
        self.start = start or FromSeed(config.model, config.seed)
        trainer = config.trainer
        dtype = compute_dtype(trainer.precision, runtime.device)
        self.parallel = parallelize(
            config.model, layout, placement, runtime.rank, runtime.device, dtype, lambda m: self.start.adapt(m, dtype)
        )
        self.parallel.module.model.recompute = trainer.activation_checkpointing
        self._initialize()
        self.compute = ComputeModel(self.parallel, dtype)
        self.optimizer = Optimizer(self._saved_shards(), config.optimizer)
        self.load_LE = initial_load(config.model).to(runtime.device)
        total_rows = trainer.max_steps * trainer.global_batch_size
        self.mixture = make_mixture(config.data, data.train, total_rows)
        rewinds = config.guards.spike_policy is SpikePolicy.rewind
        behind = config.guards.rewind_margin if rewinds else None
        self.store = CheckpointStore(directory / "checkpoints", config.checkpoint, behind)
        self.saver = Saver(self.store, report)
        self.requests = Requests(directory, runtime)
        self.saving = Saving(
            self.saver, runtime, self.requests, self.parallel.layout.sharded, lambda: self.progress.step
        )
        # Made once: training stands still while a save begins.
        self.environment, self._plain_config = environment(runtime, self.parallel, dtype), to_plain(config)
        self.progress = Progress()
        self.spikes = SpikeDetector(config.guards)
        self.before_save: Callable[[], None] = lambda: None
        """Called on every process before a checkpoint is begun."""
        self.data_state: dict[str, Any] = {}
        """Where the data stands besides `progress.data_step`: of this process, or in a checkpoint of all."""

    @torch.no_grad()
    def _initialize(self) -> None:
        """Fill the parameters: whole ones, one after the other, of which each process takes its part."""
        device = self.runtime.device
        for shard in self.parallel.shards:
            shard.fill(self.start.value(shard.name, shard.shape, device, shard.value.dtype))
        for name, router in self.parallel.module.named_modules():
            if isinstance(router, Router) and (starting := router.starting_weight) is not None:
                starting.copy_(self.start.value(f"{name}.weight", starting.shape, device, starting.dtype))

    @property
    def has_adapters(self) -> bool:
        """Whether checkpoints hold only what is added to the model, so that it is whole nowhere but merged."""
        return len(self.optimizer.shards) < len(self.parallel.shards)

    def _saved_shards(self) -> list[ParameterShard]:
        """The parameters that checkpoints hold; of stacked experts, with those marked that are trained."""
        shards = [shard for shard in self.parallel.shards if self.start.is_saved(shard.name)]
        experts = self.start.trained_experts
        if experts is None:
            return shards
        return [shard.training_only(experts) if ".mlp.experts." in shard.name else shard for shard in shards]

    def open_feed(self) -> Feed:
        """The batches from where the run stands on; to be used as a context manager."""
        return self.runtime.together(
            lambda: Feed(self.config, self.runtime, self.data, self.mixture, self.progress, self.data_state)
        )

    def save(self, feed: Feed, pulse: Pulse) -> None:
        """Begin a checkpoint of the present state, once the one before is on disk; every process must call it.

        Args:
            feed: Where the data stands.
            pulse: Called while this waits.
        """
        self.saving.finish(pulse)
        state = self._state(feed.whole_state(self.data_state))
        self.before_save()
        self.saving.begin(saved_slices(self.optimizer, self.load_LE, self.runtime.is_main), state, pulse)

    def _state(self, data_state: dict[str, Any]) -> dict[str, Any]:
        progress = self.progress
        return {
            "progress": dataclasses.asdict(progress),
            SCORE: progress.bits_per_byte if progress.validated_step == progress.step else None,
            "losses": self.spikes.losses,
            "environment": self.environment,
            "corpus_fingerprint": self.data.corpus_fingerprint,
            "tokenizer_fingerprint": self.data.tokenizer.fingerprint,
            "config": self._plain_config,
            "start": self.start.state,
            "data": data_state,
        }

    def newest_checkpoint(self, refused: Callable[[str], None], data_step: int | None = None) -> Checkpoint | None:
        """The newest checkpoint that verifies on every process; every process must call it, and gets the same.

        Args:
            refused: Told of each newer one that does not verify, where and why.
            data_step: Only one that has consumed no more than so many global batches.
        """
        names = json.loads(self.runtime.gather(json.dumps([path.name for path in self.store.paths()]))[0])
        for name in reversed(names):
            path, failure, checkpoint = self.store.directory / name, "", None
            try:
                checkpoint = Checkpoint(path)
                progress_of(checkpoint)
            except CheckpointError as error:
                failure = str(error)
            failures = {rank: text for rank, text in enumerate(self.runtime.gather(failure)) if text}
            if failures:
                where = f" on process {min(failures)}" if 0 not in failures else ""
                refused(f"{path}{where}: {failures[min(failures)]}")
            elif checkpoint is not None and (data_step is None or progress_of(checkpoint).data_step <= data_step):
                return checkpoint
        return None

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Take the state of a checkpoint of this very run.

        Raises:
            CheckpointError: It is not one: names, types or shapes differ. Nothing was changed.
        """
        progress = progress_of(checkpoint)
        checkpoint.expect(expected_tensors(self.config.model, self.optimizer, progress.updates > 0))
        load_tensors(checkpoint, self.optimizer, self.load_LE, trained=progress.updates > 0)
        self.compute.refresh(also_frozen=True)
        self.progress = progress
        self.spikes = SpikeDetector(self.config.guards, checkpoint.state["losses"])
        self.data_state = checkpoint.state["data"]
        self.saving.newest_step = int(progress.step)

    def rewind(self, data_step: int, pulse: Pulse, say: Callable[[str], None]) -> None:
        """Go back to a checkpoint from before a batch and leave out the batches around it; every process must call it.

        Where there is none it goes back to the beginning. Either way what comes is the run that left those batches out
        from the start, so it does not matter which checkpoints there happen to be.

        Args:
            data_step: The global batch whose loss was a spike.
            pulse: Called while this waits.
            say: Told of checkpoints that were refused.
        """
        self.saving.finish(pulse)
        margin = self.config.guards.rewind_margin
        around = range(max(0, data_step - margin), data_step + margin + 1)
        checkpoint = self.newest_checkpoint(lambda reason: say(f"refused checkpoint {reason}"), around[0])
        skipped = sorted({*self.progress.skipped_data_steps, *around})
        if checkpoint is None:
            self._begin_anew()
        else:
            self.load(checkpoint)
        self.progress.skipped_data_steps = skipped
        self.runtime.on_main(lambda: self.store.forget_after(self.progress.step))

    @torch.no_grad()
    def _begin_anew(self) -> None:
        """Take the state of a run that has not made a step."""
        self._initialize()
        self.compute.refresh(also_frozen=True)
        self.optimizer.restore_state(None)
        self.load_LE.copy_(initial_load(self.config.model))
        self.progress, self.spikes = Progress(), SpikeDetector(self.config.guards)
        self.data_state, self.saving.newest_step = {}, None
