"""The way of rows to the ranks that hold their experts, and back.

A row goes once to each rank that holds experts of its, however many, together with the list of its assignments there;
that rank mixes them as if the row were its own, and one row comes back. With 8 experts a row on 2 ranks that is a
quarter of what a copy for every expert takes, on 8 ranks two thirds. The arithmetic is that of one process, but for the
order of the sum over a row's experts.

Letters: N rows of this rank, A assignments of rows to slices, R ranks of the group, P pairs of a row and a rank that it
goes to, M rows that came, B assignments that came, D width, e slices of a rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tidegate.model.dispatch import Dispatch
from tidegate_kernels.moe_dispatch import Slots, fan_in, fan_out, place

__all__ = ["Exchange"]


class Exchange:
    """An exchange that the ranks have agreed on; every rank of the group makes one.

    Args:
        dispatch: of this rank's rows to the slices of all ranks, of which each holds the same number.
        num_ranks: R.
        group: of the ranks.
    """

    received: Dispatch
    """Of the M rows that `send` returns, to the slices of this rank, numbered from 0."""

    def __init__(self, dispatch: Dispatch, num_ranks: int, group: Any) -> None:
        self._group = group
        num_local = dispatch.num_slices // num_ranks
        rank_A, row_A, N = dispatch.slice_A // num_local, dispatch.row_A(), dispatch.num_rows
        num_assignments = rank_A.shape[0]
        # What is sent lies by rank, then row: so do the pairs among all (R, N).
        lengths_RN = rank_A.new_zeros(num_ranks * N).scatter_add_(0, rank_A * N + row_A, torch.ones_like(rank_A))
        lengths_RN = lengths_RN.view(num_ranks, N)
        goes_RN = lengths_RN > 0
        pair_RN = goes_RN.flatten().cumsum(0).view(num_ranks, N) - 1
        numbers_A = torch.arange(num_assignments, device=rank_A.device)
        sorted_A = place(rank_A, num_ranks, per_row=1).slot_A.long()
        assignment_A = torch.empty_like(sorted_A).scatter_(0, sorted_A, numbers_A)
        starts_N1 = F.pad(goes_RN.sum(dim=0).cumsum(0), (1, 0))

        sizes_R2 = torch.stack([goes_RN.sum(dim=1), lengths_RN.sum(dim=1)], dim=1)
        (self._sent, assigned), (self._came, came) = self.agree(sizes_R2)

        slot_P = _kept(pair_RN.t(), goes_RN.t(), sum(self._sent))
        ends_R = sizes_R2[:, 0].cumsum(0)
        self._slots = Slots(slot_P.to(torch.int32), ends_R.to(torch.int32), starts_N1, 0)
        lengths_P = _kept(lengths_RN, goes_RN, sum(self._sent))
        lengths_M = _Moved.apply(lengths_P, self._sent, self._came, group)
        slice_A = dispatch.slice_A % num_local
        slice_B = _Moved.apply(slice_A.index_select(0, assignment_A), assigned, came, group)
        weights_B = _Moved.apply(dispatch.weights_A.index_select(0, assignment_A), assigned, came, group)
        self.received = Dispatch(slice_B, weights_B, F.pad(lengths_M.cumsum(0), (1, 0)), 0, num_local)

    def agree(self, sizes_R2: torch.Tensor) -> list[list[list[int]]]:
        """(2, 2, R) of pairs and of assignments, what goes to each rank, and what comes from each."""
        others_R2 = torch.empty_like(sizes_R2)
        dist.all_to_all_single(others_R2, sizes_R2, group=self._group)
        # The one host sync of a layer: the collectives want sizes on the host.
        return torch.stack([sizes_R2.t(), others_R2.t()]).tolist()

    def send(self, x_ND: torch.Tensor) -> torch.Tensor:
        """(M, D) the rows that came to this rank; differentiable."""
        return _Moved.apply(fan_out(x_ND, self._slots), self._sent, self._came, self._group)

    def send_back(self, y_MD: torch.Tensor) -> torch.Tensor:
        """(N, D) the sum of what all ranks made of each of this rank's rows; differentiable."""
        return fan_in(_Moved.apply(y_MD, self._came, self._sent, self._group), self._slots)


def _kept(values: torch.Tensor, flags: torch.Tensor, number: int) -> torch.Tensor:
    """(number,) the values that are flagged, in order; `number` is known, so that nothing waits for the device."""
    flags = flags.flatten()
    at = torch.where(flags, flags.cumsum(0) - 1, number)  # the others share a place past the end
    return values.new_empty(number + 1).scatter_(0, at, values.flatten())[:number]


class _Moved(torch.autograd.Function):
    """All-to-all of rows of any width by given numbers of rows; gradients take the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sent: list[int], came: list[int], group: Any) -> torch.Tensor:
        ctx.way = came, sent, group
        out = x.new_empty(sum(came), *x.shape[1:])
        if x.is_meta:  # shapes only: there is nobody to exchange with
            return out
        dist.all_to_all_single(out, x.contiguous(), came, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _Moved.apply(g, *ctx.way), None, None, None
