"""Configuration of the commands that have no run of their own."""

import dataclasses
import enum
import re

from moe_lm.data.config import DataConfig, DataSource, TokenizerConfig
from moe_lm.errors import InputError
from moe_lm.training.config import Device


class ExportType(enum.Enum):
    """Type of the weights of an export."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclasses.dataclass
class PrepareConfig:
    """`moe-lm prepare`."""

    output: str | None = None
    """Directory to write the tokenizer and the token shards into; `pretrain` takes it by data=prepared
    data.paths=[…]."""
    part: str = "1/1"
    """`i/n` makes the i-th of n slices of the work, so that n machines share it. The last one to end joins all, if they
    write into one directory; otherwise copy the directories into one and run `prepare` there without `part`."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)

    def __post_init__(self) -> None:
        _require_given("output", self.output)
        index, total = self.slice
        if not 1 <= index <= total:
            raise InputError(f"part={self.part}: must be i/n with i from 1 to n, such as 2/8.")
        if self.data.source is DataSource.prepared:
            raise InputError("data.source=prepared: is prepared already; give the text that it shall be made of.")
        if self.data.streaming:
            raise InputError("data.streaming=true: a stream is not prepared; leave it out, or give it to `pretrain`.")

    @property
    def slice(self) -> tuple[int, int]:
        """Index, from 1, and number of the parts."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.part)
        return (int(match[1]), int(match[2])) if match else (0, 0)


@dataclasses.dataclass
class ExportConfig:
    """`moe-lm export`."""

    checkpoint: str | None = None
    """Run directory (its newest checkpoint) or one checkpoint directory."""
    output: str | None = None
    """Directory to write; null means `hf` in the run's directory. An earlier export there is replaced, nothing else
    is."""
    dtype: ExportType = ExportType.fp32
    """Type of the weights on disk: `fp32` is exactly what was trained, `bf16` half as large."""

    def __post_init__(self) -> None:
        _require_given("checkpoint", self.checkpoint)
        if self.output == "":
            raise InputError("output='': give a directory, or null for `hf` in the run's directory.")


@dataclasses.dataclass
class VerifyConfig:
    """`moe-lm verify`."""

    checkpoint: str | None = None
    """Run directory, or its `checkpoints` (all of them), or one checkpoint directory."""

    def __post_init__(self) -> None:
        _require_given("checkpoint", self.checkpoint)


@dataclasses.dataclass
class GenerateConfig:
    """`moe-lm generate`."""

    checkpoint: str | None = None
    """Run directory (its newest checkpoint), one checkpoint directory, or an exported Hugging Face directory."""
    prompt: str = ""
    """Text to continue."""
    max_new_tokens: int = 200
    """Most tokens to make; the text may end before."""
    temperature: float = 0.8
    """0 takes the most probable token every time; 1 samples from the model's own distribution."""
    top_k: int | None = 50
    """Sample among this many most probable tokens; null means all."""
    seed: int = 0
    """Seed of the sampling."""
    device: Device = Device.auto
    """`cpu`, `cuda`, or `auto`."""

    def __post_init__(self) -> None:
        _require_given("checkpoint", self.checkpoint)
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens}: must be at least 1.")
        if self.temperature < 0:
            raise InputError(f"temperature={self.temperature}: must not be negative.")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k={self.top_k}: must be at least 1, or null for all tokens.")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed={self.seed}: must not be negative, and must be below 2**63.")


def _require_given(name: str, value: str | None) -> None:
    if not value:
        raise InputError(f"{name}: is required; give {name}=DIRECTORY.")
