"""Update rules: AdamW for everything, or Muon for matrices and AdamW for the rest.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest orthogonal one. torch's own takes 2-D parameters
only; here a stacked tensor [E, rows, columns] is so many matrices, each orthogonalised by itself. The update is scaled
by 0.2·√max(rows, columns) (Liu et al. 2025, "Muon is scalable for LLM training", eq. 4), the size of AdamW's, so that
both share a learning rate and a decay.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_lm.checkpoint.tensor_file import TensorKind
from moe_lm.kernels.newton_schulz import orthogonalize
from moe_lm.training.config import OptimizerConfig, OptimizerName


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum with decoupled weight decay, for matrices and stacks of matrices.

    A group's `matrices` says how many matrices lie one below the other in each [rows, columns]: 2 for `gate_up_proj`,
    whose halves would otherwise share one update, the half with the larger gradient taking most of it.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float, weight_decay: float):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "matrices": 1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update; every parameter must have a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                split = (-2, (group["matrices"], -1))
                gradient = parameter.grad.unflatten(*split)
                momentum = state["momentum_buffer"].unflatten(*split).lerp_(gradient, 1 - group["momentum"])
                direction = orthogonalize(gradient.lerp(momentum, group["momentum"]))
                # An expert that got no token is not moved (but by decay). Its momentum only fades, but orthogonalising
                # would bring it back to full length and walk the expert along a stale direction, step after step.
                direction = direction * (gradient.abs().amax(dim=(-2, -1), keepdim=True) > 0)
                scale = 0.2 * max(direction.shape[-2:]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction.flatten(-3, -2), alpha=-group["lr"] * scale)


class Optimizer:
    """All update rules of a run behind one interface, with their state by parameter name."""

    def __init__(self, model: nn.Module, config: OptimizerConfig):
        self.parameters = dict(model.named_parameters())
        self.max_grad_norm = config.max_grad_norm
        self._peak = config.learning_rate
        muon, halves, decayed, plain = _split(self.parameters, config)
        adamw = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self._rules: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [group for group in adamw if group["params"]],
                lr=self._peak,
                betas=(config.beta1, config.beta2),
                eps=config.eps,
                fused=True,
            )
        ]
        if muon:
            matrices: list[dict[str, Any]] = [{"params": muon}, {"params": halves, "matrices": 2}]
            rule = Muon([g for g in matrices if g["params"]], self._peak, config.muon_momentum, config.weight_decay)
            self._rules.append(rule)

    def gradients(self) -> list[Tensor]:
        """The gradients of all parameters, in their order; one without a gradient would be a bug in the model."""
        found = [p.grad for p in self.parameters.values() if p.grad is not None]
        assert len(found) == len(self.parameters), "a parameter has no gradient"
        return found

    def gradient_norm(self) -> Tensor:
        """Global 2-norm of all gradients, fp32 scalar."""
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.gradients())))

    def step(self, gradient_norm: Tensor, factor: float) -> None:
        """Clip by the given norm, then update with `factor` times the peak learning rate."""
        if self.max_grad_norm > 0:
            scale = (self.max_grad_norm / (gradient_norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(self.gradients(), scale)
        for rule in self._rules:
            for group in rule.param_groups:
                group["lr"] = self._peak * factor
            rule.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every state tensor as (`parameter name/state name`, tensor); empty before the first step."""
        for name, parameter in self.parameters.items():
            for rule in self._rules:
                for key, value in rule.state.get(parameter, {}).items():
                    yield f"{name}/{key}", value

    def state_kinds(self) -> dict[str, TensorKind]:
        """Name, type and shape of every state tensor that there is after the first step."""
        kinds: dict[str, TensorKind] = {}
        owner = self._owners()
        for name, parameter in self.parameters.items():
            kind = TensorKind.of(parameter)
            if isinstance(owner[id(parameter)], Muon):
                kinds[f"{name}/momentum_buffer"] = kind
            else:
                kinds[f"{name}/step"] = TensorKind(torch.float32, [])
                kinds |= {f"{name}/exp_avg": kind, f"{name}/exp_avg_sq": kind}
        return kinds

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take the state that `state_tensors` gave; every tensor must belong to a parameter."""
        owner = self._owners()
        for rule in self._rules:
            rule.state.clear()
        for full_name, value in tensors.items():
            name, key = full_name.rsplit("/", 1)
            parameter = self.parameters[name]
            owner[id(parameter)].state[parameter][key] = value.to(parameter.device)

    def _owners(self) -> dict[int, torch.optim.Optimizer]:
        return {id(p): rule for rule in self._rules for group in rule.param_groups for p in group["params"]}


def _split(parameters: Mapping[str, Tensor], config: OptimizerConfig) -> tuple[list[Tensor], ...]:
    """Parameters for Muon, those of them that hold two matrices, for AdamW with decay, and without (norms)."""
    muon: list[Tensor] = []
    halves: list[Tensor] = []
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in parameters.items():
        in_layer_matrix = ".layers." in name and not name.endswith("mlp.gate.weight")
        if parameter.dim() < 2:
            plain.append(parameter)
        elif config.name is not OptimizerName.muon or not in_layer_matrix:
            decayed.append(parameter)
        elif name.endswith("gate_up_proj"):
            halves.append(parameter)
        else:
            muon.append(parameter)
    return muon, halves, decayed, plain
