"""Which tokens are tied, and which take other experts in another run."""

import torch

from moe_lm.hf.router_choices import RouterChoices
from tests.unit.hf.conftest import make_model

TOKENS_BS = torch.arange(20).view(2, 10)


@torch.no_grad()
def _run(model) -> RouterChoices:
    with RouterChoices(model) as choices:
        model(TOKENS_BS)
    model(TOKENS_BS)  # which is not noted any more
    return choices


def test_near_logits_are_ties_and_equal_ones_are_not():
    """Catches ties that go by the size of the logits, and an upcycled mixture of equal experts that is all ties."""
    model = make_model("mixture")
    assert _run(model).clear(TOKENS_BS).all()
    gate = model.model.layers[1].mlp.gate.weight
    with torch.no_grad():
        gate[:] = 1e3 * gate[0]
        assert _run(model).clear(TOKENS_BS).all()
        gate[1:] *= 1 + 5e-6 * torch.arange(1, 3)[:, None]
    assert not _run(model).clear(TOKENS_BS).any()


def test_a_token_with_another_expert_in_any_layer_is_another():
    """Catches a comparison of the last layer alone, or of the order in which a token's experts are."""
    model = make_model("mixture")
    before = _run(model)
    assert before.same(_run(model), TOKENS_BS).all()
    gate = model.model.layers[0].mlp.gate.weight
    with torch.no_grad():
        gate *= -1
    same_BS = before.same(_run(model), TOKENS_BS)
    assert same_BS.shape == TOKENS_BS.shape and not same_BS.any()  # of three, two were chosen; now the third is


def test_a_dense_model_has_no_choices():
    """Catches a traceback where there are no routers."""
    choices = _run(make_model("dense"))
    assert choices.clear(TOKENS_BS).all() and choices.same(choices, TOKENS_BS).all()
