"""Expert parallelism: token rows travel to the processes that own their experts, and the results back.

One layer's exchange, forward: each process sorts its rows by owner and expert, tells every owner how many rows of each
expert it will send, reads all these numbers at once (the layer's only wait for the device), sends the rows and their
weights, and groups what it received by its experts. The weighted results go the same way back and are summed where the
tokens are. Backward exchanges gradients with the same numbers reversed, and waits for nothing. (Activation
checkpointing runs the forward a second time, with its exchanges and its wait.)

Every process must take part in every exchange, forward and backward, whatever it has to send: a backward that is missed
on one process is answered by the next collective of its peers, which ends in an abort. So the exchange is an autograd
function of its own, and its result is always part of the loss.

Letters: T tokens, D hidden, R assignments (rows sent), Q rows received, P rows of experts (Q and those that fill groups
up), E experts in the whole model, N experts owned here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lm.kernels.combine import gather_rows, sum_rows
from moe_lm.kernels.grouping import Grouping, row_alignment
from moe_lm.model.dispatch import CapacityDispatcher
from moe_lm.model.router import Assignments


class ExchangeHandle(NamedTuple):
    """What `combine` needs to know of a dispatch."""

    token_R: Tensor
    """Token of each row sent, in the order of sending."""
    sent: list[int]
    """Rows sent to each owner."""
    received: list[int]
    """Rows received from each process."""
    num_tokens: int


class _Owners:
    """Who owns which expert of a layer."""

    def __init__(self, owners_E: Sequence[int], group: dist.ProcessGroup, device: torch.device):
        """Know the owners.

        Args:
            owners_E: Rank in the group of each expert's owner.
            group: The processes that share the experts.
            device: Where tokens are.
        """
        self._group = group
        self._size = dist.get_world_size(group)
        self._owned = [list(owners_E).count(owner) for owner in range(self._size)]
        self._num_owned = self._owned[dist.get_rank(group)]
        # The order of sending, by owner and expert: rows sorted by it are runs, one for each owner.
        by_owner = sorted(range(len(owners_E)), key=lambda expert: (owners_E[expert], expert))
        self._slot_E = torch.tensor(sorted(range(len(owners_E)), key=by_owner.__getitem__), device=device)


class AllToAllDispatcher(_Owners):
    """Experts live on the processes of a group, each layer's by a placement of its own."""

    def dispatch(self, x_TD: Tensor, assignments: Assignments) -> tuple[Tensor, Grouping, ExchangeHandle]:
        """See `TokenDispatcher`; every process of the group must call it."""
        token_R, expert_R, weight_R = assignments
        sorted_slot_R, order_R = torch.sort(self._slot_E.index_select(0, expert_R), stable=True)
        token_R, weight_R = token_R.index_select(0, order_R), weight_R.index_select(0, order_R)
        # Not bincount, which waits for the device to find out the largest number.
        size_E = torch.zeros_like(self._slot_E).scatter_add(0, sorted_slot_R, torch.ones_like(sorted_slot_R))
        size_SN, sent, received = self._exchange_sizes(size_E)
        x_QD = _Exchange.apply(gather_rows(x_TD, token_R), received, sent, self._group)
        weight_Q = _Exchange.apply(weight_R, received, sent, self._group)
        num_received = x_QD.shape[0]
        align = row_alignment(x_TD.device, x_TD.dtype, num_received, self._num_owned)
        place_Q, end_N = _places(size_SN, align, num_received)
        # As in the local dispatcher, CUDA takes an upper bound instead of being waited for.
        on_cpu = x_TD.device.type == "cpu"
        num_rows = int(end_N[-1]) if on_cpu else num_received + self._num_owned * (align - 1)
        arrived_P = place_Q.new_zeros(num_rows).index_copy(0, place_Q, torch.arange(num_received, device=x_TD.device))
        weight_P = weight_Q.new_zeros(num_rows).index_copy(0, place_Q, weight_Q)
        handle = ExchangeHandle(token_R, sent, received, x_TD.shape[0])
        return x_QD, Grouping(arrived_P, weight_P, end_N.to(torch.int32)), handle

    def combine(self, y_QD: Tensor, handle: ExchangeHandle) -> Tensor:
        """See `TokenDispatcher`; every process of the group must call it."""
        y_RD = _Exchange.apply(y_QD, handle.sent, handle.received, self._group)
        return sum_rows(y_RD, handle.token_R, handle.num_tokens)

    def _exchange_sizes(self, size_E: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """From the rows that this process has for each expert, in the order of owners: the rows that come from each
        process for each expert owned here [sources, N], and how many go to and come from each process.
        """
        size_SN = size_E.new_empty(self._size, self._num_owned)
        dist.all_to_all_single(size_SN.view(-1), size_E, [self._num_owned] * self._size, self._owned, group=self._group)
        # One copy to the host for both: the layer's only wait for the device.
        on_host = torch.cat((size_E, size_SN.flatten())).tolist()
        starts = [sum(self._owned[:owner]) for owner in range(self._size)]
        sent = [sum(on_host[start : start + owned]) for start, owned in zip(starts, self._owned)]
        coming = on_host[len(size_E) :]
        width = self._num_owned
        received = [sum(coming[source * width : (source + 1) * width]) for source in range(self._size)]
        return size_SN, sent, received


class CapacityAllToAllDispatcher(_Owners):
    """The same with static shapes: every process sends every expert its capacity, and nothing waits for the device."""

    def __init__(self, owners_E: Sequence[int], group: dist.ProcessGroup, device: torch.device, factor: float):
        """Know the owners and the capacity; `factor` as of `CapacityDispatcher`."""
        super().__init__(owners_E, group, device)
        self._local = CapacityDispatcher(len(owners_E), factor)

    def dispatch(self, x_TD: Tensor, assignments: Assignments) -> tuple[Tensor, Grouping, tuple[Tensor, int]]:
        """See `TokenDispatcher`; every process of the group must call it, with as many tokens."""
        by_slot = assignments._replace(expert_R=self._slot_E.index_select(0, assignments.expert_R))
        _, (token_R, weight_R, end_E), _ = self._local.dispatch(x_TD, by_slot)
        capacity = len(token_R) // len(end_E)
        sent, received = self._splits(capacity)
        x_QD = _Exchange.apply(gather_rows(x_TD, token_R), received, sent, self._group)
        weight_Q = _Exchange.apply(weight_R, received, sent, self._group)
        # By source and expert, as they came, to by expert and source.
        came = torch.arange(len(weight_Q), device=x_TD.device).view(self._size, self._num_owned, capacity)
        came_Q = came.transpose(0, 1).flatten()
        grouping = Grouping(came_Q, weight_Q.index_select(0, came_Q), end_E[: self._num_owned] * self._size)
        return x_QD, grouping, (token_R, len(x_TD))

    def combine(self, y_QD: Tensor, handle: tuple[Tensor, int]) -> Tensor:
        """See `TokenDispatcher`; every process of the group must call it."""
        sent, received = self._splits(y_QD.shape[0] // (self._size * self._num_owned))
        return sum_rows(_Exchange.apply(y_QD, sent, received, self._group), *handle)

    def _splits(self, capacity: int) -> tuple[list[int], list[int]]:
        """Rows to each owner, and from each process."""
        return [owned * capacity for owned in self._owned], [self._num_owned * capacity] * self._size


def _places(size_SN: Tensor, align: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Where each received row belongs, and where each expert's group ends, filling included.

    Rows come by source and, within a source, by expert; they are placed by expert and, within it, by source.

    Args:
        size_SN: Rows from each source for each expert owned here.
        align: Multiple that groups are rounded up to.
        num_rows: Their sum, Q.
    """
    end_N = ((size_SN.sum(dim=0) + align - 1) // align * align).cumsum(0)
    start_N = torch.cat((end_N.new_zeros(1), end_N[:-1]))
    start_SN = start_N + size_SN.cumsum(dim=0) - size_SN
    size_B = size_SN.flatten()
    arrived_B = size_B.cumsum(0) - size_B
    shift_B = start_SN.flatten() - arrived_B
    shift_Q = torch.repeat_interleave(shift_B, size_B, output_size=num_rows)
    return torch.arange(num_rows, device=size_SN.device) + shift_Q, end_N


class _Exchange(torch.autograd.Function):
    """All-to-all of rows with splits of any size; backward is the same with the splits reversed."""

    @staticmethod
    def forward(ctx, rows_RD, received, sent, group):  # type: ignore[no-untyped-def]
        ctx.splits = received, sent, group
        return _all_to_all(rows_RD, received, sent, group)

    @staticmethod
    def backward(ctx, grad_QD):  # type: ignore[no-untyped-def]
        received, sent, group = ctx.splits
        return _all_to_all(grad_QD, sent, received, group), None, None, None


def _all_to_all(rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result
