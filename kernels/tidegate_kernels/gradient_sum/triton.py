"""A few gradients to their fp32 sum, 8 numbers a thread; rows to the rows of a table that they belong to.

Letters: N numbers, or rows; V rows of a table, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

__all__ = ["add_gradients", "add_rows"]

_BLOCK = 2048
_ROWS = 8
"""Rows that a program loads at a time where several go to one place."""


@triton.jit
def _add_kernel(
    total_ptr, a_ptr, b_ptr, c_ptr, d_ptr, N, FIRST: tl.constexpr, NUM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < N
    value = tl.load(a_ptr + at, mask=there, other=0.0).to(tl.float32)
    if not FIRST:
        value += tl.load(total_ptr + at, mask=there, other=0.0)
    if NUM > 1:
        value += tl.load(b_ptr + at, mask=there, other=0.0).to(tl.float32)
    if NUM > 2:
        value += tl.load(c_ptr + at, mask=there, other=0.0).to(tl.float32)
    if NUM > 3:
        value += tl.load(d_ptr + at, mask=there, other=0.0).to(tl.float32)
    tl.store(total_ptr + at, value, mask=there)


def add_gradients(total_N: torch.Tensor, gradients: Sequence[torch.Tensor], first: bool) -> None:
    N, num = total_N.numel(), len(gradients)
    if N:
        four = (*gradients, *[gradients[0]] * (4 - num))  # the kernel reads `num` of them
        _add_kernel[(triton.cdiv(N, _BLOCK),)](total_N, *four, N, FIRST=first, NUM=num, BLOCK=_BLOCK, num_warps=8)


@triton.jit
def _rows_kernel(
    total_ptr, place_ptr, order_ptr, gradient_ptr, N, D, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # Places are sorted. The first row of a place takes them all, the others have nothing to do.
    at = tl.program_id(0)
    place = tl.load(place_ptr + at)
    if place != tl.load(place_ptr + at - 1, mask=at > 0, other=-1):
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        row_ptr = total_ptr + place * D + column
        total = tl.load(row_ptr, mask=column < D, other=0.0)
        more = place >= 0
        while more:
            rows = at + tl.arange(0, ROWS)
            mine = tl.load(place_ptr + rows, mask=rows < N, other=-1) == place
            row = tl.load(order_ptr + rows, mask=mine, other=0)
            read = mine[:, None] & (column < D)[None, :]
            gradient = tl.load(gradient_ptr + row[:, None] * D + column[None, :], mask=read, other=0.0)
            total += tl.sum(gradient.to(tl.float32), axis=0)
            at += ROWS
            more = tl.min(mine.to(tl.int32), axis=0) == 1
        tl.store(row_ptr, total, mask=column < D)


def add_rows(total_VD: torch.Tensor, place_N: torch.Tensor, gradient_ND: torch.Tensor) -> None:
    N, D = gradient_ND.shape
    if N and D:
        place_N, order_N = place_N.sort(stable=True)
        block = min(512, triton.next_power_of_2(D))
        _rows_kernel[(N, triton.cdiv(D, block))](
            total_VD, place_N, order_N, gradient_ND, N, D, ROWS=_ROWS, BLOCK=block, num_warps=4
        )
