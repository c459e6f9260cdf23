"""A projection without a bias, as all of these models are."""

from torch import Tensor, nn

from moe_lm.kernels.linear import linear


class Linear(nn.Linear):
    """Y = x · weightᵀ with weight [outputs, inputs]."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., inputs] to [..., outputs]."""
        return linear(x, self.weight)
