"""The benchmarks compare the same work: same weights, same batches, same loss, on every side."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
TEXT = "import os\n\n\ndef f(x):\n    return [os.path.join(x, str(i)) for i in range(10)]\n\n\n"


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    """The scripts' modules, in a directory with a little text."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(TEXT * 9 + f"{number}\n")
    import benchmark
    import benchmark_gpu

    yield benchmark, benchmark_gpu
    for name in [name for name in sys.modules if name.startswith("benchmark")]:
        del sys.modules[name]


def test_all_sides_begin_with_the_same_loss(scripts, tmp_path):
    """Catches weights that are not loaded, labels shifted twice or not at all, and a side that does not learn."""
    benchmark, _ = scripts
    options = [*benchmark.MODELS["tiny"], *benchmark.SAME_WORK, "data=text", f"data.paths=[{tmp_path / 'text'}]"]
    batches = benchmark.make_batches(options, tmp_path / "data", tmp_path / "batches.safetensors")
    sides = [
        benchmark.Side(None, "fp32"),
        benchmark.Side(None, "fp32", recompute="selective"),
        benchmark.Side("grouped_mm", "fp32"),
    ]
    with benchmark.processes(sides, options, batches, balanced=False) as running:
        losses = [[running[side].steps(count)["loss"] for count in (1, 20)] for side in sides]
    first = [loss for loss, _ in losses]
    assert first == pytest.approx([first[0]] * 3, rel=1e-5)
    assert all(last < loss - 0.5 for loss, last in losses)


def test_a_killed_side_counts_as_out_of_memory(scripts, tmp_path):
    """Catches a ladder that ends, or a rung that is called an error, where Linux has killed a side for its memory."""
    benchmark, _ = scripts
    options = [*benchmark.MODELS["tiny"], *benchmark.SAME_WORK, "data=text", f"data.paths=[{tmp_path / 'text'}]"]
    batches = benchmark.make_batches(options, tmp_path / "data", tmp_path / "batches.safetensors")
    process = benchmark.Process(benchmark.Side(None, "fp32"), options, batches, balanced=False)
    process.end()
    with pytest.raises(benchmark.OutOfMemoryError, match="moe-lm fp32 ended with exit code -9"):
        process.steps(1)


@pytest.fixture
def ladder(scripts, monkeypatch):
    """The script for GPUs, on the CPU with a tiny rung."""
    _, benchmark_gpu = scripts
    monkeypatch.setattr(benchmark_gpu, "LADDER", {"tiny": (64, 32, 2)})
    monkeypatch.setattr(benchmark_gpu, "SAME_WORK", [*benchmark_gpu.SAME_WORK, "data=text", "data.paths=[text]"])
    rung = benchmark_gpu.rung
    monkeypatch.setattr(
        benchmark_gpu, "rung", lambda *given: [*rung(*given), "tokenizer.vocab_size=384", "trainer.max_steps=1"]
    )
    monkeypatch.setattr(sys, "argv", ["benchmark_gpu.py", "--device", "cpu", "--only", "tiny", "--length", "32"])
    return benchmark_gpu


def test_the_script_for_gpus_runs_on_a_cpu(ladder, tmp_path, monkeypatch, capsys):
    """Catches a script that fails on the first machine with a GPU for reasons that a CPU would have shown, and a side
    that fails while it is built taking the others' results with it, or called one that does not fit."""
    ours, theirs, _ = ladder.SIDES
    monkeypatch.setattr(ladder, "SIDES", [ours, dataclasses.replace(theirs, precision="fp8", experts="none"), theirs])
    ladder.main()
    printed = capsys.readouterr().out
    assert printed.count("tokens/s, MFU") == 2 and "grouped_mm bf16-autocast" in printed
    report = json.loads((tmp_path / "runs/benchmark/benchmark-gpu.json").read_text())
    assert ["error" in found for found in report] == [False, True, False]
    assert "Error" in report[1]["error"].splitlines()[-1] and report[1]["error"] in printed


def test_only_out_of_memory_leads_to_the_next_attempt(ladder, tmp_path, monkeypatch, capsys):
    """Catches a rung given up at its first attempt, and a report that is written only when all rungs are done."""
    tried = []

    def run_out(sides, *given, **named):
        tried.append(sides[0].recompute)
        if len(tried) > len(ladder.ATTEMPTS):
            raise KeyboardInterrupt
        raise ladder.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ladder, "processes", run_out)
    with pytest.raises(KeyboardInterrupt):
        ladder.main()
    assert tried[:-1] == [recompute for _, recompute in ladder.ATTEMPTS]
    assert "tiny moe-lm bf16: does not fit" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "runs/benchmark/benchmark-gpu.json").read_text())) == 1


def test_the_script_for_generation_compares_texts(scripts, monkeypatch, capsys):
    """Catches a table of speeds of two different texts, which is no comparison."""
    import benchmark_generation

    monkeypatch.setattr(benchmark_generation, "IMPLEMENTATIONS", ("grouped_mm",))
    monkeypatch.setattr(benchmark_generation, "PROMPTS", (2,))
    monkeypatch.setattr(benchmark_generation, "ROUNDS", 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # other tests go on in this process
    monkeypatch.setattr(sys, "argv", ["benchmark_generation.py", "--tokens", "3"])
    assert benchmark_generation.main() == 0
    assert "| 2 | " in capsys.readouterr().out
    own = benchmark_generation.generate
    monkeypatch.setattr(
        benchmark_generation, "generate", lambda *a, **k: [[token + 1 for token in text] for text in own(*a, **k)]
    )
    assert benchmark_generation.main() == 1
