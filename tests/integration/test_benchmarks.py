"""The benchmarks compare the same work: same weights, same batches, same loss, on every side."""

import dataclasses
import io
import json
import subprocess
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


# benchmark_sides.py is told by benchmark.py what to do.
@pytest.mark.parametrize(
    "script",
    sorted({*SCRIPTS.glob("benchmark*.py")} - {SCRIPTS / "benchmark_sides.py"}),
    ids=lambda script: script.stem,
)
def test_help_is_help(script):
    """Catches a measurement of minutes in answer to a question, and a script that does not even start."""
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage:")


def test_a_text_that_is_missing_ends_in_a_sentence(scripts, tmp_path, monkeypatch, capsys):
    """Catches a traceback where the text, or a set that was prepared before, can not be read."""
    benchmark, _ = scripts
    import arguments

    monkeypatch.setattr(benchmark, "SAME_WORK", [*benchmark.SAME_WORK, "data=text", "data.paths=[nowhere]"])
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "tiny", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        arguments.run_and_exit(benchmark.main)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("data.paths: 'nowhere' does not exist") and said.count("\n") == 1


def test_what_reliability_costs(scripts, tmp_path, monkeypatch, capsys):
    """Catches a script that documents quote, and that the code has left behind."""
    benchmark, _ = scripts
    import benchmark_reliability

    monkeypatch.setattr(benchmark_reliability, "STEPS", 8)
    options = [option for option in benchmark.MODELS["tiny"] if not option.startswith("trainer.max_steps")]
    benchmark_reliability.main([*options, "data=text", f"data.paths=[{tmp_path / 'text'}]"])
    said = capsys.readouterr().out
    assert "a save holds training for" in said and "guards (spikes" in said and "verifying a checkpoint of" in said


def test_all_sides_begin_with_the_same_loss(scripts, tmp_path):
    """Catches weights that are not loaded, labels shifted twice or not at all, and a side that does not learn."""
    benchmark, _ = scripts
    options = [*benchmark.MODELS["tiny"], *benchmark.SAME_WORK, "data=text", f"data.paths=[{tmp_path / 'text'}]"]
    batches = benchmark.make_batches(options, tmp_path / "data", tmp_path / "batches.safetensors")
    sides = [
        benchmark.Side(None, "fp32"),
        benchmark.Side("grouped_mm", "fp32"),
        benchmark.Side(None, "fp32", recompute="selective", accumulation=2),
        benchmark.Side("grouped_mm", "fp32", accumulation=2),
        benchmark.Side("eager", "fp32"),
        benchmark.Side("grouped_mm", "bf16-autocast"),
        benchmark.Side("grouped_mm", "bf16-held"),
        benchmark.Side("grouped_mm", "fp32", trainer=True),
    ]
    with benchmark.processes(sides, options, batches, balanced=False) as running:
        turns = (1, 0), (1, 0), (1, 0), (9, 9)
        losses = [[running[side].steps(*turn)["loss"] for turn in turns] for side in sides]
    of_whole, of_halves = losses[0], losses[2]  # the load is balanced in each micro-batch, on both sides
    for of_side, side in zip(losses, sides, strict=True):
        ours = of_whole if side.accumulation == 1 else of_halves
        assert of_side[0] == pytest.approx(ours[0], rel=1e-5 if side.precision == "fp32" else 1e-3)
        # And they go on as alike: the same batches in their order, the same rule (the Trainer's schedule is as long as
        # its million steps).
        if side.precision == "fp32":
            assert of_side[:3] == pytest.approx(ours[:3], rel=1e-4)
        assert of_side[-1] < of_side[0] - 0.5


def test_the_first_steps_of_a_turn_are_not_timed(scripts, monkeypatch):
    """Catches ratios that count how long each side takes to fault its memory in again after it has waited."""
    import benchmark_sides

    said, now = [], 0.0
    monkeypatch.setattr(benchmark_sides, "_say", said.append)
    monkeypatch.setattr(benchmark_sides.time, "perf_counter", lambda: now)
    given_back = []
    monkeypatch.setattr(benchmark_sides, "give_back_freed_memory", lambda: given_back.append(now))
    monkeypatch.setattr(sys, "stdin", io.StringIO("2 3\n0 1\n"))
    conductor = benchmark_sides.Conductor(torch.device("cpu"))
    for seconds in (0, 100, 50, 4, 2, 1):
        now += seconds
        conductor.between_steps()
    now += 8
    with pytest.raises(SystemExit) as ended:
        conductor.between_steps()
    assert ended.value.code == 0
    assert [answer["seconds"] for answer in said[1:]] == [7, 8] and given_back == [0, 157, 165]


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
    ours, theirs = ladder.OURS, ladder.LAST
    broken = dataclasses.replace(theirs, precision="fp8", experts="none")
    monkeypatch.setitem(ladder.BYTES_OF_STATE, "fp8", 4)
    monkeypatch.setattr(ladder, "SIDES", [ours, broken])
    monkeypatch.setitem(ladder.DATA_SHEET, "", 1e12)
    ladder.main()
    printed = capsys.readouterr().out
    assert printed.count("tokens/s, MFU") == 2 and "grouped_mm bf16-autocast" in printed
    report = json.loads((tmp_path / "runs/benchmark/benchmark-gpu.json").read_text())
    first, failed, last = report["sides"]
    assert ["error" in found for found in report["sides"]] == [False, True, False]
    assert "Error" in failed["error"].splitlines()[-1] and failed["error"] in printed
    best = report["machine"]["best bf16 matrix product, FLOP/s"]
    assert first["mfu"] * 1e12 == pytest.approx(first["of_best_product"] * best) and best > 0 and first["mfu"] > 0
    assert first["loss"] == pytest.approx(last["loss"], rel=0.05)  # the same weights and text on both sides


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
    assert len(json.loads((tmp_path / "runs/benchmark/benchmark-gpu.json").read_text())["sides"]) == 1


def test_the_ladder_ends_in_time_and_says_what_is_left_out(ladder, tmp_path, monkeypatch, capsys):
    """Catches a script that is cut off by whoever lends the GPU, and a table that hides what was not measured."""
    clock = iter(range(0, 10_000, 100))  # each turn looks three times: 200 s of every 300 are its own
    monkeypatch.setattr(ladder.time, "monotonic", lambda: float(next(clock)))
    speeds = iter([300.0, 100.0, 150.0, 100.0])
    monkeypatch.setattr(
        ladder,
        "measure",
        lambda name, side, host, given, end: {
            **{"rung": name, "side": side.name, "parameters": 10**9, "sequences": 8, "recompute": "none"},
            **{"tokens_per_second": next(speeds), "mfu": 0.5, "of_best_product": 0.6, "memory": 10**9, "loss": 1.0},
        },
    )
    sys.argv += ["--minutes", "12"]
    ladder.main()
    printed = capsys.readouterr().out
    assert printed.count("no time left of 12 minutes") == 2
    assert "| tiny | 300 (8, none) | 50.0% | 60.0% | grouped_mm bf16-held, bare loop (8, none) 3.00 |" in printed


def test_what_can_not_fit_is_not_tried(scripts):
    """Catches minutes of a lent GPU spent on running out of memory: 5 B parameters in 80 GB, and with room in 150."""
    _, benchmark_gpu = scripts
    model = benchmark_gpu.load("pretrain", benchmark_gpu.rung("5B", 8, 4096)).model
    ours, held, _ = benchmark_gpu.SIDES
    autocast = benchmark_gpu.LAST
    needed = [benchmark_gpu.needed_bytes(model, side, 8 * 4096, "none") / 1e9 for side in (ours, held, autocast)]
    assert 130 < needed[0] < 140 and 35 < needed[1] < 45 and 75 < needed[2] < 90
    assert benchmark_gpu.needed_bytes(model, ours, 4096, "full") < benchmark_gpu.needed_bytes(model, ours, 4096, "none")


def test_the_script_for_kernels_of_gpus_runs_on_a_cpu(scripts, monkeypatch, capsys):
    """Catches a script that fails on the first machine with a GPU, and a kernel that is left out."""
    pytest.importorskip("triton")
    import benchmark_gpu_kernels

    monkeypatch.setattr(sys, "argv", ["benchmark_gpu_kernels.py", "--device", "cpu"])
    monkeypatch.setattr(benchmark_gpu_kernels, "ROUNDS", 1)
    benchmark_gpu_kernels.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum("| Triton |" in line for line in lines) == 5 and sum("| loss |" in line for line in lines) == 2


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
