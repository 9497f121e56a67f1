"""The truth of `rms_norm` and `add_rms_norm`, in plain PyTorch, fp32 inside.

Letters: D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

__all__ = ["AddedNorm", "add_rms_norm", "rms_norm"]


class AddedNorm(NamedTuple):
    normalised: torch.Tensor
    total: torch.Tensor
    """The sum that was normalised."""


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis.

    Args:
        x: (..., D), any float dtype.
        weight_D: (D,).
        eps: above 0.

    Returns:
        Shape and dtype of `x`.

    Source: Zhang & Sennrich 2019 (arXiv 1910.07467), Eq. 4.
    """
    return F.rms_norm(x, (x.shape[-1],), weight_D, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight_D: torch.Tensor, eps: float) -> AddedNorm:
    """Add to the residual stream and normalise the sum, which is rounded to its dtype first.

    Args:
        x, residual: (..., D), one shape and dtype.
        weight_D, eps: as for `rms_norm`.
    """
    total = residual + x
    return AddedNorm(rms_norm(total, weight_D, eps), total)
