"""Greedy generation against transformers' `generate`: the same default model, the same prompts, the same texts.

    python scripts/benchmark_generation.py [--threads N] [--tokens N]

Both generate in turn, in one process, in fp32; ratios are taken within a round. Prints a table in Markdown, and exits
with 1 where texts differ.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from benchmark_sides import their_model

from moe_lm.config import load
from moe_lm.evaluation.generation import generate
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
PROMPTS = (1, 8, 16)
LENGTH = 32
"""Tokens of a prompt."""
ROUNDS = 3

Texts = list[list[int]]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each prompt")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    config = load("pretrain", []).model
    model = CausalLM(config)
    initialize(model, seed=0)
    prompts = {count: torch.randint(config.vocab_size, (count, LENGTH)) for count in PROMPTS}
    cells: dict[int, list[str]] = {count: [] for count in PROMPTS}
    differ = []
    for implementation in IMPLEMENTATIONS:
        theirs = their_model(config, implementation, torch.device("cpu")).eval()
        theirs.config.output_router_logits = False
        for count, prompt_BS in prompts.items():

            def our_texts(prompt_BS: torch.Tensor = prompt_BS) -> Texts:
                return generate(model, prompt_BS.tolist(), given.tokens, end_id=-1)

            def their_texts(prompt_BS: torch.Tensor = prompt_BS, theirs: torch.nn.Module = theirs) -> Texts:
                settings = {"max_new_tokens": given.tokens, "do_sample": False, "use_cache": True}
                made = theirs.generate(prompt_BS, **settings, eos_token_id=None, pad_token_id=0)
                return made[:, LENGTH:].tolist()

            cell, same = compare(our_texts, their_texts, count * given.tokens)
            cells[count].append(cell)
            if not same:
                differ.append(f"{implementation}, {count} prompts")
    print("| prompts | " + " | ".join(IMPLEMENTATIONS) + " |\n" + "| --- " * (1 + len(IMPLEMENTATIONS)) + "|")
    for count, row in cells.items():
        print(f"| {count} | " + " | ".join(row) + " |")
    if differ:
        print(f"texts differ: {'; '.join(differ)}")
    return 1 if differ else 0


def compare(ours: Callable[[], Texts], theirs: Callable[[], Texts], tokens: int) -> tuple[str, bool]:
    """Tokens per second of the two (medians) and the median ratio, for people; whether the texts are the same."""
    rounds, same = [], True
    for _ in range(ROUNDS):
        our_seconds, our_texts = _timed(ours)
        their_seconds, their_texts = _timed(theirs)
        rounds.append((tokens / our_seconds, tokens / their_seconds, their_seconds / our_seconds))
        same = same and our_texts == their_texts
    ours_speed, theirs_speed, ratio = (statistics.median(column) for column in zip(*rounds, strict=True))
    return f"{ours_speed:,.0f} against {theirs_speed:,.0f} ({ratio:.1f}×)", same


def _timed(run: Callable[[], Texts]) -> tuple[float, Texts]:
    begin = time.perf_counter()
    texts = run()
    return time.perf_counter() - begin, texts


if __name__ == "__main__":
    sys.exit(main())
