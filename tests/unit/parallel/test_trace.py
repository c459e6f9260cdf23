"""Expert counts read back from metrics.jsonl."""

import json

import pytest

from moe_lm.errors import InputError
from moe_lm.parallel.trace import read_steps, summed


def _line(step, counts=None, **values):
    return json.dumps({"step": step, **({} if counts is None else {"expert_counts": counts}), **values}) + "\n"


STEPS = [
    _line(1, [[1, 2], [3, 4]]),
    _line(1, validation_bits_per_byte=2.5),
    _line(2, [[10, 20], [30, 40]]),
    _line(3, event="rewind"),
    _line(3, [[100, 200], [300, 400]]),
]


@pytest.fixture
def run(tmp_path):
    """Write metrics.jsonl of a run."""

    def write(*lines):
        (tmp_path / "metrics.jsonl").write_text("".join(lines))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("last", "total"),
    [
        (None, [[111, 222], [333, 444]]),
        (1, [[100, 200], [300, 400]]),
        (2, [[110, 220], [330, 440]]),
        (9, [[111, 222], [333, 444]]),
    ],
)
def test_the_last_logged_steps_are_summed(run, last, total):
    """Catches validations and events that count as steps, the first steps in place of the last, and sums across E."""
    directory = run(*STEPS)
    assert summed(read_steps(directory, last)) == total
    assert summed(read_steps(directory / "metrics.jsonl", last)) == total
    assert len(read_steps(directory, last)) == min(last or 3, 3)


@pytest.mark.parametrize("length", range(0, len(STEPS[-1]) - 1, 7))
def test_a_line_that_is_being_written_is_left_out(run, length):
    """Catches a trace of a live or killed run that can not be read for its last line."""
    assert summed(read_steps(run(*STEPS[:-1], STEPS[-1][:length]))) == [[11, 22], [33, 44]]


def test_a_dense_layerless_step_is_no_step(run):
    """Catches a dense run that is taken for one of no experts, and divided by."""
    for empty in ([], [[], []]):
        with pytest.raises(InputError, match="has no expert counts; give a run of a mixture"):
            read_steps(run(_line(1, empty), _line(2, empty)))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "has no expert counts"),
        ([_line(1, loss=2.0)], "has no expert counts"),
        (["null\n", "[]\n", "3\n"], "has no expert counts"),
        (["text\n", "more\n"], "line 1 of"),
        ([STEPS[0], STEPS[2][:9] + "\n", STEPS[4]], "line 2 of"),
        ([_line(1, [[1, 2], [3, 4]]), _line(2, [[1, 2]])], "steps of 1 layers × 2 experts and of 2 layers × 2 experts"),
        ([_line(1, [[1, 2, 3]]), _line(2, [[1, 2]])], "steps of 1 layers × 2 experts and of 1 layers × 3 experts"),
        ([_line(1, [[1, 2], [3]])], "line 1 of"),
        ([_line(1, [[1, -2]])], "no table of whole numbers"),
        ([_line(1, [[1, 2.5]])], "no table of whole numbers"),
        ([_line(1, [[1, None]])], "no table of whole numbers"),
        ([_line(1, [1, 2])], "no table of whole numbers"),
        ([_line(1, 3)], "no table of whole numbers"),
        ([_line(1, {})], "no table of whole numbers"),
    ],
)
def test_a_file_without_a_trace_is_refused_in_a_sentence(run, lines, words):
    """Catches tracebacks, and counts of two models that are added up."""
    directory = run(*lines)
    with pytest.raises(InputError) as caught:
        summed(read_steps(directory, field="parallel.trace"))
    said = str(caught.value)
    assert said.startswith(f"parallel.trace={directory}: ") and words in said and said.endswith(".")


def test_steps_of_another_shape_that_are_not_asked_for_do_not_matter(run):
    """Catches `last=` that does not help where the sentence about shapes would have it."""
    assert read_steps(run(_line(1, [[1, 2, 3]]), _line(2, [[1, 2]])), last=1) == [[[1, 2]]]


def test_a_missing_run_is_said_to_be_missing(tmp_path):
    """Catches a traceback for a misspelt run."""
    with pytest.raises(InputError, match=r"trace=.*nowhere: there is no .*nowhere; give a run directory"):
        summed(read_steps(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"there is no .*metrics\.jsonl; give"):
        summed(read_steps(tmp_path))
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match=r"trace=.*metrics\.jsonl can not be read \(Is a directory\); give a run dir"):
        summed(read_steps(tmp_path))
