"""The comparison of a mixture with a dense model: the same work on the same tokens, each run made once."""

import json
import sys
from pathlib import Path

import pytest

from tests.runs import ENVIRONMENT, metrics, write_corpus

OPTIONS = [
    "model.hidden_size=32",
    "model.intermediate_size=192",
    "model.num_hidden_layers=2",
    "model.num_key_value_heads=2",
    "tokenizer.vocab_size=400",
    "data=text",
    "data.paths=[corpus]",
    "data.sequence_length=32",
    "trainer.global_batch_size=4",
    "trainer.micro_batch_size=4",
    "schedule.warmup_steps=2",
]


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script's module, in a directory with a little text; its runs compute with one thread."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", ENVIRONMENT["OMP_NUM_THREADS"])
    write_corpus(tmp_path / "corpus")
    import mixture_against_dense

    yield mixture_against_dense
    del sys.modules["mixture_against_dense"]


def test_equal_work_on_equal_tokens_and_nothing_twice(script, tmp_path, capsys):
    """Catches models that are fed other batches, or as many FLOPs only in name; a figure that is not the run's own; a
    seed that is left out; and a second call that trains again what is there, or takes other runs for those asked for.
    """
    rates = ["--dense-learning-rate", "0.004"]
    script.main(["out", "--steps", "3", "--seeds", "0", *rates, *OPTIONS])
    before = stamps(tmp_path / "out/runs")
    script.main(["out", "--steps", "3", "--seeds", "0", "1", *rates, *OPTIONS])
    after = stamps(tmp_path / "out/runs")
    assert before.items() <= after.items() and before.keys() < after.keys()
    capsys.readouterr()
    script.main(["out", "--steps", "3", "--seeds", "0", "1", *rates, *OPTIONS])
    assert stamps(tmp_path / "out/runs") == after

    report = json.loads((tmp_path / "out/mixture-against-dense.json").read_text())
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith(("| mixture |", "| dense |"))]
    assert len(rows) == 2 and "| seed 0 | seed 1 |" in printed
    assert report["tokens"] == 3 * 4 * 32
    for row, (name, figures) in zip(rows, report["runs"].items(), strict=True):
        assert [one["seed"] for one in figures] == [0, 1] and figures[0] != figures[1]
        for one in figures:
            run = tmp_path / f"out/runs/{name}-seed{one['seed']}"
            assert one["bits_per_byte"] == metrics(run, "validation_bits_per_byte")[3]
            assert f"| {one['bits_per_byte']:.4f} ({one['nats_per_token']:.4f}) |" in row
    for seed in (0, 1):
        fed = [metrics(tmp_path / f"out/runs/{name}-seed{seed}", "targets") for name in report["runs"]]
        assert fed[0] == fed[1] and len(fed[0]) == 3
    mixture, dense = report["flops_per_token"].values()
    assert mixture - dense == 6 * 2 * 8 * 32  # the router: layers, experts, hidden size

    with pytest.raises(SystemExit, match=r"another configuration: trainer.max_steps=3 → 4"):
        script.main(["out", "--steps", "4", "--seeds", "0", *rates, *OPTIONS])


def test_the_best_learning_rate_of_each_model_counts(script):
    """Catches a dense model that is held to a rate that does not suit it, and a difference with the wrong sign."""
    contenders = script.contend(OPTIONS, {"mixture": None, "dense": [0.002, 0.004]})
    bits = {"mixture-0.003": [1.0, 1.25], "dense-0.002": [1.25, 2.0], "dense-0.004": [1.5, 1.5]}
    figures = {
        name: [{"bits_per_byte": one, "nats_per_token": 2 * one, "seconds": 8.0} for one in ones]
        for name, ones in bits.items()
    }
    report = script.describe(contenders, figures)
    assert report["best"] == {"mixture": "mixture-0.003", "dense": "dense-0.004"}
    assert report["difference"]["bits_per_byte"] == [0.5, 0.25]
    assert report["difference"]["nats_per_token"] == [1.0, 0.5]


def test_unequal_work_is_refused(script, tmp_path):
    """Catches a comparison of models that do not do the same arithmetic per token, where the router is large."""
    with pytest.raises(SystemExit, match=r"mixture 618,432, dense 569,280, 7.95% apart: more than 1%"):
        script.main(["out", *OPTIONS, "model.num_experts=128"])
    assert not (tmp_path / "out").exists()


def stamps(directory: Path) -> dict[str, int]:
    """When each file of the runs was last written."""
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
