"""The parts of a training step on a GPU, each with its Triton kernels and with what torch has, forward and backward.

    python scripts/benchmark_gpu_kernels.py [--device cuda]

bf16, at the sizes of one layer of the largest rung of `benchmark_gpu.py`. Both ways take turns, and the median of each
counts: where torch's is the faster one, the kernel does not pay. Attention is by documents against a mask, and without
either. A minute on an H200, most of it compilation; on a CPU the script is only tried, with tiny sizes.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moe_lm.kernels.attention import attention, attention_mask
from moe_lm.kernels.combine import gather_rows, sum_rows
from moe_lm.kernels.documents import packed_documents
from moe_lm.kernels.experts import expert_mixture
from moe_lm.kernels.grouping import Grouping
from moe_lm.kernels.loss import linear_cross_entropy
from moe_lm.kernels.normalization import rms_norm
from moe_lm.kernels.rotary import apply_rotary
from moe_lm.kernels.triton import launch

ROUNDS = 10

AT_ONCE = 10
"""Times that a part is computed between two waits for a GPU."""

Run = Callable[[], Tensor]


class Sizes(NamedTuple):
    """Letters as in the kernels: batch, sequence, hidden, intermediate, heads, key/value heads, head width, experts,
    experts of a token, vocabulary.
    """

    B: int
    S: int
    D: int
    F: int
    N: int
    G: int
    H: int
    E: int
    K: int
    V: int


LARGE = Sizes(8, 4096, 2048, 7168, 16, 8, 128, 8, 2, 8192)
TINY = Sizes(2, 16, 16, 24, 2, 1, 8, 4, 2, 32)


class Part(NamedTuple):
    """A part of a step, in several ways."""

    name: str
    inputs: Sequence[Tensor]
    """What gradients are taken of."""
    ways: dict[str, Run]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu tries the script, not the GPU")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device is visible here")
    if given.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, which `parts` does
    print("| part | way | milliseconds, forward and backward | times as fast as torch's |\n| --- | --- | --- | --- |")
    with torch.device(given.device):
        for part in parts(LARGE if given.device == "cuda" else TINY, given.device):
            seconds = measure(part, given.device)
            plain = next(iter(seconds.values()))
            for way, taken in seconds.items():
                print(f"| {part.name} | {way} | {1e3 * taken:.3f} | {plain / taken:.2f} |", flush=True)


def measure(part: Part, device: str) -> dict[str, float]:
    """Median seconds of each way, in turn; the first round compiles and does not count.

    On a GPU several times at once, so that it has work waiting while Python makes the next.
    """
    taken: dict[str, list[float]] = {way: [] for way in part.ways}
    times = AT_ONCE if device == "cuda" else 1
    for _ in range(ROUNDS + 1):
        for way, run in part.ways.items():
            upstream = torch.ones_like(run())
            begin = _now(device)
            for _ in range(times):
                torch.autograd.grad(run(), part.inputs, upstream)
            taken[way].append((_now(device) - begin) / times)
    return {way: statistics.median(seconds[1:]) for way, seconds in taken.items()}


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def parts(sizes: Sizes, device: str) -> Iterator[Part]:
    """Each part of a step that has a kernel; the first way is torch's."""
    kernel = {"Triton": "triton"} if device == "cpu" or launch.is_available() else {}

    def in_ways(name: str, run: Callable[..., Tensor], inputs: Sequence[Tensor], plain: str) -> Part:
        backends = {"torch": plain} | kernel
        return Part(name, inputs, {way: functools.partial(run, *inputs, b) for way, b in backends.items()})

    T, D, eps = sizes.B * sizes.S, sizes.D, 1e-5
    norm = in_ways("norm", lambda x, weight, b: rms_norm(x, weight, eps, b), [_draw(T, D), _draw(D)], "reference")
    x, weight = norm.inputs
    norm.ways["F.rms_norm"] = functools.partial(functional.rms_norm, x, (D,), weight, eps)
    yield norm
    cos, sin = (_draw(sizes.B, sizes.S, sizes.H).detach() for _ in range(2))
    heads = [_draw(sizes.B, sizes.S, sizes.N, sizes.H)]
    yield in_ways("rotation", lambda x, b: apply_rotary(x, cos, sin, b), heads, "reference")
    token_P, ends_E = _routing(T, sizes)
    yield in_ways("rows to experts", lambda x, b: gather_rows(x, token_P, b), [_draw(T, D)], "reference")
    yield in_ways("rows back", lambda y, b: sum_rows(y, token_P, T, b), [_draw(len(token_P), D)], "reference")
    experts = [_draw(T, D), _draw(len(token_P)), _draw(sizes.E, 2 * sizes.F, D), _draw(sizes.E, D, sizes.F)]

    def mixture(x: Tensor, weight_P: Tensor, gate_up: Tensor, down: Tensor, backend: str) -> Tensor:
        return expert_mixture(x, Grouping(token_P, weight_P, ends_E), gate_up, down, backend)

    yield in_ways("experts", mixture, experts, "grouped")
    yield _loss(sizes, T)
    yield _attention(sizes, device)


def _loss(sizes: Sizes, T: int) -> Part:
    labels_T, inputs = torch.randint(sizes.V, (T,)), [_draw(T, sizes.D), _draw(sizes.V, sizes.D)]
    ways = {"torch, all logits": "reference", "in chunks": "chunked"}
    run = functools.partial(linear_cross_entropy, *inputs, labels_T)
    return Part("loss", inputs, {way: functools.partial(run, backend=backend) for way, backend in ways.items()})


def _attention(sizes: Sizes, device: str) -> Part:
    B, S, H = sizes.B, sizes.S, sizes.H
    inputs = [_draw(B, S, sizes.N, H), _draw(B, S, sizes.G, H), _draw(B, S, sizes.G, H)]
    document_BS = (torch.arange(S) // (S // 4)).expand(B, S)
    mask = attention_mask(document_BS, document_BS)
    ways = {"a mask of 4 documents": mask, "causal, without documents": None}
    if device == "cuda":
        ways["4 documents, packed"] = packed_documents(document_BS, (B, S), document_BS.device)
    return Part("attention", inputs, {way: functools.partial(attention, *inputs, where) for way, where in ways.items()})


def _routing(T: int, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Token of each row, sorted by experts, as uneven as natural routing; and where each expert's rows end."""
    likely_E = torch.rand(sizes.E) + 0.5
    expert_R = torch.multinomial(likely_E.expand(T, -1), sizes.K).flatten()
    expert_P, order_P = expert_R.sort(stable=True)
    ends_E = torch.bincount(expert_P, minlength=sizes.E).cumsum(0).to(torch.int32)
    return order_P // sizes.K, ends_E


def _draw(*shape: int) -> Tensor:
    return (torch.randn(shape) * 0.1).to(torch.bfloat16).requires_grad_()


if __name__ == "__main__":
    main()
