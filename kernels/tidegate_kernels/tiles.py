"""How much of a tensor a program takes at a time: follows from the width of a row alone, so nothing is tuned.

Letters: N rows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

__all__ = ["MOST_PROGRAMS", "WIDEST", "RowTile", "num_processors", "row_tile", "rows", "strides", "unit_stride"]

WIDEST = 16384
"""Columns of the widest row that is held in registers whole, 32 numbers a thread."""
MOST_PROGRAMS = 65535
"""That CUDA takes along the second axis of a grid; 2**31 - 1 along the first."""


class RowTile(NamedTuple):
    """Some whole rows of an (N, columns) tensor, padded to powers of two."""

    rows: int
    columns: int
    warps: int


def row_tile(width: int) -> RowTile:
    """A tile of whole rows of about 4,096 numbers, at least one row.

    16 numbers a thread are two 16-byte accesses to each bf16 tensor, enough in flight, and leave registers for four
    such tensors in fp32. 16 warps hold the widest row.
    """
    columns = 1 << max(width - 1, 0).bit_length()
    rows = max(1, 4096 // columns)
    return RowTile(rows, columns, min(16, max(1, rows * columns // 512)))


@lru_cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; two in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last axis is dense, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(*tensors: torch.Tensor | None) -> list[int]:
    """Of all axes but the last of tensors with four; zeros for one that is not there."""
    return [stride for x in tensors for stride in ((0, 0, 0) if x is None else x.stride()[:3])]


def rows(x: torch.Tensor) -> torch.Tensor:
    """(..., columns) as (N, columns) with a dense last axis; rows may lie apart. A view where it can be."""
    return unit_stride(x.flatten(0, -2) if x.ndim > 1 else x[None])
