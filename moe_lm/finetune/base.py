"""A run that begins from a base model: its weights, what of them is trained, and what a checkpoint of it holds.

Checkpoints of a full fine-tuning hold the whole model, as those of pretraining do. Those of LoRA hold adapters alone;
the base is read again wherever the whole model is wanted, and must be the one that the adapters were trained on: a
fingerprint of its weights, whatever files they lie in, says so.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_lm.errors import InputError
from moe_lm.finetune.config import FinetuneConfig, Method, Part
from moe_lm.finetune.lora import adapt, initial_adapter, is_adapter, part_of
from moe_lm.model.config import ModelConfig
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import generator_of
from moe_lm.model.router import Router
from moe_lm.model.source import ModelSource
from moe_lm.parallel.layout import Layout
from moe_lm.parallel.parallelize import expert_dim
from moe_lm.parallel.placement import Placement


class FromBase:
    """The weights of a base model, and fresh adapters where LoRA trains those; a `Start`."""

    def __init__(self, base: ModelSource, config: FinetuneConfig, seed: int, fingerprint: str):
        """Choose what is trained.

        Args:
            base: The model to begin from.
            config: What of it is trained.
            seed: Of the adapters' initial weights.
            fingerprint: What `fingerprint` says of the base.

        Raises:
            InputError: The model has no such part, or no such expert.
        """
        _check(base.config, config)
        self._base, self._config, self._seed = base, config, seed
        self.has_learned = True
        self.trained_experts: Sequence[int] | None = [int(text) for text in config.experts] or None
        self.state: dict[str, Any] = {"base": str(base.path.absolute()), "base_fingerprint": fingerprint}

    def adapt(self, model: CausalLM, compute_dtype: torch.dtype) -> None:
        """See `Start`. Under LoRA the base is held in the type that it is computed with (its routers in their own):
        nothing is ever added to it.
        """
        choose_trained(model, self._config)
        if self._config.method is Method.lora:
            routers = {id(p) for m in model.modules() if isinstance(m, Router) for p in m.parameters()}
            for parameter in model.parameters():
                if not parameter.requires_grad and id(parameter) not in routers:
                    parameter.data = parameter.data.to(compute_dtype)

    def value(self, name: str, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """The base's parameter, or the beginning of an adapter's."""
        if is_adapter(name):
            return initial_adapter(name, list(shape), generator_of(self._seed, name, device)).to(dtype)
        return self._base.tensor(name).to(device, dtype)

    def state_bytes(self, moments: int, compute_bytes: int) -> tuple[int, int]:
        """See `Start`."""
        counts, total = trained_counts(self._base.config, self._config)
        trained, copy = sum(counts.values()), compute_bytes if compute_bytes < 4 else 0
        if self._config.method is Method.lora:
            return (4 * (2 + moments) + copy) * trained + compute_bytes * total, 4 * (1 + moments) * trained
        frozen = total - trained
        return (4 * (2 + moments) + copy) * trained + (4 + copy) * frozen, 4 * (1 + moments) * trained + 4 * frozen

    def said(self) -> str:
        """See `Start`."""
        needed = f"; they need {self._base.path} as it is" if self._config.method is Method.lora else ""
        return said_trained(self._base.config, self._config) + needed

    def is_saved(self, name: str) -> bool:
        """See `Start`."""
        return self._config.method is Method.full or is_adapter(name)

    def check_layout(self, layout: Layout, placement: Placement | None) -> None:
        """Refuse a rank that can not be cut like the experts that the adapters belong to."""
        config, experts = self._config, self._base.config.num_experts
        if config.method is Method.full or Part.experts not in config.chosen_parts or layout.expert_shards == 1:
            return
        layers = range(self._base.config.num_hidden_layers)
        owned = {experts}
        if placement is not None:
            owned = {len(placement.experts_of(layer, owner)) for layer in layers for owner in range(layout.ep)}
        cut = any(expert_dim(number, layout) == 1 for number in owned)
        assert config.rank is not None
        if self._base.config.is_mixture and cut and config.rank % layout.expert_shards:
            raise InputError(
                f"finetune.rank={config.rank}: each expert is cut over {layout.expert_shards} processes, which do not "
                f"divide the rank; give a multiple of {layout.expert_shards}, or another parallel.ep."
            )


def fingerprint(base: ModelSource) -> str:
    """SHA-256 over names, shapes and values (in fp32) of a model's parameters: the same whatever format they lie in."""
    digest = hashlib.sha256()
    for name, tensor in base.parameters():
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.float().contiguous().flatten().view(torch.uint8).numpy().data))
    return digest.hexdigest()


def choose_trained(model: CausalLM, config: FinetuneConfig) -> None:
    """Add adapters where there shall be some, and freeze what is not trained, in place."""
    parts = config.chosen_parts
    if config.method is Method.lora:
        assert config.rank is not None
        adapt(model, parts, config.rank, config.scale)
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in parts)


def trained_counts(model: ModelConfig, config: FinetuneConfig) -> tuple[dict[Part, int], int]:
    """Numbers that are trained, by part, and those of the whole model without adapters."""
    with torch.device("meta"):
        empty = CausalLM(model)
    total = sum(parameter.numel() for parameter in empty.parameters())
    choose_trained(empty, config)
    counts: dict[Part, int] = {}
    for name, parameter in empty.named_parameters():
        if not parameter.requires_grad:
            continue
        number = parameter.numel()
        if config.experts and ".mlp.experts." in name:
            number = number // model.num_experts * len(config.experts)
        counts[part_of(name)] = counts.get(part_of(name), 0) + number
    return counts, total


def said_trained(model: ModelConfig, config: FinetuneConfig) -> str:
    """What is trained, in a line for the user."""
    counts, total = trained_counts(model, config)
    trained = sum(counts.values())
    parts = ", ".join(f"{part.name} {counts[part]:,}" for part in Part if part in counts)
    of_experts = f", of the experts {', '.join(config.experts)}" if config.experts else ""
    how = f"LoRA of rank {config.rank}" if config.method is Method.lora else "the weights themselves"
    return f"training {trained:,} of {total:,} parameters ({100 * trained / total:.3g} %), {how}{of_experts}: {parts}"


def _check(model: ModelConfig, config: FinetuneConfig) -> None:
    if not model.is_mixture:
        if Part.router.name in config.parts:
            raise InputError("finetune.parts=[router]: the base is a dense model, which has no router; leave it out.")
        if config.experts:
            raise InputError(f"finetune.experts=[{','.join(config.experts)}]: the base is a dense model; leave it out.")
    for text in config.experts:
        if int(text) >= model.num_experts:
            raise InputError(
                f"finetune.experts=[{text}]: the base has {model.num_experts} experts in a layer, numbered from 0."
            )
    if config.rank is not None and config.rank > model.hidden_size:  # a side of every matrix
        raise InputError(
            f"finetune.rank={config.rank}: no matrix of the base has a rank above its hidden_size={model.hidden_size}; "
            "give that at most."
        )
    tied = {Part.embedding, Part.head} & config.chosen_parts if model.tie_word_embeddings else set()
    if tied and config.method is Method.lora:
        raise InputError(
            f"finetune.parts=[{min(part.name for part in tied)}]: the base's head is its embedding, and an adapter of "
            "one of them would be merged into both; leave it out."
        )
    if tied == {Part.head}:  # which would train nothing, in silence
        raise InputError("finetune.parts=[head]: the base's head is its embedding; give embedding.")
