"""Every Triton kernel against the fp64 reference, output and gradients: in Triton's interpreter, or compiled on a GPU.

Sizes are small, for the interpreter takes a millisecond for a program; blocks are made small with them, so that what
large rows are cut into happens here too.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lm.kernels.combine import gather_rows, sum_rows
from moe_lm.kernels.experts import expert_mixture
from moe_lm.kernels.loss import linear_cross_entropy
from moe_lm.kernels.normalization import rms_norm
from moe_lm.kernels.rotary import apply_rotary
from moe_lm.kernels.triton import launch
from moe_lm.model.config import ModelConfig, Recompute
from moe_lm.model.decoder import CausalLM
from moe_lm.model.dispatch import CapacityDispatcher, LocalDispatcher, TokenDispatcher
from moe_lm.model.initialization import initialize
from moe_lm.model.router import Assignments
from tests.kernels import DTYPES, TOLERANCE, assert_close, assert_parity, expert_inputs, mixture

pytest.importorskip("triton")
from moe_lm.kernels.triton import cross_entropy, experts, normalization

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    """New tensors are where the kernels run."""
    with torch.device(DEVICE):
        yield


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a few dozen values take several blocks, and a few programs go through all rows."""
    monkeypatch.setattr(experts, "_BLOCK", 16)
    monkeypatch.setattr(experts, "_PROGRAMS", 2)
    monkeypatch.setattr(normalization, "_PROGRAMS", 2)
    monkeypatch.setattr(cross_entropy, "_LARGEST_BLOCK", 16)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The kernels are chosen as on a GPU; the shapes that they were chosen for."""
    shapes = []

    def supports(*tensors: Tensor) -> bool:
        alike = all(t.dtype is tensors[0].dtype and t.is_contiguous() and t.numel() > 0 for t in tensors)
        if alike and tensors[0].dtype in DTYPES:
            shapes.append(tensors[0].shape)
        return alike and tensors[0].dtype in DTYPES

    monkeypatch.setattr(launch, "supports", supports)
    monkeypatch.setattr("moe_lm.model.dispatch._FEW_ROWS", 0)  # which a CPU sorts in another way than a GPU
    return shapes


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (5, 7), (2, 3, 48)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Catches a mean over the block instead of the row, and rows that no program or two programs count."""
    inputs = [torch.randn(shape) * 3, 1 + torch.randn(shape[-1]) / 10]
    ours, reference = (lambda x, weight, b=b: rms_norm(x, weight, 1e-5, b) for b in ("triton", "reference"))
    assert_parity(ours, reference, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes_BSNH", [(1, 1, 1, 2), (2, 3, 3, 6), (1, 2, 4, 16)])
def test_rotary(sizes_BSNH: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Catches halves that are exchanged, a rotation the wrong way round, and the angle of another token."""
    B, S, _, H = sizes_BSNH
    angles_BSH = torch.rand(B, S, H // 2).repeat(1, 1, 2) * 6
    cos_BSH, sin_BSH = angles_BSH.cos().to(dtype), angles_BSH.sin().to(dtype)
    ours, reference = (
        lambda x, b=b: apply_rotary(x, cos_BSH.to(x.dtype), sin_BSH.to(x.dtype), b) for b in ("triton", "reference")
    )
    assert_parity(ours, reference, [torch.randn(sizes_BSNH)], dtype)


GROUPS = {
    "random": [3, 5, 1, 7],
    "all rows to one expert": [0, 0, 16, 0],
    "empty first and last expert": [0, 4, 9, 0],
    "one row": [0, 1, 0, 0],
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS.keys())
def test_experts(counts: list[int], tail: int, dtype: torch.dtype) -> None:
    """Catches gate for up, an end that is off by one, garbage past it, and gradients of experts without rows."""
    inputs, *rows = expert_inputs(counts, tail)
    assert_parity(mixture("triton", *rows), mixture("reference", *rows), inputs, dtype)


@pytest.mark.usefixtures("small_blocks")
def test_rows_past_the_last_end_may_hold_nan() -> None:
    """Catches uninitialised memory that leaves the grouped products, forward or backward."""
    inputs, *rows = expert_inputs([3, 0, 5], tail=4)
    inputs[0][4:] = torch.nan
    leaves = [tensor.requires_grad_() for tensor in inputs]
    y_TD = mixture("triton", *rows)(*leaves)
    upstream = torch.ones_like(y_TD)
    upstream[4:] = torch.nan
    y_TD.backward(upstream)
    of_x, of_weight, *of_matrices = [leaf.grad for leaf in leaves]
    assert (y_TD[4:] == 0).all() and (of_x[4:] == 0).all() and (of_weight[8:] == 0).all()
    assert all(torch.isfinite(gradient).all() for gradient in (of_x, of_weight, *of_matrices))
    assert all((gradient[1] == 0).all() for gradient in of_matrices)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("trained", [0, 1, 2, 3])
def test_experts_in_part(trained: int) -> None:
    """Catches a backward that needs frozen weights (LoRA) or a frozen input to require gradients."""
    inputs, *rows = expert_inputs([3, 5])
    results = []
    for backend in ("triton", "reference"):
        tensors = [tensor.clone().requires_grad_(index == trained) for index, tensor in enumerate(inputs)]
        mixture(backend, *rows)(*tensors).backward(torch.ones(4, 16))
        results.append([tensor.grad for tensor in tensors])
    assert [gradient is None for gradient in results[0]] == [gradient is None for gradient in results[1]]
    assert_close([results[0][trained]], [results[1][trained]], torch.float32)


def test_kept_zeros_of_an_empty_expert() -> None:
    """Catches the kernel that zeroes gradients of experts without rows doing nothing, or too much."""
    weights = torch.ones(4, 5, 300)
    experts.zero_empty_groups(weights, torch.tensor([0, 2, 2, 3], dtype=torch.int32))
    assert weights.sum(dim=(1, 2)).tolist() == [0, 1500, 0, 1500]


TOKENS = {"random": [0, 1, 3, 3, 0, 1], "one row": [2], "all of one token": [0, 0, 0], "last without": [1, 1, 0]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 32])
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS.keys())
def test_rows_to_experts_and_back(tokens: list[int], width: int, dtype: torch.dtype) -> None:
    """Catches a row of another token, and a token without rows that is not zero."""
    token_P, T = torch.tensor(tokens), 5
    ours, reference = (lambda x, b=b: gather_rows(x, token_P, b) for b in ("triton", "reference"))
    assert_parity(ours, reference, [torch.randn(T, width)], dtype)
    ours, reference = (lambda y, b=b: sum_rows(y, token_P, T, b) for b in ("triton", "reference"))
    assert_parity(ours, reference, [torch.randn(len(tokens), width)], dtype)


ROUTINGS = {
    "random": [[0, 2], [1, 3], [3, 0], [2, 1], [0, 3]],
    "all tokens to the same experts": [[1, 3]] * 5,
    "an expert without tokens": [[0, 1], [1, 0], [1, 3], [3, 0], [0, 1]],
    "one token": [[2, 0]],
}


@pytest.mark.usefixtures("small_blocks", "chosen")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capacity", [None, 0.7, 2.5])
@pytest.mark.parametrize("experts_TK", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_a_mixture(experts_TK: list[list[int]], capacity: float | None, dtype: torch.dtype) -> None:
    """Catches what goes wrong between the kernels: dispatch, experts and combine against torch in fp64, with and
    without a capacity, whose filling rows must not count."""
    T, K, E = len(experts_TK), 2, 4
    dispatcher: TokenDispatcher = LocalDispatcher(E) if capacity is None else CapacityDispatcher(E, capacity)
    expert_R, token_R = torch.tensor(experts_TK).flatten(), torch.arange(T).repeat_interleave(K)
    (*_, gate_up, down), *_ = expert_inputs([0] * E)

    def block(x_TD: Tensor, weight_R: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        x_TD, grouping, handle = dispatcher.dispatch(x_TD, Assignments(token_R, expert_R, weight_R))
        backend = "reference" if x_TD.dtype is torch.float64 else "triton"
        return dispatcher.combine(expert_mixture(x_TD, grouping, gate_up, down, backend), handle)

    # A router's gradient is an inner product of what has been rounded four times.
    tolerance = 2e-2 if dtype is torch.bfloat16 else None
    assert_parity(block, block, [torch.randn(T, 16), torch.rand(T * K), gate_up, down], dtype, tolerance)


@pytest.mark.usefixtures("small_blocks", "chosen")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [2, 16, 37])
def test_loss(vocabulary: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a maximum of one block only, ignored labels that count, and chunks that are not all summed."""
    monkeypatch.setattr("moe_lm.kernels.native.library", lambda: None)
    labels_T = torch.randint(vocabulary, (5,))
    labels_T[1] = -100
    ours, reference = (
        lambda hidden, head, b=b: linear_cross_entropy(hidden, head, labels_T, 3, b) for b in ("chunked", "reference")
    )
    assert_parity(ours, reference, [torch.randn(5, 8) * 2, torch.randn(vocabulary, 8)], dtype)
    hidden_TD, head_VD = torch.randn(5, 8, dtype=dtype), torch.randn(vocabulary, 8, dtype=dtype)
    with torch.no_grad():
        loss = ours(hidden_TD, head_VD)
    expected = reference(hidden_TD.double(), head_VD.double())
    torch.testing.assert_close(loss.double(), expected, rtol=TOLERANCE[dtype], atol=0)
    labels_T[0] = vocabulary
    assert ours(hidden_TD, head_VD).isnan()


@pytest.mark.usefixtures("small_blocks")
def test_logits_of_any_size() -> None:
    """Catches exponentials that overflow, and minus infinity (a token that is ruled out) that becomes NaN."""
    logits_RV = torch.tensor([[1e4, -1e4, 0.0], [-torch.inf, 3.0, 3.0], [1.0, 2.0, 3.0]]).repeat(1, 7)
    logits_RV[2, :16] = -torch.inf  # a whole block
    labels_R, wide = torch.tensor([0, 1, 20]), logits_RV.double().requires_grad_()
    expected = F.cross_entropy(wide, labels_R, reduction="sum")
    expected.backward()
    loss = cross_entropy.cross_entropy(logits_RV, labels_R, True, -100)
    torch.testing.assert_close(loss.double(), expected.detach())
    torch.testing.assert_close(logits_RV.double(), wide.grad)


@pytest.mark.parametrize("recompute", Recompute)
def test_a_model(recompute: Recompute, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches kernels that are right by themselves but not chosen, or fed wrongly: a model's loss and all gradients
    with and without them, whatever backward computes again."""
    config = ModelConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        initializer_range=0.2,
    )
    model = CausalLM(config)
    initialize(model, 0)
    model.model.recompute = recompute
    tokens_BS = torch.randint(20, (2, 4))
    monkeypatch.setattr("moe_lm.kernels.native.library", lambda: None)
    monkeypatch.setattr(launch, "is_available", lambda: False)
    results = []
    for use in (False, True):
        shapes = request.getfixturevalue("chosen") if use else []
        model.zero_grad()
        hidden_TD = model(tokens_BS).hidden_BSD.flatten(0, 1)
        loss = linear_cross_entropy(hidden_TD, model.lm_head.weight, tokens_BS.roll(-1, 1).flatten())
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    assert len(shapes) >= 5 * 2 + 3  # per layer; the last norm, twice the loss
    assert_close(results[1], results[0], torch.float32)


@pytest.mark.skipif(DEVICE == "cuda", reason="Triton can start here")
def test_a_machine_on_which_triton_can_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that ends for want of a compiler or a driver, and a fallback that nobody is told of."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.warns(UserWarning, match="no Triton kernels, plain ones are used"):
        assert not launch.is_available.__wrapped__()
    monkeypatch.setenv(launch.SWITCH, "0")
    assert not launch.is_available.__wrapped__()
    monkeypatch.setattr(launch, "is_available", lambda: True)
    on_cpu = torch.zeros(2, 4)
    assert not launch.supports(on_cpu)


@pytest.mark.skipif(DEVICE == "cuda", reason="the other tests have compiled them")
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """Catches what the interpreter takes and the compiler does not: every kernel to machine code for an H200."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_triton"], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = {line.split()[0] for line in done.stdout.splitlines()}
    sources = (root / "moe_lm/kernels/triton").glob("*.py")
    expected = sum(source.read_text().count("@triton.jit") for source in sources)
    assert len(kernels) == expected, kernels
