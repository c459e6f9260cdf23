"""Update rules: AdamW for everything, or Muon for matrices and AdamW for the rest.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest orthogonal one. torch's own takes 2-D parameters
only; here a stacked tensor [E, rows, columns] is so many matrices, each orthogonalised by itself. The update is scaled
by 0.2·√max(rows, columns) (Liu et al. 2025, "Muon is scalable for LLM training", eq. 4), the size of AdamW's, so that
both share a learning rate and a decay.

Every process updates the part of each parameter that it has, a plain tensor. Muon needs whole matrices: the processes
that share one gather its momentum, and each orthogonalises it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_lm.checkpoint.tensor_file import TensorKind
from moe_lm.kernels import updates
from moe_lm.kernels.newton_schulz import iteration_dtype, orthogonalize
from moe_lm.parallel.runtime import Runtime
from moe_lm.parallel.shards import ParameterShard
from moe_lm.training.config import OptimizerConfig, OptimizerName
from moe_lm.transfer import copied_to


class AdamW(torch.optim.AdamW):
    """torch's, by its fused kernel; in native code where that takes gradients as they are, in bf16 too."""

    gradient_scale = 1.0
    """Gradients are taken times this."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update; every parameter must have a gradient."""
        assert closure is None
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters]
        if not all(map(updates.supports, gradients, parameters)):
            wide = [gradient.to(p.dtype) for p, gradient in zip(parameters, gradients)]
            if self.gradient_scale != 1:
                torch._foreach_mul_(wide, self.gradient_scale)
            for parameter, gradient in zip(parameters, wide):
                parameter.grad = gradient
            super().step()
            return
        for group in self.param_groups:
            numbers = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["step"] += 1
                moments = state["exp_avg"], state["exp_avg_sq"]
                updates.adamw(
                    parameter, parameter.grad, *moments, int(state["step"]), **numbers, scale=self.gradient_scale
                )


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum with decoupled weight decay, for matrices and stacks of matrices.

    A group's `matrices` says how many matrices lie one below the other in each [rows, columns]: 2 for `gate_up_proj`,
    whose halves would otherwise share one update, the half with the larger gradient taking most of it. Its `shards`
    are those that its parameters are the values of.
    """

    gradient_scale = 1.0
    """Gradients are taken times this."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float, weight_decay: float):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "matrices": 1}
        values = [{**group, "params": [shard.value for shard in group["shards"]]} for group in groups]
        super().__init__(values, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update; every parameter must have a gradient, and every process must call it."""
        assert closure is None
        for group in self.param_groups:
            for parameter, shard in zip(group["params"], group["shards"]):
                state, gradient = self.state[parameter], parameter.grad
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                dtype = iteration_dtype(gradient.device)
                momentum = state["momentum_buffer"]
                ahead = updates.nesterov(gradient, momentum, group["momentum"], dtype, self.gradient_scale)
                # An expert that got no token is not moved (but by decay). Its momentum only fades, but orthogonalising
                # would bring it back to full length and walk the expert along a stale direction, step after step.
                sums = torch.linalg.vector_norm(gradient, 1, dim=(-2, -1), keepdim=True)
                whole = shard.gather(ahead.mul_(shard.any(sums > 0)))
                direction = orthogonalize(whole.unflatten(-2, (group["matrices"], -1)))
                scale = 0.2 * max(direction.shape[-2:]) ** 0.5
                keep = _kept(shard, group["lr"] * group["weight_decay"])
                updates.decay_and_add(parameter, shard.own(direction.flatten(-3, -2)), keep, -group["lr"] * scale)


def _kept(shard: ParameterShard, decay: float) -> float | Tensor:
    """The factor that decay leaves of a parameter; 1 for what of it is not trained."""
    return 1 - decay if shard.trained is None else 1 - decay * shard.trained


class Optimizer:
    """All update rules of a run behind one interface, with their state by parameter name.

    Parameters that need no gradient are frozen: they are among its shards, which checkpoints hold, and that is all.
    Where some experts of a stack are frozen, their gradients are taken as zero, and they are not decayed.
    """

    def __init__(self, shards: Sequence[ParameterShard], config: OptimizerConfig):
        self.shards = shards
        self._trained = [shard for shard in shards if shard.parameter.requires_grad]
        self.max_grad_norm = config.max_grad_norm
        self._peak, self._weight_decay = config.learning_rate, config.weight_decay
        muon, halves, decayed, plain = _split(self._trained, config)
        whole = [shard for shard in decayed if shard.trained is None]
        self._decayed_in_part = [shard for shard in decayed if shard.trained is not None]
        adamw = [
            {"params": [shard.value for shard in whole], "weight_decay": config.weight_decay},
            {"params": [shard.value for shard in (*plain, *self._decayed_in_part)], "weight_decay": 0.0},
        ]
        self._rules: list[AdamW | Muon] = []
        if any(group["params"] for group in adamw):
            rule = AdamW(
                [group for group in adamw if group["params"]],
                lr=self._peak,
                betas=(config.beta1, config.beta2),
                eps=config.eps,
                fused=True,
            )
            self._rules.append(rule)
        if muon:
            matrices: list[dict[str, Any]] = [{"shards": muon}, {"shards": halves, "matrices": 2}]
            groups = [group for group in matrices if group["shards"]]
            self._rules.append(Muon(groups, self._peak, config.muon_momentum, config.weight_decay))
        self._orthogonalized = {shard.name for shard in (*muon, *halves)}

    def gradients(self) -> list[Tensor]:
        """The gradients of all trained parameters here, fp32 or bf16; one without would be a bug in the model."""
        found = [gradient for shard in self._trained if (gradient := shard.gradient) is not None]
        assert len(found) == len(self._trained), "a parameter has no gradient"
        return found

    def drop_frozen_gradients(self) -> None:
        """Set the gradients of experts that are not trained to zero; before their norm is taken."""
        for shard in self._trained:
            if shard.trained is not None and shard.gradient is not None:
                shard.gradient.mul_(shard.trained)

    def gradient_norm(self, runtime: Runtime | None = None) -> Tensor:
        """2-norm of the gradient of the whole model, scalar.

        Args:
            runtime: Given where each process has only a part of the gradient; all must then call it, and each value
                counts once.
        """
        squares_n = updates.squared_norms(self.gradients())
        if runtime is not None:
            counts = torch.tensor([shard.counts for shard in self._trained])
            squares_n = squares_n * copied_to(counts, squares_n.device)
        square = squares_n.sum()
        if runtime is not None:
            runtime.sum([square])
        return square.sqrt().float()

    @torch.no_grad()
    def step(self, gradient_norm: float, factor: float) -> None:
        """Clip by the given norm, then update with `factor` times the peak learning rate."""
        clips = 0 < self.max_grad_norm < gradient_norm
        for shard, gradient in zip(self._trained, self.gradients(), strict=True):
            shard.value.grad = gradient
        for shard in self._decayed_in_part:
            shard.value.mul_(_kept(shard, self._peak * factor * self._weight_decay))
        for rule in self._rules:
            rule.gradient_scale = self.max_grad_norm / gradient_norm if clips else 1.0
            for group in rule.param_groups:
                group["lr"] = self._peak * factor
            rule.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for shard in self._trained:
            shard.parameter.grad = shard.value.grad = None

    def state_tensors(self) -> Iterator[tuple[ParameterShard, str, Tensor]]:
        """Every state tensor that is here as (shard, state name, tensor); empty before the first step.

        Scalars are the same on every process that has a part of the parameter; all others are of the part's shape.
        """
        for shard in self._trained:
            for rule in self._rules:
                for key, value in rule.state.get(shard.value, {}).items():
                    yield shard, key, value

    def state_kinds(self) -> dict[str, TensorKind]:
        """Type and global shape of every state tensor that there is after the first step, by `parameter/state`."""
        kinds: dict[str, TensorKind] = {}
        for shard in self._trained:
            kind = TensorKind(shard.value.dtype, shard.shape)
            for key in self._state_names(shard):
                kinds[f"{shard.name}/{key}"] = TensorKind(torch.float32, []) if key == "step" else kind
        return kinds

    def restore_state(self, read: Callable[[ParameterShard, str], Tensor] | None) -> None:
        """Take a state for every parameter, or none at all.

        Args:
            read: Gives a state of a shard by its name; null forgets everything, as before the first step.
        """
        for rule in self._rules:
            rule.state.clear()
        if read is not None:
            for shard in self._trained:
                state = self._rule_of(shard).state[shard.value]
                for key in self._state_names(shard):
                    state[key] = read(shard, key).to(shard.value.device)

    def _rule_of(self, shard: ParameterShard) -> AdamW | Muon:
        return self._rules[-1 if shard.name in self._orthogonalized else 0]

    def _state_names(self, shard: ParameterShard) -> tuple[str, ...]:
        return ("momentum_buffer",) if shard.name in self._orthogonalized else ("step", "exp_avg", "exp_avg_sq")


def _split(shards: Sequence[ParameterShard], config: OptimizerConfig) -> tuple[list[ParameterShard], ...]:
    """Parameters for Muon, those of them that hold two matrices, for AdamW with decay, and without (norms)."""
    muon: list[ParameterShard] = []
    halves: list[ParameterShard] = []
    decayed: list[ParameterShard] = []
    plain: list[ParameterShard] = []
    for shard in shards:
        in_layer_matrix = ".layers." in shard.name and ".mlp.gate." not in shard.name
        if len(shard.shape) < 2:
            plain.append(shard)
        elif config.name is not OptimizerName.muon or not in_layer_matrix:
            decayed.append(shard)
        elif shard.name.endswith(("gate_up_proj", "gate_up_proj_lora_B")):
            halves.append(shard)
        else:
            muon.append(shard)
    return muon, halves, decayed, plain
