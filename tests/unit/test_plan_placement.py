"""`moe-lm plan placement`, as it is typed."""

import json
import random

import pytest

from moe_lm import cli
from moe_lm.commands.config import PlanPlacementConfig
from moe_lm.parallel.placement import Cluster, Placement, contiguous, read_placement, straggler
from moe_lm.parallel.placement_search import balanced
from moe_lm.parallel.trace import read_steps, summed

LAYERS, EXPERTS, STEPS = 3, 8, 5


@pytest.fixture
def run(tmp_path):
    """A run directory with the expert counts of a few steps."""
    rng = random.Random(5)
    busy = [[rng.lognormvariate(0, 0.8) for _ in range(EXPERTS)] for _ in range(LAYERS)]
    lines = [
        json.dumps(
            {"step": step, "expert_counts": [[int(999 * b * rng.uniform(0.5, 1.5)) for b in row] for row in busy]}
        )
        for step in range(STEPS)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def _table(out):
    """Cells of the layers' lines, and the last of all lines."""
    lines = out.rstrip().splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == ["layer"])
    return [line.split() for line in lines[start + 1 : start + 1 + LAYERS]], lines[-1]


@pytest.mark.parametrize(
    ("options", "cluster"),
    [
        (["ep=3"], Cluster(3)),
        (["ep=4", "ranks_per_node=2", "bandwidth_between_nodes=2e9"], Cluster(4, 2, bandwidth_between_nodes=2e9)),
        (["ep=2", "max_experts_per_rank=4", "bandwidth_in_node=1e9"], Cluster(2, None, 4, bandwidth_in_node=1e9)),
        (["ep=8", "seconds_per_row=1", "bytes_per_row=0"], Cluster(8, seconds_per_row=1.0, bytes_per_row=0.0)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("last", [None, 2, 10**20])
def test_the_table_is_what_the_functions_say(run, capsys, options, cluster, last):
    """Catches options that do not arrive, columns that are swapped, and seconds of all steps said to be of one."""
    if last is not None:
        options = [*options, f"last={last}"]
    assert cli.main(["plan", "placement", f"trace={run}", *options]) == 0
    table, total = _table(capsys.readouterr().out)
    count_LE = summed(read_steps(run, last))
    both = contiguous(LAYERS, EXPERTS, cluster.ep), balanced(count_LE, cluster).placement
    for layer, (cells, count_E) in enumerate(zip(table, count_LE, strict=True)):
        ratios = [straggler(Placement((p.owners[layer],), cluster.ep), [count_E], cluster).ratio for p in both]
        share = f"{max(count_E) / sum(count_E):.1%}"
        assert cells == [str(layer), share, *(f"{ratio:.3f}" for ratio in ratios), "yes"]
    for name, placement in zip(("contiguous", "balanced"), both, strict=True):
        result = straggler(placement, count_LE, cluster)
        seconds = result.seconds / min(last or STEPS, STEPS)
        said = f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.3f} ms"
        assert f"{name} {result.ratio:.3f}, {said}" in total


def test_the_file_that_it_writes_is_the_balanced_placement(run, capsys):
    """Catches a file that is not what was printed, and that nobody is told how to use."""
    path = run / "placement.json"
    assert cli.main(["plan", "placement", f"trace={run}", "ep=3", f"output={path}"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"parallel.placement=file parallel.placement_file={path}")
    assert read_placement(path, LAYERS, EXPERTS, 3) == balanced(summed(read_steps(run)), Cluster(3)).placement


def test_a_gap_is_said_where_there_is_no_proof(run, capsys, monkeypatch):
    """Catches a table that claims the best where the search gave up."""
    monkeypatch.setattr("moe_lm.parallel.placement_search.SEARCH_BUDGET", 0)
    monkeypatch.setattr("moe_lm.parallel.placement_search.lower_bound", lambda count_E, cluster: 1e-9)
    assert cli.main(["plan", "placement", f"trace={run}", "ep=3"]) == 0
    table, _ = _table(capsys.readouterr().out)
    assert all(cells[-2] == "within" and cells[-1].endswith("%") for cells in table)


def test_defaults_are_those_of_the_cost_model():
    """Catches numbers that are changed in one of the two places that state them."""
    config, cluster = PlanPlacementConfig(trace="run", ep=4), Cluster(4)
    for name in ("seconds_per_row", "bytes_per_row", "bandwidth_in_node", "bandwidth_between_nodes"):
        assert getattr(config, name) == getattr(cluster, name), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["ep=4"], "trace: is required"),
        (["trace={run}"], "ep: is required"),
        (["trace={run}", "ep=0"], "ep=0: must be at least 1"),
        (["trace={run}", "ep=9"], "ep=9: must be at most 8"),
        (["trace={run}", "ep=x"], "ep=x: must be a whole number or null"),
        (["trace={run}", "ep=4", "max_experts_per_rank=1"], "max_experts_per_rank=1: 4 ranks can not hold 8 experts"),
        (["trace={run}", "ep=4", "ranks_per_node=0"], "ranks_per_node=0: must be at least 1"),
        (["trace={run}", "ep=4", "last=0"], "last=0: must be at least 1"),
        (["trace={run}", "ep=4", "bandwidth_in_node=0"], "bandwidth_in_node=0.0: must be above 0"),
        (["trace={run}", "ep=4", "bytes_per_row=-1"], "bytes_per_row=-1.0: must not be negative"),
        (["trace={run}/none", "ep=4"], "there is no"),
        (["trace={run}", "ep=4", "output={run}/none/x"], "can not be written (No such file or directory)"),
        (["trace={run}", "ep=4", "output={run}"], "can not be written (Is a directory)"),
        (["trace={run}", "ep=4", "output="], "output='': give a file"),
        (["trace={run}", "ep=4", "rank_per_node=2"], "did you mean 'ranks_per_node'?"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_a_sentence(run, capsys, options, words):
    """Catches tracebacks, and numbers that would make one further in."""
    assert cli.main(["plan", "placement", *(option.format(run=run) for option in options)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("moe-lm: ") and words in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["plan"], ["plan", "--help"], ["plan", "-h"], ["plan", "help"]], ids=str)
def test_plan_alone_says_what_can_be_planned(arguments, capsys):
    """Catches the first word of a command that leads nowhere."""
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "usage: moe-lm plan WHAT" in out and cli.COMMANDS["plan placement"] in out


def test_help_of_a_command_of_two_words(capsys):
    """Catches help that takes the second word for an option."""
    assert cli.main(["plan", "placement", "--help", "ep=4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: moe-lm plan placement [NAME=VALUE ...]") and "\n  ep=4\n" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "placment"], "'plan placment' is not a command; did you mean 'plan placement'?"),
        (["plan", "xyz"], "'plan xyz' is not a command; choose from plan placement."),
        (["plan", "trace=run", "ep=4"], "'plan trace=run' is not a command; "),
        (["placement", "ep=4"], "'placement' is not a command; did you mean 'plan placement'?"),
        (["plam", "placement"], "'plam' is not a command; did you mean 'plan'?"),
    ],
)
def test_misspelt_commands_of_two_words_get_a_suggestion(arguments, words, capsys):
    """Catches a suggestion that only knows one word."""
    assert cli.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_it_replaces_placements_and_nothing_else(run, capsys):
    """Catches a plan that is written over the trace that it was made of, or over somebody's program."""
    command = ["plan", "placement", f"trace={run}", "ep=3"]
    trace = (run / "metrics.jsonl").read_bytes()
    assert cli.main([*command, f"output={run / 'metrics.jsonl'}"]) == 2
    assert "would be lost" in capsys.readouterr().err and (run / "metrics.jsonl").read_bytes() == trace
    for _ in range(2):
        assert cli.main([*command, f"output={run / 'placement.json'}"]) == 0
