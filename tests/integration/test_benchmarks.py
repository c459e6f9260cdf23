"""The benchmarks compare the same work: same weights, same batches, same loss, on every side."""

import sys
from pathlib import Path

import pytest

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
    for name in ("benchmark", "benchmark_gpu"):
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


def test_the_script_for_gpus_runs_on_a_cpu(scripts, tmp_path, monkeypatch, capsys):
    """Catches a script that fails on the first machine with a GPU for reasons that a CPU would have shown."""
    _, benchmark_gpu = scripts
    monkeypatch.setattr(benchmark_gpu, "LADDER", {"tiny": (64, 32, 2)})
    monkeypatch.setattr(benchmark_gpu, "SIDES", benchmark_gpu.SIDES[:2])
    monkeypatch.setattr(benchmark_gpu, "SAME_WORK", [*benchmark_gpu.SAME_WORK, "data=text", "data.paths=[text]"])
    rung = benchmark_gpu.rung
    monkeypatch.setattr(
        benchmark_gpu, "rung", lambda *given: [*rung(*given), "tokenizer.vocab_size=384", "trainer.max_steps=1"]
    )
    monkeypatch.setattr(sys, "argv", ["benchmark_gpu.py", "--device", "cpu", "--only", "tiny", "--length", "32"])
    benchmark_gpu.main()
    printed = capsys.readouterr().out
    assert printed.count("tokens/s, MFU") == 2 and "grouped_mm bf16-autocast" in printed
    assert (tmp_path / "runs/benchmark/benchmark-gpu.json").exists()
