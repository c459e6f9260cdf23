"""Configuration of fine-tuning: what of a model is trained, and how."""

import dataclasses
import enum

from moe_lm.errors import InputError
from moe_lm.training.config import RunConfig


class Method(enum.Enum):
    """What training changes."""

    full = "full"
    lora = "lora"


class Part(enum.Enum):
    """A kind of parameters; the member's name is what the user types."""

    embedding = "embedding"
    attention = "attention"
    experts = "experts"
    router = "router"
    norms = "norms"
    head = "head"


LORA_PARTS = (Part.embedding, Part.attention, Part.experts, Part.router, Part.head)
"""Those that can have adapters."""

LORA_DEFAULT = (Part.attention, Part.experts, Part.router)
"""Those that have them where nothing else is asked for."""

DEFAULT_RANK, DEFAULT_ALPHA = 8, 16.0


@dataclasses.dataclass
class FinetuneConfig:
    """What is trained of the base model; everything else stays as it is."""

    method: Method = Method.full
    """`full` changes the weights themselves; `lora` adds a low-rank matrix to each and changes that alone (LoRA, Hu et
    al. 2021). `finetune=full` and `finetune=lora` are shorthands."""
    parts: list[str] = dataclasses.field(default_factory=list)
    """Which parts: embedding, attention, experts (of a dense model its feed-forward blocks), router, norms, head. An
    empty list means all of them; for LoRA, which has no adapters of norms, it means attention, experts and router.
    Leaving `router` out freezes it."""
    experts: list[str] = dataclasses.field(default_factory=list)
    """Numbers of the experts to train, in every layer, such as [0,3]; an empty list means all."""
    rank: int | None = None
    """Rank of LoRA's matrices, at most the model's hidden_size; null means 8."""
    alpha: float | None = None
    """LoRA's matrices are scaled by alpha / rank; null means 16."""

    def __post_init__(self) -> None:
        if self.method is Method.lora:
            self.rank = DEFAULT_RANK if self.rank is None else self.rank
            self.alpha = DEFAULT_ALPHA if self.alpha is None else self.alpha
        names = [part.name for part in Part]
        for name in self.parts:
            if name not in names:
                raise InputError(f"finetune.parts=[{name}]: there is no such part; choose from {', '.join(names)}.")
            if self.method is Method.lora and Part[name] not in LORA_PARTS:
                allowed = ", ".join(part.name for part in LORA_PARTS)
                raise InputError(f"finetune.parts=[{name}]: LoRA adapts {allowed}; choose from them.")
        if twice := [name for name in self.parts if self.parts.count(name) > 1]:
            raise InputError(f"finetune.parts=[{','.join(self.parts)}]: {twice[0]} stands there twice.")
        if self.experts and Part.experts not in self.chosen_parts:
            raise InputError(f"finetune.experts=[{','.join(self.experts)}]: finetune.parts leaves the experts out.")
        for text in self.experts:
            if not text.isdecimal():
                raise InputError(f"finetune.experts=[{text}]: must be numbers of experts, from 0.")
        numbers = [int(text) for text in self.experts]
        if twice := [str(number) for number in numbers if numbers.count(number) > 1]:
            raise InputError(f"finetune.experts=[{','.join(self.experts)}]: expert {twice[0]} stands there twice.")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"finetune.rank={self.rank}: must be at least 1.")
        if self.alpha is not None and self.alpha <= 0:
            raise InputError(f"finetune.alpha={self.alpha}: must be greater than 0.")

    @property
    def chosen_parts(self) -> set[Part]:
        """The parts that are trained, as far as the model has them."""
        every = LORA_DEFAULT if self.method is Method.lora else tuple(Part)
        return {Part[name] for name in self.parts} or set(every)

    @property
    def scale(self) -> float:
        """Factor of LoRA's product of matrices."""
        assert self.alpha is not None and self.rank is not None, "of LoRA alone"
        return self.alpha / self.rank


@dataclasses.dataclass
class FinetuneRunConfig(RunConfig):
    """Everything a fine-tuning run depends on. The model's shape is the base's, and can not be given."""

    base: str | None = None
    """Model to begin from: a run directory (its newest checkpoint), one checkpoint, or a directory in Hugging Face's or
    Mistral's own layout. The model's shape and the tokenizer are its own; what training alone knows of the model, such
    as router_aux_loss_coef, may be given anew."""
    finetune: FinetuneConfig = dataclasses.field(default_factory=FinetuneConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.base:
            raise InputError("base: is required; give base=DIRECTORY, a run, a checkpoint or an export.")
        for name in ("rank", "alpha") if self.finetune.method is Method.full else ():
            if (value := getattr(self.finetune, name)) is not None:
                raise InputError(
                    f"finetune.{name}={value}: finetune.method=full trains the weights themselves; give finetune=lora, "
                    "or leave it out."
                )
        has_router = self.finetune.chosen_parts & {Part.router}
        if self.model.router_drift_coef > 0 and not has_router:
            raise InputError(
                f"model.router_drift_coef={self.model.router_drift_coef}: finetune.parts leaves the router out, which "
                "then stays as it is; leave it out as well."
            )
