"""`swiglu` in one pass each way. The backward can leave the weighted activation again: nobody has to keep it.

A program takes some whole rows, wide ones piece by piece, so that the gradient of a row's weight is its own sum. Rows
may lie apart: the halves of one product are read, and their gradients written, where they lie.

Letters: N rows, F hidden width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tidegate_kernels.gated_output.triton import activate
from tidegate_kernels.tiles import row_tile

__all__ = ["Gradients", "backward", "forward"]

_PIECE = 4096
"""Columns of a row at a time."""


class Gradients(NamedTuple):
    dgate_NF: torch.Tensor
    dup_NF: torch.Tensor
    activated_NF: torch.Tensor | None
    """`w silu(gate) up`, the forward's result; None unless asked for."""
    dweights_N: torch.Tensor | None
    """fp32; None without weights."""


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    gate_ptr, up_ptr, weights_ptr, out_ptr, N, F: tl.constexpr, gate_n, up_n,
    WEIGHTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    if WEIGHTED:
        weights = tl.load(weights_ptr + n, mask=n < N, other=0.0)
    for start in range(0, F, BLOCK_F):
        i = start + tl.arange(0, BLOCK_F)[None, :]
        there = (n < N) & (i < F)
        gate = tl.load(gate_ptr + n * gate_n + i, mask=there, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + n * up_n + i, mask=there, other=0.0).to(tl.float32)
        out, _ = activate(gate, "silu")
        out *= up
        if WEIGHTED:
            out *= weights
        tl.store(out_ptr + n * F + i, out.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    g_ptr, gate_ptr, up_ptr, weights_ptr, dgate_ptr, dup_ptr, activated_ptr, dweights_ptr,
    N, F: tl.constexpr, g_n, gate_n, up_n, dgate_n, dup_n,
    WEIGHTED: tl.constexpr, ACTIVATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    if WEIGHTED:
        weights = tl.load(weights_ptr + n, mask=n < N, other=0.0)
        dweights = tl.zeros((BLOCK_N, 1), dtype=tl.float32)
    for start in range(0, F, BLOCK_F):
        i = start + tl.arange(0, BLOCK_F)[None, :]
        there = (n < N) & (i < F)
        g = tl.load(g_ptr + n * g_n + i, mask=there, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + n * gate_n + i, mask=there, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + n * up_n + i, mask=there, other=0.0).to(tl.float32)
        silu, slope = activate(gate, "silu")
        if WEIGHTED:
            dweights += tl.sum(g * silu * up, axis=1, keep_dims=True)
            g *= weights
        tl.store(dgate_ptr + n * dgate_n + i, (g * up * slope).to(dgate_ptr.dtype.element_ty), mask=there)
        tl.store(dup_ptr + n * dup_n + i, (g * silu).to(dup_ptr.dtype.element_ty), mask=there)
        if ACTIVATED:
            activated = silu * up
            if WEIGHTED:
                activated *= weights
            tl.store(activated_ptr + n * F + i, activated.to(activated_ptr.dtype.element_ty), mask=there)
    if WEIGHTED:
        tl.store(dweights_ptr + n, dweights, mask=n < N)


def forward(gate_NF: torch.Tensor, up_NF: torch.Tensor, weights_N: torch.Tensor | None) -> torch.Tensor:
    """(N, F); rows of gate and up may lie apart, weights are contiguous fp32."""
    N, F = gate_NF.shape
    out_NF = torch.empty_like(gate_NF, memory_format=torch.contiguous_format)
    if out_NF.numel():
        tile = row_tile(min(F, _PIECE))
        _forward_kernel[(triton.cdiv(N, tile.rows),)](
            gate_NF, up_NF, weights_N, out_NF, N, F, gate_NF.stride(0), up_NF.stride(0),
            WEIGHTED=weights_N is not None, BLOCK_N=tile.rows, BLOCK_F=tile.columns, num_warps=tile.warps,
        )  # fmt: skip
    return out_NF


def backward(
    g_NF: torch.Tensor,
    gate_NF: torch.Tensor,
    up_NF: torch.Tensor,
    weights_N: torch.Tensor | None,
    *,
    activated: bool,
) -> Gradients:
    """Gradients of `forward`, and its result again if wanted."""
    N, F = gate_NF.shape
    dgate, dup = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate_NF, up_NF))
    activated_NF = torch.empty_like(g_NF, memory_format=torch.contiguous_format) if activated else None
    new = torch.empty_like if gate_NF.numel() else torch.zeros_like
    dweights_N = None if weights_N is None else new(weights_N)
    if gate_NF.numel():
        tile = row_tile(min(F, _PIECE))
        _backward_kernel[(triton.cdiv(N, tile.rows),)](
            g_NF, gate_NF, up_NF, weights_N, dgate, dup, activated_NF, dweights_N, N, F,
            *(x.stride(0) for x in (g_NF, gate_NF, up_NF, dgate, dup)),
            WEIGHTED=weights_N is not None, ACTIVATED=activated,
            BLOCK_N=tile.rows, BLOCK_F=tile.columns, num_warps=tile.warps,
        )  # fmt: skip
    return Gradients(dgate, dup, activated_NF, dweights_N)
