"""Reorder the rows of an expert-parallel exchange between (source rank, expert) and (expert, source rank).

Letters: A rows, D width, R source ranks, e experts of this rank; P and Q are R and e, or e and R.
"""

from __future__ import annotations

from typing import Any

import torch

from tidegate_kernels.choice import takes_triton
from tidegate_kernels.ep_permute import reference

__all__ = ["ep_pack", "ep_unpack"]

_MOST_BLOCKS = 4096
"""Largest R e that the kernel takes: a program holds the counts of all blocks."""


def ep_unpack(rows_AD: torch.Tensor, counts_Re: torch.Tensor) -> torch.Tensor:
    """Rows by (source rank, expert) to rows by (expert, source rank); see the reference for arguments."""
    if not takes_triton(rows_AD, fits=_fits(rows_AD, counts_Re)):
        return reference.ep_unpack(rows_AD, counts_Re)
    return _swap_blocks(rows_AD, counts_Re)


def ep_pack(rows_AD: torch.Tensor, counts_Re: torch.Tensor) -> torch.Tensor:
    """The inverse of `ep_unpack`, and its gradient."""
    if not takes_triton(rows_AD, fits=_fits(rows_AD, counts_Re)):
        return reference.ep_pack(rows_AD, counts_Re)
    return _swap_blocks(rows_AD, counts_Re.t())


def _fits(rows_AD: torch.Tensor, counts_Re: torch.Tensor) -> bool:
    return counts_Re.numel() <= _MOST_BLOCKS and rows_AD.shape[0] < 2**31


@torch.library.custom_op("tidegate::swap_blocks", mutates_args=())
def _swap_blocks(rows_AD: torch.Tensor, counts_PQ: torch.Tensor) -> torch.Tensor:
    """Rows by (p, q) to rows by (q, p). With the counts transposed it is its own inverse, and its own gradient."""
    from tidegate_kernels.ep_permute import triton

    return triton.swap_blocks(rows_AD, counts_PQ)


@_swap_blocks.register_fake
def _(rows_AD: torch.Tensor, counts_PQ: torch.Tensor) -> torch.Tensor:
    return rows_AD.new_empty(rows_AD.shape)


def _save(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _differentiate(ctx: Any, g_AD: torch.Tensor) -> tuple[torch.Tensor, None]:
    (counts_PQ,) = ctx.saved_tensors
    return _swap_blocks(g_AD, counts_PQ.t()), None


_swap_blocks.register_autograd(_differentiate, setup_context=_save)
