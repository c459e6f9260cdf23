"""One optimizer step: accumulation, precision, and what a skipped step leaves behind."""

import copy
from pathlib import Path

import pytest
import torch

from moe_lm.data.batch import Batch
from moe_lm.kernels.updates import takes_low_gradients
from moe_lm.model.config import LoadBalancing, LoadSource, ModelConfig, ModelFamily
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize
from moe_lm.parallel.layout import Layout
from moe_lm.parallel.parallelize import ParallelModel
from moe_lm.parallel.runtime import Runtime
from moe_lm.parallel.shards import whole_shards
from moe_lm.training.config import OptimizerConfig, OptimizerName, Precision
from moe_lm.training.feed import GlobalBatch
from moe_lm.training.optimizer import Optimizer
from moe_lm.training.precision import ComputeModel, compute_dtype
from moe_lm.training.state import initial_load
from moe_lm.training.step import next_load, train_step


def _config(**options) -> ModelConfig:
    return ModelConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        router_aux_loss_coef=0.1,
        router_z_loss_coef=0.01,
        **options,
    )


def _rows(number: int) -> list[Batch]:
    """Rows of very different numbers of targets and of padding: what a mean over micro-batches would get wrong."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for row in range(number):
        tokens = torch.randint(61, (1, 24), generator=generator)
        length = 24 - 5 * (row % 4)
        mask = torch.arange(24)[None] < length
        labels = torch.where(mask & (torch.rand(1, 24, generator=generator) < 0.2 + 0.1 * row), tokens.roll(-1), -100)
        positions = torch.arange(24)[None]
        rows.append(Batch(tokens, labels, positions, mask.long(), mask, torch.zeros_like(tokens)))
    return rows


def _join(rows: list[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(r, f) for r in rows]) for f in rows[0].__dataclass_fields__))


def _global_batch(rows: list[Batch], size: int) -> GlobalBatch:
    micro_batches = [_join(rows[i : i + size]) for i in range(0, len(rows), size)]
    whole = _join(rows)
    targets, routed = int((whole.labels >= 0).sum()), int(whole.routing_mask.sum())
    return GlobalBatch(micro_batches, targets, routed, [routed], {})


class _Trained:
    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32):
        self.model = CausalLM(config)
        initialize(self.model, 2)
        parallel = ParallelModel(self.model, whole_shards(self.model))
        self.compute = ComputeModel(parallel, dtype)
        self.optimizer = Optimizer(parallel.shards, OptimizerConfig(learning_rate=1e-2))
        self.load = initial_load(self.model.config)

    def step(self, batch: GlobalBatch):
        result = train_step(self.compute, self.optimizer, Runtime("cpu"), batch, self.load, 1.0)
        self.load = next_load(result, self.load)
        return result


@pytest.mark.parametrize("family", ModelFamily)
@pytest.mark.parametrize("formula", LoadBalancing)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_accumulation_changes_nothing(size, formula, family):
    """Catches any loss normalised by the micro-batch: gradients, losses and loads equal the undivided batch's."""
    rows = _rows(8)
    whole, parts = (_Trained(_config(load_balancing=formula, family=family)) for _ in range(2))
    for _ in range(2):  # the second step balances by the first one's load
        one, many = whole.step(_global_batch(rows, 8)), parts.step(_global_batch(rows, size))
        assert many.cross_entropy == pytest.approx(one.cross_entropy, rel=1e-5)
        assert many.load_balancing == pytest.approx(one.load_balancing, rel=1e-5)
        assert many.router_z == pytest.approx(one.router_z, rel=1e-5)
        assert many.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-4)
        assert torch.equal(one.count_LE, many.count_LE)
        for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
            # AdamW's first step turns what gradients near 0 differ by into whole updates, on some processors more.
            unit_a, unit_b = a.grad / one.gradient_norm, b.grad / one.gradient_norm
            torch.testing.assert_close(unit_b, unit_a, rtol=1e-4, atol=5e-6, msg=name)


def test_cross_entropy_is_the_mean_over_targets():
    """Catches padding or unlabelled positions in the reported loss, against plain torch on full logits."""
    rows = _rows(4)
    trained, batch = _Trained(_config()), _join(rows)
    with torch.no_grad():
        hidden = trained.model(batch.input_ids, batch.position_ids, batch.document_ids, batch.routing_mask).hidden_BSD
        logits = trained.model.logits(hidden)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    assert trained.step(_global_batch(rows, 2)).cross_entropy == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("source", LoadSource)
@pytest.mark.parametrize("formula", LoadBalancing)
def test_auxiliary_losses_reach_the_gradient(formula, source):
    """Catches an auxiliary loss that is silently off, on where it is switched off, wrongly weighted, or fed with
    another load than that of the step before, or of the micro-batch: gradients against the losses written out with the
    router's full probabilities."""
    rows = _rows(4)
    options = {"load_balancing": formula, "load_balancing_source": source, "router_drift_coef": 0.2}
    trained, batch = _Trained(_config(**options)), _join(rows)
    starting = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(7))
    for module in (trained.model, trained.compute.module):
        for layer, weight in zip(module.model.layers, starting, strict=True):
            layer.mlp.gate.starting_weight.copy_(weight)
    trained.step(_global_batch(rows, 4))
    model, load, mask = trained.model, trained.load.clone(), batch.routing_mask.flatten()
    assert not torch.allclose(load, torch.full_like(load, 1 / 8)) and torch.allclose(load.sum(-1), torch.ones(2))
    seen: list[torch.Tensor] = []
    hooks = [layer.mlp.gate.register_forward_hook(lambda gate, x, _: seen.append(x[0])) for layer in model.model.layers]
    hidden = model(batch.input_ids, batch.position_ids, batch.document_ids, batch.routing_mask).hidden_BSD
    for hook in hooks:
        hook.remove()
    logits = [x @ layer.mlp.gate.weight.T for x, layer in zip(seen, model.model.layers, strict=True)]
    probability_LTE = torch.stack([of_layer.softmax(-1) for of_layer in logits])
    # The step below has two micro-batches, of two rows each.
    pieces = [(slice(None), load)]
    if source is LoadSource.micro_batch:
        halves = slice(None, len(mask) // 2), slice(len(mask) // 2, None)
        chosen = torch.stack([torch.zeros_like(p).scatter(1, p.topk(2).indices, 1.0) for p in probability_LTE])
        pieces = [(half, chosen[:, half][:, mask[half]].sum(1)) for half in halves]
        pieces = [(half, count / count.sum(-1, keepdim=True)) for half, count in pieces]
    balancing = torch.zeros(())
    for half, fraction in pieces:
        probability = probability_LTE[:, half][:, mask[half]].sum(1) / mask.sum()
        if formula is LoadBalancing.per_layer:
            balancing = balancing + 8 * (fraction * probability).sum(-1).mean()
        elif formula is LoadBalancing.pooled:
            balancing = balancing + 2 * 8 * (fraction.mean(0) * probability.mean(0)).sum()
    z = torch.stack([of_layer.logsumexp(-1)[mask].square().mean() for of_layer in logits]).mean()
    drift = torch.zeros(())
    for x, weight, of_layer in zip(seen, starting, logits, strict=True):
        target = (x.detach() @ weight.T).softmax(-1)
        drift = drift + torch.nn.functional.kl_div(
            of_layer.log_softmax(-1)[mask], target[mask], reduction="batchmean"
        ) / len(logits)
    cross_entropy = torch.nn.functional.cross_entropy(model.logits(hidden).flatten(0, 1), batch.labels.flatten())
    model.zero_grad()
    (cross_entropy + 0.1 * balancing + 0.01 * z + 0.2 * drift).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    trained.optimizer.step = lambda norm, factor: None  # keep the gradients of the very same weights
    result = trained.step(_global_batch(rows, 2))
    assert (balancing > 0.5) == (formula is not LoadBalancing.none)
    assert result.load_balancing == pytest.approx(balancing.item(), rel=1e-5)
    assert result.router_z == pytest.approx(z.item(), rel=1e-5)
    assert result.router_drift == pytest.approx(drift.item(), rel=1e-5) and drift > 0.1
    for name, parameter in model.named_parameters():
        if expected[name].norm() > 0:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_bf16_twin_follows_fp32_masters():
    """Catches a twin that is not refreshed, gradients that are lost or kept in bf16, or a router that was rounded."""
    trained = _Trained(_config(), torch.bfloat16)
    exact = _Trained(_config())
    rows = _rows(8)
    losses = [(trained.step(_global_batch(rows, 4)).cross_entropy, exact.step(_global_batch(rows, 4)).cross_entropy)]
    for name, parameter in trained.model.named_parameters():
        assert parameter.dtype is torch.float32 and parameter.grad.dtype is torch.float32, name
    for mine, twin in zip(trained.model.parameters(), trained.compute.module.parameters(), strict=True):
        assert twin is mine or torch.equal(twin, mine.bfloat16())
        assert twin is mine or twin.grad is None
    gate = "model.layers.0.mlp.gate.weight"
    assert trained.compute.module.get_parameter(gate) is trained.model.get_parameter(gate)
    losses += [(trained.step(_global_batch(rows, 4)).cross_entropy, exact.step(_global_batch(rows, 4)).cross_entropy)]
    assert losses[0][0] == pytest.approx(losses[0][1], rel=0.01)
    # Behind an update of this size any other rounding routes tokens otherwise: 2 % were seen. The step is worth 36 %.
    assert losses[1][0] == pytest.approx(losses[1][1], rel=0.05)


@pytest.mark.parametrize(("processes", "micro_batches"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_gradients_stay_in_bf16_only_where_nothing_is_added(processes, micro_batches):
    """Catches sums over micro-batches or processes in bf16, and a cast of the whole gradient that an update on a CPU
    does not need."""
    model = CausalLM(_config())
    initialize(model, 0)
    compute = ComputeModel(ParallelModel(model, whole_shards(model), Layout(dp_replicate=processes)), torch.bfloat16)
    for batch in _rows(micro_batches):
        compute.module(batch.input_ids).hidden_BSD.float().square().sum().backward()
    stays = processes == micro_batches == 1 and takes_low_gradients(torch.device("cpu"))
    twins = dict(compute.module.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert name == "lm_head.weight"
        elif twins[name] is not parameter:
            assert parameter.grad.dtype is (torch.bfloat16 if stays else torch.float32), name


def test_frozen_weights_that_are_loaded_are_those_that_are_computed_with():
    """Catches a twin that keeps what a base had when the run was started again, beside what its checkpoint holds."""
    model = CausalLM(_config())
    initialize(model, 0)
    model.model.embed_tokens.requires_grad_(False)
    compute = ComputeModel(ParallelModel(model, whole_shards(model), Layout()), torch.bfloat16)
    twin = compute.module.model.embed_tokens.weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    compute.refresh()
    assert not torch.equal(twin, model.model.embed_tokens.weight.bfloat16()), "no update changes it"
    compute.refresh(also_frozen=True)
    for mine, theirs in zip(model.parameters(), compute.module.parameters(), strict=True):
        assert torch.equal(mine.to(theirs.dtype), theirs)


@pytest.mark.parametrize("rule", OptimizerName)
def test_a_step_with_bf16_gradients_is_one_with_the_same_in_fp32(rule):
    """Catches a gradient in bf16 that a rule misreads, or clips in another way than its wide twin."""
    models = [CausalLM(_config()) for _ in range(2)]
    for model, dtype in zip(models, (torch.bfloat16, torch.float32), strict=True):
        initialize(model, 0)
        optimizer = Optimizer(whole_shards(model), OptimizerConfig(rule, learning_rate=0.01, max_grad_norm=0.5))
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad_dtype = None
                parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16().to(dtype)
            optimizer.step(float(optimizer.gradient_norm()), 1.0)
    # Newton–Schulz runs in bf16: norms that differ in the last bit of fp32 already show.
    atol = {OptimizerName.adamw: 1e-7, OptimizerName.muon: 3e-4}[rule]
    for ours, reference in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_not_finite_changes_nothing(dtype):
    """Catches the one NaN that destroys weights, moments or the load: after it, everything is bitwise as before."""
    trained = _Trained(_config(), dtype)
    rows = _rows(4)
    trained.step(_global_batch(rows, 2))
    before = copy.deepcopy(
        (dict(trained.model.named_parameters()), [t for *_, t in trained.optimizer.state_tensors()], trained.load)
    )
    parameter = trained.compute.module.model.layers[0].self_attn.o_proj.weight
    hook = parameter.register_hook(lambda gradient: gradient * float("nan"))
    result = trained.step(_global_batch(rows, 2))
    hook.remove()
    assert not result.applied
    weights, moments, load = before
    assert all(torch.equal(p, weights[n]) for n, p in trained.model.named_parameters())
    states = [state for *_, state in trained.optimizer.state_tensors()]
    assert all(torch.equal(t, before) for t, before in zip(states, moments, strict=True))
    assert torch.equal(trained.load, load)
    assert trained.step(_global_batch(rows, 2)).applied


def test_tied_embeddings_train_in_both_precisions():
    """Catches a twin whose head and embedding come apart, or a gradient of one use that is dropped."""
    rows = _rows(4)
    for dtype in (torch.float32, torch.bfloat16):
        trained = _Trained(_config(tie_word_embeddings=True), dtype)
        module = trained.compute.module
        assert module.lm_head.weight is module.model.embed_tokens.weight
        first = trained.step(_global_batch(rows, 2)).cross_entropy
        assert trained.step(_global_batch(rows, 2)).cross_entropy < first


def test_precision_is_resolved_by_hardware():
    """Catches bf16 forced where it was not asked for, or refused where it was."""
    cpu = torch.device("cpu")
    assert compute_dtype(Precision.fp32, cpu) is torch.float32
    assert compute_dtype(Precision.bf16, cpu) is torch.bfloat16
    flags = Path("/proc/cpuinfo")
    if flags.exists():
        native = any(name in flags.read_text() for name in ("avx512_bf16", "amx_bf16"))
        assert compute_dtype(Precision.auto, cpu) is (torch.bfloat16 if native else torch.float32)
