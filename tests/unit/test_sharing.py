"""How processes of a run see that they are alike."""

import pytest

from moe_lm.commands import sharing


@pytest.mark.parametrize("name", ["a.py", "kernels/native.cpp", "kernels/amx.inc"])
def test_other_code_is_seen(name, tmp_path, monkeypatch):
    """Catches a process whose kernels are others, and that nobody refuses."""
    for place in ("commands", "kernels"):
        (tmp_path / place).mkdir()
    monkeypatch.setattr(sharing, "__file__", str(tmp_path / "commands" / "sharing.py"))
    (tmp_path / name).write_text("one")
    before = sharing._code_fingerprint()
    assert sharing._code_fingerprint() == before
    (tmp_path / name).write_text("other")
    assert sharing._code_fingerprint() != before
