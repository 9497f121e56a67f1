"""The truth of `moe_experts`, in plain PyTorch: rows to experts, three grouped products around SwiGLU, rows back.

Letters: N rows, A assignments, D width, E experts, F expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tidegate_kernels.grouped_mm import rows_by_group
from tidegate_kernels.moe_dispatch import reference as dispatch

__all__ = ["moe_experts"]


def moe_experts(
    x_ND: torch.Tensor,
    weights_A: torch.Tensor,
    slot_A: torch.Tensor,
    ends_E: torch.Tensor,
    starts_N1: torch.Tensor | None,
    per_row: int,
    w1_EFD: torch.Tensor,
    w3_EFD: torch.Tensor,
    w2_EDF: torch.Tensor,
) -> torch.Tensor:
    """(N, D) the weighted sum of each row's experts."""
    rows_AD = dispatch.fan_out(x_ND, slot_A, starts_N1, per_row)
    gate_AF = rows_by_group(rows_AD, w1_EFD.transpose(1, 2), ends_E)
    up_AF = rows_by_group(rows_AD, w3_EFD.transpose(1, 2), ends_E)
    outputs_AD = rows_by_group(F.silu(gate_AF) * up_AF, w2_EDF.transpose(1, 2), ends_E)
    return dispatch.combine(outputs_AD, weights_A, slot_A, starts_N1, per_row)
