"""The way of rows to the ranks that hold their experts, and back.

A row goes once to each rank that holds experts of its, however many, together with the list of its assignments there;
that rank mixes them as if the row were its own, and one row comes back. With 8 experts a row on 2 ranks that is a
quarter of what a copy for every expert takes, on 8 ranks two thirds. The arithmetic is that of one process, but for the
order of the sum over a row's experts.

Letters: N rows of this rank, A assignments of rows to slices, R ranks of the group, P pairs of a row and a rank that it
goes to, M rows that came, B assignments that came, D width, e slices of a rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tidegate.model.dispatch import Dispatch
from tidegate.parallel.all_to_all import AllToAll
from tidegate_kernels.moe_dispatch import Slots, fan_in, fan_out, place

__all__ = ["Exchange"]


class Exchange:
    """An exchange that the ranks have agreed on; every rank of the group makes one.

    Args:
        dispatch: of this rank's rows to the slices of all ranks, of which each holds the same number.
        num_ranks: R.
        all_to_all: of the ranks.
    """

    received: Dispatch
    """Of the M rows that `send` returns, to the slices of this rank, numbered from 0."""

    def __init__(self, dispatch: Dispatch, num_ranks: int, all_to_all: AllToAll) -> None:
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
        self._pairs, assignments = all_to_all.agree(sizes_R2)

        num_pairs = sum(self._pairs.sent)
        slot_P = _kept(pair_RN.t(), goes_RN.t(), num_pairs)
        ends_R = sizes_R2[:, 0].cumsum(0)
        self._slots = Slots(slot_P.to(torch.int32), ends_R.to(torch.int32), starts_N1, 0)
        lengths_M = self._pairs.there(_kept(lengths_RN, goes_RN, num_pairs))
        slice_A = dispatch.slice_A % num_local
        slice_B = assignments.there(slice_A.index_select(0, assignment_A))
        weights_B = assignments.there(dispatch.weights_A.index_select(0, assignment_A))
        self.received = Dispatch(slice_B, weights_B, F.pad(lengths_M.cumsum(0), (1, 0)), 0, num_local)

    def send(self, x_ND: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Rows leave; called, the result is the (M, D) that came to this rank. Differentiable."""
        return self._pairs.set_out(fan_out(x_ND, self._slots))

    def send_back(self, y_MD: torch.Tensor) -> torch.Tensor:
        """(N, D) the sum of what all ranks made of each of this rank's rows; differentiable."""
        return fan_in(self._pairs.back(y_MD), self._slots)


def _kept(values: torch.Tensor, flags: torch.Tensor, number: int) -> torch.Tensor:
    """(number,) the values that are flagged, in order; `number` is known, so that nothing waits for the device."""
    flags = flags.flatten()
    at = torch.where(flags, flags.cumsum(0) - 1, number)  # the others share a place past the end
    return values.new_empty(number + 1).scatter_(0, at, values.flatten())[:number]
