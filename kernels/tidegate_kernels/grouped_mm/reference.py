"""The truth of `grouped_mm`: one matrix product a group."""

from __future__ import annotations

import torch

__all__ = ["grouped_mm", "outer_by_group", "rows_by_group"]


def grouped_mm(x_ND: torch.Tensor, w_EDF: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """See `tidegate_kernels.grouped_mm.grouped_mm`; reads the counts on the host."""
    return rows_by_group(x_ND, w_EDF, counts_E.cumsum(0))


def rows_by_group(x_ND: torch.Tensor, w_EDF: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """See `tidegate_kernels.grouped_mm.rows_by_group`; reads the ends on the host."""
    parts = x_ND.tensor_split(_splits(ends_E, len(x_ND)))
    return torch.cat([part @ w for part, w in zip(parts, w_EDF, strict=True)])


def outer_by_group(a_NM: torch.Tensor, b_NF: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """See `tidegate_kernels.grouped_mm.outer_by_group`; reads the ends on the host."""
    splits = _splits(ends_E, len(a_NM))
    pairs = zip(a_NM.tensor_split(splits), b_NF.tensor_split(splits), strict=True)
    return torch.stack([a.t() @ b for a, b in pairs])


def _splits(ends_E: torch.Tensor, rows: int) -> list[int]:
    """Where all groups but the last end; on `meta`, where nobody knows, as if all were equal."""
    E = len(ends_E)
    return [rows * group // E for group in range(1, E)] if ends_E.is_meta else ends_E[:-1].tolist()
