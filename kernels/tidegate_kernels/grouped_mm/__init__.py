"""Multiply rows that are sorted by group with each group's own matrix: the matrix product of a dropless MoE.

`rows_by_group` and `outer_by_group` are the bare products of forward and backward, for operations that have a backward
pass of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tidegate_kernels.grouped_mm import reference

__all__ = ["grouped_mm", "outer_by_group", "rows_by_group"]


def grouped_mm(x_ND: torch.Tensor, w_EDF: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """`y[n] = x[n] @ w[group of n]` for rows sorted by group, through `torch.nn.functional.grouped_mm`.

    Args:
        x_ND: (N, D), rows of group 0 first; any N, also 0. D and F are multiples of 8 (of 4 in fp32).
        w_EDF: (E, D, F), same dtype; may be a transposed view.
        counts_E: (E,) integers that sum to N; groups may be empty. Not read on the host.

    Returns:
        (N, F).
    """
    return rows_by_group(x_ND, w_EDF, counts_E.cumsum(0).to(torch.int32))


def rows_by_group(x_ND: torch.Tensor, w_EDF: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """`grouped_mm` by (E,) int32 ends of the groups."""
    if not _taken(x_ND):
        return reference.rows_by_group(x_ND, w_EDF, ends_E)
    return F.grouped_mm(x_ND, w_EDF, offs=ends_E)


def outer_by_group(a_NM: torch.Tensor, b_NF: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """(E, M, F) `a^T b` over the rows of each group; zero for an empty one."""
    if not _taken(a_NM):
        return reference.outer_by_group(a_NM, b_NF, ends_E)
    return F.grouped_mm(a_NM.t(), b_NF, offs=ends_E)


def _taken(x_ND: torch.Tensor) -> bool:
    """What the library's product takes; other dtypes are for tests."""
    taken = (torch.bfloat16,) if x_ND.is_cuda or x_ND.is_meta else (torch.bfloat16, torch.float32)
    return x_ND.shape[0] > 0 and x_ND.dtype in taken
