"""Configuration of the commands that have no run of their own."""

import dataclasses
import enum
import re

from moe_lm.data.config import DataConfig, DataSource, TokenizerConfig
from moe_lm.errors import InputError
from moe_lm.training.config import Device, Precision


class ExportType(enum.Enum):
    """Type of the weights of an export."""

    fp32 = "fp32"
    bf16 = "bf16"


SMALLEST_SHARD = 10_000
"""Bytes of the smallest file of weights that can be asked for: what is below it has lost its unit."""

_OF_WHOLE_MODELS = ("dtype", "max_shard_size", "license", "whole_model")
"""Options of an export that adapters alone have no use for."""


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
            raise InputError("data.source=prepared: is prepared already; give the text to prepare.")
        if self.data.streaming:
            raise InputError("data.streaming=true: a stream is not prepared; leave it out, or give it to `pretrain`.")

    @property
    def slice(self) -> tuple[int, int]:
        """Index, from 1, and number of the parts."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.part)
        return (int(match[1]), int(match[2])) if match else (0, 0)


@dataclasses.dataclass
class ImportConfig:
    """`moe-lm import`."""

    checkpoint: str | None = None
    """Hugging Face directory of a Mixtral, Mistral or Llama model, or a directory of Mistral's own files (params.json
    and consolidated.safetensors). Only safetensors are read."""
    output: str | None = None
    """Directory to write, which must be empty or not there yet; other commands take it like a run's."""

    def __post_init__(self) -> None:
        _require_given("checkpoint", self.checkpoint)
        _require_given("output", self.output)


@dataclasses.dataclass
class UpcycleConfig:
    """`moe-lm upcycle`."""

    checkpoint: str | None = None
    """The base: a dense model (native, or a Hugging Face directory of Mistral or Llama), or a mixture that gets more
    experts."""
    output: str | None = None
    """Directory to write, which must be empty or not there yet; other commands take it like a run's."""
    num_experts: int = 8
    """Experts in each layer; of a mixture a multiple of those it has."""
    num_experts_per_tok: int | None = None
    """Experts that each token is sent to; null means 2 for a dense model, and for a mixture its own number times
    the copies, which keeps its function."""
    noise: float = 0.0
    """Normal noise added to each copy of an expert, in standard deviations of the matrix it is added to; 0.01 tells
    copies apart, 0 keeps the function of the base."""
    reinitialize: float = 0.0
    """Share of each copy's intermediate dimensions that is drawn anew (drop-upcycling; its authors found 0.5 best over
    long training); 0 keeps the function of the base."""
    seed: int = 0
    """Seed of the router, the noise and what is drawn anew."""

    def __post_init__(self) -> None:
        _require_given("checkpoint", self.checkpoint)
        _require_given("output", self.output)
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed={self.seed}: must not be negative, and must be below 2**63.")


@dataclasses.dataclass
class ExportConfig:
    """`moe-lm export`."""

    checkpoint: str | None = None
    """Run directory (its newest checkpoint), one checkpoint directory, or another model that `import` takes."""
    output: str | None = None
    """Directory to write; null means `hf` in the run's directory, of adapters `adapter`. An earlier export there is
    replaced, nothing else is."""
    base: str | None = None
    """Where the base of a LoRA run is now, if it was moved: a copy of it, or its fp32 export."""
    adapter: bool = False
    """Write the adapters of a LoRA run alone, as peft's files, instead of the model that they are merged into."""
    dtype: ExportType = ExportType.fp32
    """Type of the weights on disk: `fp32` is exactly what was trained, `bf16` half as large."""
    max_shard_size: str = "4GB"
    """Largest file of weights, such as 500MB or 4GB (powers of ten; of two as 4GiB); larger models get several files
    and an index, and a tensor that is larger by itself has its own."""
    license: str = "unknown"
    """Licence that the model card names: one word, taken as it is, such as the Hub's apache-2.0; `unknown` says that
    none was stated."""
    whole_model: bool | None = None
    """Whether the gate runs the whole model besides each layer by itself; null means where twice its size in fp32 is at
    most half of the memory that is free."""

    def __post_init__(self) -> None:
        _require_given("checkpoint", self.checkpoint)
        if self.output == "":
            raise InputError("output='': give a directory, or null for `hf` in the run's directory.")
        if self.base == "":
            raise InputError("base='': give the directory where the base is now, or null if it was not moved.")
        if self.max_shard_bytes < SMALLEST_SHARD:
            raise InputError(
                f"max_shard_size={self.max_shard_size}: must be a size such as 500MB, 4GB or 4GiB, of 10KB at least."
            )
        if not re.fullmatch(r"[\w.+-]+", self.license):
            raise InputError(f"license={self.license!r}: must be one name, such as apache-2.0, or unknown.")
        for field in dataclasses.fields(self) if self.adapter else ():
            if field.name in _OF_WHOLE_MODELS and getattr(self, field.name) != field.default:
                raise InputError(
                    f"adapter=true: writes the adapters alone, in fp32 and in one file, so {field.name} has no effect; "
                    "leave one of the two out."
                )

    @property
    def max_shard_bytes(self) -> int:
        """The size in bytes; 0 where it can not be understood."""
        size = self.max_shard_size.strip()
        match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,3})?)(?:([KMGT])(i?))?B?", size, re.IGNORECASE)
        if match is None:
            return 0
        return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index((match[2] or " ").upper()))


@dataclasses.dataclass
class VerifyConfig:
    """`moe-lm verify`."""

    checkpoint: str | None = None
    """Run directory, or its `checkpoints` (all of them), or one checkpoint directory, or an export or another Hugging
    Face directory."""
    against: str | None = None
    """What an export was made from, a run directory or one checkpoint directory: each of its tensors is compared with
    that. null compares an export with its own receipt."""
    whole_model: bool | None = None
    """Whether to run the whole model besides each layer by itself; null means where twice its size in fp32 is at most
    half of the memory that is free."""
    output: str | None = None
    """File to write the receipt into, as JSON; null only prints."""

    def __post_init__(self) -> None:
        _require_given("checkpoint", self.checkpoint)
        for name in ("against", "output"):
            if getattr(self, name) == "":
                raise InputError(f"{name}='': give a path, or null.")


@dataclasses.dataclass
class GenerateConfig:
    """`moe-lm generate`."""

    checkpoint: str | None = None
    """Run directory (its newest checkpoint), one checkpoint, or a directory in Hugging Face's or Mistral's layout."""
    prompt: str = ""
    """Text to continue."""
    prompts: str | None = None
    """File of texts to continue, one JSON string per line; the output is JSON lines {"prompt": …,
    "completion": …}."""
    batch_size: int = 16
    """How many prompts are continued at once."""
    chat: bool = False
    """Whether the prompt is a user's message, rendered by the tokenizer's chat template (moe-lm's own where a tokenizer
    of moe-lm's has none); only the answer is printed."""
    max_new_tokens: int = 200
    """Most tokens to make; the text may end before."""
    temperature: float = 0.8
    """0 takes the most probable token every time; 1 samples from the model's own distribution."""
    top_k: int | None = 50
    """Sample among this many most probable tokens; null means all."""
    seed: int = 0
    """Seed of the sampling."""
    precision: Precision = Precision.fp32
    """Compute type: `fp32`, `bf16` (faster where hardware supports it), or `auto`: bf16 where hardware supports it."""
    device: Device = Device.auto
    """`cpu`, `cuda`, or `auto`."""

    def __post_init__(self) -> None:
        _require_given("checkpoint", self.checkpoint)
        if self.prompts == "":
            raise InputError("prompts='': give a file, or null.")
        if self.prompts is not None and self.prompt:
            raise InputError(f"prompt={self.prompt!r}: leave it out, or prompts={self.prompts}.")
        if self.chat and self.prompts is None and not self.prompt.strip():
            raise InputError("prompt='': with chat=true give the user's message.")
        if self.batch_size < 1:
            raise InputError(f"batch_size={self.batch_size}: must be at least 1.")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens}: must be at least 1.")
        if self.temperature < 0:
            raise InputError(f"temperature={self.temperature}: must not be negative.")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k={self.top_k}: must be at least 1, or null for all tokens.")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed={self.seed}: must not be negative, and must be below 2**63.")


@dataclasses.dataclass
class PlanPlacementConfig:
    """`moe-lm plan placement`."""

    trace: str | None = None
    """Run directory, or its metrics.jsonl, whose expert counts say how busy each expert is."""
    last: int | None = 100
    """How many logged steps to use, the latest; null means all."""
    ep: int | None = None
    """Ranks of the expert-parallel group, at most as many as a layer has experts."""
    ranks_per_node: int | None = None
    """How many of them are on one node; null means all."""
    max_experts_per_rank: int | None = None
    """The most experts of a layer that fit into one rank's memory; null means any number."""
    seconds_per_row: float = 2.6e-6
    """Seconds to compute one routed row in one expert, forward and backward; the default is that of Mixtral 8x7B on an
    H100. Only ratios of costs matter, except for the predicted seconds."""
    bytes_per_row: float = 32768.0
    """Bytes sent per routed row, for dispatch and combine, forward and backward: 8 · hidden_size in bf16."""
    bandwidth_in_node: float = 450e9
    """Bytes per second that one rank exchanges with its own node; the default is that of NVLink 4."""
    bandwidth_between_nodes: float = 400e9
    """Bytes per second that one node exchanges with the others, for all its ranks together; the default is that of
    eight links of 400 Gbit/s."""
    output: str | None = None
    """File to write the placement into; `pretrain` takes it by parallel.placement=file parallel.placement_file=FILE. An
    earlier file there is replaced. null only prints."""

    def __post_init__(self) -> None:
        if not self.trace:
            raise InputError("trace: is required; give trace=RUN, a run directory.")
        if self.ep is None:
            raise InputError("ep: is required; give ep=N, the number of ranks that share the experts.")
        for name in ("last", "ep", "ranks_per_node", "max_experts_per_rank"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name}={value}: must be at least 1.")
        for name in ("seconds_per_row", "bandwidth_in_node", "bandwidth_between_nodes"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name}={getattr(self, name)}: must be above 0.")
        if self.bytes_per_row < 0:
            raise InputError(f"bytes_per_row={self.bytes_per_row}: must not be negative.")
        if self.output == "":
            raise InputError("output='': give a file, or null to print only.")


def _require_given(name: str, value: str | None) -> None:
    if not value:
        raise InputError(f"{name}: is required; give {name}=DIRECTORY.")
