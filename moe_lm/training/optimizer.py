"""Update rules: AdamW for everything, or Muon for matrices and AdamW for the rest.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest orthogonal one. torch's own takes 2-D parameters
only; here a stacked tensor [E, rows, columns] is E matrices, each orthogonalised by itself. The update is scaled by
0.2·√max(rows, columns) (Liu et al. 2025, "Muon is scalable for LLM training", eq. 4), the size of AdamW's, so that both
share a learning rate and a decay.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from moe_lm.kernels.newton_schulz import orthogonalize
from moe_lm.training.config import OptimizerConfig, OptimizerName


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum with decoupled weight decay, for matrices and stacks of matrices."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
                direction = orthogonalize(gradient.lerp(momentum, group["momentum"]))
                scale = 0.2 * max(parameter.shape[-2:]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction, alpha=-group["lr"] * scale)


class Optimizer:
    """All update rules of a run behind one interface, with their state by parameter name."""

    def __init__(self, model: nn.Module, config: OptimizerConfig):
        self.parameters = dict(model.named_parameters())
        self.max_grad_norm = config.max_grad_norm
        self._peak = config.learning_rate
        muon, decayed, plain = _split(self.parameters, config)
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
            self._rules.append(Muon(muon, self._peak, config.muon_momentum, config.weight_decay))

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

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take the state that `state_tensors` gave; every tensor must belong to a parameter."""
        owner = {id(p): rule for rule in self._rules for group in rule.param_groups for p in group["params"]}
        for full_name, value in tensors.items():
            name, key = full_name.rsplit("/", 1)
            parameter = self.parameters[name]
            owner[id(parameter)].state[parameter][key] = value.to(parameter.device) if value.dim() else value


def _split(
    parameters: Mapping[str, Tensor], config: OptimizerConfig
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters for Muon, for AdamW with decay, and for AdamW without (norms); every parameter is in exactly one."""
    muon, decayed, plain = [], [], []
    for name, parameter in parameters.items():
        in_layer_matrix = parameter.dim() >= 2 and ".layers." in name and not name.endswith("mlp.gate.weight")
        if parameter.dim() < 2:
            plain.append(parameter)
        elif config.name is OptimizerName.muon and in_layer_matrix:
            muon.append(parameter)
        else:
            decayed.append(parameter)
    return muon, decayed, plain
