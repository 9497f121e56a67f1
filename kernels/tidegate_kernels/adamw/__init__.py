"""One step of AdamW on a flat part of the weights, in place.

Letters: N weights.
"""

from __future__ import annotations

import torch

from tidegate_kernels.adamw import reference
from tidegate_kernels.adamw.reference import Rates, StepFactors, step_factors
from tidegate_kernels.choice import takes_triton

__all__ = ["Rates", "StepFactors", "adamw", "step_factors"]


def adamw(
    weights_N: torch.Tensor,
    in_use_N: torch.Tensor,
    gradients_N: torch.Tensor,
    mean_N: torch.Tensor,
    square_N: torch.Tensor,
    factors: StepFactors,
    rates: Rates,
    *,
    place: int = 0,
) -> None:
    """Move weights and moments; see the reference for arguments. All of them are contiguous."""
    arguments = weights_N, in_use_N, gradients_N, mean_N, square_N, factors, rates, place
    if takes_triton(weights_N):
        from tidegate_kernels.adamw import triton

        triton.adamw(*arguments)
    else:
        reference.adamw(*arguments)
