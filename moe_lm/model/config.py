"""What a decoder is made of. Field names are Hugging Face's, except `num_experts` (see its note)."""

import dataclasses
import enum

from moe_lm.errors import InputError


class ModelFamily(enum.Enum):
    """The feed-forward block of every layer."""

    mixture = "mixture"
    dense = "dense"


class LoadBalancing(enum.Enum):
    """Which load-balancing loss training adds (formulas in `model/balancing.py`)."""

    per_layer = "per_layer"
    pooled = "pooled"
    none = "none"


class LoadSource(enum.Enum):
    """Whose load the load-balancing loss works against."""

    previous_step = "previous_step"
    micro_batch = "micro_batch"


class Recompute(enum.Enum):
    """What the backward pass computes again of each layer (`model/recompute.py`)."""

    none = "none"
    selective = "selective"
    """All but products with weights, and fused attention: norms, rotations, gathers, attention by written-out
    probabilities."""
    full = "full"
    """Everything but the choice of experts."""


@dataclasses.dataclass
class ModelConfig:
    """Shape of the decoder and of its routing."""

    family: ModelFamily = ModelFamily.mixture
    """`mixture`: routed experts (Mixtral). `dense`: one SwiGLU per layer (Mistral); the expert fields are then
    unused. model=dense sets a whole shape as well, this alone does not."""
    vocab_size: int = 32000
    """Rows of the embedding and of the output head; at least the tokenizer's vocabulary."""
    hidden_size: int = 4096
    """Width of the residual stream."""
    intermediate_size: int = 14336
    """Width of the SwiGLU inside one expert (or inside the one dense block)."""
    num_hidden_layers: int = 32
    """Number of decoder layers."""
    num_attention_heads: int = 32
    """Query heads."""
    num_key_value_heads: int = 8
    """Key/value heads; query heads share them in equal groups (grouped-query attention)."""
    head_dim: int | None = None
    """Width of one head; null means hidden_size / num_attention_heads. Must be even (rotary pairs)."""
    max_position_embeddings: int = 32768
    """Longest context promised to users of an export, in tokens; at least data.sequence_length."""
    rope_theta: float = 1000000.0
    """Base of the rotary frequencies."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square inside every RMSNorm."""
    sliding_window: int | None = None
    """Attention sees this many latest tokens (itself included); null means all."""
    tie_word_embeddings: bool = False
    """Share one matrix between the embedding and the output head."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; matrices that write to the residual stream get it / sqrt(2·layers)."""
    num_experts: int = 8
    """Experts per layer in the whole model (`num_local_experts` in an export; here local would mean: on this
    process)."""
    num_experts_per_tok: int = 2
    """Experts that each token is sent to (top-k)."""
    capacity_factor: float | None = None
    """Most rows that an expert takes from one process's micro-batch, as a multiple of an even share; assignments beyond
    that, those of least weight, are dropped. Shapes then do not depend on routing, but what is dropped depends on how a
    batch is split. null drops nothing."""
    load_balancing: LoadBalancing = LoadBalancing.per_layer
    """Load-balancing loss: `per_layer` (Switch, 1 at balance), `pooled` (transformers' Mixtral, top-k at balance),
    `none`."""
    load_balancing_source: LoadSource = LoadSource.previous_step
    """Load that the loss counteracts: `previous_step`, that of the previous global batch, so that gradients do not
    depend on how a batch is split; `micro_batch`, that of the current micro-batch over all processes, as in other
    trainers: independent of the number of processes, but not of micro-batches."""
    router_aux_loss_coef: float = 0.01
    """Weight of the load-balancing loss."""
    router_z_loss_coef: float = 0.001
    """Weight of the router z-loss, which keeps router logits small."""
    router_drift_coef: float = 0.0
    """Weight of the penalty on router drift, the divergence of its probabilities from those of the router that
    fine-tuning started with; 0 is no penalty. For fine-tuning only."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "num_experts",
            "num_experts_per_tok",
        ):
            _require(self, name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_drift_coef"):
            _require(self, name, getattr(self, name) >= 0, "must not be negative")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            _require(self, name, getattr(self, name) > 0, "must be greater than 0")
        factor, routes = self.capacity_factor, self.family is ModelFamily.mixture
        _require(self, "capacity_factor", factor is None or factor > 0, "must be greater than 0, or null")
        _require(self, "capacity_factor", factor is None or routes, "a dense model routes nothing; leave it out")
        window, below = self.sliding_window, "must be less than 2147483648"
        _require(self, "max_position_embeddings", self.max_position_embeddings < 2**31, below)
        _require(self, "sliding_window", window is None or window >= 1, "must be at least 1")
        _require(self, "sliding_window", window is None or window < 2**31, below)
        _require(
            self,
            "num_attention_heads",
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"must be a multiple of model.num_key_value_heads={self.num_key_value_heads}",
        )
        if self.head_dim is None:
            heads = f"model.num_attention_heads={self.num_attention_heads}"
            divides = self.hidden_size % self.num_attention_heads == 0
            _require(self, "hidden_size", divides, f"must be a multiple of {heads}, or set model.head_dim")
            is_even = self.width_of_head % 2 == 0
            _require(self, "hidden_size", is_even, f"by {heads} must be even, or set model.head_dim")
        else:
            _require(self, "head_dim", self.head_dim > 0 and self.head_dim % 2 == 0, "must be even and positive")
        _require(
            self,
            "num_experts_per_tok",
            self.family is ModelFamily.dense or self.num_experts_per_tok <= self.num_experts,
            f"must be at most model.num_experts={self.num_experts}",
        )

    @property
    def width_of_head(self) -> int:
        """H: `head_dim`, or hidden_size / num_attention_heads where it is null."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads

    @property
    def is_mixture(self) -> bool:
        """Whether the layers route tokens to experts."""
        return self.family is ModelFamily.mixture


def _require(config: ModelConfig, name: str, holds: bool, remedy: str) -> None:
    if not holds:
        raise InputError(f"model.{name}={getattr(config, name)}: {remedy}.")
