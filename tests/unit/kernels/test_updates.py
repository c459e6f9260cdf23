"""What the plain update rules do to memory; what they compute is in `tests/parity`."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lm.kernels.updates import nesterov


class _Operators(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(("scale", "passes"), [(1.0, 0), (0.5, 1)])
def test_a_gradient_that_is_not_clipped_is_not_copied(scale, passes):
    """Catches a product with 1: on a GPU a pass over every gradient, and room for one more."""
    gradient, momentum = torch.ones(4, 4), torch.zeros(4, 4)
    with _Operators() as operators:
        ahead = nesterov(gradient, momentum, 0.75, torch.float32, scale)
    assert sum("mul" in name for name in operators.names) == passes
    assert (momentum == 0.25 * scale).all() and (ahead == 0.4375 * scale).all() and (gradient == 1).all()
