"""`qk_norm_rope` in one launch forward and one backward; nothing but the inputs is saved.

A program takes a block of tokens and a share of the heads, of q, then of k, so that it reads cos and sin once. The two
halves of a head are two tiles: a rotation moves nothing between threads, and a row's sums stay within eight of them.

Letters: B batch, T tokens, H query heads, G key heads, d head width, P programs.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tidegate_kernels.column_sums import column_sums
from tidegate_kernels.tiles import strides

__all__ = ["backward", "forward"]

_SHARES = 8
"""Programs that share the heads of a block of tokens: more loads under way. Where they leave sums of weight gradients,
one program takes all heads, of half as many tokens."""


@triton.jit
def _rstd(a, b, HALF: tl.constexpr, eps):
    """Of every row, from its two halves."""
    return tl.rsqrt(tl.sum(a * a + b * b, axis=1, keep_dims=True) / (2 * HALF) + eps)


@triton.jit
def _share(heads):
    """First and last of a program's heads."""
    share = tl.cdiv(heads, tl.num_programs(1))
    first = tl.program_id(1) * share
    return first, tl.minimum(first + share, heads)


@triton.jit
def _forward_heads(
    x_ptr, out_ptr, weight_ptr, first, last, t, i, there, cos, sin, x_t, x_h, out_t, out_h, eps,
    NORM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    if NORM:
        weight_a = tl.load(weight_ptr + i, mask=i < HALF, other=0.0).to(tl.float32)
        weight_b = tl.load(weight_ptr + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
    for head in range(first, last):
        h = tl.cast(head, tl.int64)
        at = x_ptr + t * x_t + h * x_h + i
        a = tl.load(at, mask=there, other=0.0).to(tl.float32)
        b = tl.load(at + HALF, mask=there, other=0.0).to(tl.float32)
        if NORM:
            rstd = _rstd(a, b, HALF, eps)
            a, b = a * rstd * weight_a, b * rstd * weight_b
        to = out_ptr + t * out_t + h * out_h + i
        tl.store(to, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=there)
        tl.store(to + HALF, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    T, H, G, eps, q_b, q_t, q_h, k_b, k_t, k_h, q_out_b, q_out_t, q_out_h, k_out_b, k_out_t, k_out_h,
    NORM: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    i = tl.arange(0, BLOCK_HALF)[None, :]
    there = (t < T) & (i < HALF)
    cos = tl.load(cos_ptr + t * HALF + i, mask=there, other=0.0)
    sin = tl.load(sin_ptr + t * HALF + i, mask=there, other=0.0)
    first, last = _share(H)
    _forward_heads(
        q_ptr + b * q_b, q_out_ptr + b * q_out_b, q_weight_ptr, first, last, t, i, there, cos, sin,
        q_t, q_h, q_out_t, q_out_h, eps, NORM, HALF,
    )  # fmt: skip
    first, last = _share(G)
    _forward_heads(
        k_ptr + b * k_b, k_out_ptr + b * k_out_b, k_weight_ptr, first, last, t, i, there, cos, sin,
        k_t, k_h, k_out_t, k_out_h, eps, NORM, HALF,
    )  # fmt: skip


@triton.jit
def _backward_heads(
    g_ptr, x_ptr, dx_ptr, weight_ptr, partial_ptr, first, last, t, i, there, cos, sin,
    g_t, g_h, x_t, x_h, dx_t, dx_h, eps,
    NORM: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    if NORM:
        weight_a = tl.load(weight_ptr + i, mask=i < HALF, other=0.0).to(tl.float32)
        weight_b = tl.load(weight_ptr + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
        dweight_a = tl.zeros((BLOCK_T, BLOCK_HALF), dtype=tl.float32)
        dweight_b = tl.zeros((BLOCK_T, BLOCK_HALF), dtype=tl.float32)
    for head in range(first, last):
        h = tl.cast(head, tl.int64)
        g_at = g_ptr + t * g_t + h * g_h + i
        g_a = tl.load(g_at, mask=there, other=0.0).to(tl.float32)
        g_b = tl.load(g_at + HALF, mask=there, other=0.0).to(tl.float32)
        da, db = g_a * cos + g_b * sin, g_b * cos - g_a * sin
        if NORM:
            x_at = x_ptr + t * x_t + h * x_h + i
            a = tl.load(x_at, mask=there, other=0.0).to(tl.float32)
            b = tl.load(x_at + HALF, mask=there, other=0.0).to(tl.float32)
            rstd = _rstd(a, b, HALF, eps)
            a, b = a * rstd, b * rstd
            dweight_a += da * a
            dweight_b += db * b
            da, db = da * weight_a, db * weight_b
            along = tl.sum(da * a + db * b, axis=1, keep_dims=True) / (2 * HALF)
            da, db = rstd * (da - a * along), rstd * (db - b * along)
        dx_at = dx_ptr + t * dx_t + h * dx_h + i
        tl.store(dx_at, da.to(dx_ptr.dtype.element_ty), mask=there)
        tl.store(dx_at + HALF, db.to(dx_ptr.dtype.element_ty), mask=there)
    if NORM:
        tl.store(partial_ptr + i, tl.sum(dweight_a, axis=0, keep_dims=True), mask=i < HALF)
        tl.store(partial_ptr + HALF + i, tl.sum(dweight_b, axis=0, keep_dims=True), mask=i < HALF)


@triton.jit
def _backward_kernel(
    gq_ptr, gk_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dq_ptr, dk_ptr, partial_ptr,
    T, H, G, eps, gq_b, gq_t, gq_h, gk_b, gk_t, gk_h, q_b, q_t, q_h, k_b, k_t, k_h,
    dq_b, dq_t, dq_h, dk_b, dk_t, dk_h,
    NORM: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    program = (b * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    i = tl.arange(0, BLOCK_HALF)[None, :]
    there = (t < T) & (i < HALF)
    cos = tl.load(cos_ptr + t * HALF + i, mask=there, other=0.0)
    sin = tl.load(sin_ptr + t * HALF + i, mask=there, other=0.0)
    first, last = _share(H)
    _backward_heads(
        gq_ptr + b * gq_b, q_ptr + b * q_b, dq_ptr + b * dq_b, q_weight_ptr, partial_ptr + program * 4 * HALF,
        first, last, t, i, there, cos, sin, gq_t, gq_h, q_t, q_h, dq_t, dq_h, eps, NORM, HALF, BLOCK_T, BLOCK_HALF,
    )  # fmt: skip
    first, last = _share(G)
    _backward_heads(
        gk_ptr + b * gk_b, k_ptr + b * k_b, dk_ptr + b * dk_b, k_weight_ptr, partial_ptr + (program * 4 + 2) * HALF,
        first, last, t, i, there, cos, sin, gk_t, gk_h, k_t, k_h, dk_t, dk_h, eps, NORM, HALF, BLOCK_T, BLOCK_HALF,
    )  # fmt: skip


def _launch(q_BTHd: torch.Tensor, shares: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    B, T, H, d = q_BTHd.shape
    half = triton.next_power_of_2(d // 2)
    elements = 512 if shares == 1 else 1024  # of a half at a time: 4 or 8 a thread
    block_t = max(1, min(elements // half, triton.next_power_of_2(T)))
    grid = triton.cdiv(T, block_t), min(shares, H), B
    return grid, {"HALF": d // 2, "BLOCK_T": block_t, "BLOCK_HALF": half, "num_warps": 4}


def forward(
    q_BTHd: torch.Tensor,
    k_BTGd: torch.Tensor,
    q_weight_d: torch.Tensor | None,
    k_weight_d: torch.Tensor | None,
    cos_Td: torch.Tensor,
    sin_Td: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys, contiguous."""
    q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BTHd, k_BTGd))
    if q_out.numel() + k_out.numel():
        grid, blocks = _launch(q_BTHd, _SHARES)
        _forward_kernel[grid](
            q_BTHd, k_BTGd, q_weight_d, k_weight_d, cos_Td, sin_Td, q_out, k_out,
            q_BTHd.shape[1], q_BTHd.shape[2], k_BTGd.shape[2], eps, *strides(q_BTHd, k_BTGd, q_out, k_out),
            NORM=q_weight_d is not None, **blocks,
        )  # fmt: skip
    return q_out, k_out


def backward(
    gq_BTHd: torch.Tensor,
    gk_BTGd: torch.Tensor,
    q_BTHd: torch.Tensor,
    k_BTGd: torch.Tensor,
    q_weight_d: torch.Tensor | None,
    k_weight_d: torch.Tensor | None,
    cos_Td: torch.Tensor,
    sin_Td: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q and k, contiguous, and (2, d) of both weights; (0, d) without weights."""
    dq, dk = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BTHd, k_BTGd))
    norm, d = q_weight_d is not None, q_BTHd.shape[3]
    if dq.numel() + dk.numel() == 0:
        return dq, dk, dq.new_zeros(2, d) if norm else dq.new_empty(0, d)
    grid, blocks = _launch(q_BTHd, 1 if norm else _SHARES)
    partial_PX = dq.new_empty(math.prod(grid), 2 * d if norm else 0, dtype=torch.float32)
    _backward_kernel[grid](
        gq_BTHd, gk_BTGd, q_BTHd, k_BTGd, q_weight_d, k_weight_d, cos_Td, sin_Td, dq, dk, partial_PX,
        q_BTHd.shape[1], q_BTHd.shape[2], k_BTGd.shape[2], eps, *strides(gq_BTHd, gk_BTGd, q_BTHd, k_BTGd, dq, dk),
        NORM=norm, **blocks,
    )  # fmt: skip
    return dq, dk, column_sums(partial_PX, dq.dtype).view(2, d) if norm else dq.new_empty(0, d)
