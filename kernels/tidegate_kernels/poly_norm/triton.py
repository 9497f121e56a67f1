"""`poly_norm` in one pass each way; nothing but the inputs is saved.

A row is in registers whole: its sums are taken and its numbers written without reading it again. A warp has 1,024
numbers of it, 32 a thread: the three sums forward and seven backward cost shuffles by the thread, not by the number.

Letters: N rows, F hidden width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tidegate_kernels.poly_norm.reference import EPS

__all__ = ["backward", "forward"]


@triton.jit
def _norms(x, F: tl.constexpr, eps):
    """1 / rms of x, x^2 and x^3."""
    x2 = x * x
    x4 = x2 * x2
    r1 = tl.rsqrt(tl.sum(x2, axis=0, keep_dims=True) / F + eps)
    r2 = tl.rsqrt(tl.sum(x4, axis=0, keep_dims=True) / F + eps)
    r3 = tl.rsqrt(tl.sum(x4 * x2, axis=0, keep_dims=True) / F + eps)
    return r1, r2, r3


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    x_ptr, c_ptr, weights_ptr, out_ptr, N, F: tl.constexpr, eps, x_n, c_n,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, 1)
    i = tl.arange(0, BLOCK_F)
    for row in range(ROWS):
        n = first + row
        there = (n < N) & (i < F)
        x = tl.load(x_ptr + n * x_n + i, mask=there, other=0.0).to(tl.float32)
        c0 = tl.load(c_ptr + n * c_n, mask=n < N, other=0.0)
        c1 = tl.load(c_ptr + n * c_n + 1, mask=n < N, other=0.0)
        c2 = tl.load(c_ptr + n * c_n + 2, mask=n < N, other=0.0)
        c3 = tl.load(c_ptr + n * c_n + 3, mask=n < N, other=0.0)
        r1, r2, r3 = _norms(x, F, eps)
        out = c0 + x * (c1 * r1 + x * (c2 * r2 + x * (c3 * r3)))
        if WEIGHTED:
            out *= tl.load(weights_ptr + n, mask=n < N, other=0.0)
        tl.store(out_ptr + n * F + i, out.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    g_ptr, x_ptr, c_ptr, weights_ptr, dx_ptr, dc_ptr, dweights_ptr, N, F: tl.constexpr, eps, g_n, x_n, c_n,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, 1)
    i = tl.arange(0, BLOCK_F)
    for row in range(ROWS):
        n = first + row
        there = (n < N) & (i < F)
        x = tl.load(x_ptr + n * x_n + i, mask=there, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + n * g_n + i, mask=there, other=0.0).to(tl.float32)
        c1 = tl.load(c_ptr + n * c_n + 1, mask=n < N, other=0.0)
        c2 = tl.load(c_ptr + n * c_n + 2, mask=n < N, other=0.0)
        c3 = tl.load(c_ptr + n * c_n + 3, mask=n < N, other=0.0)
        r1, r2, r3 = _norms(x, F, eps)
        # What a row's output changes by with each of its coefficients.
        along = g * x
        d0 = tl.sum(g, axis=0, keep_dims=True)
        d1 = tl.sum(along, axis=0, keep_dims=True) * r1
        along *= x
        d2 = tl.sum(along, axis=0, keep_dims=True) * r2
        d3 = tl.sum(along * x, axis=0, keep_dims=True) * r3
        if WEIGHTED:
            c0 = tl.load(c_ptr + n * c_n, mask=n < N, other=0.0)
            tl.store(dweights_ptr + n, c0 * d0 + c1 * d1 + c2 * d2 + c3 * d3, mask=n < N)
            weights = tl.load(weights_ptr + n, mask=n < N, other=0.0)
            g *= weights
            d0, d1, d2, d3 = weights * d0, weights * d1, weights * d2, weights * d3
        tl.store(dc_ptr + n * 4, d0, mask=n < N)
        tl.store(dc_ptr + n * 4 + 1, d1, mask=n < N)
        tl.store(dc_ptr + n * 4 + 2, d2, mask=n < N)
        tl.store(dc_ptr + n * 4 + 3, d3, mask=n < N)
        # Of ci x^i / rms(x^i): i ci ri x^(i-1) (g - di ri x^i / F).
        p1, p2, p3 = c1 * r1, 2 * c2 * r2, 3 * c3 * r3
        q1, q2, q3 = p1 * r1 * d1 / F, p2 * r2 * d2 / F, p3 * r3 * d3 / F
        x2 = x * x
        dx = g * (p1 + x * (p2 + x * p3)) - x * (q1 + x2 * (q2 + x2 * q3))
        tl.store(dx_ptr + n * F + i, dx.to(dx_ptr.dtype.element_ty), mask=there)


def _launch(N: int, F: int) -> tuple[tuple[int], dict[str, int]]:
    """A program takes up to four rows one by one, so that starting it costs little beside a row of one warp."""
    block_f = triton.next_power_of_2(F)
    num_rows, warps = max(1, min(4, 4096 // block_f)), max(1, block_f // 1024)
    return (triton.cdiv(N, num_rows),), {"ROWS": num_rows, "BLOCK_F": block_f, "num_warps": warps}


def forward(x_NF: torch.Tensor, coefficients_N4: torch.Tensor, weights_N: torch.Tensor | None) -> torch.Tensor:
    """(N, F), contiguous; rows may lie apart, and those of the fp32 coefficients be one row; weights are contiguous."""
    N, F = x_NF.shape
    out_NF = torch.empty_like(x_NF, memory_format=torch.contiguous_format)
    if out_NF.numel():
        grid, blocks = _launch(N, F)
        _forward_kernel[grid](
            x_NF, coefficients_N4, weights_N, out_NF, N, F, EPS, x_NF.stride(0), coefficients_N4.stride(0),
            WEIGHTED=weights_N is not None, **blocks,
        )  # fmt: skip
    return out_NF


def backward(
    g_NF: torch.Tensor, x_NF: torch.Tensor, coefficients_N4: torch.Tensor, weights_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of the input, of the coefficients of every row (N, 4), and of the weights."""
    N, F = x_NF.shape
    dx_NF = torch.empty_like(x_NF, memory_format=torch.contiguous_format)
    new = torch.empty_like if dx_NF.numel() else torch.zeros_like
    dcoefficients_N4 = new(coefficients_N4, memory_format=torch.contiguous_format)
    dweights_N = None if weights_N is None else new(weights_N)
    if dx_NF.numel():
        grid, blocks = _launch(N, F)
        _backward_kernel[grid](
            g_NF, x_NF, coefficients_N4, weights_N, dx_NF, dcoefficients_N4, dweights_N, N, F, EPS,
            g_NF.stride(0), x_NF.stride(0), coefficients_N4.stride(0),
            WEIGHTED=weights_N is not None, **blocks,
        )  # fmt: skip
    return dx_NF, dcoefficients_N4, dweights_N
