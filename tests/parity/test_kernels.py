"""Every kernel backend against its slow reference: outputs and all gradients."""

import contextlib
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moe_lm.kernels.attention import attention, attention_mask
from moe_lm.kernels.combine import gather_rows, sum_rows
from moe_lm.kernels.experts import expert_mixture
from moe_lm.kernels.grouped_linear import grouped_linear
from moe_lm.kernels.grouping import ROW_ALIGNMENT, Grouping, grouped_mm_takes, row_alignment
from moe_lm.kernels.loss import linear_cross_entropy
from moe_lm.kernels.newton_schulz import orthogonalize
from moe_lm.kernels.normalization import rms_norm
from moe_lm.kernels.rotary import apply_rotary
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

CPU = torch.device("cpu")


# --- experts ---------------------------------------------------------------------------------------------------------

GROUPS = {
    "random": [3, 5, 1, 7],
    "all rows to one expert": [0, 0, 16, 0],
    "empty first and last expert": [0, 4, 9, 0],
    "one row": [0, 1, 0, 0],
    "zero rows": [0, 0, 0, 0],
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", "grouped", "cpu", None])
@pytest.mark.parametrize("tail", [0, 3])
def test_experts_match_the_fp64_reference(backend: str, dtype: torch.dtype, counts: list[int], tail: int) -> None:
    """Catches a wrong group boundary, an unwritten weight gradient of an empty expert, garbage past the last end, and a
    row of another token."""
    inputs, *rows = expert_inputs(counts, tail)
    assert_parity(mixture(backend, *rows), mixture("reference", *rows), inputs, dtype)


SIZES = [(36, torch.bfloat16, False), (40, torch.bfloat16, True), (33, torch.float32, False), (36, torch.float32, True)]


@pytest.mark.parametrize(("size", "dtype", "fits"), SIZES)
def test_sizes_that_grouped_mm_refuses_are_known(size: int, dtype: torch.dtype, fits: bool) -> None:
    """Catches a model that its configuration allows, and that a GPU's products of groups can not take."""
    for D, F_ in ((size, 16), (16, size)):
        inputs, *rows = expert_inputs([2, 3], D=D, F_=F_)
        inputs = leaves(*inputs, dtype=dtype)
        assert grouped_mm_takes(*inputs[2:]) is fits
        with contextlib.nullcontext() if fits else pytest.raises(RuntimeError):
            mixture("grouped", *rows)(*inputs)


def test_the_expert_reference_is_the_formula() -> None:
    """Catches a swap of gate and up, or of the weights' axes, that all backends would share."""
    (x_TD, weight_P, gate_up, down), token_P, end_E = expert_inputs([2, 3])
    expected_TD = torch.zeros_like(x_TD)
    for token, weight, expert in zip(token_P.tolist(), weight_P, [0, 0, 1, 1, 1]):
        gate, up = gate_up[expert, :24] @ x_TD[token], gate_up[expert, 24:] @ x_TD[token]
        expected_TD[token] += weight * (down[expert] @ (gate * torch.sigmoid(gate) * up))
    y_TD = expert_mixture(x_TD, Grouping(token_P, weight_P, end_E), gate_up, down, "reference")
    torch.testing.assert_close(y_TD, expected_TD)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("backend", ["reference", "grouped", "cpu"])
def test_rows_past_the_last_end_count_for_nothing_even_if_they_hold_nan(backend: str) -> None:
    """Catches uninitialised memory leaking out of grouped GEMMs, forward or backward."""
    inputs, *rows = expert_inputs([3, 5], tail=4)
    inputs[0][4:] = torch.nan
    inputs = leaves(*inputs, dtype=torch.float32)
    y_TD, grad_x, *gradients = output_and_gradients(mixture(backend, *rows), inputs, torch.ones(8, 16))
    assert (y_TD[4:] == 0).all() and (grad_x[4:] == 0).all() and (gradients[0][8:] == 0).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["grouped", "cpu"])
def test_rows_that_fill_up_change_nothing(backend: str, dtype: torch.dtype) -> None:
    """Catches filling, which is of any token with weight 0, that adds to a gradient or to a token; up to whole tiles,
    whose kernels then run."""
    (x_TD, weight_P, *matrices), token_P, end_E = expert_inputs([3, 5], 0, 32, 64)
    real = torch.tensor([0, 1, 2, 32, 33, 34, 35, 36])
    filled_token_P = torch.ones(64, dtype=torch.int64).index_copy(0, real, token_P)
    filled_weight_P = torch.zeros(64).index_copy(0, real, weight_P)
    upstream, ends = torch.randn(4, 32).to(dtype), torch.tensor([32, 64], dtype=torch.int32)
    inputs = leaves(x_TD, weight_P, *matrices, dtype=dtype)
    wide = leaves(*inputs, dtype=torch.float64)
    exact = output_and_gradients(mixture("reference", token_P, end_E), wide, upstream)
    inputs = leaves(x_TD, filled_weight_P, *matrices, dtype=dtype)
    filled = output_and_gradients(mixture(backend, filled_token_P, ends), inputs, upstream)
    assert_close([*filled[:2], filled[2][real], *filled[3:]], exact, dtype)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("backend", ["grouped", "cpu"])
def test_experts_in_part(backend: str) -> None:
    """Catches a backward that needs frozen matrices (LoRA) or a frozen input to require gradients."""
    inputs, *rows = expert_inputs([3, 5])
    upstream = torch.ones(4, 16)
    expected = output_and_gradients(mixture("reference", *rows), leaves(*inputs, dtype=torch.float32), upstream)
    for index in range(4):
        tensors = [tensor.detach().requires_grad_(position == index) for position, tensor in enumerate(inputs)]
        mixture(backend, *rows)(*tensors).backward(upstream)
        gradient = tensors[index].grad
        assert gradient is not None
        assert_close([gradient], [expected[index + 1]], torch.float32)


@pytest.mark.usefixtures("kernels")
def test_experts_compose_with_selective_checkpointing() -> None:
    """Catches buffers kept outside save_for_backward, which a checkpoint would neither drop nor recompute."""
    inputs, *rows = expert_inputs([3, 0, 5])
    upstream = torch.randn(4, 16)

    def block(x: Tensor, *others: Tensor) -> Tensor:
        return x + mixture("cpu", *rows)(x.sigmoid().topk(16, sorted=False).values, *others)

    def policy(context: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        saved = operator is torch.ops.aten.topk.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    def checkpointed(*tensors: Tensor) -> Tensor:
        context = partial(create_selective_checkpoint_contexts, policy)
        output: Tensor = checkpoint(block, *tensors, use_reentrant=False, context_fn=context)
        return output

    plain = output_and_gradients(block, leaves(*inputs, dtype=torch.float32), upstream)
    again = output_and_gradients(checkpointed, leaves(*inputs, dtype=torch.float32), upstream)
    for ours, expected in zip(again, plain, strict=True):
        assert torch.equal(ours, expected)


def test_the_mixture_keeps_only_the_gate_up_product_of_its_rows() -> None:
    """Catches a second tensor as large as the rows that waits for the backward pass."""
    inputs, *rows = expert_inputs([30, 34])
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()), lambda t: t):
        mixture("cpu", *rows)(*leaves(*inputs, dtype=torch.float32))
    matrices = [inputs[2].numel(), inputs[3].numel()]
    assert sorted(sizes) == sorted([32 * 16, 64, 64, 2, *matrices, 64 * 48])


def test_row_alignment_pads_little_and_never_a_decoding_step(kernels: Kernels) -> None:
    """Catches a rule that pads two rows to a thousand, or many experts to several times their rows."""
    bf16 = torch.bfloat16
    assert row_alignment(CPU, torch.float32, 8192) == 1
    assert row_alignment(torch.device("cuda"), bf16, 8192) == 1
    assert row_alignment(CPU, bf16, 2) == 1
    assert row_alignment(CPU, bf16, 8192) == (32 if kernels.path == "amx" else ROW_ALIGNMENT)
    for experts in (8, 64):
        for rows in (1024, 4096, 65536):
            assert row_alignment(CPU, bf16, rows, experts) * experts / 2 <= rows / 4


# --- a linear map of each expert -------------------------------------------------------------------------------------


def linear_inputs(counts: list[int], tail: int, inputs: int = 16, outputs: int = 8) -> tuple[list[Tensor], Tensor]:
    """Rows and experts' matrices, and where each expert's rows end."""
    rows, E = sum(counts) + tail, len(counts)
    tensors = [torch.randn(rows, inputs), torch.randn(E, outputs, inputs) / inputs**0.5]
    return tensors, torch.tensor(counts).cumsum(0).to(torch.int32)


def of_groups(backend: str | None, end_E: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, weight: grouped_linear(x, end_E, weight, backend)


@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", "grouped", "cpu", None])
@pytest.mark.parametrize("tail", [0, 3])
def test_grouped_linear_matches_the_fp64_reference(
    tail: int, backend: str | None, dtype: torch.dtype, counts: list[int]
) -> None:
    """Catches an adapter's map that an expert takes from another, and a gradient left unwritten where one has no rows.
    What is past the last end counts for nothing, even if it is not a number."""
    inputs, end_E = linear_inputs(counts, tail)
    inputs[0][sum(counts) :] = torch.nan
    assert_parity(of_groups(backend, end_E), of_groups("reference", end_E), inputs, dtype)


def test_the_reference_of_grouped_linear_is_the_formula() -> None:
    """Catches axes swapped in what all backends are compared with."""
    (x_RI, weight_EOI), end_E = linear_inputs([2, 0, 3], 1)
    expected = [weight_EOI[expert] @ x for x, expert in zip(x_RI, [0, 0, 2, 2, 2])]
    y_RO = of_groups("reference", end_E)(x_RI, weight_EOI)
    torch.testing.assert_close(y_RO, torch.stack([*expected, torch.zeros(8)]))


@pytest.mark.parametrize("backend", ["grouped", "cpu"])
def test_grouped_linear_in_part(backend: str) -> None:
    """Catches a backward that needs a frozen matrix (the base of an adapter) or frozen rows to require gradients."""
    inputs, end_E = linear_inputs([3, 0, 5], 2)
    upstream = torch.ones(10, 8)
    expected = output_and_gradients(of_groups("reference", end_E), leaves(*inputs, dtype=torch.float32), upstream)
    for index in range(2):
        tensors = [tensor.detach().requires_grad_(position == index) for position, tensor in enumerate(inputs)]
        of_groups(backend, end_E)(*tensors).backward(upstream)
        gradient = tensors[index].grad
        assert gradient is not None
        assert_close([gradient], [expected[index + 1]], torch.float32)


# --- rows of tokens ---------------------------------------------------------------------------------------------------


def test_an_unknown_backend_is_refused() -> None:
    """Catches a misspelt name that is taken for the default."""
    inputs, *rows = expert_inputs([3])
    with pytest.raises(ValueError, match="choose reference, grouped, cpu or triton"):
        mixture("other", *rows)(*inputs)
    with pytest.raises(ValueError, match="choose reference, native or triton"):
        sum_rows(torch.ones(3, 2), torch.arange(3), 3, "other")


@pytest.mark.usefixtures("kernels")
def test_gathering_and_summing_are_each_other_s_gradient() -> None:
    """Catches a row of another token, in fp64 as well, which native code does not take."""
    token_P = torch.tensor([3, 0, 3, 1, 0, 3])
    for dtype in (torch.float32, torch.float64):
        x_TD, y_PD = leaves(torch.randn(5, 7), torch.randn(6, 7), dtype=dtype)
        rows_PD, sums_TD = gather_rows(x_TD, token_P), sum_rows(y_PD, token_P, 5)
        assert torch.equal(rows_PD, x_TD[token_P])
        torch.testing.assert_close(sums_TD, torch.zeros(5, 7, dtype=dtype).index_add(0, token_P, y_PD))
        of_rows, of_sums = torch.randn(6, 7).to(dtype), torch.randn(5, 7).to(dtype)
        rows_PD.backward(of_rows)
        sums_TD.backward(of_sums)
        torch.testing.assert_close(x_TD.grad, torch.zeros(5, 7, dtype=dtype).index_add(0, token_P, of_rows))
        assert torch.equal(y_PD.grad, of_sums[token_P])


# --- attention -------------------------------------------------------------------------------------------------------


def test_attention_mask_against_the_definition() -> None:
    """Catches an off-by-one in the window, a later key, another document, or a misplaced offset of cached decoding."""
    documents_BT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [5, 5, 5, 5, 5, 5, 6]])
    for window in (None, 1, 2, 3):
        for offset in (0, 4, 6):
            mask = attention_mask(documents_BT[:, offset:], documents_BT, offset, window)
            assert mask.shape == (2, 7 - offset, 7) and mask.dtype == torch.bool
            for row, query, key in torch.cartesian_prod(torch.arange(2), torch.arange(7 - offset), torch.arange(7)):
                i, j = int(query) + offset, int(key)
                visible = j <= i and bool(documents_BT[row, i] == documents_BT[row, j])
                if window is not None:
                    visible = visible and j > i - window
                assert bool(mask[row, query, key]) == bool(visible)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("masking", ["causal", "documents", "window", "decode", "one query"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", "sdpa", "cpu", None])
def test_attention_matches_the_fp64_reference(
    backend: str, dtype: torch.dtype, masking: str, heads: tuple[int, int]
) -> None:
    """Catches heads paired with the wrong keys, a lost scale, a mask that leaks, a decode offset off by one."""
    T, queries = 10, {"decode": 4, "one query": 1}.get(masking, 10)
    documents_BT = torch.tensor([[0] * 4 + [1] * 6, [0] * 7 + [1] * 3, [0] * 10])
    mask = None
    if masking != "causal":
        window = 3 if masking == "window" else None
        mask = attention_mask(documents_BT[:, T - queries :], documents_BT, T - queries, window)
    inputs = qkv(3, queries, T, *heads, 8)
    assert_parity(
        lambda q, k, v: attention(q, k, v, mask, backend),
        lambda q, k, v: attention(q, k, v, mask, "reference"),
        inputs,
        dtype,
    )


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("S", [128, 129, 300])
def test_explicit_attention_in_several_blocks_of_queries(S: int) -> None:
    """Catches keys dropped, or gradients of keys counted once, where queries span blocks of 128."""
    documents = torch.arange(S).expand(2, S) // 140
    mask = attention_mask(documents, documents)
    for chosen in (None, mask):
        assert_parity(
            lambda q, k, v, chosen=chosen: attention(q, k, v, chosen, "cpu"),
            lambda q, k, v, chosen=chosen: attention(q, k, v, chosen, "reference"),
            qkv(2, S, S, 4, 2, 8),
            torch.float32,
        )


@pytest.mark.usefixtures("kernels")
def test_explicit_attention_in_several_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows of a batch that read or write another chunk's slice."""
    monkeypatch.setattr("moe_lm.kernels.attention_cpu._SCORES_AT_ONCE", 2 * 10 * 10 * 4)
    assert_parity(
        lambda q, k, v: attention(q, k, v, None, "cpu"),
        lambda q, k, v: attention(q, k, v, None, "reference"),
        qkv(5, 10, 10, 4, 2, 8),
        torch.float32,
    )


@pytest.mark.usefixtures("kernels")
def test_attention_takes_strided_inputs() -> None:
    """Catches a `view` on q, k, v that were split out of one fused projection."""
    fused = torch.randn(2, 6, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    q, k, v = fused.split((4, 2, 2), dim=2)
    attention(q, k, v, None, "cpu").float().sum().backward()
    assert fused.grad is not None and torch.isfinite(fused.grad).all()


# --- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunked_cross_entropy_matches_the_fp64_reference(dtype: torch.dtype, tokens: int) -> None:
    """Catches a lost last chunk, ignored labels that count, a gradient not scaled by what comes from above."""
    labels_T = torch.randint(0, 50, (tokens,))
    labels_T[::3] = -100
    inputs = [torch.randn(tokens, 16), torch.randn(50, 16) / 4]
    assert_parity(
        lambda hidden, head: linear_cross_entropy(hidden, head, labels_T, chunk_rows=8, backend="chunked") * 0.3,
        lambda hidden, head: linear_cross_entropy(hidden, head, labels_T, backend="reference") * 0.3,
        inputs,
        dtype,
    )
    with torch.no_grad():
        hidden, head = (tensor.to(dtype) for tensor in inputs)
        loss = linear_cross_entropy(hidden, head, labels_T, chunk_rows=8)
        expected = linear_cross_entropy(hidden.double(), head.double(), labels_T, backend="reference")
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert_close([loss], [expected], dtype)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_cross_entropy_of_ignored_labels_only_is_zero(backend: str) -> None:
    """Catches NaN from a mean over nothing, and gradients from padding."""
    inputs = leaves(torch.randn(9, 16), torch.randn(50, 16), dtype=torch.float32)
    labels_T = torch.full((9,), -100)
    results = output_and_gradients(
        lambda hidden, head: linear_cross_entropy(hidden, head, labels_T, 4, backend), inputs, torch.tensor(1.0)
    )
    assert all((result == 0).all() for result in results)


@pytest.mark.usefixtures("kernels")
def test_second_derivatives_are_refused() -> None:
    """Catches a backward that autograd takes for a constant: a wrong number instead of an error."""
    (hidden,) = leaves(torch.randn(9, 16), dtype=torch.float32)
    q, k, v = leaves(*qkv(1, 4, 4, 2, 1, 16), dtype=torch.float32)
    labels_T = torch.arange(9)
    for value, of in (
        (linear_cross_entropy(hidden, torch.randn(50, 16), labels_T, 4).square(), hidden),
        (attention(q, k, v, None, "cpu").square().sum(), q),
    ):
        (slope,) = torch.autograd.grad(value, of, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.square().sum().backward()


@pytest.mark.usefixtures("kernels")
def test_cross_entropy_adds_to_a_tied_embedding() -> None:
    """Catches a head gradient that replaces, or is replaced by, that of the lookup when both are one parameter."""
    tokens, labels_T = torch.randint(0, 50, (12,)), torch.randint(0, 50, (12,))

    def loss(table: Tensor, backend: str) -> Tensor:
        return linear_cross_entropy(F.embedding(tokens, table), table, labels_T, 5, backend)

    table = torch.randn(50, 16) / 4
    assert_parity(partial(loss, backend="chunked"), partial(loss, backend="reference"), [table], torch.float32)


# --- element-wise and Newton–Schulz ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    """Catches a weight multiplied before the cast, or an epsilon in the wrong place."""
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    module = modeling.MixtralRMSNorm(32, eps=1e-3).to(dtype)
    torch.nn.init.normal_(module.weight)
    x = torch.randn(5, 3, 32).to(dtype)
    torch.testing.assert_close(rms_norm(x, module.weight, 1e-3, "reference"), module(x), rtol=0, atol=0)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", None])
def test_rms_norm_matches_the_fp64_reference(backend: str, dtype: torch.dtype) -> None:
    """Catches a backward without its projection term, or one that adds up thousands of rows in bf16."""
    assert_parity(
        lambda x, weight: rms_norm(x, weight, 1e-3, backend),
        lambda x, weight: rms_norm(x, weight, 1e-3, "reference"),
        [torch.randn(5, 700, 32), torch.randn(32)],
        dtype,
    )


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_is_that_of_transformers(dtype: torch.dtype) -> None:
    """Catches interleaved in place of half rotation, and a wrong sign in the backward."""
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    angles = torch.rand(2, 7, 4).repeat(1, 1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def theirs(x: Tensor) -> Tensor:
        rotated: Tensor = modeling.apply_rotary_pos_emb(x, x, cos.to(x.dtype), sin.to(x.dtype), unsqueeze_dim=2)[0]
        return rotated

    assert_parity(lambda x: apply_rotary(x, cos, sin), theirs, [torch.randn(2, 7, 3, 8)], dtype)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40), (3, 48, 32), (2, 3, 16, 24)])
def test_orthogonalize_brings_singular_values_near_one(shape: tuple[int, ...]) -> None:
    """Catches wrong coefficients, a missing transpose, or one norm for a whole stack; Muon aims at [0.7, 1.2]."""
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
    assert values.min() > 0.3 and values.max() < 1.35
    assert 0.6 < values.median() < 1.25


def test_orthogonalize_keeps_the_singular_vectors() -> None:
    """Catches an iteration whose singular values are right and whose directions are not."""
    u, _, v = torch.linalg.svd(torch.randn(48, 32), full_matrices=False)
    g = u @ torch.diag(torch.linspace(0.5, 2, 32)) @ v
    projected = u.T @ orthogonalize(g).float() @ v.T
    off_diagonal = projected - torch.diag(projected.diagonal())
    assert projected.diagonal().min() > 0.5 and off_diagonal.abs().max() < 0.1


def test_orthogonalize_takes_each_expert_by_itself_whatever_its_scale() -> None:
    """Catches a large expert's norm shrinking a small one, and NaN from a gradient of zero or near it."""
    stack = torch.randn(9, 24, 16)
    stack *= torch.tensor([1e-12, 1.0, 0.0, 1e6, 1e-18, 1e-23, 1e-26, 1e-38, 1e30]).view(-1, 1, 1)
    together = orthogonalize(stack)
    assert (together[2] == 0).all() and together.isfinite().all()
    for expert in range(4):
        torch.testing.assert_close(together[expert], orthogonalize(stack[expert]), rtol=0, atol=1e-2)
    torch.testing.assert_close(together[4], orthogonalize(stack[4] * 1e18), rtol=0, atol=5e-2)
    assert torch.linalg.svdvals(together[[0, 1, 3]].float()).median() > 0.6
