"""The batches of a run: its loader, the workers and the thread behind it, and the counts of the global batch."""

import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from moe_lm.data.batch import Batch
from moe_lm.data.encode import Encoder
from moe_lm.data.loader import BatchPlan, Loader, ShardLoader, StepBatch
from moe_lm.data.mixture import Mixture
from moe_lm.data.prefetch import Prefetcher
from moe_lm.data.prepared import PreparedData
from moe_lm.data.sources import Source, open_sources, open_validation
from moe_lm.data.streams import SourceStreams, StreamLoader, merge_states
from moe_lm.parallel.runtime import Runtime
from moe_lm.training.config import RunConfig
from moe_lm.training.progress import Progress


@dataclass(frozen=True)
class GlobalBatch:
    """This process's micro-batches of a step, and the counts of the whole step."""

    micro_batches: list[Batch]
    num_targets: int
    """Targets over all processes: what the summed loss is divided by."""
    num_routed_tokens: int
    """Input tokens over all processes that count in routing."""
    domain_tokens: list[int]
    """The same of each domain."""
    state: dict[str, Any]
    """Where this process's data stands behind this step."""


class Feed:
    """Gives one batch after the other; a context manager."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        data: PreparedData,
        mixture: Mixture,
        progress: Progress,
        state: dict[str, Any],
    ) -> None:
        """Opens the data where a run stands.

        Args:
            config: The run's configuration.
            runtime: This process among its peers.
            data: Shards, or of streams their tokenizer and how they are split.
            mixture: Which source each row comes from, in the order of their names.
            progress: How many steps were consumed so far, and which are left out.
            state: The data's state in the checkpoint; empty at the beginning.
        """
        self._runtime, self._open = runtime, ExitStack()
        self._encoder: Encoder | None = None
        self._sources: list[Source] = []
        trainer = config.trainer
        plan = BatchPlan(
            seed=config.seed,
            global_batch_size=trainer.global_batch_size,
            micro_batch_size=trainer.micro_batch_size,
            sequence_length=config.data.sequence_length,
            pad_id=data.tokenizer.pad_id,
            domains=data.domains,
            mask_documents=config.data.mask_documents,
            route_prompts=config.data.route_prompts,
            packing=config.data.packing,
            epochs=config.data.epochs,
            rank=runtime.rank,
            world_size=runtime.world_size,
        )
        loader: Loader
        if config.data.streaming:
            loader = StreamLoader(self._streams(config, data, plan, state), sorted(data.train), mixture, plan)
        else:
            names = sorted(data.train)
            loader = ShardLoader([data.train[name] for name in names], names, mixture, plan)
        ends = loader.num_steps
        self.total_steps = trainer.max_steps if ends is None else min(trainer.max_steps, ends)
        """Steps of the run: as configured, or fewer where the data is known to end before."""
        left_out = 0 if ends is None else sum(data_step < ends for data_step in progress.skipped_data_steps)
        self.last_step = self.total_steps if ends is None else min(trainer.max_steps, ends - left_out)
        """The step that ends the run: earlier than planned where batches that are left out are missed at the end. The
        schedule does not follow, for it would change the rate of steps already made."""
        self._prefetcher = self._open.enter_context(Prefetcher(loader, progress.data_step))

    def _streams(
        self, config: RunConfig, data: PreparedData, plan: BatchPlan, state: dict[str, Any]
    ) -> list[SourceStreams]:
        workers = 1 if config.data.workers is None else config.data.workers
        encoder = Encoder(data.tokenizer, data.tokenizer_directory, workers)
        self._open.callback(encoder.close)
        self._encoder = encoder
        self._sources = open_sources(config.data, without=open_validation(config.data))
        return [
            SourceStreams(
                source, data.splits[source.name], encoder, plan, config.data.num_streams, state.get(source.name)
            )
            for source in self._sources
        ]

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    @property
    def waited(self) -> float:
        """Seconds that this process has waited for batches so far."""
        return self._prefetcher.waited

    @property
    def skipped(self) -> dict[str, int]:
        """Rows of streams that were left out since this process began, by kind."""
        total: Counter[str] = Counter()
        for source in self._sources:
            total.update(dict(source.bad.skipped))  # at once, since another thread reads on
        return dict(sorted(total.items()))

    def next(self) -> GlobalBatch | None:
        """The next batch; null, on every process at once, where the data has ended.

        Raises:
            InputError, RunError: The data of any process can not be read further; the same on every process.
        """
        step = self._runtime.together(self._next_here)
        num_domains = len(step.domain_tokens)
        # Alone there is nobody to ask: the device need not be waited for.
        device = self._runtime.device if self._runtime.world_size > 1 else torch.device("cpu")
        counts = torch.tensor(
            [step.num_targets, *step.domain_tokens.tolist(), *step.live_sources.tolist()], device=device
        )
        self._runtime.sum([counts])
        num_targets, *rest = counts.tolist()
        if 0 in rest[num_domains:]:
            return None
        domain_tokens = rest[:num_domains]
        # A step without targets, of the prompts of conversations say, is divided by one instead of none.
        return GlobalBatch(
            step.micro_batches, max(1, num_targets), max(1, sum(domain_tokens)), domain_tokens, step.state
        )

    def _next_here(self) -> StepBatch:
        if self._encoder is not None:
            self._encoder.check()
        return self._prefetcher.next()

    def whole_state(self, own: dict[str, Any]) -> dict[str, Any]:
        """The state of all processes' data from each one's own; every process must call it."""
        return merge_states([json.loads(text) for text in self._runtime.gather(json.dumps(own))]) if own else {}
