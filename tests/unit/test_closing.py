"""What is said after the last step."""

from pathlib import Path
from types import SimpleNamespace

from moe_lm.commands import closing
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
