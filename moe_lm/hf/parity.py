"""The same weights in moe-lm and in the installed transformers give the same outputs: each layer, and the whole model.

transformers is given the tensors under their names on disk, and puts them together by its own conversion into its own
classes; moe-lm is given the source's parameters. Both compute in fp32, from weights rounded to the type on disk, with
the plainest of their kernels. What they share is nothing but the configuration.

One layer at a time needs the memory of one layer, not of the model: the decoder that is run has that layer alone, and
its embedding holds random hidden states. Where two experts' logits are within rounding of each other the two sides may
choose differently, and both be right: such tokens are not compared, nor, in the whole model, those after them.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_lm.hf.receipt import Check, VerificationError
from moe_lm.hf.silence import quiet_transformers
from moe_lm.kernels.loss import linear_cross_entropy
from moe_lm.model.balancing import load_balancing_loss, load_fraction
from moe_lm.model.config import LoadBalancing, ModelConfig
from moe_lm.model.decoder import CausalLM
from moe_lm.model.router import Router
from moe_lm.model.source import ModelSource

TOLERANCE = 1e-5
"""Largest difference of two outputs, as a share of the largest of their values."""

AMPLIFIED = 1e-3
"""The most that is allowed of a deep model that amplifies rounding: ten times what changing the last bits of the
embedding does, where that is above TOLERANCE."""

MARGIN = 1e-5
"""Two logits of a router that are closer than this share of the largest are within rounding of each other. Equal ones
are not: both sides then take the same."""

LENGTH = 48
"""Tokens that are run; more where a sliding window would not be reached."""
LONGEST = 1024
"""The most. Longer windows are compared by the configuration alone."""

ROWS, SEEDS = 2, 4
"""Texts of random tokens that the whole model runs, and how often others are drawn where there are ties."""


class DiskModel(NamedTuple):
    """A model as transformers is given it."""

    config: Any
    """Its PretrainedConfig."""
    read: Callable[[str], dict[str, Tensor]]
    """Reads the tensors on disk whose names begin with a text."""
    directory: Path | None
    """Where the whole model lies in files; null where it does not."""


class _Outputs(NamedTuple):
    """Of the whole model."""

    logits_BSV: Tensor
    loss: float
    auxiliary: float | None
    nudged_BSV: Tensor | None = None
    """Logits once the embedding's last bits are changed."""


def check_layers(theirs: DiskModel, source: ModelSource, dtype: torch.dtype) -> Check:
    """Run every layer by itself, in both.

    Args:
        theirs: For transformers.
        source: The parameters for moe-lm.
        dtype: What they are rounded to.

    Raises:
        VerificationError: A layer's outputs differ, or transformers leaves a part of it unfilled.
    """
    number, largest, layer_class = source.config.num_hidden_layers, 0.0, ""
    length = _length(source.config)
    alone = dataclasses.replace(_plain(source.config), num_hidden_layers=1, vocab_size=length, tie_word_embeddings=True)
    for layer in range(number):
        generator = torch.Generator().manual_seed(layer)
        # Small beside 1: the residual must not drown what the layer adds, and the norm's epsilon must count.
        hidden_SD = 0.1 * torch.randn(length, alone.hidden_size, generator=generator)
        our_SD, clear_S = _run_our_layer(alone, source, layer, hidden_SD, dtype)
        their_SD, layer_class = _run_their_layer(theirs, layer, hidden_SD)
        if not clear_S.any():
            raise VerificationError("layers", f"model.layers.{layer}.mlp.gate: its choices of experts are all but ties")
        difference = _difference(our_SD[clear_S], their_SD[clear_S])
        if not difference <= TOLERANCE:
            raise VerificationError(
                "layers",
                f"model.layers.{layer} differs from transformers' {layer_class} by {difference:.1e} of its largest "
                f"value, and {TOLERANCE:.0e} is allowed",
            )
        largest = max(largest, difference)
    return Check(
        "layers",
        f"{number} layers, each alone, against transformers' {layer_class}: within {largest:.1e} of the largest value "
        f"(fp32, {length} random hidden states)",
        {"layers": largest},
    )


def check_model(theirs: DiskModel, source: ModelSource, dtype: torch.dtype) -> Check:
    """Run the whole model in both, one after the other: logits, loss, and transformers' pooled auxiliary loss.

    Args:
        theirs: For transformers, which loads its directory by `AutoModelForCausalLM` where there is one.
        source: The parameters for moe-lm.
        dtype: What they are rounded to.

    Raises:
        VerificationError: An output differs, or transformers leaves a part unfilled.
    """
    tokens_BS, ours, ends = _run_our_model(source, dtype)
    their = _run_their_model(theirs, tokens_BS)
    if not any(ends):
        raise VerificationError("model", "the routers' choices of experts are all but ties")
    assert ours.nudged_BSV is not None
    figures = {"logits": _largest_difference(ours.logits_BSV, their.logits_BSV, ends)}
    rounding = _largest_difference(ours.nudged_BSV, ours.logits_BSV, ends)
    allowed = min(max(TOLERANCE, 10 * rounding), AMPLIFIED)
    if all(end == tokens_BS.shape[1] for end in ends):  # both count every token
        figures["loss"] = abs(ours.loss / their.loss - 1)
        if ours.auxiliary is not None and their.auxiliary is not None:
            figures["auxiliary loss"] = abs(ours.auxiliary / their.auxiliary - 1)
    for name, difference in figures.items():
        if not difference <= allowed:
            raise VerificationError(
                "model", f"{name} and transformers' are {difference:.1e} apart, and {allowed:.0e} is allowed"
            )
    said = ", ".join(f"{name} within {difference:.1e}" for name, difference in figures.items())
    how = "AutoModelForCausalLM.from_pretrained" if theirs.directory is not None else "transformers"
    if max(figures.values()) > TOLERANCE:
        said += f"; the last bit of the embedding alone changes the logits by {rounding:.1e}"
    return Check("model", f"the whole model by {how}: {said} (relative, fp32, {sum(ends)} tokens)", figures)


def _plain(config: ModelConfig) -> ModelConfig:
    """Without what only training has."""
    return dataclasses.replace(config, capacity_factor=None, router_drift_coef=0.0)


def _length(config: ModelConfig) -> int:
    window = config.sliding_window or 0
    wanted = window + 16 if LENGTH - 16 < window <= LONGEST - 16 else LENGTH
    return max(2, min(wanted, config.max_position_embeddings))


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, as a share of transformers' largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=torch.finfo(theirs.dtype).tiny)).item()


def _largest_difference(ours_BSV: Tensor, theirs_BSV: Tensor, ends: list[int]) -> float:
    rows = zip(ours_BSV, theirs_BSV, ends)
    return max(_difference(our_SV[:end], their_SV[:end]) for our_SV, their_SV, end in rows if end)


class _Ties:
    """While its block runs, notes which tokens a model's routers choose experts for within rounding."""

    def __init__(self, model: CausalLM):
        self._routers = [module for module in model.modules() if isinstance(module, Router)]
        self._tied_T: Tensor | None = None

    def __enter__(self) -> "_Ties":
        self._handles = [router.register_forward_pre_hook(self._note) for router in self._routers]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, router: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(router, Router)
        logits_TE = router.logits(arguments[0])
        if router.top_k == logits_TE.shape[-1]:
            return
        best_TK = logits_TE.topk(router.top_k + 1, dim=-1).values
        margin_T = best_TK[:, -2] - best_TK[:, -1]
        tied_T = (margin_T > 0) & (margin_T < MARGIN * logits_TE.abs().amax(dim=-1))
        self._tied_T = tied_T if self._tied_T is None else self._tied_T | tied_T

    def clear(self, tokens_BS: Tensor) -> Tensor:
        """Which tokens are not tied in any layer, [B, S]."""
        if self._tied_T is None:
            return torch.ones_like(tokens_BS, dtype=torch.bool)
        return ~self._tied_T.view_as(tokens_BS)


def _empty(config: ModelConfig) -> CausalLM:
    with torch.device("meta"):
        model = CausalLM(config)
    model.to_empty(device="cpu")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


@torch.no_grad()
def _run_our_layer(
    alone: ModelConfig, source: ModelSource, layer: int, hidden_SD: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Outputs [S, D] after a norm with weights of one, and which [S] are of no tie."""
    model = _empty(alone)
    for name, parameter in model.model.layers[0].named_parameters():
        parameter.copy_(source.tensor(f"model.layers.{layer}.{name}").to(dtype))
    model.model.embed_tokens.weight.copy_(hidden_SD)
    model.model.norm.weight.fill_(1.0)
    tokens_BS = torch.arange(len(hidden_SD))[None]
    with _Ties(model) as ties:
        output = model(tokens_BS)
    return output.hidden_BSD[0], ties.clear(tokens_BS)[0]


@torch.no_grad()
def _run_their_layer(theirs: DiskModel, layer: int, hidden_SD: Tensor) -> tuple[Tensor, str]:
    """The same of transformers, and the name of its layer's class."""
    values = {name: value for name, value in theirs.config.to_dict().items() if name != "layer_types"}
    values |= {"num_hidden_layers": 1, "vocab_size": len(hidden_SD), "tie_word_embeddings": True}
    values |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = type(theirs.config).from_dict(values)
    prefix = f"model.layers.{layer}."
    tensors = {f"model.layers.0.{name.removeprefix(prefix)}": t.float() for name, t in theirs.read(prefix).items()}
    tensors |= {"model.embed_tokens.weight": hidden_SD, "model.norm.weight": torch.ones(hidden_SD.shape[1])}
    model = _load("layers", config, tensors, prefix)
    output = model.model(input_ids=torch.arange(len(hidden_SD))[None])
    return output.last_hidden_state[0], type(model.model.layers[0]).__name__


@torch.no_grad()
def _run_our_model(source: ModelSource, dtype: torch.dtype) -> tuple[Tensor, _Outputs, list[int]]:
    """Random tokens [B, S], what comes of them, and how many of each row come before the first tie."""
    config = _plain(source.config)
    model = _empty(config)
    targets = dict(model.named_parameters())
    for name, tensor in source.parameters():
        targets[name].copy_(tensor.to(dtype))
    for seed in range(SEEDS):
        shape, generator = (ROWS, _length(config)), torch.Generator().manual_seed(seed)
        tokens_BS = torch.randint(config.vocab_size, shape, generator=generator)
        with _Ties(model) as ties:
            output = model(tokens_BS)
        clear_BS = ties.clear(tokens_BS)
        if clear_BS.all():
            break
    hidden_TD = output.hidden_BSD[:, :-1].flatten(0, 1)
    total = linear_cross_entropy(hidden_TD, model.lm_head.weight, tokens_BS[:, 1:].flatten())
    auxiliary = None
    if config.is_mixture:
        count_LE = output.statistics.count_E
        auxiliary = load_balancing_loss(
            output.statistics.probability_sum_E,
            load_fraction(count_LE),
            tokens_BS.numel(),
            config.num_experts_per_tok,
            LoadBalancing.pooled,
        ).item()
    logits_BSV = model.logits(output.hidden_BSD)
    model.model.embed_tokens.weight[:, ::2] *= 1 + 2**-23
    nudged_BSV = model.logits(model(tokens_BS).hidden_BSD)
    outputs = _Outputs(logits_BSV, total.item() / len(hidden_TD), auxiliary, nudged_BSV)
    return tokens_BS, outputs, clear_BS.int().cumprod(dim=1).sum(dim=1).tolist()


@torch.no_grad()
def _run_their_model(theirs: DiskModel, tokens_BS: Tensor) -> _Outputs:
    model = _load("model", theirs.config, theirs.directory or theirs.read(""), "")
    routed = hasattr(theirs.config, "num_local_experts")
    output = model(tokens_BS, labels=tokens_BS, **({"output_router_logits": True} if routed else {}))
    if not routed:
        return _Outputs(output.logits, output.loss.item(), None)
    loss = output.loss - model.router_aux_loss_coef * output.aux_loss
    return _Outputs(output.logits, loss.item(), output.aux_loss.item())


def _load(check: str, config: Any, weights: Path | dict[str, Tensor], prefix: str) -> Any:
    """Transformers' model, each part of it filled from a directory or from tensors under their names on disk."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    options: dict[str, Any] = {
        "dtype": torch.float32,
        "attn_implementation": "eager",
        "output_loading_info": True,
        **({"experts_implementation": "eager"} if hasattr(config, "num_local_experts") else {}),
    }
    with quiet_transformers():
        try:
            if isinstance(weights, Path):
                options |= {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
                model, report = AutoModelForCausalLM.from_pretrained(weights, **options)
            else:
                options |= {"config": config, "state_dict": weights}
                model, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(None, **options)
        except Exception as error:  # whatever its conversion makes of tensors that it can not put together
            where = f"{prefix}*: " if prefix else ""
            raise VerificationError(check, f"{where}transformers can not load it ({_first_line(error)})") from error
    for what, names in report.items():
        if names:
            first = str(sorted(map(str, names))[0]).replace("model.layers.0.", prefix or "model.layers.0.")
            raise VerificationError(check, f"{first}: transformers reports {what.replace('_', ' ')}")
    return model.eval()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
