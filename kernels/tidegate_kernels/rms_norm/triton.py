"""`rms_norm` and `add_rms_norm` in one pass each way; the backward takes the norm again from what it reads anyway.

A row is in registers whole. In the backward a fixed number of programs loop over the rows, each adding up the weight's
gradient in registers and leaving one partial sum.

Letters: N rows, D width, P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tidegate_kernels.column_sums import column_sums
from tidegate_kernels.tiles import num_processors, row_tile

__all__ = ["backward", "forward"]

_WARPS_A_PROCESSOR = 16
"""Of the backward: 512 threads may have 128 registers each, so that all programs run at once."""


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr,
    N, D: tl.constexpr, eps, x_n, residual_n,
    ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    i = tl.arange(0, BLOCK_D)[None, :]
    there = (n < N) & (i < D)
    x = tl.load(x_ptr + n * x_n + i, mask=there, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + n * residual_n + i, mask=there, other=0.0)
        # What is normalised is what the residual stream keeps.
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + n * D + i, x, mask=there)
    x = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + eps)
    weight = tl.load(weight_ptr + i, mask=i < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + n * D + i, (x * rstd * weight).to(out_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    g_ptr, g_total_ptr, x_ptr, weight_ptr, dx_ptr, partial_ptr,
    N, D: tl.constexpr, eps, g_n, g_total_n, x_n,
    ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK_D)[None, :]
    weight = tl.load(weight_ptr + i, mask=i < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    program, step = tl.program_id(0).to(tl.int64), tl.num_programs(0) * BLOCK_N
    n = program * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    there = (n < N) & (i < D)
    x_next = tl.load(x_ptr + n * x_n + i, mask=there, other=0.0)
    g_next = tl.load(g_ptr + n * g_n + i, mask=there, other=0.0)
    for _ in range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        x, g = x_next.to(tl.float32), g_next.to(tl.float32)
        if ADD:
            g_total = tl.load(g_total_ptr + n * g_total_n + i, mask=there, other=0.0)
        # The next rows are on their way while these are worked on: few programs run, and each would wait for memory.
        after = n + step
        there_after = (after < N) & (i < D)
        x_next = tl.load(x_ptr + after * x_n + i, mask=there_after, other=0.0)
        g_next = tl.load(g_ptr + after * g_n + i, mask=there_after, other=0.0)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + eps)
        y = x * rstd
        dweight += g * y
        g = g * weight
        dx = rstd * (g - y * (tl.sum(g * y, axis=1, keep_dims=True) / D))
        if ADD:
            dx += g_total.to(tl.float32)
        tl.store(dx_ptr + n * D + i, dx.to(dx_ptr.dtype.element_ty), mask=there)
        n, there = after, there_after
    tl.store(partial_ptr + program * D + i, tl.sum(dweight, axis=0, keep_dims=True), mask=i < D)


def forward(
    x_ND: torch.Tensor, residual_ND: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised rows and, with a residual, the sum (else nothing, (0,)); rows may lie apart."""
    N, D = x_ND.shape
    out_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    total_ND = x_ND.new_empty(0) if residual_ND is None else torch.empty_like(out_ND)
    if x_ND.numel():
        tile = row_tile(D)
        residual = x_ND if residual_ND is None else residual_ND
        _forward_kernel[(triton.cdiv(N, tile.rows),)](
            x_ND, residual, weight_D, out_ND, total_ND, N, D, eps, x_ND.stride(0), residual.stride(0),
            ADD=residual_ND is not None, BLOCK_N=tile.rows, BLOCK_D=tile.columns, num_warps=tile.warps,
        )  # fmt: skip
    return out_ND, total_ND


def backward(
    g_ND: torch.Tensor, g_total_ND: torch.Tensor | None, x_ND: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the rows that were normalised, that of the sum added, and of the weight."""
    N, D = x_ND.shape
    dx_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    if not x_ND.numel():
        return dx_ND, torch.zeros_like(weight_D)
    tile = row_tile(D)
    programs = min(triton.cdiv(N, tile.rows), _WARPS_A_PROCESSOR // tile.warps * num_processors(x_ND.device))
    partial_PD = torch.empty(programs, D, dtype=torch.float32, device=x_ND.device)
    g_total = g_ND if g_total_ND is None else g_total_ND
    _backward_kernel[(programs,)](
        g_ND, g_total, x_ND, weight_D, dx_ND, partial_PD, N, D, eps, g_ND.stride(0), g_total.stride(0), x_ND.stride(0),
        ADD=g_total_ND is not None, BLOCK_N=tile.rows, BLOCK_D=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    return dx_ND, column_sums(partial_PD, weight_D.dtype)
