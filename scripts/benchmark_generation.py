"""Greedy generation against transformers' `generate`: the same default model, the same prompts.

    python scripts/benchmark_generation.py [--threads N] [--tokens N]

Both generate in turn, in one process, in the same precision; ratios are taken within a round. Prints a table in
Markdown for each precision, and exits with 1 where texts in fp32 differ. In bf16 they may: where two tokens are as
likely but for rounding, or two experts, each implementation has its own choice; so it says how many are the same, also
of transformers' own two.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from arguments import positive
from benchmark_sides import their_model
from torch import Tensor

from moe_lm.config import load
from moe_lm.evaluation.generation import generate
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize

IMPLEMENTATIONS = ("eager", "grouped_mm")
"""Of transformers' experts; the third, `batched_mm`, is several times slower than these on a CPU."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPTS = (1, 8, 16)
LENGTH = 32
"""Tokens of a prompt."""
ROUNDS = 3

Texts = list[list[int]]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=positive, default=1, help="of the CPU")
    parser.add_argument("--tokens", type=positive, default=64, help="new tokens of each prompt")
    given = parser.parse_args()
    config = load("pretrain", []).model
    for name, most in (("threads", os.cpu_count() or 1), ("tokens", config.max_position_embeddings - LENGTH)):
        if getattr(given, name) > most:
            parser.error(f"--{name} {getattr(given, name)}: at most {most} here")
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    prompts = [torch.randint(config.vocab_size, (count, LENGTH)) for count in PROMPTS]
    differ = False
    for precision, dtype in PRECISIONS.items():
        ours = CausalLM(config)
        initialize(ours, seed=0)
        ours.to(dtype)
        theirs = [their_model(config, name, torch.device("cpu"), dtype).eval() for name in IMPLEMENTATIONS]
        titles = [f"prompts, {precision}", *IMPLEMENTATIONS, "same texts", "same texts of transformers' own"]
        print("| " + " | ".join(titles) + " |\n" + "| --- " * len(titles) + "|")
        for prompt_BS in prompts:
            cells, texts = measure(ours, theirs, prompt_BS, given.tokens)
            same = [min(map(_count_same, texts[:1] * len(theirs), texts[1:])), _count_same(texts[1], texts[-1])]
            cells += [f"{count} of {len(prompt_BS)}" for count in same]
            print(f"| {len(prompt_BS)} | " + " | ".join(cells) + " |", flush=True)
            differ = differ or (dtype is torch.float32 and same[0] < len(prompt_BS))
    if differ:
        print("texts differ in fp32")
    return 1 if differ else 0


def measure(ours: CausalLM, theirs: list[Any], prompt_BS: Tensor, tokens: int) -> tuple[list[str], list[Texts]]:
    """For each of theirs, speeds for people; and the texts, ours first."""

    def our_texts() -> Texts:
        return generate(ours, prompt_BS.tolist(), tokens)

    def texts_of(model: Any) -> Callable[[], Texts]:
        model.config.output_router_logits = False
        settings = {"max_new_tokens": tokens, "do_sample": False, "use_cache": True, "eos_token_id": None}
        # Without a mask it would take the prompts' own zeros for padding.
        inputs = {"input_ids": prompt_BS, "attention_mask": torch.ones_like(prompt_BS), "pad_token_id": 0}
        return lambda: model.generate(**inputs, **settings)[:, LENGTH:].tolist()

    texts = [our_texts(), *(texts_of(model)() for model in theirs)]
    return [compare(our_texts, texts_of(model), len(prompt_BS) * tokens) for model in theirs], texts


def compare(ours: Callable[[], Texts], theirs: Callable[[], Texts], tokens: int) -> str:
    """Tokens per second of the two (medians) and the median ratio, for people."""
    rounds = []
    for _ in range(ROUNDS):
        our_seconds, their_seconds = _seconds(ours), _seconds(theirs)
        rounds.append((tokens / our_seconds, tokens / their_seconds, their_seconds / our_seconds))
    ours_speed, theirs_speed, ratio = (statistics.median(column) for column in zip(*rounds, strict=True))
    return f"{ours_speed:,.0f} against {theirs_speed:,.0f} ({ratio:.1f}×)"


def _count_same(texts: Texts, others: Texts) -> int:
    return sum(map(list.__eq__, texts, others))


def _seconds(run: Callable[[], Texts]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
