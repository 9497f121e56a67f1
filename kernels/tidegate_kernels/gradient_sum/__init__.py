"""Add a gradient to its fp32 sum over micro-batches, in place.

Letters: N numbers.
"""

from __future__ import annotations

import torch

from tidegate_kernels.choice import takes_triton

__all__ = ["add_gradient"]


def add_gradient(total_N: torch.Tensor, gradient_N: torch.Tensor, *, first: bool) -> None:
    """`total += gradient`, or `total = gradient` for the first one, whatever `total` held.

    Args:
        total_N: (N,) fp32, contiguous; is changed.
        gradient_N: (N,) of any floating dtype, contiguous.
        first: whether it is the first of the sum.
    """
    if takes_triton(gradient_N):
        from tidegate_kernels.gradient_sum import triton

        triton.add_gradient(total_N, gradient_N, first)
    elif first:
        total_N.copy_(gradient_N)
    else:
        total_N.add_(gradient_N)
