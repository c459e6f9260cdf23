"""A single process: nothing of what sharding needs is there."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lm.model.config import ModelConfig
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize
from moe_lm.parallel.layout import Layout
from moe_lm.parallel.parallelize import ParallelModel, parallelize
from moe_lm.parallel.runtime import Runtime
from moe_lm.parallel.shards import whole_shards
from moe_lm.training.config import OptimizerConfig
from moe_lm.training.optimizer import Optimizer
from moe_lm.training.precision import ComputeModel
from moe_lm.training.state import initial_load
from moe_lm.training.step import train_step
from tests.distributed.cases import Case, global_batch

CONFIG = Case().model_config()


class _Calls(TorchDispatchMode):
    """Every operation with the shapes and types of its tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        self.calls.append((str(function), [(a.shape, a.dtype) if isinstance(a, torch.Tensor) else a for a in given]))
        return function(*args, **(kwargs or {}))


def _plain() -> CausalLM:
    model = CausalLM(CONFIG)
    initialize(model, 1)
    return model


def test_a_single_process_calls_the_same_kernels_and_no_collective():
    """Catches a cost of the abstraction where nobody needs it: the operations of forward and backward, with their
    arguments, are those of the bare model, and a whole step asks for no collective."""
    parallel = parallelize(CONFIG, Layout(), None, 0, torch.device("cpu"), torch.float32)
    initialize(parallel.module, 1)
    batch = global_batch(0, Case(), 0)
    inputs = batch.micro_batches[0]
    traces = []
    for model in (parallel.module, _plain()):
        with _Calls() as trace:
            out = model(inputs.input_ids, inputs.position_ids, inputs.document_ids, inputs.routing_mask)
            out.hidden_BSD.square().sum().backward()
        traces.append(trace.calls)
    assert traces[0] == traces[1] and len(traces[0]) > 200
    compute, optimizer = ComputeModel(parallel, torch.float32), Optimizer(parallel.shards, OptimizerConfig())
    with _Calls() as trace:
        train_step(compute, optimizer, Runtime("cpu"), batch, initial_load(CONFIG), 1.0)
    assert not any(name.startswith("c10d") for name, _ in trace.calls)


def test_the_shards_of_a_single_process_are_its_parameters():
    """Catches a copy: what the optimizer changes must be what the model computes with."""
    model = _plain()
    for shard, (name, parameter) in zip(whole_shards(model), model.named_parameters(), strict=True):
        assert shard.name == name and shard.value is parameter and shard.shape == list(parameter.shape)
        (box,) = shard.boxes
        assert box.of(shard.value).data_ptr() == parameter.data_ptr() and shard.gather(parameter) is parameter
    assert ParallelModel(model, whole_shards(model)).layout == Layout(1, 1, 1)


def test_a_capacity_changes_the_dispatcher_alone():
    """Catches a capacity that is read but not obeyed."""
    config = ModelConfig(**{**vars(CONFIG), "capacity_factor": 0.5})
    parallel = parallelize(config, Layout(), None, 0, torch.device("cpu"), torch.float32)
    initialize(parallel.module, 1)
    compute, optimizer = ComputeModel(parallel, torch.float32), Optimizer(parallel.shards, OptimizerConfig())
    result = train_step(compute, optimizer, Runtime("cpu"), global_batch(0, Case(), 0), initial_load(config), 1.0)
    assert result.dropped > 0 and result.finite
