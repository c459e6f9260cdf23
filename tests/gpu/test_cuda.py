"""The CUDA paths against the CPU reference; skipped where there is no CUDA device.

The Triton kernels at sizes of real models are here; at degenerate ones they are in `tests/parity`.
"""

import warnings

import pytest
import torch

from moe_lm.data.batch import Batch
from moe_lm.kernels.attention import attention, attention_mask
from moe_lm.kernels.combine import gather_rows, sum_rows
from moe_lm.kernels.documents import packed_documents
from moe_lm.kernels.loss import linear_cross_entropy
from moe_lm.kernels.normalization import rms_norm
from moe_lm.kernels.rotary import apply_rotary
from moe_lm.kernels.triton import launch
from moe_lm.model.config import ModelConfig, Recompute
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize
from moe_lm.parallel.parallelize import ParallelModel
from moe_lm.parallel.runtime import Runtime
from moe_lm.parallel.shards import whole_shards
from moe_lm.training.config import OptimizerConfig
from moe_lm.training.feed import GlobalBatch
from moe_lm.training.optimizer import Optimizer
from moe_lm.training.precision import ComputeModel
from moe_lm.training.state import initial_load
from moe_lm.training.step import next_load, train_step
from tests.kernels import DTYPES, assert_parity, expert_inputs, mixture

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours.cpu().double() - reference.double()).norm() / reference.double().norm()).item()


@pytest.mark.parametrize("groups", [[64, 0, 128, 8], [0, 0, 200, 0], [1, 2, 3, 4]])
def test_experts_in_bf16(groups):
    """Catches a grouped product that mixes up experts, or garbage in rows past the last group, forward or backward."""
    inputs, token_P, end_E = expert_inputs(groups, 16, 64, 48)
    results = []
    for device, dtype, backend in (("cpu", torch.float64, "reference"), ("cuda", torch.bfloat16, None)):
        leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
        y = mixture(backend, token_P.to(device), end_E.to(device))(*leaves)
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for ours, reference in zip(results[1], results[0], strict=True):
        assert _relative(ours, reference) < 0.03


def test_attention_in_bf16():
    """Catches a mask or a head grouping that the fused CUDA kernels read differently."""
    documents = torch.tensor([[1] * 40 + [2] * 88, [1] * 128])
    q, k, v = torch.randn(2, 128, 8, 64), torch.randn(2, 128, 2, 64), torch.randn(2, 128, 2, 64)
    mask = attention_mask(documents, documents)
    expected = attention(q.double(), k.double(), v.double(), mask, backend="reference")
    ours = attention(*(x.cuda().bfloat16() for x in (q, k, v)), mask.cuda())
    assert _relative(ours, expected) < 0.02


@pytest.mark.parametrize("window", [None, 50])
def test_attention_in_packed_documents(window):
    """Catches a flash kernel for documents that reads ends, heads or the window in another way, either direction."""
    document_BS = torch.tensor([[1] * 40 + [2] * 88, [1] * 100 + [2] * 3 + [0] * 25])
    shapes = [(2, 128, heads, 64) for heads in (8, 2, 2)]
    inputs = [torch.randn(shape).bfloat16() for shape in shapes]
    mask, results = attention_mask(document_BS, document_BS, 0, window), []
    packed = packed_documents(document_BS, (2, 128), torch.device("cuda"), window)
    for device, dtype, where in (("cpu", torch.float64, mask), ("cuda", torch.bfloat16, packed)):
        leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
        o = attention(*leaves, where, "reference" if device == "cpu" else None)
        results.append([o.detach(), *torch.autograd.grad(o.square().sum(), leaves)])
    for ours, reference in zip(results[1], results[0], strict=True):
        assert _relative(ours, reference) < 0.02


@pytest.fixture
def on_gpu():
    assert launch.is_available()
    torch.manual_seed(0)
    with torch.device("cuda"):
        yield


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_kernels_on_long_rows(dtype):
    """Catches what only large sizes show in norm, rotation and loss: sums across warps, several blocks of a row."""
    inputs = [torch.randn(4099, 2048), 1 + torch.randn(2048) / 10]
    norms = [lambda x, weight, b=b: rms_norm(x, weight, 1e-5, b) for b in ("triton", "reference")]
    assert_parity(*norms, inputs, dtype)
    angles_BSH = torch.rand(2, 1024, 64).repeat(1, 1, 2) * 6
    cos, sin = angles_BSH.cos().to(dtype), angles_BSH.sin().to(dtype)
    turns = [lambda x, b=b: apply_rotary(x, cos.to(x.dtype), sin.to(x.dtype), b) for b in ("triton", "reference")]
    assert_parity(*turns, [torch.randn(2, 1024, 16, 128)], dtype)
    labels_T = torch.randint(32000, (300,)).where(torch.rand(300) < 0.8, -100)
    losses = [lambda h, w, b=b: linear_cross_entropy(h, w, labels_T, 128, b) for b in ("chunked", "reference")]
    assert_parity(*losses, [torch.randn(300, 256) / 4, torch.randn(32000, 256) / 4], dtype)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_kernels_on_many_rows(dtype):
    """Catches what only large sizes show between tokens and experts, with an expert that gets nothing."""
    token_P = torch.randperm(8192) // 2
    gathers = [lambda x, b=b: gather_rows(x, token_P, b) for b in ("triton", "reference")]
    assert_parity(*gathers, [torch.randn(4096, 1024)], dtype)
    sums = [lambda y, b=b: sum_rows(y, token_P, 4096, b) for b in ("triton", "reference")]
    assert_parity(*sums, [torch.randn(8192, 1024)], dtype)
    inputs, *rows = expert_inputs([1000, 0, 3, 3093], 4, 512, 1024)
    assert_parity(mixture("triton", *rows), mixture("reference", *rows), inputs, dtype)


CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.1,
)


class _Training:
    """A small model in bf16 with packed documents on the GPU."""

    def __init__(self, recompute=Recompute.none):
        model = CausalLM(CONFIG)
        initialize(model, 0)
        parallel = ParallelModel(model.cuda(), whole_shards(model))
        self.compute = ComputeModel(parallel, torch.bfloat16)
        self.compute.module.model.recompute = recompute
        self.optimizer, self.runtime = Optimizer(parallel.shards, OptimizerConfig()), Runtime("cpu")
        self.runtime.device = torch.device("cuda")  # Accelerate knows one device in a process, which has other tests
        self.load_LE = initial_load(CONFIG).cuda()
        tokens_BS = torch.randint(512, (4, 256), generator=torch.Generator().manual_seed(0))
        document_BS = (torch.arange(256) // 100).expand(4, -1)
        position_BS, labels_BS = torch.arange(256).expand(4, -1), tokens_BS.roll(-1, 1)
        batch = Batch(tokens_BS, labels_BS, position_BS, document_BS, tokens_BS >= 0, tokens_BS * 0)
        self.batch = GlobalBatch(batch.split(2), 1024, 1024, [1024], {})

    def step(self):
        result = train_step(self.compute, self.optimizer, self.runtime, self.batch, self.load_LE, 1.0)
        self.load_LE = next_load(result, self.load_LE)
        return result


@pytest.mark.parametrize("recompute", Recompute)
def test_a_step_waits_for_the_gpu_once(recompute):
    """Catches any other wait: the GPU would stand still until the host has started the next kernel."""
    training = _Training(recompute)
    for _ in range(2):  # kernels are compiled, moments and buffers made
        training.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert training.step().applied
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchronizing" in str(warning.message)]
    assert len(waits) == 1, [f"{wait.filename}:{wait.lineno}" for wait in waits]


@pytest.mark.parametrize("recompute", Recompute)
def test_steps_with_and_without_triton_learn_alike(recompute, monkeypatch):
    """Catches a kernel that is not what it stands for within a whole step, whatever backward computes again."""
    losses = []
    for wanted in (True, False):
        monkeypatch.setattr(launch, "is_available", lambda wanted=wanted: wanted)
        training = _Training(recompute)
        losses.append([training.step().cross_entropy for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=0.01) and losses[0][-1] < losses[0][0]


def test_hidden_states_and_gradients_in_bf16_follow_the_cpu():
    """Catches any CUDA path of the decoder or the loss that computes something else than the CPU in fp32: a mask that
    is lost, weights of experts that are not renormalised."""
    model = CausalLM(CONFIG)
    initialize(model, 0)
    tokens = torch.randint(512, (4, 64))
    losses, found = [], []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        moved = CausalLM(CONFIG).to(device, dtype)
        moved.load_state_dict(model.state_dict())
        hidden = moved(tokens.to(device)).hidden_BSD.flatten(0, 1)
        loss = linear_cross_entropy(hidden, moved.lm_head.weight, tokens.roll(-1, 1).flatten().to(device))
        loss.backward()
        gradients = {name: p.grad.float().cpu() for name, p in moved.named_parameters()}
        found.append((hidden.detach().float().cpu(), gradients))
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    # Rounding sends a few tokens to other experts; of a path that computes something else nothing would be alike.
    (exact, exact_gradients), (near, near_gradients) = found
    assert _relative(near, exact) < 0.1
    for name, gradient in exact_gradients.items():
        assert _relative(near_gradients[name], gradient) < 0.3, name
