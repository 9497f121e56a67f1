"""Add gradients to their fp32 sum over micro-batches, in place.

Letters: N numbers, or rows; V rows of a table, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tidegate_kernels.choice import takes_triton

__all__ = ["MOST_AT_ONCE", "add_gradients", "add_rows"]

MOST_AT_ONCE = 4
"""Gradients that one pass adds."""


def add_gradients(total_N: torch.Tensor, gradients: Sequence[torch.Tensor], *, first: bool) -> None:
    """Add gradients to `total` one after the other, in one pass; the first ones overwrite whatever `total` held.

    Args:
        total_N: (N,) fp32, contiguous; is changed.
        gradients: 1 to `MOST_AT_ONCE`, (N,) each, of one floating dtype, contiguous.
        first: whether they are the first of the sum.
    """
    if takes_triton(gradients[0]):
        from tidegate_kernels.gradient_sum import triton

        triton.add_gradients(total_N, gradients, first)
        return
    if first:
        total_N.copy_(gradients[0])
        gradients = gradients[1:]
    for gradient in gradients:
        total_N.add_(gradient)


def add_rows(total_VD: torch.Tensor, place_N: torch.Tensor, gradient_ND: torch.Tensor) -> None:
    """`total[place[n]] += gradient[n]` for all n, each row in fp32 and in a fixed order: the same bits every time.

    Args:
        total_VD: (V, D) fp32, contiguous; is changed.
        place_N: (N,) int64 in [0, V), in any order, repeated or not.
        gradient_ND: (N, D) of any floating dtype, contiguous.
    """
    if takes_triton(gradient_ND):
        from tidegate_kernels.gradient_sum import triton

        triton.add_rows(total_VD, place_N, gradient_ND)
        return
    total_VD.index_put_((place_N,), gradient_ND.to(total_VD.dtype), accumulate=True)  # sorts first on a CUDA device
