"""The truth of `place`, `fan_out` and `combine`, in plain PyTorch.

Letters: N rows, A assignments, D width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["combine", "fan_in", "fan_out", "place"]


def place(expert_A: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots and ends by a stable sort."""
    order_A = expert_A.argsort(stable=True)
    slot_A = torch.empty_like(order_A).scatter_(0, order_A, torch.arange(order_A.numel(), device=order_A.device))
    counts_E = expert_A.new_zeros(num_experts).scatter_add_(0, expert_A, torch.ones_like(expert_A))
    return slot_A.to(torch.int32), counts_E.cumsum(0).to(torch.int32)


def fan_out(x_ND: torch.Tensor, slot_A: torch.Tensor, starts_N1: torch.Tensor | None, per_row: int) -> torch.Tensor:
    """(A, D) every row in all its slots."""
    return _FanOut.apply(x_ND, slot_A, starts_N1, per_row)


def fan_in(y_AD: torch.Tensor, slot_A: torch.Tensor, starts_N1: torch.Tensor | None, per_row: int) -> torch.Tensor:
    """(N, D) the sum of each row's slots, in the wider of fp32 and the dtype of y."""
    by_row_AD = _Permute.apply(y_AD, slot_A, _inverse(slot_A))
    return _sum_per_row(by_row_AD, starts_N1, per_row)


def combine(
    y_AD: torch.Tensor, weights_A: torch.Tensor, slot_A: torch.Tensor, starts_N1: torch.Tensor | None, per_row: int
) -> torch.Tensor:
    """(N, D) the weighted sum of each row's slots, summed in the wider of fp32 and the dtype of y."""
    by_row_AD = _Permute.apply(y_AD, slot_A, _inverse(slot_A))
    wide = torch.promote_types(y_AD.dtype, torch.float32)
    return _sum_per_row(by_row_AD.to(wide) * weights_A.unsqueeze(-1), starts_N1, per_row).to(y_AD.dtype)


def _sum_per_row(values_AD: torch.Tensor, starts_N1: torch.Tensor | None, per_row: int) -> torch.Tensor:
    if starts_N1 is None:
        return values_AD.unflatten(0, (-1, per_row)).sum(dim=1)
    if values_AD.shape[0] == 0:
        return values_AD.new_zeros(starts_N1.shape[0] - 1, values_AD.shape[1]) + values_AD.sum()
    # In fp32, as a plain sum is inside. `unsafe` leaves out checks of the lengths that would read them on the host.
    wide = values_AD.to(torch.promote_types(values_AD.dtype, torch.float32))
    sums = torch.segment_reduce(wide, "sum", lengths=starts_N1.diff(), axis=0, initial=0.0, unsafe=True)
    return sums.to(values_AD.dtype)


def _inverse(slot_A: torch.Tensor) -> torch.Tensor:
    order_A = torch.empty(slot_A.shape, dtype=torch.int64, device=slot_A.device)
    return order_A.scatter_(0, slot_A.long(), torch.arange(slot_A.numel(), device=slot_A.device))


def _source(slot_A: torch.Tensor, starts_N1: torch.Tensor | None, per_row: int) -> torch.Tensor:
    """(A,) the row of each slot."""
    order_A = _inverse(slot_A)
    if starts_N1 is None:
        return order_A // per_row
    rows = torch.arange(starts_N1.shape[0] - 1, device=slot_A.device)
    return rows.repeat_interleave(starts_N1.diff(), output_size=slot_A.shape[0])[order_A]


class _FanOut(torch.autograd.Function):
    """`y[i] = x[source[i]]`; the backward gathers and sums per row instead of scattering with atomics."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: torch.Tensor, slot_A: torch.Tensor, starts_N1: torch.Tensor | None, per_row: int
    ) -> torch.Tensor:
        ctx.save_for_backward(slot_A, starts_N1)
        ctx.per_row = per_row
        return x_ND.index_select(0, _source(slot_A, starts_N1, per_row))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        slot_A, starts_N1 = ctx.saved_tensors
        return _sum_per_row(grad.index_select(0, slot_A), starts_N1, ctx.per_row), None, None, None


class _Permute(torch.autograd.Function):
    """`y[i] = x[index[i]]` for a permutation, with the inverse permutation as its backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None
