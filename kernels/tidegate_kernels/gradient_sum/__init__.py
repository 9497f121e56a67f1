"""Add gradients to their fp32 sum over micro-batches, in place.

Letters: N numbers.
"""

from __future__ import annotations

import torch

from tidegate_kernels.choice import takes_triton

__all__ = ["add_gradients"]


def add_gradients(
    total_N: torch.Tensor, gradient_N: torch.Tensor, other_N: torch.Tensor | None = None, *, first: bool
) -> None:
    """`total += gradient`, then `total += other`; for the first ones `total = gradient`, whatever `total` held.

    Args:
        total_N: (N,) fp32, contiguous; is changed.
        gradient_N: (N,) of any floating dtype, contiguous.
        other_N: (N,) likewise, or None.
        first: whether they are the first of the sum.
    """
    if takes_triton(gradient_N):
        from tidegate_kernels.gradient_sum import triton

        triton.add_gradients(total_N, gradient_N, other_N, first)
        return
    if first:
        total_N.copy_(gradient_N)
    else:
        total_N.add_(gradient_N)
    if other_N is not None:
        total_N.add_(other_N)
