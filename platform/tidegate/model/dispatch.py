"""From a routing to rows sorted by expert, and back.

A routing names experts; what is stored and run are *slices*, all of one width. An expert of an even mixture is one
slice. In an uneven mixture an expert is a bundle of slices (SwiGLU adds up over hidden units, so a wide expert is the
sum of narrow ones), or of none: the identity, whose block adds nothing. The grouped product and expert parallelism
see slices only, all alike.

Letters: N rows, D width, E experts, K chosen experts, S slots, A assignments of rows to slices, s slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from tidegate.model.routers.base import Routing

__all__ = ["Dispatch", "Permute", "combine", "fan_out", "inverse_permutation", "plan"]


class Dispatch(NamedTuple):
    """Where the assignments of N rows go. They are numbered by row; `order` sorts them by slice."""

    order_A: torch.Tensor
    inverse_A: torch.Tensor
    counts_s: torch.Tensor
    """(s,) int64 rows of each slice."""
    source_A: torch.Tensor
    """(A,) int64, the row that each assignment copies, sorted by slice."""
    weights_A: torch.Tensor
    """(A,) fp32; carries gradient."""
    lengths_N: torch.Tensor | None
    """(N,) int64 assignments of each row; None if every row has `per_row`."""
    per_row: int


def plan(routing: Routing, slices: Sequence[int]) -> Dispatch:
    """Sort the assignments of a routing by slice.

    Args:
        routing: of N rows.
        slices: how many slices each expert is; they are numbered consecutively.

    Where every expert is one slice and the router is not ragged, nothing is read on the host. A ragged router costs one
    read a layer and pass, the number of assignments, and uneven experts one more.
    """
    experts_NS = routing.experts_NS
    rows, slots = experts_NS.shape
    lengths_N: torch.Tensor | None = None
    weights_A = routing.weights_NS.flatten()
    slice_A = experts_NS.flatten()
    rows_A: torch.Tensor | None = None
    if routing.chosen_NS is not None:
        kept = routing.chosen_NS.flatten().nonzero().squeeze(1)
        slice_A, rows_A, weights_A = slice_A[kept], kept // slots, weights_A[kept]
        lengths_N = routing.chosen_NS.sum(dim=1)
    if any(number != 1 for number in slices):
        if rows_A is None:
            rows_A = torch.arange(rows, device=slice_A.device).repeat_interleave(slots)
        width_E, first_E = _slice_table(tuple(slices), slice_A.device)
        width_A, first_A = width_E[slice_A], first_E[slice_A]
        total = int(width_A.sum())
        of_A = torch.arange(len(width_A), device=slice_A.device).repeat_interleave(width_A, output_size=total)
        within_A = torch.arange(total, device=slice_A.device) - (width_A.cumsum(0) - width_A)[of_A]
        slice_A, rows_A, weights_A = first_A[of_A] + within_A, rows_A[of_A], weights_A[of_A]
        lengths_N = torch.zeros(rows, dtype=torch.int64, device=rows_A.device).scatter_add_(
            0, rows_A, torch.ones_like(rows_A)
        )
    order_A = slice_A.argsort(stable=True)
    counts_s = slice_A.new_zeros(sum(slices)).scatter_add_(0, slice_A, torch.ones_like(slice_A))
    source_A = order_A // slots if rows_A is None else rows_A[order_A]
    return Dispatch(order_A, inverse_permutation(order_A), counts_s, source_A, weights_A, lengths_N, slots)


def fan_out(x_ND: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
    """(A, D) the rows of `x` for every assignment, sorted by slice."""
    return _FanOut.apply(x_ND, dispatch.source_A, dispatch.inverse_A, dispatch.lengths_N, dispatch.per_row)


def combine(outputs_AD: torch.Tensor, dispatch: Dispatch, rows: int) -> torch.Tensor:
    """(N, D) fp32, the weighted sum of each row's outputs, which come sorted by slice."""
    outputs_AD = Permute.apply(outputs_AD, dispatch.inverse_A, dispatch.order_A)
    weighted_AD = outputs_AD.float() * dispatch.weights_A.unsqueeze(-1)
    return _sum_per_row(weighted_AD, dispatch.lengths_N, dispatch.per_row, rows)


def _sum_per_row(values_AD: torch.Tensor, lengths_N: torch.Tensor | None, per_row: int, rows: int) -> torch.Tensor:
    if lengths_N is None:
        return values_AD.unflatten(0, (-1, per_row)).sum(dim=1)
    if values_AD.shape[0] == 0:
        return values_AD.new_zeros(rows, values_AD.shape[1]) + values_AD.sum()
    # In fp32, as a plain sum is inside. `unsafe` leaves out checks of the lengths that would read them on the host.
    sums = torch.segment_reduce(
        values_AD.to(torch.promote_types(values_AD.dtype, torch.float32)),
        "sum",
        lengths=lengths_N,
        axis=0,
        initial=0.0,
        unsafe=True,
    )
    return sums.to(values_AD.dtype)


@lru_cache(maxsize=8)
def _slice_table(slices: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(E,) int64 slices of each expert, and the number of its first one."""
    width_E = torch.tensor(slices, device=device)
    return width_E, width_E.cumsum(0) - width_E


def inverse_permutation(order: torch.Tensor) -> torch.Tensor:
    """`inverse[order[i]] = i`, without a second sort."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


class _FanOut(torch.autograd.Function):
    """`y[i] = x[source[i]]`; the backward gathers and sums per row instead of scattering with atomics."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: torch.Tensor,
        source_A: torch.Tensor,
        inverse_A: torch.Tensor,
        lengths_N: torch.Tensor | None,
        per_row: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse_A, *(() if lengths_N is None else (lengths_N,)))
        ctx.per_row, ctx.rows = per_row, x_ND.shape[0]
        return x_ND.index_select(0, source_A)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        inverse_A, *rest = ctx.saved_tensors
        by_row = grad.index_select(0, inverse_A)
        return _sum_per_row(by_row, rest[0] if rest else None, ctx.per_row, ctx.rows), None, None, None, None


class Permute(torch.autograd.Function):
    """`y[i] = x[index[i]]` for a permutation, with the inverse permutation as its backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None
