"""Upcycling: a mixture of experts made of a trained model (sparse upcycling, Komatsuzaki et al. 2023).

*From a dense model*, each expert begins as the layer's feed-forward block. A token's weights over its experts sum to
one, so equal experts give what the one block gave, whatever the router says: the mixture computes the very function of
the dense model. The router is random, so tokens are spread, experts see different ones and grow apart.

*From a mixture*, each expert becomes m copies. The router's rows are repeated, so the m copies of an expert have one
logit. With m·K experts per token the choice is then that of the base: all m copies of each of its K experts (where no
two of the base's own logits tie), each with 1/m of the weight. So the function is that of the base again. With any
other number it is not: of K experts per token, copies of the best would push the second-best out.

Copies can be told apart from the beginning, which changes the function:

- noise: to each matrix is added a normal one, whose standard deviation is a share of the matrix's own;
- re-initialisation (drop-upcycling, Nakamura et al. 2025, section 3): of each copy a random share of the intermediate
  dimensions is drawn anew, the same ones in gate, up and down, from a normal distribution with the mean and the
  standard deviation of what stood there, of each of the three by itself.

Letters: E experts, F intermediate, D hidden, m copies, K experts per token.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from moe_lm.errors import InputError
from moe_lm.model.config import ModelConfig, ModelFamily
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import generator_of, initial_value
from moe_lm.model.source import ModelSource

MOST_NOISE = 1000.0
"""Standard deviations. Beyond them nothing is left of the base, and far beyond them no type holds the sum."""

_OF_EXPERTS = re.compile(r"(model\.layers\.\d+\.mlp\.)(gate\.weight|experts\.gate_up_proj|experts\.down_proj)")


@dataclasses.dataclass(frozen=True)
class UpcyclePlan:
    """What is to be made."""

    num_experts: int
    num_experts_per_tok: int | None = None
    """Null means 2 of a dense model, and m·K of a mixture, which keeps its function."""
    noise: float = 0.0
    """Standard deviation of what is added to a matrix, as a share of the matrix's own."""
    reinitialize: float = 0.0
    """Share of each expert's intermediate dimensions that is drawn anew."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise InputError(f"noise={self.noise}: must not be negative.")
        if self.noise > MOST_NOISE:
            raise InputError(f"noise={self.noise}: must be at most {MOST_NOISE:.0f}; 0.01 tells copies apart.")
        if not 0 <= self.reinitialize <= 1:
            raise InputError(f"reinitialize={self.reinitialize}: must be a share from 0 to 1.")

    def drawn_anew(self, size: int) -> int:
        """How many of an expert's intermediate dimensions are drawn anew."""
        return int(size * self.reinitialize)


class UpcycledModel:
    """The mixture that a plan makes of a base, made one parameter at a time; a `ModelSource` itself."""

    def __init__(self, base: ModelSource, plan: UpcyclePlan):
        """Check that the plan can be carried out; nothing is read.

        Raises:
            InputError: It can not.
        """
        self.base, self.plan = base, plan
        self.config = _upcycled_config(base.config, plan)
        self.copies = plan.num_experts // (base.config.num_experts if base.config.is_mixture else 1)
        """m: copies of each of the base's experts, or of its dense block."""

    @property
    def path(self) -> Path:
        """Where the base lies."""
        return self.base.path

    @property
    def tokenizer_directory(self) -> Path | None:
        """The base's."""
        return self.base.tokenizer_directory

    @property
    def keeps_function(self) -> bool:
        """Whether the mixture computes what the base does."""
        changed = self.plan.noise > 0 or self.plan.reinitialize > 0
        return not changed and (not self.base.config.is_mixture or self._keeps_choice)

    @property
    def copies_never_part(self) -> bool:
        """Whether copies of an expert are equal, always chosen together, and so learn the same for ever."""
        return self.keeps_function and self.base.config.is_mixture and self.copies > 1

    @property
    def _keeps_choice(self) -> bool:
        return self.config.num_experts_per_tok == self.copies * self.base.config.num_experts_per_tok

    def names(self) -> list[str]:
        """Native names of all parameters, in the model's own order."""
        with torch.device("meta"):
            model = CausalLM(self.config)
        return [name for name, _ in model.named_parameters()]

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters by name, made one at a time."""
        return ((name, self.tensor(name)) for name in self.names())

    def tensor(self, name: str) -> Tensor:
        """A whole parameter, in the type of the base's."""
        match = _OF_EXPERTS.fullmatch(name)
        if match is None:
            return self.base.tensor(name)
        layer, kind = match[1], match[2]
        if kind == "gate.weight":
            return self._router(layer)
        one = self._base_experts(layer, kind)
        experts = one.repeat(self.copies, 1, 1)
        # What a mixture has learned stays as it is: only the copies that come to it are changed.
        for expert in range(self.base.config.num_experts if self.base.config.is_mixture else 0, len(experts)):
            self._change(experts[expert], layer, kind, expert)
        return experts

    def origin(self, name: str) -> str:
        """What a parameter is made of, in words."""
        match = _OF_EXPERTS.fullmatch(name)
        if match is None:
            return "copied"
        mixture = self.base.config.is_mixture
        if match[2] == "gate.weight":
            if not mixture:
                return f"random, N(0, {self.config.initializer_range}²)"
            return f"rows copied {self.copies} times" + ("" if self._keeps_choice else f", {self._said_noise}")
        of = "each expert" if mixture else "the dense block"
        said = [
            f"{self.copies} copies of {of}" + (", the first as it was" if mixture and not self.keeps_function else "")
        ]
        if self.plan.noise > 0:
            said.append(self._said_noise)
        if self.plan.reinitialize > 0:
            said.append(f"{self.plan.reinitialize:.3g} of their intermediate dimensions drawn anew")
        return ", ".join(said)

    @property
    def _said_noise(self) -> str:
        return f"noise of {self.plan.noise:.3g} standard deviations"

    def _router(self, layer: str) -> Tensor:
        name = f"{layer}gate.weight"
        if not self.base.config.is_mixture:
            like = self.base.tensor(f"{layer}gate_proj.weight")
            shape = [self.config.num_experts, self.config.hidden_size]
            return initial_value(self.config, self.plan.seed, name, shape, like.device, torch.float32).to(like.dtype)
        rows = self.base.tensor(name)
        repeated = rows.repeat(self.copies, 1)
        if not self._keeps_choice:  # equal logits would leave it to the order of the experts which copy is chosen
            _add_noise(repeated[len(rows) :], rows.float().std(correction=0), self.plan.noise, self._generator(name))
        return repeated

    def _base_experts(self, layer: str, kind: str) -> Tensor:
        """The base's experts, stacked; a dense block is a stack of one."""
        if self.base.config.is_mixture:
            return self.base.tensor(layer + kind)
        if kind == "experts.down_proj":
            return self.base.tensor(f"{layer}down_proj.weight")[None]
        gate_up = [self.base.tensor(f"{layer}{part}_proj.weight") for part in ("gate", "up")]
        return torch.cat(gate_up)[None]

    def _change(self, matrix: Tensor, layer: str, kind: str, expert: int) -> None:
        """Noise and re-initialisation of one copy, in place; `matrix` is gate and up [2F, D], or down [D, F]."""
        down = kind == "experts.down_proj"
        for index, part in enumerate((matrix,) if down else matrix.chunk(2)):
            generator = self._generator(f"{layer}{kind}/{expert}/{index}")
            if self.plan.noise > 0:
                _add_noise(part, part.float().std(correction=0), self.plan.noise, generator)
            chosen = self._drawn_anew(layer, expert)
            if len(chosen):
                values = part[:, chosen] if down else part[chosen]
                anew = torch.empty(values.shape).normal_(
                    values.float().mean().item(), values.float().std(correction=0).item(), generator=generator
                )
                if down:
                    part[:, chosen] = anew.to(part.dtype)
                else:
                    part[chosen] = anew.to(part.dtype)

    def _drawn_anew(self, layer: str, expert: int) -> Tensor:
        """The intermediate dimensions of an expert that are drawn anew, the same in its three matrices."""
        size = self.config.intermediate_size
        order = torch.randperm(size, generator=self._generator(f"{layer}dimensions/{expert}"))
        return order[: self.plan.drawn_anew(size)]

    def _generator(self, name: str) -> torch.Generator:
        return generator_of(self.plan.seed, f"upcycle/{name}", torch.device("cpu"))


def _add_noise(values: Tensor, deviation: Tensor, share: float, generator: torch.Generator) -> None:
    """Normal noise of `share` of a standard deviation, in place; summed in fp32."""
    noise = torch.empty(values.shape).normal_(0.0, share * deviation.item(), generator=generator)
    values.copy_(values.float() + noise)


def _upcycled_config(base: ModelConfig, plan: UpcyclePlan) -> ModelConfig:
    """The base's configuration with the plan's experts.

    Raises:
        InputError: The plan does not fit the base.
    """
    if not base.is_mixture:
        chosen = 2 if plan.num_experts_per_tok is None else plan.num_experts_per_tok
    else:
        experts, tried = base.num_experts, plan.num_experts
        if tried % experts or tried == experts:
            raise InputError(
                f"num_experts={tried}: the base has {experts} experts in a layer; give a multiple of that, "
                f"{2 * experts} or more."
            )
        kept = tried // experts * base.num_experts_per_tok
        chosen = kept if plan.num_experts_per_tok is None else plan.num_experts_per_tok
        if chosen != kept and plan.noise == 0:
            raise InputError(
                f"num_experts_per_tok={chosen}: copies of an expert would have equal router logits, so that chance "
                f"chooses between them; give noise=0.01, or num_experts_per_tok={kept}, which keeps the function."
            )
    for name, value in (("num_experts", plan.num_experts), ("num_experts_per_tok", chosen)):
        if value < 1:
            raise InputError(f"{name}={value}: must be at least 1.")
    if chosen > plan.num_experts and plan.num_experts_per_tok is None:
        raise InputError(
            f"num_experts={plan.num_experts}: a token is sent to {chosen} experts where num_experts_per_tok is not "
            f"given; give at least {chosen}, or num_experts_per_tok=1."
        )
    if chosen > plan.num_experts:
        raise InputError(f"num_experts_per_tok={chosen}: must be at most num_experts={plan.num_experts}.")
    size = base.intermediate_size
    if plan.reinitialize > 0 and not plan.drawn_anew(size):
        raise InputError(
            f"reinitialize={plan.reinitialize}: is less than one of the base's {size} intermediate dimensions, so none "
            f"would be drawn anew; give {min(1.0, 1.01 / size):.3g} or more, or 0."
        )
    return dataclasses.replace(
        base, family=ModelFamily.mixture, num_experts=plan.num_experts, num_experts_per_tok=chosen
    )
