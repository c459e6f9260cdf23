"""The same weights in moe-lm and in the installed transformers give the same outputs: each layer, and the whole model.

transformers is given the tensors under their names on disk, and puts them together by its own conversion into its own
classes; moe-lm is given the source's parameters. Both compute in fp32, from weights rounded to the type on disk, with
the plainest of their kernels. What they share is nothing but the configuration.

One layer at a time needs the memory of one layer, not of the model: the decoder that is run has that layer alone, and
its embedding holds random hidden states. Where two experts' logits are within rounding of each other the two sides may
choose differently, and both be right: such tokens are not compared, nor, in the whole model, those after them. Of what
is drawn at least half has to be left, or the check fails.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_lm.hf.receipt import Check, VerificationError
from moe_lm.hf.router_choices import RouterChoices
from moe_lm.hf.their_model import DiskModel, load_theirs
from moe_lm.kernels.loss import linear_cross_entropy
from moe_lm.model.balancing import load_balancing_loss, load_fraction
from moe_lm.model.config import LoadBalancing, ModelConfig
from moe_lm.model.decoder import CausalLM
from moe_lm.model.source import ModelSource
from moe_lm.model.streamed import nudge

TOLERANCE = 1e-5
"""Largest difference of two outputs, as a share of the largest of their values."""

AMPLIFIED = 1e-3
"""The most that is allowed of the logits of a deep model that amplifies rounding: ten times what changing the last bits
of the embedding does, where that is above TOLERANCE. Means over all tokens, as the losses are, do not need it."""

LENGTH = 48
"""Tokens that are run; more where a sliding window would not be reached."""
LONGEST = 1024
"""The most. Longer windows are compared by the configuration alone."""

ROWS, SEEDS = 2, 4
"""Texts of random tokens that the whole model runs, and how often is drawn, at most, where there are ties."""


class _Outputs(NamedTuple):
    """Of the whole model."""

    logits_BSV: Tensor
    loss: float
    auxiliary: float | None


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
    length = fewest = _length(source.config)
    alone = dataclasses.replace(_plain(source.config), num_hidden_layers=1, vocab_size=length, tie_word_embeddings=True)
    for layer in range(number):
        hidden_SD, our_SD, clear_S = _run_our_layer(alone, source, layer, dtype)
        their_SD, layer_class = _run_their_layer(theirs, layer, hidden_SD)
        difference = _difference(our_SD[clear_S], their_SD[clear_S])
        if not difference <= TOLERANCE:
            raise VerificationError(
                "layers",
                f"model.layers.{layer} differs from transformers' {layer_class} by {difference:.1e} of its largest "
                f"value, and {TOLERANCE:.0e} is allowed",
            )
        largest, fewest = max(largest, difference), min(fewest, int(clear_S.sum()))
    compared = f"{length}" if fewest == length else f"at least {fewest} of {length}"
    return Check(
        "layers",
        f"{number} layers, each alone, against transformers' {layer_class}: within {largest:.1e} of the largest value "
        f"(fp32, {compared} random hidden states each)",
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
    tokens_BS, ours, rounding = _run_our_model(source, dtype)
    their = _run_their_model(theirs, tokens_BS)
    allowed = {"logits": tolerance_of_logits(rounding)}
    figures = {"logits": _difference(ours.logits_BSV, their.logits_BSV), "loss": abs(ours.loss / their.loss - 1)}
    if ours.auxiliary is not None and their.auxiliary is not None:
        figures["auxiliary loss"] = abs(ours.auxiliary / their.auxiliary - 1)
    for name, difference in figures.items():
        if not difference <= (most := allowed.get(name, TOLERANCE)):
            raise VerificationError(
                "model", f"{name} and transformers' are {difference:.1e} apart, and {most:.0e} is allowed"
            )
    said = ", ".join(f"{name} within {difference:.1e}" for name, difference in figures.items())
    how = "AutoModelForCausalLM.from_pretrained" if theirs.directory is not None else "transformers"
    if figures["logits"] > TOLERANCE:
        said += f"; the last bit of the embedding alone changes the logits by {rounding:.1e}"
    drawn = ROWS * _length(source.config)
    number = (
        f"{drawn} tokens" if tokens_BS.numel() == drawn else f"{tokens_BS.numel()} of {drawn} tokens, before any tie"
    )
    return Check("model", f"the whole model by {how}: {said} (relative, fp32, {number})", figures)


def tolerance_of_logits(rounding: float) -> float:
    """Most by which logits that should be equal may differ, relative to the largest.

    Args:
        rounding: The difference that the last bits of the embedding make.
    """
    return min(max(TOLERANCE, 10 * rounding), AMPLIFIED)


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


def _empty(config: ModelConfig) -> CausalLM:
    with torch.device("meta"):
        model = CausalLM(config)
    model.to_empty(device="cpu")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


@torch.no_grad()
def _run_our_layer(
    alone: ModelConfig, source: ModelSource, layer: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states [S, D], what comes of them after a norm with weights of one, and which [S] are of no tie."""
    model = _empty(alone)
    for name, parameter in model.model.layers[0].named_parameters():
        parameter.copy_(source.tensor(f"model.layers.{layer}.{name}").to(dtype))
    model.model.norm.weight.fill_(1.0)
    tokens_BS = torch.arange(alone.vocab_size)[None]
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(SEEDS * layer + seed)
        # Small beside 1: the residual must not drown what the layer adds, and the norm's epsilon must count.
        hidden_SD = 0.1 * torch.randn(alone.vocab_size, alone.hidden_size, generator=generator)
        model.model.embed_tokens.weight.copy_(hidden_SD)
        with RouterChoices(model) as choices:
            output = model(tokens_BS)
        clear_S = choices.clear(tokens_BS)[0]
        if 2 * clear_S.sum() >= len(clear_S):
            return hidden_SD, output.hidden_BSD[0], clear_S
    raise VerificationError(
        "layers", f"model.layers.{layer}.mlp.gate: more than half of its choices of experts are ties"
    )


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
    model = load_theirs("layers", config, tensors, prefix)
    output = model.model(input_ids=torch.arange(len(hidden_SD))[None])
    return output.last_hidden_state[0], type(model.model.layers[0]).__name__


@torch.no_grad()
def _run_our_model(source: ModelSource, dtype: torch.dtype) -> tuple[Tensor, _Outputs, float]:
    """Random tokens [B, S], what comes of them, and how far the last bits of the embedding change the logits."""
    config = _plain(source.config)
    model = _empty(config)
    targets = dict(model.named_parameters())
    for name, tensor in source.parameters():
        targets[name].copy_(tensor.to(dtype))
    tokens_BS = _draw_tokens(model, config)
    output = model(tokens_BS)
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
    with _nudged(model):
        rounding = _difference(model.logits(model(tokens_BS).hidden_BSD), logits_BSV)
    return tokens_BS, _Outputs(logits_BSV, total.item() / len(hidden_TD), auxiliary), rounding


def _draw_tokens(model: CausalLM, config: ModelConfig) -> Tensor:
    """Random tokens [B, S], none of which is tied in any layer, nor takes other experts once the embedding's last bits
    are changed: rows are cut where one is, so that all outputs, losses too, are of tokens that can be compared.
    """
    length = _length(config)
    rows: list[tuple[int, Tensor]] = []
    for seed in range(SEEDS):
        tokens_BS = torch.randint(config.vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(seed))
        with RouterChoices(model) as choices:
            model(tokens_BS)
        with RouterChoices(model) as nudged, _nudged(model):
            model(tokens_BS)
        clear_BS = choices.clear(tokens_BS) & choices.same(nudged, tokens_BS)
        rows += zip(clear_BS.int().cumprod(dim=1).sum(dim=1).tolist(), tokens_BS)
        rows.sort(key=lambda row: row[0], reverse=True)
        if rows[ROWS - 1][0] == length:
            break
    end = rows[ROWS - 1][0]
    if end < max(2, length / 2):
        raise VerificationError("model", "ties of experts leave less than half of any text of random tokens to compare")
    return torch.stack([tokens_S[:end] for _, tokens_S in rows[:ROWS]])


@contextlib.contextmanager
def _nudged(model: CausalLM) -> Iterator[None]:
    """While the block runs, the last bit of every second value that the embedding gives is another."""

    def change(embedding: nn.Module, arguments: object, hidden_BSD: Tensor) -> Tensor:
        nudge(hidden_BSD)
        return hidden_BSD

    handle = model.model.embed_tokens.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _run_their_model(theirs: DiskModel, tokens_BS: Tensor) -> _Outputs:
    model = load_theirs("model", theirs.config, theirs.directory or theirs.read(""), "")
    routed = hasattr(theirs.config, "num_local_experts")
    output = model(tokens_BS, labels=tokens_BS, **({"output_router_logits": True} if routed else {}))
    if not routed:
        return _Outputs(output.logits, output.loss.item(), None)
    loss = output.loss - model.router_aux_loss_coef * output.aux_loss
    return _Outputs(output.logits, loss.item(), output.aux_loss.item())
