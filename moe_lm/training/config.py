"""What a training run is: optimizer, schedule, trainer, tracker, and the whole of them with model, data and
checkpoint.
"""

import dataclasses
import enum
import re

from moe_lm.checkpoint.config import CheckpointConfig
from moe_lm.data.config import DataConfig, TokenizerConfig
from moe_lm.errors import InputError
from moe_lm.model.config import ModelConfig, Recompute
from moe_lm.parallel.config import ParallelConfig

WEEK = 7 * 24 * 3600
"""Seconds; the longest that a limit of time can be."""


class OptimizerName(enum.Enum):
    """Which update rule matrices get; everything else always gets AdamW."""

    adamw = "adamw"
    muon = "muon"


class ScheduleName(enum.Enum):
    """Shape of the learning rate after warm-up."""

    cosine = "cosine"
    wsd = "wsd"
    constant = "constant"


class Precision(enum.Enum):
    """Type of the compute copy of the weights; master weights, gradients and moments are fp32 always."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


class Device(enum.Enum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class TrackerName(enum.Enum):
    """Where metrics go besides metrics.jsonl."""

    none = "none"
    wandb = "wandb"


class TrackerMode(enum.Enum):
    """Whether the tracker talks to its server."""

    online = "online"
    offline = "offline"


class ResumePolicy(enum.Enum):
    """What to do about a run directory that exists already."""

    auto = "auto"
    never = "never"


class SpikePolicy(enum.Enum):
    """What to do about a step whose loss is far above those before it."""

    warn = "warn"
    skip = "skip"
    rewind = "rewind"


@dataclasses.dataclass
class OptimizerConfig:
    """The update rule."""

    name: OptimizerName = OptimizerName.adamw
    """`adamw`, or `muon`: orthogonalised momentum for matrices (each expert by itself), AdamW for embedding, head,
    gate, norms. optimizer=muon sets a learning rate for it as well, this alone does not."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled decay, in units of the learning rate; norms are never decayed."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    eps: float = 1e-8
    """AdamW's floor under the square root of the second moment."""
    muon_momentum: float = 0.95
    """Muon's (Nesterov) momentum."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            _require(self, "optimizer", name, getattr(self, name) > 0, "must be greater than 0")
        for name in ("weight_decay", "max_grad_norm"):
            _require(self, "optimizer", name, getattr(self, name) >= 0, "must not be negative")
        for name in ("beta1", "beta2", "muon_momentum"):
            _require(self, "optimizer", name, 0 <= getattr(self, name) < 1, "must lie in [0, 1)")


@dataclasses.dataclass
class ScheduleConfig:
    """The learning rate over the run, as a factor of optimizer.learning_rate."""

    name: ScheduleName = ScheduleName.cosine
    """`cosine` falls from the end of warm-up; `wsd` (warm-up, stable, decay) holds, then falls linearly; `constant`
    holds. schedule=wsd sets a decay for it as well, this alone does not."""
    warmup_steps: int = 100
    """Steps of linear warm-up: step n has n / warmup_steps of the rate. A shorter run is all warm-up."""
    decay_fraction: float = 0.2
    """Share of trainer.max_steps that the decay of `wsd` takes, at the end."""
    final_factor: float = 0.1
    """Factor of the learning rate that `cosine` and `wsd` decay towards; one more step would have it."""

    def __post_init__(self) -> None:
        _require(self, "schedule", "warmup_steps", self.warmup_steps >= 0, "must not be negative")
        _require(self, "schedule", "decay_fraction", 0 <= self.decay_fraction <= 1, "must lie in [0, 1]")
        _require(self, "schedule", "final_factor", 0 <= self.final_factor <= 1, "must lie in [0, 1]")


@dataclasses.dataclass
class TrainerConfig:
    """The run's length, batch, precision and rhythm."""

    max_steps: int = 1000
    """Optimizer steps of the whole run."""
    global_batch_size: int = 16
    """Sequences per optimizer step, over all processes."""
    micro_batch_size: int = 16
    """Sequences that one process runs at once; smaller ones accumulate, with the same gradient and less memory."""
    precision: Precision = Precision.auto
    """`bf16`, `fp32`, or `auto`: bf16 where the hardware multiplies it natively. Master weights are fp32 in every
    case."""
    device: Device = Device.auto
    """`cpu`, `cuda`, or `auto`: CUDA where there is one."""
    activation_checkpointing: Recompute = Recompute.none
    """What the backward pass computes again, to save memory: `none`; `selective`, all but products with weights, at
    little cost; or `full`, everything, a third more arithmetic."""
    log_interval: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_interval: int = 100
    """Steps between validations; 0 validates only at the end."""
    eval_sequences: int = 64
    """Sequences of an interim validation, spread evenly over the validation set; the final one uses all of it."""
    step_timeout: int = 1800
    """If no step, validation batch or save ends for this many seconds, the process prints its threads' stacks and ends
    with exit code 1, so that a launcher restarts it; 0 disables this."""
    stop_deadline: int = 25
    """Most seconds from SIGTERM, SIGINT or SIGHUP to the end of the process; then it ends without a checkpoint of the
    current step. torchrun kills after 30; give more if steps or saves take longer and the launcher waits."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "global_batch_size", "micro_batch_size", "log_interval", "eval_sequences"):
            _require(self, "trainer", name, getattr(self, name) >= 1, "must be at least 1")
        _require(self, "trainer", "eval_interval", self.eval_interval >= 0, "must not be negative")
        for name, least in (("step_timeout", 0), ("stop_deadline", 1)):
            limit = f"must be a number of seconds from {least} to {WEEK}, a week"
            _require(self, "trainer", name, least <= getattr(self, name) <= WEEK, limit)


@dataclasses.dataclass
class GuardsConfig:
    """What protects the weights from one bad step. A loss or gradient that is not finite is never learned from."""

    max_skipped: int = 10
    """Updates skipped in a row, for whatever reason, that end the run with a diagnosis."""
    spike_policy: SpikePolicy = SpikePolicy.warn
    """A loss far above those before it: `warn` says so and learns from it; `skip` does not learn from it; `rewind` goes
    back to a checkpoint from before it and leaves out the batches around it."""
    spike_threshold: float = 10.0
    """A spike is this many robust standard deviations (1.4826 times the median absolute deviation, at least 1 % of the
    median) above the median of the window."""
    spike_window: int = 128
    """Previous losses that a loss is compared with; fewer at first, and none before 32."""
    rewind_margin: int = 8
    """Batches left out before the one that spiked, and after it."""
    max_rewinds: int = 3
    """Rewinds to the same checkpoint before the run ends."""

    def __post_init__(self) -> None:
        for name in ("max_skipped", "max_rewinds"):
            _require(self, "guards", name, getattr(self, name) >= 1, "must be at least 1")
        _require(self, "guards", "spike_threshold", self.spike_threshold > 0, "must be greater than 0")
        _require(self, "guards", "spike_window", 32 <= self.spike_window <= 10_000, "must lie between 32 and 10000")
        _require(self, "guards", "rewind_margin", self.rewind_margin >= 0, "must not be negative")


@dataclasses.dataclass
class ResumeConfig:
    """What becomes of a run directory that has a run in it."""

    policy: ResumePolicy = ResumePolicy.auto
    """`auto` resumes from the newest good checkpoint; `never` refuses. `resume=auto` and `resume=never` are
    shorthands."""
    allow_change: list[str] = dataclasses.field(default_factory=list)
    """Options, or sections of them, that may differ from those the run was started with, such as
    [trainer.max_steps,schedule]."""


@dataclasses.dataclass
class TrackerConfig:
    """An experiment tracker besides metrics.jsonl, which is always written."""

    name: TrackerName = TrackerName.none
    """`none` or `wandb`."""
    project: str = "moe-lm"
    """Project that runs are filed under."""
    mode: TrackerMode = TrackerMode.online
    """`online`, or `offline`: files under the run directory, to be uploaded later by `wandb sync`."""


@dataclasses.dataclass
class FinishConfig:
    """What happens after the last step."""

    export: bool = True
    """Write the Hugging Face directory `hf/` into the run directory."""
    sample_prompt: str | None = None
    """Continue this text with the trained model and print it; null prints no sample."""
    sample_tokens: int = 120
    """Most tokens of that sample; the model's context limits it too."""
    compare_compressors: bool = False
    """Print the bits per byte of `gzip -9` and `xz -9` on the validation bytes beside the model's; left out above
    100 MB, where they would take long."""

    def __post_init__(self) -> None:
        _require(self, "finish", "sample_tokens", self.sample_tokens >= 1, "must be at least 1")


@dataclasses.dataclass
class RunConfig:
    """Everything a pretraining run depends on."""

    run_name: str = "run"
    """Name of the run and of its directory."""
    output_dir: str = "runs"
    """Directory that holds the runs' directories."""
    seed: int = 1
    """Seed of initial weights and data order."""
    resume: ResumeConfig = dataclasses.field(default_factory=ResumeConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = dataclasses.field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    guards: GuardsConfig = dataclasses.field(default_factory=GuardsConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    tracker: TrackerConfig = dataclasses.field(default_factory=TrackerConfig)
    finish: FinishConfig = dataclasses.field(default_factory=FinishConfig)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", self.run_name):
            raise InputError(
                f"run_name={self.run_name!r}: use at most 200 letters, digits, '.', '_' and '-', beginning with a "
                "letter or digit; directories belong into output_dir."
            )
        if self.seed < 0:
            raise InputError(f"seed={self.seed}: must not be negative.")
        if self.tokenizer.path is None and self.tokenizer.vocab_size > self.model.vocab_size:
            raise InputError(
                f"model.vocab_size={self.model.vocab_size}: must be at least tokenizer.vocab_size="
                f"{self.tokenizer.vocab_size}."
            )
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise InputError(
                f"data.sequence_length={self.data.sequence_length}: must be at most "
                f"model.max_position_embeddings={self.model.max_position_embeddings}."
            )


def _require(config: object, section: str, name: str, holds: bool, remedy: str) -> None:
    if not holds:
        raise InputError(f"{section}.{name}={getattr(config, name)}: {remedy}.")
