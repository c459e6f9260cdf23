"""The figures of a step are of what they are called."""

import json
from types import SimpleNamespace

import pytest
import torch

from moe_lm.config import load
from moe_lm.model.accounting import training_flops_per_token
from moe_lm.training import telemetry
from moe_lm.training.feed import GlobalBatch
from moe_lm.training.step import StepResult
from moe_lm.training.telemetry import Telemetry

PROCESSES, FLOPS_OF_ONE = 4, 1e9


@pytest.fixture
def clock(monkeypatch):
    """Says what time it is."""
    now = [100.0]
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(telemetry, "matmul_rate", lambda device, dtype: FLOPS_OF_ONE)
    return now


@pytest.fixture
def run(tmp_path):
    """As much of a run as a step's figures are of."""
    config = load("pretrain", ["trainer.log_interval=2", "model.capacity_factor=2"])
    runtime = SimpleNamespace(
        device=torch.device("cpu"), world_size=PROCESSES, is_main=True, on_main=lambda work: work()
    )
    progress = SimpleNamespace(step=0, targets=0, tokens_by_domain={"text": 7})
    compute = SimpleNamespace(dtype=torch.float32)
    return SimpleNamespace(
        config=config, runtime=runtime, progress=progress, compute=compute, directory=tmp_path, start=None
    )


def test_figures_of_a_step(run, clock):
    """Catches targets counted as tokens, a utilisation of one process's machine, time of waiting or of a validation
    that counts as training, and figures of steps that are not due."""
    feed = SimpleNamespace(waited=5.0, total_steps=10, skipped={})
    batch = GlobalBatch([], 300, 1000, [1000], {})
    result = StepResult(2.5, 1.25, 0.5, 0.0, 3.0, 11, torch.tensor([[30.0, 10.0], [20.0, 20.0]]), True, True)
    with Telemetry(run) as figures:
        figures.begin(feed)
        for step in (1, 2, 3):
            clock[0] += 7.0  # a validation
            figures.restart_clock()
            clock[0] += 0.5
            feed.waited += 0.125
            run.progress.step, run.progress.targets = step, 300 * step
            figures.step(result, batch, step - 1, 1e-3)
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]  # the first, and every second one
    flops = training_flops_per_token(run.config.model, run.config.data.sequence_length)
    for line in lines:
        assert line["tokens_per_second"] == pytest.approx(2000)
        assert line["flops_utilization"] == pytest.approx(2000 * flops / (PROCESSES * FLOPS_OF_ONE))
        assert line["data_wait"] == pytest.approx(0.25)
        assert line["targets"] == 300 * line["step"] and line["data_step"] == line["step"] - 1
        assert (line["loss"], line["load_balancing_loss"], line["router_z_loss"]) == (2.5, 1.25, 0.5)
        assert (line["gradient_norm"], line["learning_rate"], line["dropped_assignments"]) == (3.0, 1e-3, 11)
        assert line["load_violation"] == pytest.approx(0.5)  # 30 of 40 where 20 are even
        assert line["expert_counts"] == [[30, 10], [20, 20]] and line["tokens_by_domain"] == {"text": 7}
        assert line["peak_memory_bytes"] > 10**6
