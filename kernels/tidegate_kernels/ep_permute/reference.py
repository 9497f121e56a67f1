"""The truth of `ep_unpack` and `ep_pack`, in plain PyTorch: a stable sort by block.

Letters: A rows, D width, R source ranks, e experts of this rank.
"""

from __future__ import annotations

import torch

__all__ = ["ep_pack", "ep_unpack"]


def ep_unpack(rows_AD: torch.Tensor, counts_Re: torch.Tensor) -> torch.Tensor:
    """Rows by (source rank, expert), as an all-to-all leaves them, to rows by (expert, source rank).

    Args:
        rows_AD: (A, D), any dtype.
        counts_Re: (R, e) int64 rows of each block; they sum to A, and any may be 0. Not read on the host.
    """
    return rows_AD.index_select(0, _order(rows_AD, counts_Re))


def ep_pack(rows_AD: torch.Tensor, counts_Re: torch.Tensor) -> torch.Tensor:
    """The inverse of `ep_unpack`: rows by (expert, source rank) to rows by (source rank, expert)."""
    return rows_AD.index_select(0, _order(rows_AD, counts_Re.t()))


def _order(rows_AD: torch.Tensor, counts_PQ: torch.Tensor) -> torch.Tensor:
    """(A,) places of the rows, which lie by (p, q), in the order of (q, p)."""
    P, Q = counts_PQ.shape
    q_of_block = torch.arange(Q, device=rows_AD.device).repeat(P)
    return q_of_block.repeat_interleave(counts_PQ.flatten(), output_size=rows_AD.shape[0]).argsort(stable=True)
