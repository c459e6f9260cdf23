"""The parts of a training step, each fast path against its plain reference, forward and backward in one process.

    python scripts/benchmark_components.py            prints the table
    python scripts/benchmark_components.py --store    also makes it the baseline of this kind of machine
    python scripts/benchmark_components.py --check    exits with 1 where less than three quarters of a ratio are left

Reference and fast path take turns, and only ratios of the two are kept: another machine's speed, or a busy hour,
changes both. The baseline lies beside this file, by kind of machine (what multiplies matrices, and the number of
threads); a part that it has no ratio for fails a check as well.
"""

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moe_lm.kernels import gemm, native
from moe_lm.kernels.allocator import keep_freed_memory
from moe_lm.kernels.attention import attention, attention_mask
from moe_lm.kernels.combine import sum_rows
from moe_lm.kernels.experts import expert_mixture
from moe_lm.kernels.grouping import Grouping, row_alignment
from moe_lm.kernels.hardware import has_fast_bf16
from moe_lm.kernels.loss import linear_cross_entropy
from moe_lm.kernels.normalization import rms_norm

BASELINE = Path(__file__).with_suffix(".json")
ALLOWED = 0.75
"""Share of the baseline's ratio that has to be left."""
TRIES = 3
"""How often a ratio that is too small is measured again before it counts."""

B, S, D, F, N, G, H, E, K, V = 8, 512, 256, 896, 8, 2, 32, 8, 2, 8192
"""The reference model of `benchmark.py`."""

Pass = Callable[[], None]


def main() -> int:
    """Measure, print, and store or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--store", action="store_true", help="make this the baseline of this kind of machine")
    parser.add_argument("--check", action="store_true", help="fail where a fast path has become slower")
    given = parser.parse_args()
    keep_freed_memory()
    stored = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    baseline = stored.get(kind(), {})
    if given.check and not baseline:
        there = "; ".join(stored)
        print(f"no baseline for {kind()}, only for {there}: make one with --store on a commit that you trust")
        return 1
    ratios, slower = {}, []
    for name, (reference, fast) in components().items():
        ratio = measure(reference, fast)
        floor = ALLOWED * baseline.get(name, math.inf)
        for _ in range(TRIES if given.check and ratio < floor < math.inf else 0):
            ratio = max(ratio, measure(reference, fast))
        was = f", {baseline[name]:.2f} in the baseline" if name in baseline else ", no baseline"
        print(f"{name}: {ratio:.2f} times as fast as the reference{was}")
        ratios[name] = round(ratio, 2)
        if given.check and ratio < floor:
            slower.append(name)
    if given.store:
        BASELINE.write_text(json.dumps({**stored, kind(): ratios}, indent=2) + "\n")
    if slower:
        print(f"slower than {ALLOWED:.0%} of the baseline, or not in it: {', '.join(slower)}")
    return 1 if slower else 0


def kind() -> str:
    """What a baseline holds for."""
    bf16 = "AMX" if native.has_amx() else "bf16" if has_fast_bf16(torch.device("cpu")) else "no bf16"
    products = ", own fp32 products" if gemm.pays() else ""
    return f"cpu, {bf16}{products}, {torch.get_num_threads()} threads"


def measure(reference: Pass, fast: Pass, pairs: int = 9) -> float:
    """How many times as fast the fast path is: the median over pairs that are run one after the other."""
    ratios = []
    for _ in range(pairs + 1):
        slow_seconds, fast_seconds = _seconds(reference), _seconds(fast)
        ratios.append(slow_seconds / fast_seconds)
    return statistics.median(ratios[1:])  # the first makes primitives


def _seconds(run: Pass) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def components() -> dict[str, tuple[Pass, Pass]]:
    """Reference and fast path of every component, in each type that this machine is fast in."""
    dtypes = [torch.float32, *([torch.bfloat16] if has_fast_bf16(torch.device("cpu")) else [])]
    made: dict[str, tuple[Pass, Pass]] = {}
    for dtype in dtypes:
        draw = functools.partial(_draw, dtype)
        suffix = str(dtype).removeprefix("torch.")
        made[f"norm {suffix}"] = _norm(draw)
        made[f"experts {suffix}"] = _experts(draw, dtype)
        made[f"combine {suffix}"] = _combine(draw)
        made[f"attention {suffix}"] = _attention(draw)
        made[f"loss {suffix}"] = _loss(draw)
    return made


def _norm(draw: Callable[..., Tensor]) -> tuple[Pass, Pass]:
    x_TD, weight_D = draw(B * S, D), draw(D)
    return _pair(lambda backend: rms_norm(x_TD, weight_D, 1e-5, backend), [x_TD, weight_D], "fused")


def _loss(draw: Callable[..., Tensor]) -> tuple[Pass, Pass]:
    hidden_TD, head_VD, label_T = draw(B * S, D), draw(V, D), torch.randint(V, (B * S,))

    def run(backend: str | None) -> Tensor:
        return linear_cross_entropy(hidden_TD, head_VD, label_T, backend=backend)

    return _pair(run, [hidden_TD, head_VD], "chunked")


def _experts(draw: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Pass, Pass]:
    """Natural routing: shares of the rows that differ, and are others in every pass."""
    gate_up, down = draw(E, 2 * F, D), draw(E, D, F)
    align = row_alignment(torch.device("cpu"), dtype, B * S * K, E)
    cuts = []
    for _ in range(20):
        size_E = torch.multinomial(torch.rand(E) + 0.5, B * S * K, replacement=True).bincount(minlength=E)
        cuts.append(((size_E + align - 1) // align * align).cumsum(0).int())
    x_TD, weight_P = draw(B * S, D), draw(B * S * K + E * align)
    token_P = torch.randperm(len(weight_P)) % (B * S)
    number = [0]

    def run(backend: str) -> Tensor:
        number[0] += 1
        end_E = cuts[number[0] % len(cuts)]
        rows = int(end_E[-1])
        return expert_mixture(x_TD, Grouping(token_P[:rows], weight_P[:rows], end_E), gate_up, down, backend)

    return _pair(run, [x_TD, weight_P, gate_up, down], "cpu")


def _combine(draw: Callable[..., Tensor]) -> tuple[Pass, Pass]:
    y_PD, token_P = draw(B * S * K, D), torch.randperm(B * S * K) // K
    return _pair(lambda backend: sum_rows(y_PD, token_P, B * S, backend), [y_PD], None)


def _attention(draw: Callable[..., Tensor]) -> tuple[Pass, Pass]:
    q, k, v = draw(B, S, N, H), draw(B, S, G, H), draw(B, S, G, H)
    document_BS = (torch.arange(S) // (S // 3)).expand(B, S)
    mask = attention_mask(document_BS, document_BS)
    return _pair(lambda backend: attention(q, k, v, mask, backend), [q, k, v], None)


def _draw(dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.randn(*shape) * 0.1).to(dtype).requires_grad_()


def _pair(run: Callable[[str | None], Tensor], inputs: Sequence[Tensor], fast: str | None) -> tuple[Pass, Pass]:
    def both(backend: str | None) -> None:
        output = run(backend)
        torch.autograd.grad(output, inputs, torch.ones_like(output))

    return functools.partial(both, "reference"), functools.partial(both, fast)


if __name__ == "__main__":
    sys.exit(main())
