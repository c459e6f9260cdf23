"""The kernels in C++ and on AMX tiles, and the plain versions that stand in for them, against the fp64 reference.

Every test says which native functions it is about and fails if others ran: a shape that falls back tests nothing.
"""

import functools
import math
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lm.kernels import gemm as gemm_module
from moe_lm.kernels import native, newton_schulz
from moe_lm.kernels.attention import attention, attention_mask
from moe_lm.kernels.combine import gather_rows, sum_rows
from moe_lm.kernels.experts import expert_mixture
from moe_lm.kernels.gemm import gemm
from moe_lm.kernels.grouped_linear import grouped_linear
from moe_lm.kernels.grouping import Grouping
from moe_lm.kernels.linear import linear
from moe_lm.kernels.loss import _LOGITS_AT_ONCE, linear_cross_entropy
from moe_lm.kernels.normalization import rms_norm
from moe_lm.kernels.rotary import apply_rotary
from moe_lm.kernels.updates import decay_and_add, nesterov, squared_norms
from moe_lm.model.config import ModelConfig, Recompute
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize
from moe_lm.training.optimizer import AdamW
from tests.kernels import (
    DTYPES,
    Kernels,
    assert_close,
    assert_parity,
    expert_inputs,
    leaves,
    mixture,
    output_and_gradients,
    qkv,
)

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# --- experts ---------------------------------------------------------------------------------------------------------

ROWS = {"swiglu", "swiglu_backward", "sum_of_tokens"}
TILES = {"amx_experts", "amx_experts_backward", "sum_of_tokens"}

TILED = {
    "one group of 32": ([32], 32, 32),
    "empty experts": ([0, 32, 0, 64, 0], 64, 96),
    "all rows to one expert": ([0, 160, 0, 0], 96, 32),
    "groups of several blocks, the last one short": ([288, 32, 128], 32, 160),
    "sums over more rows than one depth": ([544, 1056], 64, 64),
    "sums over more columns than one depth": ([32, 64], 32, 544),
    "as wide as real models": ([64, 576], 512, 672),
    "no rows": ([0, 0], 32, 64),
}
UNTILED = {
    "D": ([32, 64], 40, 32),
    "F": ([32, 64], 32, 33),
    "D and F, of half a tile": ([32, 64], 48, 16),
    "groups": ([31, 0, 33, 1], 32, 64),
    "nothing is a multiple": ([5, 0, 70], 7, 19),
}


@pytest.mark.parametrize("tail", [0, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*TILED, *UNTILED])
def test_experts(case: str, dtype: torch.dtype, tail: int, kernels: Kernels) -> None:
    """Catches a block, a depth or a panel that is left out or counted twice, and what is past the last end."""
    counts, D, F_ = (TILED | UNTILED)[case]
    inputs, *rows = expert_inputs(counts, tail, D, F_)
    placed, tokens = sum(counts), len(inputs[0]) - tail
    inputs[0][tokens:] = torch.nan
    inputs = leaves(*inputs, dtype=dtype)
    upstream = torch.randn_like(inputs[0])
    upstream[tokens:] = torch.nan
    wide = leaves(*inputs, dtype=torch.float64)
    expected = output_and_gradients(mixture("reference", *rows), wide, upstream)
    actual = output_and_gradients(mixture("cpu", *rows), inputs, upstream)
    assert (actual[0][tokens:] == 0).all() and (actual[1][tokens:] == 0).all() and (actual[2][placed:] == 0).all()
    assert_close(actual, expected, dtype)
    in_rows = ROWS if placed else {"sum_of_tokens"}
    kernels.assert_ran(in_rows, TILES if case in TILED and dtype is BF16 else in_rows)


@pytest.mark.parametrize("case", ["empty experts", "D"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("kernels")
def test_frozen_experts(case: str, dtype: torch.dtype) -> None:
    """Catches a null gradient that is written to, or one whose absence takes another's work along."""
    counts, D, F_ = (TILED | UNTILED)[case]
    inputs, *rows = expert_inputs(counts, 3, D, F_)
    inputs, upstream = leaves(*inputs, dtype=dtype), torch.randn(len(inputs[0]), D).to(dtype)
    output, *gradients = output_and_gradients(mixture("cpu", *rows), inputs, upstream)
    for needs in list(product((False, True), repeat=4))[1:]:
        tensors = [x.detach().requires_grad_(needed) for x, needed in zip(inputs, needs)]
        mixture("cpu", *rows)(*tensors).backward(upstream)
        for tensor, gradient, needed in zip(tensors, gradients, needs):
            assert torch.equal(tensor.grad, gradient) if needed else tensor.grad is None
    with torch.no_grad():
        assert torch.equal(mixture("cpu", *rows)(*inputs), output)


def of_every_row(x_RD: Tensor, end_E: Tensor, gate_up: Tensor, down: Tensor, backend: str) -> Tensor:
    """SwiGLU of rows that are a token each, with weight 1."""
    return expert_mixture(
        x_RD, Grouping(torch.arange(len(x_RD)), x_RD.new_ones(len(x_RD)), end_E), gate_up, down, backend
    )


def gated(x_RD: Tensor, backend: str) -> Tensor:
    """silu(first input) · second input, in the first output, of one expert; the other outputs are 0."""
    D, weights = x_RD.shape[1], torch.zeros(1, 128, x_RD.shape[1])
    weights[0, :64, 0], weights[0, 64:, 1] = 1, 1
    down = F.pad(torch.ones(1, 1, 1), (0, 63, 0, D - 1))
    ends = torch.tensor([len(x_RD)], dtype=torch.int32)
    return of_every_row(x_RD, ends, weights.to(x_RD.dtype), down.to(x_RD.dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_over_the_whole_range(dtype: torch.dtype, kernels: Kernels) -> None:
    """Catches an exponential that is off by more than roundings, clamps that leave something, a lost 1 + gate."""
    both = torch.cat([torch.linspace(0, 104, 10383), torch.logspace(-30, 38, 500), torch.tensor([90.0, 3.3e38, 1e-45])])
    gates = torch.cat([both, -both, torch.zeros(20)])  # a multiple of 32 of them
    x_RD = F.pad(torch.stack((gates, torch.ones_like(gates)), 1), (0, 30)).to(dtype)
    upstream = F.pad(torch.ones(len(gates), 1), (0, 31))
    values, slopes = output_and_gradients(lambda x: gated(x, "cpu"), leaves(x_RD, dtype=dtype), upstream)
    wide = leaves(x_RD, dtype=torch.float64)
    exact, exact_slopes = output_and_gradients(lambda x: gated(x, "reference"), wide, upstream)
    tolerance = 5e-7 if dtype is FP32 else 1e-2
    torch.testing.assert_close(values.double(), exact, rtol=tolerance, atol=2e-36)
    torch.testing.assert_close(slopes.double(), exact_slopes, rtol=tolerance, atol=tolerance)
    kernels.assert_ran(ROWS, TILES if dtype is BF16 else ROWS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [math.inf, -math.inf, math.nan])
@pytest.mark.usefixtures("kernels")
def test_a_gate_that_is_no_number(gate: float, dtype: torch.dtype) -> None:
    """Catches an overflow or NaN that comes out as a number, and one that spreads to the next row."""
    x_R1 = torch.ones(32, 1).index_fill(0, torch.tensor([5]), gate)
    one = torch.ones(1, 64, 1), torch.ones(1, 1, 32)
    ends = torch.tensor([32], dtype=torch.int32)
    for D in (1, 32):  # the second on tiles
        x = F.pad(x_R1, (0, D - 1)).to(dtype)
        weights = (one[0].expand(1, 64, D).contiguous().to(dtype), one[1].expand(1, D, 32).contiguous().to(dtype))
        expected = of_every_row(x, ends, *weights, "reference")
        actual = of_every_row(x, ends, *weights, "cpu")
        assert not torch.isfinite(actual[5]).any()
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=0, equal_nan=True)


# --- attention -------------------------------------------------------------------------------------------------------

SOFTMAX = {"attention_softmax", "attention_softmax_backward"}
AMX_ATTENTION = {"amx_attention", "amx_attention_backward"}
FP32_ATTENTION = {"fp32_attention", "fp32_attention_backward"}
# S, N, G, H
SHAPES = {
    "one block": (32, 4, 4, 32),
    "two queries": (2, 4, 2, 32),
    "a last block of few": (70, 4, 2, 32),
    "two blocks": (64, 4, 2, 64),
    "an odd length, one vector wide": (131, 4, 2, 16),
    "three vectors wide": (40, 2, 1, 48),
    "five blocks, three columns of tiles": (160, 4, 1, 96),
    "long": (512, 4, 2, 32),
    "a length that tiles do not take": (48, 4, 2, 32),
    "an odd length": (33, 2, 1, 32),
    "a width that tiles do not take": (64, 4, 2, 24),
}
MASKS = ["causal", "documents", "window", "documents and window", "holes"]


def masks(masking: str, S: int) -> Tensor | None:
    """[2, S, S]; documents begin at other places in the second row, and nowhere at a multiple of 32."""
    if masking == "causal":
        return None
    if masking == "holes":
        mask_BST = torch.ones(2, S, S, dtype=torch.bool).tril()
        mask_BST[1, 20:, 7:8] = False
        return mask_BST
    place_S = torch.arange(S)
    numbers_BS = torch.stack((place_S // 45, (place_S + 20) // 27))
    documents_BS = numbers_BS if masking.startswith("documents") else torch.zeros_like(numbers_BS)
    return attention_mask(documents_BS, documents_BS, 0, 19 if masking.endswith("window") else None)


def on_cpu(mask_BST: Tensor | None) -> Callable[..., Tensor]:
    """Attention with the kernels that training takes by itself."""
    return lambda q, k, v: attention(q, k, v, mask_BST)


@pytest.mark.parametrize("masking", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(shape: str, masking: str, dtype: torch.dtype, kernels: Kernels) -> None:
    """Catches keys that are hidden or seen by a whole tile, and heads that share keys adding up wrongly."""
    S, N, G, H = SHAPES[shape]
    mask_BST = masks(masking, S)
    reference = lambda q, k, v: attention(q, k, v, mask_BST, "reference")  # noqa: E731
    assert_parity(on_cpu(mask_BST), reference, qkv(2, S, S, N, G, H), dtype)
    tiled = dtype is BF16 and S % 32 == 0 and H % 32 == 0
    fits = tiled if dtype is BF16 else H % 16 == 0
    asked = {"mask_begins"} if fits and mask_BST is not None else set()
    begins = fits and (masking != "holes" or S < 20)  # each query sees all keys from one to itself
    if dtype is BF16:
        kernels.assert_ran(SOFTMAX, asked | (AMX_ATTENTION if begins else SOFTMAX))
    else:
        kernels.assert_ran(asked | (FP32_ATTENTION if begins else set()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("kernels")
def test_attention_without_gradients(dtype: torch.dtype) -> None:
    """Catches an inference path that is another function than the one that was trained."""
    q, k, v = (x.to(dtype) for x in qkv(2, 64, 64, 4, 2, 32))
    with torch.no_grad():
        for masking in MASKS:
            expected = attention(q.double(), k.double(), v.double(), masks(masking, 64))
            assert_close([attention(q, k, v, masks(masking, 64))], [expected], dtype)


@pytest.mark.parametrize("strides", ["transposed", "expanded", "a part"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("kernels")
def test_masks_of_any_strides(strides: str, dtype: torch.dtype) -> None:
    """Catches a kernel that takes the bytes after a mask's first for its second."""
    plain_BST = masks("documents", 64)
    mask_BST = {
        "transposed": plain_BST.mT.contiguous().mT,
        "expanded": plain_BST[:1].expand(2, -1, -1),
        "a part": F.pad(plain_BST, (3, 5, 1, 1))[:, 1:-1, 3:-5],
    }[strides]
    assert_parity(
        on_cpu(mask_BST),
        lambda q, k, v: attention(q, k, v, mask_BST, "reference"),
        qkv(2, 64, 64, 4, 2, 32),
        dtype,
    )


def test_softmax_over_the_whole_range(kernels: Kernels) -> None:
    """Catches an exponential that is off by more than roundings, far from 0, and one query that misses keys."""
    q_BSNH = torch.zeros(1, 1, 1, 256)
    q_BSNH[..., 0] = 16  # undoes the scale
    k_BTGH = torch.zeros(1, 256, 1, 256)
    k_BTGH[0, :, 0, 0] = torch.linspace(-100, 3, 256)[torch.randperm(256)]
    k_BTGH[0, :3, 0, 0] = torch.tensor([-1e4, -3e37, -math.inf])
    v_BTGH = torch.eye(256).view(1, 256, 1, 256)
    k_BTGH[0, 2, 0, 1:] = 0
    for mask in (None, torch.ones(1, 1, 256, dtype=torch.bool)):
        weights = attention(q_BSNH, k_BTGH, v_BTGH, mask, "cpu").flatten()
        exact = k_BTGH[0, :, 0, 0].double().softmax(0)
        torch.testing.assert_close(weights.double(), exact, rtol=1e-5, atol=1e-37)
    kernels.assert_ran({"attention_softmax"})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.usefixtures("kernels")
def test_nan_in_attention_stays_in_its_batch_row(where: str, dtype: torch.dtype) -> None:
    """Catches NaN that a maximum or a mask swallows, and buffers that carry it from one task to the next."""
    inputs = qkv(3, 64, 64, 4, 2, 32)
    clean = output_and_gradients(on_cpu(None), leaves(*inputs, dtype=dtype), torch.ones_like(inputs[0]))
    inputs["qkv".index(where)][1, 40] = torch.nan
    dirty = output_and_gradients(on_cpu(None), leaves(*inputs, dtype=dtype), torch.ones_like(inputs[0]))
    for before, after in zip(clean, dirty):
        assert torch.equal(before[::2], after[::2])
    sees = slice(40, 41) if where == "q" else slice(40, None)
    assert torch.isnan(dirty[0][1, sees]).all()
    if where != "v":  # 0 times NaN is NaN: queries that do not see the value may have it too, as in torch
        assert torch.isfinite(dirty[0][1, :40]).all()
    assert torch.isnan(dirty[1][1, sees]).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_large_scores(dtype: torch.dtype, kernels: Kernels) -> None:
    """Catches a softmax without its maximum, and a scale that is applied on one side of it only."""
    q, k, v = qkv(2, 64, 64, 2, 1, 32)
    # Scores of ±22 times powers of 2 to ±4096 · 22, so that a rounding of them in bf16 decides nothing.
    q = 128 * F.one_hot(torch.tensor(0), 32) * q.sign()
    k = F.one_hot(torch.tensor(0), 32) * k.sign() * 2.0 ** torch.randint(0, 13, (2, 64, 1, 1))
    mask_BST = masks("documents", 64)
    # torch's flash kernel keeps a logarithm, in which large scores leave nothing of the sum.
    backend = "cpu" if kernels.path == "plain" and dtype is FP32 else None
    # Equal keys leave the gradient of q a difference of large numbers that is 0.
    assert_parity(
        lambda k, v: attention(q.to(k.dtype), k, v, mask_BST, backend),
        lambda k, v: attention(q.to(k.dtype), k, v, mask_BST, "reference"),
        [k, v],
        dtype,
    )


# --- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [1, 15, 16, 1003])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(V: int, dtype: torch.dtype, kernels: Kernels) -> None:
    """Catches what a vectorised loop leaves at its end, and ignored labels that count."""
    labels_T = torch.randint(0, V, (41,))
    labels_T[[0, 8, 9, 40]] = -100
    assert_parity(
        lambda hidden, head: linear_cross_entropy(hidden, head, labels_T, chunk_rows=8),
        lambda hidden, head: linear_cross_entropy(hidden, head, labels_T, backend="reference"),
        [torch.randn(41, 24), torch.randn(V, 24) / 4],
        dtype,
    )
    kernels.assert_ran({"cross_entropy"})


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("T", "D", "V"), [(32, 32, 32), (160, 96, 416), (96, 64, 16416)])
def test_cross_entropy_on_tiles(T: int, D: int, V: int, needs: tuple[bool, bool], kernels: Kernels) -> None:
    """Catches blocks, chunks or panels that are mixed up, a gradient that only one of two gets, and ignored labels."""
    labels_T = torch.randint(0, V, (T,))
    labels_T[[0, 8, 9, T - 1]] = -100
    inputs = leaves(torch.randn(T, D), torch.randn(V, D) / 4, dtype=BF16)
    for x, wanted in zip(inputs, needs, strict=True):
        x.requires_grad_(wanted)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    losses = (
        linear_cross_entropy(*inputs, labels_T, chunk_rows=64),
        linear_cross_entropy(*wide, labels_T, backend="reference"),
    )
    for loss in losses:
        (loss / T).backward()
    assert_close(
        [losses[0], *(x.grad for x in inputs if x.requires_grad)],
        [losses[1], *(x.grad for x in wide if x.requires_grad)],
        BF16,
    )
    kernels.assert_ran({"cross_entropy"}, {"amx_cross_entropy"})
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(*inputs, labels_T), losses[0].detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("T", [96, 70])
def test_chunks_are_whole_tiles(T: int, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bound on logits that cuts rows where no tile ends: then only the last rows, if any, are for others."""
    monkeypatch.setitem(_LOGITS_AT_ONCE, 2, 41 * 96)
    inputs = leaves(torch.randn(T, 32), torch.randn(96, 32), dtype=BF16)
    linear_cross_entropy(*inputs, torch.randint(0, 96, (T,))).backward()
    kernels.assert_ran({"cross_entropy"}, {"amx_cross_entropy"} | ({"cross_entropy"} if T % 32 else set()))
    assert kernels.path != "amx" or kernels.calls.count("amx_cross_entropy") == T // 32


@pytest.mark.usefixtures("kernels")
def test_cross_entropy_of_large_logits() -> None:
    """Catches an exponential that overflows, or a gradient that does where the loss does not."""
    hidden_T1 = torch.tensor([[100.0], [-100.0], [1.0], [0.0]])
    head_V1 = torch.arange(-100.0, 101.0).unsqueeze(1)
    labels_T = torch.tensor([200, 3, 100, 0])
    assert_parity(
        lambda hidden, head: linear_cross_entropy(hidden, head, labels_T),
        lambda hidden, head: linear_cross_entropy(hidden, head, labels_T, backend="reference"),
        [hidden_T1, head_V1],
        FP32,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", [0, 3, 20])
@pytest.mark.parametrize("rows", [slice(3, 4), slice(None)])
@pytest.mark.parametrize("logit", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("size", [1, 32])
@pytest.mark.usefixtures("kernels")
def test_cross_entropy_of_logits_that_are_no_numbers(
    size: int, logit: float, rows: slice, label: int, dtype: torch.dtype
) -> None:
    """Catches infinities and NaN that come out as a loss like any other, and -inf that spoils a sound one."""
    head_VD = (torch.linspace(-2, 2, 64).unsqueeze(1) / size).repeat(1, size).to(dtype)
    head_VD[rows] = logit
    with torch.no_grad():
        ones, labels_T = torch.ones(size, size, dtype=dtype), torch.full((size,), label)
        actual = linear_cross_entropy(ones, head_VD, labels_T)
        expected = linear_cross_entropy(ones.double(), head_VD.double(), labels_T, backend="reference")
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("label", [64, 2**40, -1, -101])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_label_outside_the_vocabulary_never_passes(
    dtype: torch.dtype, label: int, training: bool, kernels: Kernels
) -> None:
    """Catches a read beyond the row, and a label such as -1 that is silently left out."""
    hidden, head = (x.to(dtype).requires_grad_(training) for x in (torch.randn(32, 32), torch.randn(64, 32)))
    labels_T = torch.randint(0, 64, (32,))
    labels_T[4] = label
    if kernels.path == "plain":
        with pytest.raises((RuntimeError, IndexError)):
            linear_cross_entropy(hidden, head, labels_T)
    else:
        assert torch.isnan(linear_cross_entropy(hidden, head, labels_T))


# --- projections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("rows", [(32,), (3, 64), (2, 160)])
@pytest.mark.parametrize(("N", "K"), [(32, 32), (64, 256), (544, 96), (96, 1056)])
@pytest.mark.usefixtures("two_threads")
def test_linear(N: int, K: int, rows: tuple[int, ...], needs: tuple[bool, bool], kernels: Kernels) -> None:
    """Catches blocks, depths or panels that are mixed up, and a gradient that only one of two gets."""
    inputs = leaves(torch.randn(*rows, K), torch.randn(N, K) / K**0.5, dtype=BF16)
    results = []
    for function, dtype in ((linear, BF16), (F.linear, torch.float64)):
        own = [x.detach().to(dtype).requires_grad_(needed) for x, needed in zip(inputs, needs, strict=True)]
        y = function(*own)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(BF16).to(dtype))
        results.append([y.detach(), *(x.grad for x in own if x.requires_grad)])
    assert_close(*results, BF16)
    with torch.no_grad():
        assert torch.equal(linear(*inputs), results[0][0])
    kernels.assert_ran(set(), {"amx_linear", "amx_linear_backward"})


@pytest.mark.parametrize(("T", "N", "K"), [(31, 32, 32), (32, 33, 32), (32, 32, 40), (0, 32, 32)])
def test_linear_of_other_sizes(T: int, N: int, K: int, kernels: Kernels) -> None:
    """Catches tiles that reach beyond what there is."""
    reference = lambda x, w: F.linear(x, w)  # noqa: E731
    assert_parity(linear, reference, [torch.randn(T, K), torch.randn(N, K) / K**0.5], BF16)
    kernels.assert_ran(set())


# --- products of our own in fp32 --------------------------------------------------------------------------------------


@pytest.fixture
def own_products(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Takes them on every processor, and for few rows as well."""
    if kernels.path != "native":
        pytest.skip("has none, or the same")
    monkeypatch.setattr(gemm_module, "pays", lambda: True)
    monkeypatch.setattr(gemm_module, "_FEWEST_ROWS", 1)
    return kernels


def laid_out(x: Tensor, by_columns: bool) -> Tensor:
    """The same values as a part of something larger, so that rows or columns lie apart."""
    rows = x.t() if by_columns else x
    larger = torch.full((len(rows) + 2, rows.shape[1] + 3), math.nan)
    part = larger[1:-1, 2:-1].copy_(rows)
    return part.t() if by_columns else part


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("b_by_columns", [False, True])
@pytest.mark.parametrize("a_by_columns", [False, True])
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        (1, 1, 1),
        (5, 7, 3),
        (12, 32, 8),
        (72, 64, 512),
        (73, 33, 513),
        (145, 100, 1030),
        (300, 31, 1),
        (1, 700, 40),
        (20, 4130, 600),
    ],
)
@pytest.mark.usefixtures("two_threads")
def test_gemm(
    M: int, N: int, K: int, a_by_columns: bool, b_by_columns: bool, accumulate: bool, own_products: Kernels
) -> None:
    """Catches tiles, panels, blocks or depths that are mixed up, ends that are left out, and writes beyond them."""
    a, b, before = torch.randn(M, K), torch.randn(K, N), torch.randn(M, N)
    out = laid_out(before, by_columns=False)
    result = gemm(laid_out(a, a_by_columns), laid_out(b, b_by_columns), out, accumulate)
    assert result is out
    assert_close([out], [a.double() @ b.double() + before.double() * accumulate], FP32)
    around = out._base
    assert around is not None and int(around.isfinite().sum()) == M * N
    own_products.assert_ran({"fp32_gemm"})


def test_a_row_has_one_product_in_any_company(own_products: Kernels) -> None:
    """Catches sums whose order depends on the number of threads, on other rows or on what is in them."""
    a, b = torch.randn(200, 1100), torch.randn(1100, 300)
    alone = gemm(a, b)
    torch.set_num_threads(2)
    try:
        assert torch.equal(gemm(a, b), alone)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(gemm(a[50:63], b), alone[50:63])
    a[7, 3], a[8, 4] = math.nan, math.inf
    spoilt = gemm(a, b)
    assert spoilt[7].isnan().all() and not spoilt[8].isfinite().any()
    assert torch.equal(spoilt[9:], alone[9:]) and torch.equal(spoilt[:7], alone[:7])
    own_products.assert_ran({"fp32_gemm"})


@pytest.mark.parametrize("accumulate", [False, True])
def test_what_is_multiplied_by_torch(accumulate: bool, own_products: Kernels) -> None:
    """Catches a kernel that is given what it does not take."""
    whole = torch.randn(40, 60)
    others = {
        "gaps": (whole[:20, ::2], whole[:30, :25], torch.ones(20, 25)),
        "empty": (whole[:, :0], whole[:0], torch.ones(40, 60)),
        "fp64": (whole.double(), whole.double().t(), torch.ones(40, 40, dtype=torch.float64)),
        "a product by columns": (whole, whole.t()[:, :30], torch.ones(30, 40).t()),
        "one number for all": (torch.ones(1, 1).expand(5, 60), whole.t(), torch.ones(5, 40)),
        "what autograd follows": (whole.clone().requires_grad_(), whole.t(), None),
    }
    for a, b, out in others.values():
        expected = a @ b + (accumulate and out is not None)
        torch.testing.assert_close(gemm(a, b, out, accumulate and out is not None), expected)
    for a, b in (whole, whole), (whole[0], whole.t()):
        with pytest.raises(RuntimeError, match="mat"):
            gemm(a, b)
    with pytest.raises(RuntimeError, match="mat"):
        linear(whole, whole[:, 1:])
    own_products.assert_ran(set())
    with pytest.raises(AssertionError):
        gemm(whole, whole.t(), torch.empty(39, 40))


def test_second_derivatives_through_our_products(own_products: Kernels) -> None:
    """Catches a backward whose own gradient is taken for zero, where it should be right or refused."""
    x, w = leaves(torch.randn(70, 40), torch.randn(24, 40), dtype=FP32)

    def of_gradient(function: Callable[..., Tensor]) -> Tensor:
        grad_x = torch.autograd.grad((function(x, w) ** 3).sum(), x, create_graph=True)[0]
        return torch.autograd.grad(grad_x.square().sum(), w)[0]

    torch.testing.assert_close(of_gradient(linear), of_gradient(F.linear))
    own_products.assert_ran({"fp32_gemm"})
    with pytest.raises(RuntimeError):
        of_gradient(lambda x, w: grouped_linear(x, torch.tensor([70], dtype=torch.int32), w[None], "cpu"))
    down = torch.randn(1, 40, 12)
    with pytest.raises(RuntimeError):
        of_gradient(lambda x, w: of_every_row(x, torch.tensor([70], dtype=torch.int32), w[None], down, "cpu"))


def test_few_rows_are_multiplied_by_torch(own_products: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bound that is not kept."""
    monkeypatch.setattr(gemm_module, "_FEWEST_ROWS", 64)
    x, w = torch.randn(64, 40), torch.randn(24, 40)
    linear(x[:63], w)
    gemm(x[:63], w.t())
    own_products.assert_ran(set())
    linear(x, w)
    own_products.assert_ran({"fp32_gemm"})


def test_a_frozen_projection_keeps_no_inputs(own_products: Kernels) -> None:
    """Catches memory that nobody reads."""
    x, w = torch.randn(70, 40, requires_grad=True), torch.randn(24, 40)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        y = linear(x, w)
    assert kept == [(24, 40)]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], w.sum(0).expand(70, 40))
    own_products.assert_ran({"fp32_gemm"})


def test_what_takes_our_products(own_products: Kernels) -> None:
    """Catches a factor that is transposed or swapped where experts, projections or the loss multiply."""
    inputs, token_P, end_E = expert_inputs([31, 0, 33, 1], 5, 40, 24)
    assert_parity(mixture("cpu", token_P, end_E), mixture("reference", token_P, end_E), inputs, FP32)
    own_products.assert_ran({*ROWS, "fp32_gemm"})
    own_products.calls.clear()
    rows_and_weight = [torch.randn(3, 11, 40), torch.randn(24, 40) / 40**0.5]
    assert_parity(linear, F.linear, rows_and_weight, FP32)
    with torch.no_grad():
        torch.testing.assert_close(linear(*rows_and_weight), F.linear(*rows_and_weight))
    by_expert = functools.partial(grouped_linear, group_ends_E=end_E)
    assert_parity(
        lambda x, w: by_expert(x, weight_EOI=w, backend="cpu"),
        lambda x, w: by_expert(x, weight_EOI=w, backend="reference"),
        [torch.randn(65, 40), torch.randn(4, 24, 40)],
        FP32,
    )
    own_products.assert_ran({"fp32_gemm"})
    labels_T = torch.randint(70, (90,))
    assert_parity(
        lambda hidden, head: linear_cross_entropy(hidden, head, labels_T, 32, "chunked"),
        lambda hidden, head: linear_cross_entropy(hidden, head, labels_T, backend="reference"),
        [torch.randn(90, 40), torch.randn(70, 40)],
        FP32,
    )
    own_products.assert_ran({"cross_entropy", "fp32_gemm"})


def test_our_products_are_those_of_processors_without_avx512() -> None:
    """Catches a machine that is not asked, or answers for another."""
    if native.library() is None or not hasattr(torch.cpu, "_is_avx512_supported"):
        pytest.skip("no compiler, or a torch that can not be asked")
    assert gemm_module.pays() == (torch.cpu._is_avx2_supported() and not torch.cpu._is_avx512_supported())


# --- rows of tokens ---------------------------------------------------------------------------------------------------

TOKENS_OF_ROWS = {
    "each twice": [*range(40), *reversed(range(40))],
    "a token without rows": [0, 2, 2, 39, 0],
    "all of one": [7] * 50,
    "none": [],
}


@pytest.mark.parametrize("D", [1, 24, 4099])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS_OF_ROWS)
@pytest.mark.usefixtures("two_threads")
def test_rows_of_tokens(tokens: str, dtype: torch.dtype, D: int, kernels: Kernels) -> None:
    """Catches rows that are summed for another token, or twice."""
    token_P = torch.tensor(TOKENS_OF_ROWS[tokens], dtype=torch.int64)
    of_gather, of_sum = (
        lambda x, backend=None: gather_rows(x, token_P, backend),
        lambda y, backend=None: sum_rows(y, token_P, 40, backend),
    )
    assert_parity(of_gather, functools.partial(of_gather, backend="reference"), [torch.randn(40, D)], dtype)
    assert_parity(of_sum, functools.partial(of_sum, backend="reference"), [torch.randn(len(token_P), D)], dtype)
    kernels.assert_ran({"sum_of_tokens"})


# --- normalisation, rotation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", [5, 16, 33, 512])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(D: int, dtype: torch.dtype, kernels: Kernels) -> None:
    """Catches what a vectorised loop leaves at its end, and rows of zeros or of very large or small numbers."""
    x_RD = torch.randn(37, D)
    x_RD[[3, 4, 5]] *= torch.tensor([0.0, 1e-12, 1e12]).unsqueeze(1)
    assert_parity(
        lambda x, weight: rms_norm(x, weight, 1e-3),
        lambda x, weight: rms_norm(x, weight, 1e-3, "reference"),
        [x_RD, torch.randn(D)],
        dtype,
    )
    kernels.assert_ran({"rms_norm", "rms_norm_backward"})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("kernels")
def test_rms_norm_keeps_what_is_no_number_in_its_row(value: float, dtype: torch.dtype) -> None:
    """Catches NaN that a norm turns into a number, or spreads."""
    x_RD, weight = torch.randn(4, 32).to(dtype), torch.ones(32, dtype=dtype)
    clean = rms_norm(x_RD, weight, 1e-3)
    dirty = rms_norm(x_RD.index_fill(0, torch.tensor([2]), value), weight, 1e-3)
    assert torch.isnan(dirty[2]).all()
    assert torch.equal(dirty[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("H", [8, 32, 34])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary(heads: int, H: int, dtype: torch.dtype, kernels: Kernels) -> None:
    """Catches halves whose length no vector divides, angles of another position, and a wrong sign backward."""
    angles_BSH = (torch.rand(2, 7, H // 2) * 6).repeat(1, 1, 2)
    cos, sin = angles_BSH.cos().to(dtype), angles_BSH.sin().to(dtype)
    assert_parity(
        lambda x: apply_rotary(x, cos, sin),
        lambda x: apply_rotary(x, cos.to(x.dtype), sin.to(x.dtype), "reference"),
        [torch.randn(2, 7, heads, H)],
        dtype,
    )
    kernels.assert_ran({"rotary"})


# --- Muon ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (15,), (3, 4099)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("two_threads")
def test_the_ends_of_a_step(shape: tuple[int, ...], dtype: torch.dtype, kernels: Kernels) -> None:
    """Catches a momentum that is looked ahead before it is updated, and a decay of the updated parameter."""
    gradient, momentum, parameter = torch.randn(3, *shape)
    gradient = gradient.to(dtype)
    mean = 0.95 * momentum.double() + 0.05 * 0.7 * gradient.double()
    ahead = nesterov(gradient, momentum, 0.95, dtype, 0.7)
    assert ahead.dtype == dtype
    assert_close([momentum], [mean], FP32)
    assert_close([ahead], [0.05 * 0.7 * gradient.double() + 0.95 * mean], dtype)
    moved = 0.9 * parameter.double() - 0.02 * ahead.double()
    decay_and_add(parameter, ahead, 0.9, -0.02)
    assert_close([parameter], [moved], FP32)
    kernels.assert_ran({"nesterov", "decay_and_add"} if dtype is BF16 else set())


@pytest.mark.parametrize("of_gradient", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (15,), (3, 4099)])
@pytest.mark.usefixtures("two_threads")
def test_adamw(shape: tuple[int, ...], of_gradient: torch.dtype, kernels: Kernels) -> None:
    """Catches a moment, correction or decay that is not torch's, and a gradient that is not clipped, or misread."""
    parameter = torch.randn(shape)
    twin = parameter.double().requires_grad_()
    options = {"lr": 0.01, "betas": (0.9, 0.9999), "eps": 1e-3, "weight_decay": 0.3}
    ours, theirs = AdamW([parameter], **options, fused=True), torch.optim.AdamW([twin], **options)
    ours.gradient_scale = 0.3
    parameter.grad_dtype = None
    for _ in range(3):
        parameter.grad = torch.randn(shape).to(of_gradient)
        twin.grad = parameter.grad.double() * 0.3
        ours.step()
        theirs.step()
    assert_close([parameter], [twin.detach()], FP32)
    for name, value in theirs.state[twin].items():
        assert_close([ours.state[parameter][name]], [value], FP32)
    kernels.assert_ran({"adamw"})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("two_threads")
def test_squared_norms(dtype: torch.dtype, kernels: Kernels) -> None:
    """Catches parts of a sum that two threads leave out or take twice, sums that are rounded, and what is infinite."""
    gradients = [torch.randn(size).to(dtype) for size in (1, 4095, 4096, 50_001)]
    gradients.append(torch.tensor([1.0, math.inf]).to(dtype))
    expected = torch.stack([gradient.double().square().sum() for gradient in gradients])
    torch.testing.assert_close(squared_norms(gradients), expected, rtol=1e-5, atol=0)
    kernels.assert_ran({"sum_of_squares"})


def test_updates_of_other_types(kernels: Kernels) -> None:
    """Catches bf16 read and written as if it were fp32, beyond its end."""
    gradient, momentum, parameter, direction = torch.randn(4, 40).to(BF16)
    moved = 0.5 * parameter.double() + direction.double()
    decay_and_add(parameter, direction, 0.5, 1.0)
    assert_close([parameter], [moved], BF16)
    mean = 0.5 * momentum.double() + 0.5 * gradient.double()
    assert_close([nesterov(gradient, momentum, 0.5, BF16), momentum], [(mean + gradient.double()) / 2, mean], BF16)
    kernels.assert_ran(set())


@pytest.mark.parametrize("shape", [(32, 32), (64, 160), (160, 64), (5, 96, 64), (512, 512), (2, 3, 48, 32), (544, 512)])
@pytest.mark.usefixtures("two_threads")
def test_newton_schulz(shape: tuple[int, ...], kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a block that is not mirrored or is a step old, and a matrix that another thread writes over."""
    monkeypatch.setattr(newton_schulz, "iteration_dtype", lambda device: BF16)
    values = torch.linspace(0.5, 2, min(shape[-2:]), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    g = (u * values @ vh).float()
    x = values / values.norm()
    a, b, c = newton_schulz.COEFFICIENTS
    for _ in range(5):
        x = a * x + b * x**3 + c * x**5
    expected = u * x @ vh
    actual = newton_schulz.orthogonalize(g)
    assert actual.dtype == BF16 and actual.shape == shape
    assert (actual.double() - expected).norm() < 0.02 * expected.norm()
    assert torch.equal(newton_schulz.orthogonalize(g), actual)
    fits = shape[-1] % 32 == shape[-2] % 32 == 0 and shape[-1] * shape[-2] <= 2**18
    kernels.assert_ran(set(), {"amx_newton_schulz"} if fits else set())


# --- several threads -------------------------------------------------------------------------------------------------

ANGLES = torch.linspace(0, 50, 2 * 256 * 16).view(2, 256, 16).repeat(1, 1, 2)
LABELS = torch.arange(512) % 100
ENDS = torch.tensor([288, 288, 512], dtype=torch.int32)
SEVERAL: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "experts": (
        lambda backend, *x: of_every_row(x[0], ENDS, *x[1:], backend or "cpu"),
        [(512, 64), (3, 192, 64), (3, 64, 96)],
    ),
    "attention": (
        lambda backend, *x: attention(*x, masks("documents", 256), backend),
        [(2, 256, 4, 32), (2, 256, 2, 32), (2, 256, 2, 32)],
    ),
    "loss": (lambda backend, *x: linear_cross_entropy(*x, LABELS, backend=backend), [(512, 32), (100, 32)]),
    "loss on tiles": (lambda backend, *x: linear_cross_entropy(*x, LABELS, backend=backend), [(512, 32), (128, 32)]),
    "rms norm": (lambda backend, *x: rms_norm(*x, 1e-3, backend), [(1024, 64), (64,)]),
    "rotary": (
        lambda backend, x: apply_rotary(x, ANGLES.cos().to(x.dtype), ANGLES.sin().to(x.dtype), backend),
        [(2, 256, 4, 32)],
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", SEVERAL)
@pytest.mark.usefixtures("kernels", "two_threads")
def test_two_threads(kernel: str, dtype: torch.dtype) -> None:
    """Catches threads that write one place, rows that fall between two, and sums whose order is left to chance."""
    function, shapes = SEVERAL[kernel]
    inputs = leaves(*(torch.randn(shape) / max(1, len(shape) - 1) for shape in shapes), dtype=dtype)
    upstream = torch.randn_like(function("reference", *inputs))
    wide = leaves(*inputs, dtype=torch.float64)
    expected = output_and_gradients(lambda *x: function("reference", *x), wide, upstream)
    first = output_and_gradients(lambda *x: function(None, *x), inputs, upstream)
    assert_close(first, expected, dtype)
    for _ in range(5):
        again = output_and_gradients(lambda *x: function(None, *x), inputs, upstream)
        assert all(map(torch.equal, first, again))


# --- together --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_recomputation_changes_no_bit(dtype: torch.dtype, kernels: Kernels) -> None:
    """Catches a kernel that writes over what a checkpoint keeps, which torch sees of its own operators only."""
    config = ModelConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.1,
    )
    model = CausalLM(config).to(dtype)
    initialize(model, 0)
    tokens_BS, documents_BS = torch.randint(96, (8, 64)), (torch.arange(64) // 20).expand(8, -1)

    def gradients(mode: Recompute) -> list[Tensor]:
        model.model.recompute = mode
        hidden_TD = model(tokens_BS, document_ids_BS=documents_BS).hidden_BSD.flatten(0, 1)
        loss = linear_cross_entropy(hidden_TD, model.lm_head.weight, tokens_BS.roll(-1).flatten())
        return list(torch.autograd.grad(loss, list(model.parameters())))

    kept = gradients(Recompute.none)
    if kernels.path == "amx" and dtype is BF16:
        assert set(kernels.calls) >= TILES | AMX_ATTENTION
    for mode in (Recompute.selective, Recompute.full):
        assert all(map(torch.equal, gradients(mode), kept))
