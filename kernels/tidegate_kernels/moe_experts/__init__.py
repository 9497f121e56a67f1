"""The routed feed-forward: rows to their experts, SwiGLU between grouped products, the weighted sum back to rows.

What is kept for the backward pass is the input, gate and up products and indices: rows in expert order, activations
and expert outputs are made again or not needed. The routing weight enters before the last product, where it is a factor
of the activation; its gradient is then a sum over F that the activation's backward has at hand.

Letters: N rows, A assignments, D width, E experts, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch

from tidegate_kernels.choice import takes_triton
from tidegate_kernels.grouped_mm import outer_by_group, rows_by_group
from tidegate_kernels.moe_dispatch import Slots
from tidegate_kernels.moe_experts import reference
from tidegate_kernels.tiles import unit_stride

__all__ = ["moe_experts", "sorted_experts"]


def moe_experts(
    x_ND: torch.Tensor,
    weights_A: torch.Tensor,
    slots: Slots,
    w1_EFD: torch.Tensor,
    w3_EFD: torch.Tensor,
    w2_EDF: torch.Tensor,
) -> torch.Tensor:
    """(N, D) `sum over a row's experts e of weight_e w2_e (silu(w1_e x) * w3_e x)`; no host sync.

    Args:
        x_ND: bf16 or fp32.
        weights_A: (A,) fp32 routing weights, assignments numbered by row.
        slots: where they lie by expert.
        w1_EFD, w3_EFD: gate and up matrices; D and F are multiples of 8.
        w2_EDF: down matrices.

    Source: SwiGLU (Shazeer 2020, arXiv 2002.05202) in a dropless mixture of experts (MegaBlocks, arXiv 2211.15841).
    """
    indices = slots.slot_A, slots.ends_E, slots.starts_N1, slots.per_row
    if not takes_triton(x_ND):
        return reference.moe_experts(x_ND, weights_A, *indices, w1_EFD, w3_EFD, w2_EDF)
    return _moe_experts(unit_stride(x_ND), weights_A.contiguous(), *indices, w1_EFD, w3_EFD, w2_EDF)[0]


def sorted_experts(
    rows_AD: torch.Tensor, ends_E: torch.Tensor, w1_EFD: torch.Tensor, w3_EFD: torch.Tensor, w2_EDF: torch.Tensor
) -> torch.Tensor:
    """(A, D) `w2_e (silu(w1_e x) * w3_e x)` of rows sorted by expert, whose ends are (E,) int32."""
    if not takes_triton(rows_AD):
        return reference.sorted_experts(rows_AD, ends_E, w1_EFD, w3_EFD, w2_EDF)
    return _moe_experts(rows_AD.contiguous(), None, None, ends_E, None, 1, w1_EFD, w3_EFD, w2_EDF)[0]


@torch.library.custom_op("tidegate::moe_experts", mutates_args=())
def _moe_experts(
    x_ND: torch.Tensor,
    weights_A: torch.Tensor | None,
    slot_A: torch.Tensor | None,
    ends_E: torch.Tensor,
    starts_N1: torch.Tensor | None,
    per_row: int,
    w1_EFD: torch.Tensor,
    w3_EFD: torch.Tensor,
    w2_EDF: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, gate and up products. Without slots, rows are sorted by expert already and come back so."""
    from tidegate_kernels.moe_dispatch import triton as dispatch
    from tidegate_kernels.swiglu import triton as swiglu

    rows_AD, sorted_A = x_ND, weights_A
    if slot_A is not None:
        rows_AD, sorted_A = dispatch.fan_out(x_ND, slot_A, starts_N1, per_row, weights_A)
    gate_AF = rows_by_group(rows_AD, w1_EFD.transpose(1, 2), ends_E)
    up_AF = rows_by_group(rows_AD, w3_EFD.transpose(1, 2), ends_E)
    del rows_AD
    act_AF = swiglu.forward(gate_AF, up_AF, sorted_A)
    outputs_AD = rows_by_group(act_AF, w2_EDF.transpose(1, 2), ends_E)
    if slot_A is None:
        return outputs_AD, gate_AF, up_AF
    return dispatch.combine(outputs_AD, slot_A, starts_N1, per_row, x_ND.shape[0]), gate_AF, up_AF


@_moe_experts.register_fake
def _(
    x_ND: torch.Tensor,
    weights_A: torch.Tensor | None,
    slot_A: torch.Tensor | None,
    ends_E: torch.Tensor,
    starts_N1: torch.Tensor | None,
    per_row: int,
    w1_EFD: torch.Tensor,
    w3_EFD: torch.Tensor,
    w2_EDF: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = x_ND.shape[0] if slot_A is None else slot_A.shape[0]
    gate_AF, up_AF = (x_ND.new_empty(rows, w1_EFD.shape[1]) for _ in range(2))
    return x_ND.new_empty(x_ND.shape), gate_AF, up_AF


@torch.library.custom_op("tidegate::moe_experts_backward", mutates_args=())
def _moe_experts_backward(
    g_ND: torch.Tensor,
    x_ND: torch.Tensor,
    weights_A: torch.Tensor | None,
    slot_A: torch.Tensor | None,
    ends_E: torch.Tensor,
    starts_N1: torch.Tensor | None,
    per_row: int,
    w1_EFD: torch.Tensor,
    w3_EFD: torch.Tensor,
    w2_EDF: torch.Tensor,
    gate_AF: torch.Tensor,
    up_AF: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weights (empty without), w1, w3, w2."""
    from tidegate_kernels.moe_dispatch import triton as dispatch
    from tidegate_kernels.moe_experts import triton
    from tidegate_kernels.swiglu import triton as swiglu

    g_AD, sorted_A = g_ND, None
    if slot_A is not None:
        g_AD, sorted_A = dispatch.fan_out(g_ND, slot_A, starts_N1, per_row, weights_A)
    dact_AF = rows_by_group(g_AD, w2_EDF, ends_E)
    dgate_AF, dup_AF, act_AF, dsorted_A = swiglu.backward(dact_AF, gate_AF, up_AF, sorted_A, activated=True)
    assert act_AF is not None
    del dact_AF
    dw2 = outer_by_group(g_AD, act_AF, ends_E)
    del g_AD, act_AF
    rows_AD = x_ND if slot_A is None else dispatch.fan_out(x_ND, slot_A, starts_N1, per_row)[0]
    dw1, dw3 = outer_by_group(dgate_AF, rows_AD, ends_E), outer_by_group(dup_AF, rows_AD, ends_E)
    del rows_AD
    if x_ND.dtype == torch.bfloat16:
        dx = triton.two_products(dgate_AF, w1_EFD, dup_AF, w3_EFD, ends_E)
    else:
        dx = rows_by_group(dgate_AF, w1_EFD, ends_E) + rows_by_group(dup_AF, w3_EFD, ends_E)
    dweights = x_ND.new_empty(0, dtype=torch.float32)
    if slot_A is not None:
        dx = dispatch.combine(dx, slot_A, starts_N1, per_row, x_ND.shape[0])
        assert dsorted_A is not None
        dweights = dsorted_A.index_select(0, slot_A)
    return dx, dweights, dw1, dw3, dw2


@_moe_experts_backward.register_fake
def _(
    g_ND: torch.Tensor,
    x_ND: torch.Tensor,
    weights_A: torch.Tensor | None,
    slot_A: torch.Tensor | None,
    ends_E: torch.Tensor,
    starts_N1: torch.Tensor | None,
    per_row: int,
    w1_EFD: torch.Tensor,
    w3_EFD: torch.Tensor,
    w2_EDF: torch.Tensor,
    gate_AF: torch.Tensor,
    up_AF: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dweights = x_ND.new_empty(0 if weights_A is None else weights_A.shape[0], dtype=torch.float32)
    dw1, dw3, dw2 = (w.new_empty(w.shape) for w in (w1_EFD, w3_EFD, w2_EDF))
    return x_ND.new_empty(x_ND.shape), dweights, dw1, dw3, dw2


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weights, slot, ends, starts, ctx.per_row, w1, w3, w2 = inputs
    _, gate, up = output
    ctx.set_materialize_grads(False)  # gate and up get no gradient, and would get zeros of their size
    ctx.save_for_backward(x, weights, slot, ends, starts, w1, w3, w2, gate, up)


def _differentiate(ctx: Any, g_ND: torch.Tensor, *unused: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weights, slot, ends, starts, *matrices = ctx.saved_tensors
    dx, dweights, dw1, dw3, dw2 = _moe_experts_backward(
        g_ND.contiguous(), x, weights, slot, ends, starts, ctx.per_row, *matrices
    )
    return dx, None if weights is None else dweights, None, None, None, None, dw1, dw3, dw2


_moe_experts.register_autograd(_differentiate, setup_context=_save)
