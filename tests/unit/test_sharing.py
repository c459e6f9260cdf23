"""How processes of a run see that they are alike."""

from types import SimpleNamespace

import pytest

from moe_lm.commands import sharing
from moe_lm.commands.finetune import _agreed_fingerprint
from moe_lm.commands.output import output_to_file
from moe_lm.errors import InputError
from moe_lm.finetune.base import fingerprint
from moe_lm.model.config import ModelConfig
from moe_lm.model.decoder import CausalLM
from tests.models import InMemory


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


def test_another_base_is_seen():
    """Catches a job whose machines have different weights under the same name, of which no checkpoint is whole."""
    shape = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    base = InMemory(CausalLM(ModelConfig(**shape, num_attention_heads=1, num_key_value_heads=1, num_experts=2)))
    alone = SimpleNamespace(together=lambda work: work(), gather=lambda mine: [mine] * 3)
    assert _agreed_fingerprint("there", base, alone) == fingerprint(base)
    other = SimpleNamespace(together=lambda work: work(), gather=lambda mine: [mine, mine, "another"])  # another disk's
    with pytest.raises(InputError, match=r"^base=there: process 2 finds other weights there than process 0; copy them"):
        _agreed_fingerprint("there", base, other)


@pytest.mark.parametrize("name", ["output", "output/process-00001.txt"])
def test_what_lies_in_the_way_of_a_process_s_output_is_named(name, tmp_path):
    """Catches a traceback of a process that nobody watches."""
    path = tmp_path / name
    if name == "output":
        path.write_text("mine")
    else:
        path.mkdir(parents=True)
    sentence = r"process-00001.txt: can not be written \((File exists|Is a directory)\); move what lies there away"
    with pytest.raises(InputError, match=sentence), output_to_file(tmp_path / "output", 1):
        pass
    with output_to_file(tmp_path / "output", 0):
        pass
