"""Sort assignments of rows to experts, and carry rows to their experts and back.

Letters: N rows, A assignments (numbered by row), D width, E experts, K experts a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tidegate_kernels.choice import takes_triton
from tidegate_kernels.moe_dispatch import reference
from tidegate_kernels.tiles import unit_stride

__all__ = ["Slots", "combine", "fan_in", "fan_out", "place"]

_MOST_EXPERTS = 1024
"""That the counting sort takes."""


class Slots(NamedTuple):
    """Where the assignments of N rows lie when they are sorted by expert."""

    slot_A: torch.Tensor
    """(A,) int32, a permutation."""
    ends_E: torch.Tensor
    """(E,) int32, the end of each expert's slots."""
    starts_N1: torch.Tensor | None
    """(N + 1,) int64, where the assignments of each row begin; None if every row has `per_row`."""
    per_row: int

    @property
    def counts_E(self) -> torch.Tensor:
        """(E,) int64 slots of each expert."""
        return self.ends_E.diff(prepend=self.ends_E.new_zeros(1)).long()


def place(expert_A: torch.Tensor, num_experts: int, *, per_row: int, starts_N1: torch.Tensor | None = None) -> Slots:
    """Sort assignments by expert, stably; nothing is read on the host.

    Args:
        expert_A: (A,) int64, of assignments that are numbered by row.
        num_experts: E.
        per_row: K, assignments of each row.
        starts_N1: (N + 1,) int64 where they are not all K.
    """
    if num_experts <= _MOST_EXPERTS and _sorts(expert_A):
        slot_A, ends_E = _place(expert_A.contiguous(), num_experts)
    else:
        slot_A, ends_E = reference.place(expert_A, num_experts)
    return Slots(slot_A, ends_E, starts_N1, per_row)


def fan_out(x_ND: torch.Tensor, slots: Slots) -> torch.Tensor:
    """(A, D) every row in all its slots."""
    arguments = slots.slot_A, slots.starts_N1, slots.per_row
    if not takes_triton(x_ND):
        return reference.fan_out(x_ND, *arguments)
    return _fan_out(unit_stride(x_ND), *arguments)


def fan_in(y_AD: torch.Tensor, slots: Slots) -> torch.Tensor:
    """(N, D) the sum of each row's slots, in fp32 inside: the gradient of `fan_out`."""
    arguments = slots.slot_A, slots.starts_N1, slots.per_row
    if not takes_triton(y_AD):
        return reference.fan_in(y_AD, *arguments)
    return _fan_in(y_AD.contiguous(), *arguments)


def combine(y_AD: torch.Tensor, weights_A: torch.Tensor, slots: Slots) -> torch.Tensor:
    """(N, D) the weighted sum of each row's slots, in fp32 inside.

    Args:
        y_AD: sorted by expert.
        weights_A: (A,) fp32, numbered by row.
        slots: of `place`.
    """
    arguments = slots.slot_A, slots.starts_N1, slots.per_row
    if not takes_triton(y_AD):
        return reference.combine(y_AD, weights_A, *arguments)
    return _combine(y_AD.contiguous(), weights_A.contiguous(), *arguments)


def _sorts(expert_A: torch.Tensor) -> bool:
    """Ids have no float dtype to decide by: their device does."""
    return takes_triton(expert_A.new_empty(0, dtype=torch.float32))


def _num_rows(slot_A: torch.Tensor, starts_N1: torch.Tensor | None, per_row: int) -> int:
    return slot_A.shape[0] // per_row if starts_N1 is None else starts_N1.shape[0] - 1


@torch.library.custom_op("tidegate::place", mutates_args=())
def _place(expert_A: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    from tidegate_kernels.moe_dispatch import triton

    return triton.place(expert_A, num_experts)


@_place.register_fake
def _(expert_A: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(expert_A, dtype=torch.int32), expert_A.new_empty(num_experts, dtype=torch.int32)


@torch.library.custom_op("tidegate::fan_out", mutates_args=())
def _fan_out(x_ND: torch.Tensor, slot_A: torch.Tensor, starts_N1: torch.Tensor | None, per_row: int) -> torch.Tensor:
    from tidegate_kernels.moe_dispatch import triton

    return triton.fan_out(x_ND, slot_A, starts_N1, per_row)[0]


@_fan_out.register_fake
def _(x_ND: torch.Tensor, slot_A: torch.Tensor, starts_N1: torch.Tensor | None, per_row: int) -> torch.Tensor:
    return x_ND.new_empty(slot_A.shape[0], x_ND.shape[1])


@torch.library.custom_op("tidegate::fan_in", mutates_args=())
def _fan_in(y_AD: torch.Tensor, slot_A: torch.Tensor, starts_N1: torch.Tensor | None, per_row: int) -> torch.Tensor:
    from tidegate_kernels.moe_dispatch import triton

    return triton.combine(y_AD, slot_A, starts_N1, per_row, _num_rows(slot_A, starts_N1, per_row))


@_fan_in.register_fake
def _(y_AD: torch.Tensor, slot_A: torch.Tensor, starts_N1: torch.Tensor | None, per_row: int) -> torch.Tensor:
    return y_AD.new_empty(_num_rows(slot_A, starts_N1, per_row), y_AD.shape[1])


def _save_slots(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, slot_A, starts_N1, ctx.per_row = inputs
    ctx.save_for_backward(slot_A, starts_N1)


def _differentiate_fan_out(ctx: Any, g_AD: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return _fan_in(g_AD.contiguous(), *ctx.saved_tensors, ctx.per_row), None, None, None


_fan_out.register_autograd(_differentiate_fan_out, setup_context=_save_slots)


def _differentiate_fan_in(ctx: Any, g_ND: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return _fan_out(unit_stride(g_ND), *ctx.saved_tensors, ctx.per_row), None, None, None


_fan_in.register_autograd(_differentiate_fan_in, setup_context=_save_slots)


@torch.library.custom_op("tidegate::combine", mutates_args=())
def _combine(
    y_AD: torch.Tensor, weights_A: torch.Tensor, slot_A: torch.Tensor, starts_N1: torch.Tensor | None, per_row: int
) -> torch.Tensor:
    from tidegate_kernels.moe_dispatch import triton

    rows = _num_rows(slot_A, starts_N1, per_row)
    return triton.combine(y_AD, slot_A, starts_N1, per_row, rows, weights_A)


@_combine.register_fake
def _(
    y_AD: torch.Tensor, weights_A: torch.Tensor, slot_A: torch.Tensor, starts_N1: torch.Tensor | None, per_row: int
) -> torch.Tensor:
    return y_AD.new_empty(_num_rows(slot_A, starts_N1, per_row), y_AD.shape[1])


@torch.library.custom_op("tidegate::combine_backward", mutates_args=())
def _combine_backward(
    g_ND: torch.Tensor,
    y_AD: torch.Tensor,
    weights_A: torch.Tensor,
    slot_A: torch.Tensor,
    starts_N1: torch.Tensor | None,
    per_row: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    from tidegate_kernels.moe_dispatch import triton

    return triton.combine_backward(unit_stride(g_ND), y_AD, slot_A, starts_N1, per_row, weights_A)


@_combine_backward.register_fake
def _(
    g_ND: torch.Tensor,
    y_AD: torch.Tensor,
    weights_A: torch.Tensor,
    slot_A: torch.Tensor,
    starts_N1: torch.Tensor | None,
    per_row: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(y_AD), torch.empty_like(weights_A)


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.per_row = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_combine(ctx: Any, g_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
    dy, dweights = _combine_backward(g_ND, *ctx.saved_tensors, ctx.per_row)
    return dy, dweights, None, None, None


_combine.register_autograd(_differentiate_combine, setup_context=_save_combine)
