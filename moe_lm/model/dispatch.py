"""Which rows the experts take, and where: the protocol, and the dispatchers of a single process.

The decoder only knows `TokenDispatcher`; expert parallelism injects one that exchanges tokens between processes. Rows
are gathered and summed by `kernels/experts.py`, from tokens to tokens.

Letters: T tokens, D hidden, N tokens that this process's experts get (T where they are its own), R assignments, P rows
(R and those that fill groups up), E experts, C capacity.
"""

import itertools
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_lm.kernels.grouping import Grouping, row_alignment
from moe_lm.model.router import Assignments, expert_capacity

_FEW_ROWS = 64
"""Fewer rows than this are sorted in Python on a CPU; `row_alignment` fills up no group of theirs."""


class TokenDispatcher(Protocol):
    """Brings tokens to the experts that this process holds, and their answers back."""

    def dispatch(self, x_TD: Tensor, assignments: Assignments) -> tuple[Tensor, Grouping, Any]:
        """Return tokens [N, D], the grouping of their rows by local expert, and a handle for `combine`."""

    def combine(self, y_ND: Tensor, handle: Any) -> Tensor:
        """Return y [T, D]: for each token the sum of its assignments' weight · expert output."""


class LocalDispatcher:
    """All experts live in this process: a stable sort by expert, each group rounded up to the kernels' alignment."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def dispatch(self, x_TD: Tensor, assignments: Assignments) -> tuple[Tensor, Grouping, None]:
        """See `TokenDispatcher`."""
        return x_TD, self._group(x_TD, assignments), None

    def combine(self, y_TD: Tensor, handle: None) -> Tensor:
        """See `TokenDispatcher`."""
        return y_TD

    def _group(self, x_TD: Tensor, assignments: Assignments) -> Grouping:
        token_R, expert_R, weight_R = assignments
        if x_TD.device.type == "cpu" and len(token_R) < _FEW_ROWS:
            return self._group_few(assignments)
        align = row_alignment(x_TD.device, x_TD.dtype, len(token_R), self.num_experts)
        sorted_expert_R, order_R = torch.sort(expert_R, stable=True)
        experts_E = torch.arange(self.num_experts, device=x_TD.device)
        start_E = torch.searchsorted(sorted_expert_R, experts_E)
        size_E = torch.searchsorted(sorted_expert_R, experts_E, right=True) - start_E
        end_E = ((size_E + align - 1) // align * align).cumsum(0)
        # Each group begins where the one before ends, filling included: shift the sorted rows by what was filled in so
        # far.
        shift_E = torch.cat((end_E.new_zeros(1), end_E[:-1])) - start_E
        place_R = torch.arange(len(token_R), device=x_TD.device) + shift_E.index_select(0, sorted_expert_R)
        # Upper bound known without asking the device, so that CUDA does not wait; rows past the last end stay unused.
        capacity = len(token_R) + self.num_experts * (align - 1)
        num_rows = int(end_E[-1]) if x_TD.device.type == "cpu" else capacity
        token_P = token_R.new_zeros(num_rows).index_copy(0, place_R, token_R.index_select(0, order_R))
        weight_P = weight_R.new_zeros(num_rows).index_copy(0, place_R, weight_R.index_select(0, order_R))
        return Grouping(token_P, weight_P, end_E.to(torch.int32))

    def _group_few(self, assignments: Assignments) -> Grouping:
        """The same without filling rows, sorted in Python: for a few rows that is faster than starting 16 operators."""
        experts = assignments.expert_R.tolist()
        order_R = torch.tensor(sorted(range(len(experts)), key=experts.__getitem__), dtype=torch.int64)
        end_E = torch.tensor([*itertools.accumulate(map(experts.count, range(self.num_experts)))], dtype=torch.int32)
        token_P, weight_P = (values.index_select(0, order_R) for values in (assignments.token_R, assignments.weight_R))
        return Grouping(token_P, weight_P, end_E)


class CapacityDispatcher(LocalDispatcher):
    """All experts live in this process, and each takes exactly C rows, filled up or cut off: shapes are static. Group e
    is rows e·C to (e + 1)·C.

    Of an expert with too many assignments those of least weight are dropped (as Megatron's `probs` policy does, where
    GShard drops the latest): their tokens keep what other experts and the residual stream give them.
    """

    def __init__(self, num_experts: int, factor: float):
        super().__init__(num_experts)
        self.factor = factor

    def _group(self, x_TD: Tensor, assignments: Assignments) -> Grouping:
        token_R, expert_R, weight_R = assignments
        capacity = expert_capacity(self.factor, len(token_R), self.num_experts)
        by_weight_R = torch.argsort(weight_R.detach(), descending=True, stable=True)
        sorted_expert_R, order_R = torch.sort(expert_R.index_select(0, by_weight_R), stable=True)
        order_R = by_weight_R.index_select(0, order_R)
        experts_E = torch.arange(self.num_experts, device=x_TD.device)
        start_E = torch.searchsorted(sorted_expert_R, experts_E)
        rank_R = torch.arange(len(token_R), device=x_TD.device) - start_E.index_select(0, sorted_expert_R)
        # What is dropped goes to one place past the end.
        num_rows = self.num_experts * capacity
        place_R = torch.where(rank_R < capacity, sorted_expert_R * capacity + rank_R, num_rows)
        # Filling rows are of any token, but not all of one: they are that token's to sum.
        filling_P = torch.arange(num_rows + 1, device=x_TD.device) % x_TD.shape[0]
        token_P = filling_P.scatter(0, place_R, token_R.index_select(0, order_R))[:-1]
        weight_P = weight_R.new_zeros(num_rows + 1).scatter(0, place_R, weight_R.index_select(0, order_R))[:-1]
        end_E = (experts_E + 1) * capacity
        return Grouping(token_P, weight_P, end_E.to(torch.int32))
