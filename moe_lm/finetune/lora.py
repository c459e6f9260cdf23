"""LoRA (Hu et al. 2021): y = W·x + (alpha / rank) · B·A·x, with W frozen, A random and B zero at the beginning.

Stacked experts get an A and a B each, applied to the rows that the dispatcher has grouped by expert. (peft 0.21 builds
W + B·A of the whole stack in every forward pass: for 8 experts of which a token takes 2, four times the products, and a
copy of all experts.) They are sliced like the experts themselves when processes share a model.

Letters: E experts, r rank, D hidden, F intermediate, R routed rows, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lm.finetune.config import Part
from moe_lm.kernels.combine import gather_rows, sum_rows
from moe_lm.kernels.grouped_linear import grouped_linear
from moe_lm.kernels.grouping import Grouping
from moe_lm.model.decoder import CausalLM, OutputHead
from moe_lm.model.linear import Linear
from moe_lm.model.moe import Experts
from moe_lm.model.router import Router

EMBEDDING = "embed_tokens."

A, B = "lora_A", "lora_B"
"""Names of an adapter's matrices, as peft has them: those of `q_proj.weight` are `q_proj.lora_A` and `q_proj.lora_B`,
those of stacked experts `experts.down_proj_lora_A` and `experts.down_proj_lora_B`."""


class _Adapted:
    """What a module with one parameter has of its adapter."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float


class LoraLinear(Linear, _Adapted):
    """A linear map with an adapter; `weight` [out, in], `lora_A` [r, in], `lora_B` [out, r]."""

    def forward(self, x: Tensor) -> Tensor:
        """X [..., in] to [..., out]."""
        return super().forward(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


class LoraRouter(Router, _Adapted):
    """A router with an adapter, in fp32 like the router itself; `lora_A` [r, D], `lora_B` [E, r]."""

    def logits(self, x_TD: Tensor) -> Tensor:
        """See `Router.logits`."""
        logits_TE = super().logits(x_TD)
        a_rD, b_Er = self.lora_A.to(logits_TE.dtype), self.lora_B.to(logits_TE.dtype)
        return logits_TE + F.linear(F.linear(x_TD.to(logits_TE.dtype), a_rD), b_Er) * self.scale


class LoraExperts(Experts):
    """Stacked experts with an adapter for each: A [E, r, in], B [E, out, r]."""

    gate_up_proj_lora_A: nn.Parameter
    gate_up_proj_lora_B: nn.Parameter
    down_proj_lora_A: nn.Parameter
    down_proj_lora_B: nn.Parameter
    scale: float

    def forward(self, x_TD: Tensor, grouping: Grouping) -> Tensor:
        """See `Experts.forward`."""
        token_P, weight_P, end_E = grouping

        def adapted(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
            low_rank = grouped_linear(grouped_linear(x, end_E, a), end_E, b)
            return grouped_linear(x, end_E, weight) + low_rank * self.scale

        x_PD = gather_rows(x_TD, token_P)
        h_P2F = adapted(x_PD, self.gate_up_proj, self.gate_up_proj_lora_A, self.gate_up_proj_lora_B)
        gate_PF, up_PF = h_P2F.chunk(2, dim=-1)
        activation_PF = F.silu(gate_PF) * up_PF * weight_P[:, None]
        y_PD = adapted(activation_PF, self.down_proj, self.down_proj_lora_A, self.down_proj_lora_B)
        return sum_rows(y_PD, token_P, len(x_TD))


class LoraEmbedding(nn.Embedding, _Adapted):
    """An embedding with an adapter: W + scale · (B·A)ᵀ; `weight` [V, D], `lora_A` [r, V], `lora_B` [D, r]."""

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [...] to [..., D]."""
        low_rank = F.linear(F.embedding(ids, self.lora_A.t()), self.lora_B)
        return F.embedding(ids, self.weight) + low_rank * self.scale


class LoraHead(OutputHead, _Adapted):
    """An output head with an adapter: `weight` [V, D], `lora_A` [r, D], `lora_B` [V, r]."""

    def factors(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See `OutputHead.factors`: with r columns more, which keeps what is too small to add to a bf16 weight."""
        low_rank = F.linear(hidden, self.lora_A) * self.scale
        return torch.cat((hidden, low_rank), dim=-1), torch.cat((self.weight, self.lora_B), dim=-1)


def part_of(name: str) -> Part:
    """The part that a parameter belongs to, by its native name or an adapter's; of a module, by its name and a dot."""
    for part, mark in (
        (Part.attention, ".self_attn."),
        (Part.router, ".mlp.gate."),
        (Part.experts, ".mlp."),
        (Part.embedding, "embed_tokens."),
        (Part.head, "lm_head."),
    ):
        if mark in name:
            return part
    assert "norm" in name, name
    return Part.norms


def is_adapter(name: str) -> bool:
    """Whether a parameter is one of an adapter's."""
    return name.endswith((A, B))


def adapter_names(name: str) -> tuple[str, str]:
    """The adapter's two parameters of a parameter."""
    stem = name.removesuffix("weight") if name.rpartition(".")[2] == "weight" else f"{name}_"
    return f"{stem}{A}", f"{stem}{B}"


def initial_adapter(name: str, shape: list[int], generator: torch.Generator) -> Tensor:
    """The beginning of an adapter, as in peft; fp32, on the generator's device.

    A is uniform within ±1/√in (Kaiming's with a = √5) and B zero; of an embedding A is zero and B N(0, 1).
    """
    value = torch.empty(*shape, device=generator.device)
    of_embedding = EMBEDDING in name
    if name.endswith(A if of_embedding else B):
        return value.zero_()
    if of_embedding:
        return value.normal_(generator=generator)
    bound = 1 / math.sqrt(shape[-1])
    return value.uniform_(-bound, bound, generator=generator)


def merged(name: str, weight: Tensor, read: Callable[[str], Tensor], scale: float) -> Tensor:
    """W + scale · B·A of one parameter, in fp32 whatever W's type: bf16 would round most of a small change away.

    Args:
        name: Of the parameter, native.
        weight: [out, in], or [E, out, in]; of an embedding [V, D].
        read: Gives a parameter of the adapter by its name.
        scale: alpha / rank.
    """
    a, b = (read(part).float() for part in adapter_names(name))
    product = torch.matmul(b, a)
    return weight.float() + scale * (product.t() if EMBEDDING in name else product)


_ADAPTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Embedding: LoraEmbedding,
    Linear: LoraLinear,
    Router: LoraRouter,
    Experts: LoraExperts,
    OutputHead: LoraHead,
}


def _become(module: nn.Module, kind: type[nn.Module], rank: int, scale: float) -> None:
    """Turn a module into its subclass that has adapters: its parameters stay where everybody finds them."""
    assert issubclass(kind, type(module))
    module.__class__ = kind
    module.scale = scale  # type: ignore[assignment]
    for name, weight in list(module.named_parameters(recurse=False)):
        *stack, outputs, inputs = weight.shape
        if kind is LoraEmbedding:  # of which ids are the inputs
            inputs, outputs = outputs, inputs
        for matrix, shape in zip(adapter_names(name), ((rank, inputs), (outputs, rank)), strict=True):
            module.register_parameter(matrix, nn.Parameter(weight.new_empty(*stack, *shape)))


def adapt(model: CausalLM, parts: Collection[Part], rank: int, scale: float) -> None:
    """Add adapters to the parts of a model, and freeze everything else, in place."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, module in model.named_modules():
        kind = _ADAPTED.get(type(module))
        if kind is not None and part_of(f"{name}.") in parts:
            _become(module, kind, rank, scale)
