"""`gated_output` in one pass forward and one backward; nothing but the inputs is saved.

A program takes a block of tokens of one head, so no index of an element is divided. Scores may be any view with a unit
last stride: a slice of the fused projection is read where it lies.

Letters: B batch, T tokens, H heads, d head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tidegate_kernels.tiles import strides

__all__ = ["activate", "backward", "forward"]

_TILE = 4096
"""Elements a program."""


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """Value and slope of the gate's activation."""
    if ACTIVATION == "identity":
        return z, z * 0 + 1
    e = tl.exp(-tl.abs(z))  # not exp(-z), which overflows
    s = tl.where(z < 0, e, 1.0) / (1 + e)
    if ACTIVATION == "silu":
        return z * s, s + z * s * (1 - s)
    if ACTIVATION == "ns_sigmoid":
        return 0.5 + 0.5 * s, 0.5 * s * (1 - s)
    return s, s * (1 - s)


@triton.jit
def _forward_kernel(
    y_ptr, z_ptr, out_ptr,
    T, H, d: tl.constexpr,
    y_b, y_t, y_h, z_b, z_t, z_h, out_b, out_t, out_h,
    ACTIVATION: tl.constexpr, ADDITIVE: tl.constexpr, HEADWISE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_d: tl.constexpr,
):  # fmt: skip
    h, b = (tl.program_id(0) % H).to(tl.int64), tl.program_id(1).to(tl.int64)
    t = (tl.program_id(0) // H).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    i = tl.arange(0, BLOCK_d)[None, :]
    there = (t < T) & (i < d)
    y = tl.load(y_ptr + b * y_b + t * y_t + h * y_h + i, mask=there, other=0.0).to(tl.float32)
    if HEADWISE:
        z = tl.load(z_ptr + b * z_b + t * z_t + h * z_h, mask=t < T, other=0.0).to(tl.float32)
    else:
        z = tl.load(z_ptr + b * z_b + t * z_t + h * z_h + i, mask=there, other=0.0).to(tl.float32)
    a, _ = activate(z, ACTIVATION)
    out = y + a if ADDITIVE else y * a
    tl.store(out_ptr + b * out_b + t * out_t + h * out_h + i, out.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _backward_kernel(
    g_ptr, y_ptr, z_ptr, dy_ptr, dz_ptr,
    T, H, d: tl.constexpr,
    g_b, g_t, g_h, y_b, y_t, y_h, z_b, z_t, z_h, dy_b, dy_t, dy_h, dz_b, dz_t, dz_h,
    ACTIVATION: tl.constexpr, ADDITIVE: tl.constexpr, HEADWISE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_d: tl.constexpr,
):  # fmt: skip
    h, b = (tl.program_id(0) % H).to(tl.int64), tl.program_id(1).to(tl.int64)
    t = (tl.program_id(0) // H).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    i = tl.arange(0, BLOCK_d)[None, :]
    there = (t < T) & (i < d)
    g = tl.load(g_ptr + b * g_b + t * g_t + h * g_h + i, mask=there, other=0.0).to(tl.float32)
    z_at = z_ptr + b * z_b + t * z_t + h * z_h
    if HEADWISE:
        z = tl.load(z_at, mask=t < T, other=0.0).to(tl.float32)
    else:
        z = tl.load(z_at + i, mask=there, other=0.0).to(tl.float32)
    a, slope = activate(z, ACTIVATION)
    if ADDITIVE:
        dy, da = g, g
    else:
        y = tl.load(y_ptr + b * y_b + t * y_t + h * y_h + i, mask=there, other=0.0).to(tl.float32)
        dy, da = g * a, g * y
    tl.store(dy_ptr + b * dy_b + t * dy_t + h * dy_h + i, dy.to(dy_ptr.dtype.element_ty), mask=there)
    dz_at = dz_ptr + b * dz_b + t * dz_t + h * dz_h
    if HEADWISE:
        da = tl.sum(da, axis=1, keep_dims=True)
        tl.store(dz_at, (da * slope).to(dz_ptr.dtype.element_ty), mask=t < T)
    else:
        tl.store(dz_at + i, (da * slope).to(dz_ptr.dtype.element_ty), mask=there)


def _launch(y_BTHd: torch.Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    B, T, H, d = y_BTHd.shape
    block_d = triton.next_power_of_2(d)
    block_t = max(1, min(_TILE // block_d, triton.next_power_of_2(T)))
    warps = 4 if block_d * block_t <= _TILE else 8
    # Tokens are not an axis of their own: CUDA takes no more than 65,535 programs along any but the first.
    return (H * triton.cdiv(T, block_t), B), {"BLOCK_T": block_t, "BLOCK_d": block_d, "num_warps": warps}


def forward(y_BTHd: torch.Tensor, scores_BTHs: torch.Tensor, activation: str, additive: bool) -> torch.Tensor:
    out = torch.empty_like(y_BTHd)
    if y_BTHd.numel():
        grid, blocks = _launch(y_BTHd)
        _forward_kernel[grid](
            y_BTHd, scores_BTHs, out, *y_BTHd.shape[1:], *strides(y_BTHd, scores_BTHs, out),
            ACTIVATION=activation, ADDITIVE=additive, HEADWISE=scores_BTHs.shape[3] == 1, **blocks,
        )  # fmt: skip
    return out


def backward(
    g_BTHd: torch.Tensor, y_BTHd: torch.Tensor, scores_BTHs: torch.Tensor, activation: str, additive: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dy = torch.empty_like(y_BTHd)
    dz = torch.empty_like(scores_BTHs, memory_format=torch.contiguous_format)
    if y_BTHd.numel():
        grid, blocks = _launch(y_BTHd)
        _backward_kernel[grid](
            g_BTHd, y_BTHd, scores_BTHs, dy, dz, *y_BTHd.shape[1:],
            *strides(g_BTHd, y_BTHd, scores_BTHs, dy, dz),
            ACTIVATION=activation, ADDITIVE=additive, HEADWISE=scores_BTHs.shape[3] == 1, **blocks,
        )  # fmt: skip
    return dy, dz
