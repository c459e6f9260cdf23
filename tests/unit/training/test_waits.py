"""A step on a GPU never waits for it but once. Checked without one: on the meta device, where there is nothing to wait
for, whatever asks for a tensor's numbers fails.
"""

import pytest
import torch
from torch import Tensor

from moe_lm.data.batch import Batch
from moe_lm.model import decoder
from moe_lm.model.config import ModelConfig, Recompute
from moe_lm.model.decoder import CausalLM
from moe_lm.parallel.parallelize import ParallelModel
from moe_lm.parallel.runtime import Runtime
from moe_lm.parallel.shards import whole_shards
from moe_lm.training.config import OptimizerConfig
from moe_lm.training.feed import GlobalBatch
from moe_lm.training.optimizer import Optimizer
from moe_lm.training.precision import ComputeModel
from moe_lm.training.step import train_step

META = torch.device("meta")


@pytest.mark.parametrize("capacity", [None, 1.5])
@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.selective])
def test_a_step_asks_a_device_for_its_figures_and_nothing_else(recompute, capacity, monkeypatch):
    """Catches an `item`, a `tolist`, indexing by a mask or a `nonzero` anywhere in forward, backward, the sum of
    gradients or their norm, with packed documents and two micro-batches."""
    config = ModelConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        capacity_factor=capacity,
        router_z_loss_coef=0.01,
    )
    with META:
        model = CausalLM(config)
    parallel = ParallelModel(model, whole_shards(model))
    compute, optimizer = ComputeModel(parallel, torch.bfloat16), Optimizer(parallel.shards, OptimizerConfig())
    compute.module.model.recompute = recompute
    runtime = Runtime("cpu")
    runtime.device = META
    monkeypatch.setattr(decoder, "takes_packed", lambda x, head_dim: True)
    tokens_BS = torch.arange(32).view(2, 16)
    document_BS = torch.arange(16).expand(2, -1) // 5
    batch = Batch(tokens_BS, tokens_BS, tokens_BS % 16, document_BS, tokens_BS > 3, tokens_BS * 0)
    asked, cpu = [], Tensor.cpu

    def answered(tensor: Tensor) -> Tensor:
        if tensor.device.type != "meta":
            return cpu(tensor)
        asked.append(tensor.shape)
        figures = torch.zeros(tensor.shape)
        figures[5] = torch.inf  # the gradient's norm: the step is not applied, for no update rule takes such tensors
        return figures

    monkeypatch.setattr(Tensor, "cpu", answered)
    load_LE = torch.full((2, 8), 1 / 8, device=META)
    result = train_step(compute, optimizer, runtime, GlobalBatch([batch, batch], 64, 56, [56], {}), load_LE, 1.0)
    assert not result.applied and result.count_LE.shape == (2, 8)
    assert all(parameter.grad is not None and parameter.grad.is_meta for parameter in model.parameters())
    assert asked == [(6 + 2 * 8,)]
