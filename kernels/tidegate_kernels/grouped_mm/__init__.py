"""Multiply rows that are sorted by group with each group's own matrix: the matrix product of a dropless MoE."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tidegate_kernels.grouped_mm import reference

__all__ = ["grouped_mm"]


def grouped_mm(x_ND: torch.Tensor, w_EDF: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """`y[n] = x[n] @ w[group of n]` for rows sorted by group, through `torch.nn.functional.grouped_mm`.

    Args:
        x_ND: (N, D), rows of group 0 first; any N, also 0. D and F are multiples of 8 (of 4 in fp32).
        w_EDF: (E, D, F), same dtype; may be a transposed view.
        counts_E: (E,) integers that sum to N; groups may be empty. Not read on the host.

    Returns:
        (N, F).
    """
    taken = (torch.bfloat16,) if x_ND.is_cuda else (torch.bfloat16, torch.float32)
    if x_ND.shape[0] == 0 or x_ND.dtype not in taken:  # other dtypes are for tests
        return reference.grouped_mm(x_ND, w_EDF, counts_E)
    return F.grouped_mm(x_ND, w_EDF, offs=counts_E.cumsum(0).to(torch.int32))
