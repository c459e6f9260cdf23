"""What is said after the last step."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_lm.commands import closing
from moe_lm.errors import RunError
from moe_lm.evaluation.bits_per_byte import Validation
from moe_lm.training.config import FinishConfig


def test_compressors_are_left_out_of_much_text(monkeypatch):
    """Catches the end of a run over gigabytes of held-out text, all of it in memory at once."""
    recorded, said = {}, []
    shard = SimpleNamespace(header=SimpleNamespace(num_bytes=closing.MOST_COMPRESSED + 1))  # read, it would fail
    training = SimpleNamespace(
        config=SimpleNamespace(finish=FinishConfig(compare_compressors=True, export=False)),
        directory=Path("runs/x"),
        data=SimpleNamespace(validation=[shard]),
        progress=SimpleNamespace(start_loss=None, step=7),
    )
    monkeypatch.setattr(closing, "write_state", lambda training, status, **details: recorded.update(details))
    closing.finish(training, Validation(bits_per_byte=1.25, loss=2.0), said.append)
    assert said[0] == "\nbits per byte: 1.250 (gzip and xz would take long over 100 MB)"
    assert recorded["validation"] == {"loss": 2.0, "bits_per_byte": 1.25}


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_run_that_diverged_is_not_finished(monkeypatch, loss):
    """Catches exit code 0 and state.json with NaN, which is no JSON, of a model that nothing can be done with."""
    training = SimpleNamespace(
        config=SimpleNamespace(finish=FinishConfig()),
        directory=Path("runs/x"),
        data=None,
        progress=SimpleNamespace(step=7),
    )
    monkeypatch.setattr(closing, "write_state", None)  # called, it would fail
    with pytest.raises(RunError, match=f"after step 7 is {loss}: the run has diverged"):
        closing.finish(training, Validation(bits_per_byte=loss, loss=loss), print)
