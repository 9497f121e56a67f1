"""The routed feed-forward: rows to their experts, SwiGLU between grouped products, the weighted sum back to rows.

What is kept for the backward pass is the input, gate and up products and indices: activations and expert outputs are
made again or not needed, and so are rows in expert order, unless the caller wants them kept. The routing weight enters
before the last product, where it is a factor of the activation; its gradient is then a sum over F that the activation's
backward has at hand.

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

__all__ = ["moe_experts"]


def moe_experts(
    x_ND: torch.Tensor,
    weights_A: torch.Tensor,
    slots: Slots,
    w1_EFD: torch.Tensor,
    w3_EFD: torch.Tensor,
    w2_EDF: torch.Tensor,
    *,
    keep_rows: bool = False,
) -> torch.Tensor:
    """(N, D) `sum over a row's experts e of weight_e w2_e (silu(w1_e x) * w3_e x)`; no host sync.

    Args:
        x_ND: bf16 or fp32.
        weights_A: (A,) fp32 routing weights, assignments numbered by row.
        slots: where they lie by expert.
        w1_EFD, w3_EFD: gate and up matrices; D and F are multiples of 8.
        w2_EDF: down matrices.
        keep_rows: keep the rows in expert order for the backward pass, A x D numbers, instead of gathering them again.
            PyTorch's path keeps them anyway.

    Source: SwiGLU (Shazeer 2020, arXiv 2002.05202) in a dropless mixture of experts (MegaBlocks, arXiv 2211.15841).
    """
    indices = slots.slot_A, slots.ends_E, slots.starts_N1, slots.per_row
    if not takes_triton(x_ND):
        return reference.moe_experts(x_ND, weights_A, *indices, w1_EFD, w3_EFD, w2_EDF)
    return _moe_experts(unit_stride(x_ND), weights_A.contiguous(), *indices, w1_EFD, w3_EFD, w2_EDF, keep_rows)[0]


@torch.library.custom_op("tidegate::moe_experts", mutates_args=())
def _moe_experts(
    x_ND: torch.Tensor,
    weights_A: torch.Tensor,
    slot_A: torch.Tensor,
    ends_E: torch.Tensor,
    starts_N1: torch.Tensor | None,
    per_row: int,
    w1_EFD: torch.Tensor,
    w3_EFD: torch.Tensor,
    w2_EDF: torch.Tensor,
    keep_rows: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, gate and up products, and rows in expert order if they are kept, else none."""
    from tidegate_kernels.moe_dispatch import triton as dispatch
    from tidegate_kernels.swiglu import triton as swiglu

    rows_AD, sorted_A = dispatch.fan_out(x_ND, slot_A, starts_N1, per_row, weights_A)
    gate_AF = rows_by_group(rows_AD, w1_EFD.transpose(1, 2), ends_E)
    up_AF = rows_by_group(rows_AD, w3_EFD.transpose(1, 2), ends_E)
    if not keep_rows:
        rows_AD = rows_AD.new_empty(0)
    act_AF = swiglu.forward(gate_AF, up_AF, sorted_A)
    outputs_AD = rows_by_group(act_AF, w2_EDF.transpose(1, 2), ends_E)
    return dispatch.combine(outputs_AD, slot_A, starts_N1, per_row, x_ND.shape[0]), gate_AF, up_AF, rows_AD


@_moe_experts.register_fake
def _(
    x_ND: torch.Tensor,
    weights_A: torch.Tensor,
    slot_A: torch.Tensor,
    ends_E: torch.Tensor,
    starts_N1: torch.Tensor | None,
    per_row: int,
    w1_EFD: torch.Tensor,
    w3_EFD: torch.Tensor,
    w2_EDF: torch.Tensor,
    keep_rows: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    A = slot_A.shape[0]
    gate_AF, up_AF = (x_ND.new_empty(A, w1_EFD.shape[1]) for _ in range(2))
    return x_ND.new_empty(x_ND.shape), gate_AF, up_AF, x_ND.new_empty((A, x_ND.shape[1]) if keep_rows else 0)


@torch.library.custom_op("tidegate::moe_experts_backward", mutates_args=())
def _moe_experts_backward(
    g_ND: torch.Tensor,
    x_ND: torch.Tensor,
    weights_A: torch.Tensor,
    slot_A: torch.Tensor,
    ends_E: torch.Tensor,
    starts_N1: torch.Tensor | None,
    per_row: int,
    w1_EFD: torch.Tensor,
    w3_EFD: torch.Tensor,
    w2_EDF: torch.Tensor,
    gate_AF: torch.Tensor,
    up_AF: torch.Tensor,
    kept_AD: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weights, w1, w3, w2."""
    from tidegate_kernels.moe_dispatch import triton as dispatch
    from tidegate_kernels.moe_experts import triton
    from tidegate_kernels.swiglu import triton as swiglu

    g_AD, sorted_A = dispatch.fan_out(g_ND, slot_A, starts_N1, per_row, weights_A)
    dact_AF = rows_by_group(g_AD, w2_EDF, ends_E)
    dgate_AF, dup_AF, act_AF, dsorted_A = swiglu.backward(dact_AF, gate_AF, up_AF, sorted_A, activated=True)
    assert act_AF is not None
    assert dsorted_A is not None
    del dact_AF
    dw2 = outer_by_group(g_AD, act_AF, ends_E)
    del g_AD, act_AF
    rows_AD = dispatch.fan_out(x_ND, slot_A, starts_N1, per_row)[0] if kept_AD is None else kept_AD
    dw1, dw3 = outer_by_group(dgate_AF, rows_AD, ends_E), outer_by_group(dup_AF, rows_AD, ends_E)
    del rows_AD
    if x_ND.dtype == torch.bfloat16:
        dx_AD = triton.two_products(dgate_AF, w1_EFD, dup_AF, w3_EFD, ends_E)
    else:
        dx_AD = rows_by_group(dgate_AF, w1_EFD, ends_E) + rows_by_group(dup_AF, w3_EFD, ends_E)
    dx_ND = dispatch.combine(dx_AD, slot_A, starts_N1, per_row, x_ND.shape[0])
    return dx_ND, dsorted_A.index_select(0, slot_A), dw1, dw3, dw2


@_moe_experts_backward.register_fake
def _(
    g_ND: torch.Tensor,
    x_ND: torch.Tensor,
    weights_A: torch.Tensor,
    slot_A: torch.Tensor,
    ends_E: torch.Tensor,
    starts_N1: torch.Tensor | None,
    per_row: int,
    w1_EFD: torch.Tensor,
    w3_EFD: torch.Tensor,
    w2_EDF: torch.Tensor,
    gate_AF: torch.Tensor,
    up_AF: torch.Tensor,
    kept_AD: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dw1, dw3, dw2 = (w.new_empty(w.shape) for w in (w1_EFD, w3_EFD, w2_EDF))
    return x_ND.new_empty(x_ND.shape), weights_A.new_empty(weights_A.shape, dtype=torch.float32), dw1, dw3, dw2


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weights, slot, ends, starts, ctx.per_row, w1, w3, w2, keep_rows = inputs
    _, gate, up, rows = output
    ctx.set_materialize_grads(False)  # gate, up and rows get no gradient, and would get zeros of their size
    ctx.save_for_backward(x, weights, slot, ends, starts, w1, w3, w2, gate, up, rows if keep_rows else None)


def _differentiate(ctx: Any, g_ND: torch.Tensor, *unused: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weights, slot, ends, starts, *rest = ctx.saved_tensors
    dx, dweights, dw1, dw3, dw2 = _moe_experts_backward(
        g_ND.contiguous(), x, weights, slot, ends, starts, ctx.per_row, *rest
    )
    return dx, dweights, None, None, None, None, dw1, dw3, dw2, None


_moe_experts.register_autograd(_differentiate, setup_context=_save)
