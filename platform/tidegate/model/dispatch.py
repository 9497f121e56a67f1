"""From a routing to assignments of rows to slices.

A routing names experts; what is stored and run are *slices*, all of one width. An expert of an even mixture is one
slice. In an uneven mixture an expert is a bundle of slices (SwiGLU adds up over hidden units, so a wide expert is the
sum of narrow ones), or of none: the identity, whose block adds nothing. The grouped product and expert parallelism
see slices only, all alike.

Letters: N rows, D width, E experts, K chosen experts, S slots, A assignments of rows to slices, s slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tidegate.model.routers.base import Routing
from tidegate_kernels.moe_dispatch import Slots, place

__all__ = ["Dispatch", "plan"]


class Dispatch(NamedTuple):
    """Where N rows go: assignments, numbered by row."""

    slice_A: torch.Tensor
    """(A,) int64."""
    weights_A: torch.Tensor
    """(A,) fp32; carries gradient."""
    starts_N1: torch.Tensor | None
    """(N + 1,) int64, where the assignments of each row begin; None if every row has `per_row`."""
    per_row: int
    num_slices: int

    @property
    def num_rows(self) -> int:
        """N."""
        if self.starts_N1 is None:
            return self.slice_A.shape[0] // self.per_row
        return self.starts_N1.shape[0] - 1

    def row_A(self) -> torch.Tensor:
        """(A,) int64, the row of each assignment."""
        rows = torch.arange(self.num_rows, device=self.slice_A.device)
        if self.starts_N1 is None:
            return rows.repeat_interleave(self.per_row)
        return rows.repeat_interleave(self.starts_N1.diff(), output_size=self.slice_A.shape[0])

    def slots(self) -> Slots:
        """Where the assignments lie when they are sorted by slice."""
        return place(self.slice_A, self.num_slices, per_row=self.per_row, starts_N1=self.starts_N1)


def plan(routing: Routing, slices: Sequence[int]) -> Dispatch:
    """Assign the rows of a routing to slices.

    Args:
        routing: of N rows.
        slices: how many slices each expert is; they are numbered consecutively.

    Where every expert is one slice and the router is not ragged, nothing is read on the host. A ragged router costs one
    read a layer and pass, the number of assignments, and uneven experts one more.
    """
    experts_NS = routing.experts_NS
    rows, slots = experts_NS.shape
    starts_N1: torch.Tensor | None = None
    weights_A = routing.weights_NS.flatten()
    slice_A = experts_NS.flatten()
    rows_A: torch.Tensor | None = None
    if routing.chosen_NS is not None:
        kept = routing.chosen_NS.flatten().nonzero().squeeze(1)
        slice_A, rows_A, weights_A = slice_A[kept], kept // slots, weights_A[kept]
        starts_N1 = _starts(routing.chosen_NS.sum(dim=1))
    if any(number != 1 for number in slices):
        if rows_A is None:
            rows_A = torch.arange(rows, device=slice_A.device).repeat_interleave(slots)
        width_E, first_E = _slice_table(tuple(slices), slice_A.device)
        width_A, first_A = width_E[slice_A], first_E[slice_A]
        total = int(width_A.sum())
        of_A = torch.arange(len(width_A), device=slice_A.device).repeat_interleave(width_A, output_size=total)
        within_A = torch.arange(total, device=slice_A.device) - (width_A.cumsum(0) - width_A)[of_A]
        slice_A, rows_A, weights_A = first_A[of_A] + within_A, rows_A[of_A], weights_A[of_A]
        lengths_N = torch.zeros(rows, dtype=torch.int64, device=rows_A.device)
        starts_N1 = _starts(lengths_N.scatter_add_(0, rows_A, torch.ones_like(rows_A)))
    return Dispatch(slice_A, weights_A, starts_N1, slots, sum(slices))


def _starts(lengths_N: torch.Tensor) -> torch.Tensor:
    return F.pad(lengths_N.cumsum(0), (1, 0))


@lru_cache(maxsize=8)
def _slice_table(slices: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(E,) int64 slices of each expert, and the number of its first one."""
    width_E = torch.tensor(slices, device=device)
    return width_E, width_E.cumsum(0) - width_E
