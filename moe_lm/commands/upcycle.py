"""`moe-lm upcycle`: a mixture of experts made of a dense model, or more experts for a mixture."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lm.commands.config import UpcycleConfig
from moe_lm.commands.model_directory import copy_tokenizer, new_model_directory, said_tokenizer, save_parameters
from moe_lm.commands.model_source import check_outside, open_source
from moe_lm.errors import InputError, RunError
from moe_lm.files import write_json
from moe_lm.finetune.upcycle import UpcycledModel, UpcyclePlan
from moe_lm.hf.parity import TOLERANCE, tolerance_of_logits
from moe_lm.memory import total_memory
from moe_lm.model.accounting import count_parameters
from moe_lm.model.streamed import streamed_logits

RECEIPT = "upcycle.json"

ROWS, LENGTH = 2, 64
"""Random tokens that logits are compared on."""


def run(config: UpcycleConfig) -> int:
    """Make the mixture, compare it with its base, and write it as a directory like a run's."""
    assert config.checkpoint is not None and config.output is not None
    output = Path(config.output).expanduser()
    plan = UpcyclePlan(config.num_experts, config.num_experts_per_tok, config.noise, config.reinitialize, config.seed)
    checkpoint = Path(config.checkpoint).expanduser().absolute()
    model = UpcycledModel(open_source(checkpoint), plan)
    check_outside(output, model.base)
    _check_memory(model)
    with new_model_directory(output) as directory:
        copy_tokenizer(model.tokenizer_directory, directory, model.config)
        origin = {"command": "upcycle", "checkpoint": str(checkpoint)}
        written = save_parameters(directory, model.config, model.parameters(), origin)
        receipt = _receipt(model, origin, written, _compare(model, directory))
        write_json(directory / RECEIPT, receipt)
    _report(model, receipt, output)
    return 0


def _check_memory(model: UpcycledModel) -> None:
    """Refuse more experts than there is memory for: those of a layer are one parameter, which is made as a whole.

    Raises:
        InputError: There are more, in whatever type.
    """
    config = model.config
    of_layer = 2 * 2 * config.num_experts * config.intermediate_size * config.hidden_size  # gate and up, in 16 bits
    if of_layer > (memory := total_memory()):
        raise InputError(
            f"num_experts={config.num_experts}: those of one layer take {of_layer // 2**30:,} GiB at least, and this "
            f"machine has {memory / 2**30:,.0f} GiB of memory; give fewer."
        )


def _compare(model: UpcycledModel, directory: Path) -> dict[str, Any]:
    """Logits of the mixture, as it was written, and of its base, layer by layer: neither need fit into memory.

    Raises:
        RunError: They differ where they must not.
    """
    length = min(LENGTH, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(model.plan.seed)
    input_ids_BS = torch.randint(model.config.vocab_size, (ROWS, length), generator=generator)
    base_BSV = streamed_logits(model.base, input_ids_BS)
    difference_BSV = streamed_logits(open_source(directory), input_ids_BS) - base_BSV
    largest = base_BSV.abs().max().item()
    relative = _share(difference_BSV, largest)
    if not math.isfinite(relative):
        raise RunError("the base's weights, or the mixture's, give logits that are not finite; nothing was written")
    tolerance = TOLERANCE
    if model.keeps_function and relative > TOLERANCE:  # a deep model may amplify rounding
        rounding = _share(streamed_logits(model.base, input_ids_BS, nudged=True) - base_BSV, largest)
        tolerance = tolerance_of_logits(rounding)
    if model.keeps_function and relative > tolerance:
        raise RunError(
            f"the mixture must compute what its base does, and its logits differ by {relative:.2g} of the largest "
            "(in a mixture, two experts whose router logits tie do that: try another seed=); nothing was written"
        )
    return {
        "tokens": ROWS * length,
        "largest_logit": largest,
        "largest_difference": difference_BSV.abs().max().item(),
        "relative_difference": relative,
        "must_be_equal": model.keeps_function,
        "tolerance": tolerance,
    }


def _share(difference_BSV: Tensor, largest: float) -> float:
    """The largest difference, as a share of the largest logit."""
    return difference_BSV.abs().max().item() / max(largest, torch.finfo(torch.float32).tiny)


def _receipt(
    model: UpcycledModel, origin: dict[str, Any], written: dict[str, Any], logits: dict[str, Any]
) -> dict[str, Any]:
    counts = {
        name: {"total": count.total, "active": count.active}
        for name, count in (
            ("before", count_parameters(model.base.config)),
            ("after", count_parameters(model.config)),
        )
    }
    plan = model.plan
    return {
        **origin,
        "num_experts": model.config.num_experts,
        "num_experts_per_tok": model.config.num_experts_per_tok,
        "noise": plan.noise,
        "reinitialize": plan.reinitialize,
        "seed": plan.seed,
        "parameters": counts,
        "logits": logits,
        "tensors": {name: {"made_of": model.origin(name), **entry} for name, entry in written.items()},
    }


def _report(model: UpcycledModel, receipt: dict[str, Any], output: Path) -> None:
    before, after, logits = receipt["parameters"]["before"], receipt["parameters"]["after"], receipt["logits"]
    first = "model.layers.0.mlp."
    print(f"upcycled {model.path} to {output}")
    print("  embedding, attention, norms, head:  copied")
    print(f"  experts:     {model.origin(f'{first}experts.down_proj')}; {model.config.num_experts} in a layer")
    print(f"  router:      {model.origin(f'{first}gate.weight')}; {model.config.num_experts_per_tok} experts per token")
    print(f"  parameters:  {before['total']:,} → {after['total']:,}; active {before['active']:,} → {after['active']:,}")
    verdict = "the same function" if model.keeps_function else "another function, as asked for"
    print(
        f"  logits:      differ from the base's by {logits['largest_difference']:.2g} at most, where the largest is "
        f"{logits['largest_logit']:.3g} ({logits['tokens']} random tokens, fp32): {verdict}"
    )
    if model.copies_never_part:
        print(
            "  note:        copies of one expert are always chosen together and learn the same; give noise=0.01, or "
            "reinitialize=0.5, to tell them apart"
        )
    print(f"  tokenizer:   {said_tokenizer(model.tokenizer_directory)}")
    print(f"  receipt:     {output / RECEIPT}")
