"""Rows by (p, q) to rows by (q, p) in one launch: a program finds where its rows come from, then copies them.

Letters: A rows, D width, P and Q the two orders of blocks, S = P Q blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tidegate_kernels.tiles import unit_stride

__all__ = ["swap_blocks"]


@triton.jit
def _swap_kernel(
    rows_ptr, counts_ptr, out_ptr,
    A, P, Q, counts_p, counts_q,
    D: tl.constexpr, ROW_STRIDE: tl.constexpr,  # constants: rows of 8 bf16 are whole vectors
    BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    # All blocks in the order of the output: (q, p).
    block = tl.arange(0, BLOCK_S)[None, :]
    p, q = block % P, block // P
    # Row numbers fit into 32 bits, and the search wants few registers; addresses do not fit.
    count = tl.load(counts_ptr + p * counts_p + q * counts_q, mask=block < P * Q, other=0).to(tl.int32)
    end = tl.cumsum(count, axis=1)
    row = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)[:, None]
    mine = tl.sum((end <= row).to(tl.int32), axis=1, keep_dims=True)  # the block of each row: how many end before it
    before = tl.sum(tl.where(block < mine, count, 0), axis=1, keep_dims=True)
    mine_in_source = (mine % P) * Q + mine // P
    before_in_source = tl.sum(tl.where(p * Q + q < mine_in_source, count, 0), axis=1, keep_dims=True)
    source = (before_in_source + row - before).to(tl.int64)
    there = (mine < P * Q) & (source < A)  # also where the counts are wrong
    out_ptr += row.to(tl.int64) * D
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)[None, :]
        value = tl.load(rows_ptr + source * ROW_STRIDE + column, mask=there & (column < D), other=0.0)
        tl.store(out_ptr + column, value, mask=(row < A) & (column < D))


def swap_blocks(rows_AD: torch.Tensor, counts_PQ: torch.Tensor) -> torch.Tensor:
    A, D = rows_AD.shape
    P, Q = counts_PQ.shape
    out = rows_AD.new_empty(A, D)
    if out.numel():
        rows_AD = unit_stride(rows_AD)
        # Tiles of 8,192 elements, to copy and to search; a search costs little beside 16 rows.
        blocks = max(16, triton.next_power_of_2(P * Q))  # Triton 3.6 does not compile a scan of one or two
        block_a = max(1, min(16, 8192 // blocks))
        block_d = min(triton.next_power_of_2(D), 8192 // block_a)
        _swap_kernel[(triton.cdiv(A, block_a),)](
            rows_AD, counts_PQ, out, A, P, Q, counts_PQ.stride(0), counts_PQ.stride(1),
            D=D, ROW_STRIDE=rows_AD.stride(0),
            BLOCK_A=block_a, BLOCK_D=block_d, BLOCK_S=blocks, num_warps=8 if block_a * block_d >= 4096 else 4,
        )  # fmt: skip
    return out
