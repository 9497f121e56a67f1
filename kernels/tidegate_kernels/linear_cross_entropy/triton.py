"""`linear_cross_entropy` in chunks of rows: logits by cuBLAS, loss and gradient of a row by one program, in its logits.

A row is read twice, once for its log-partition and once for its gradient, which takes the place of the logits. The
second read finds it in the L2 cache: two rows a multiprocessor are 26 MB at 50,304 columns of bf16.

Letters: N rows, M rows of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

__all__ = ["forward", "scaled"]

_TILE = 16384
"""Columns at a time."""


@triton.jit
def _tanh(z):
    e = tl.exp(-2 * tl.abs(z))  # never more than 1
    large = tl.where(z < 0, e - 1, 1 - e) / (1 + e)
    square = z * z
    # 1 - e loses digits where z is small; the series is short of fp32 by less than a rounding below 0.2.
    small = z * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    return tl.where(tl.abs(z) < 0.2, small, large)


@triton.jit
def _capped(z, cap, CAPPED: tl.constexpr):
    return cap * _tanh(z / cap) if CAPPED else z


@triton.jit
def _row_kernel(
    logits_ptr, labels_ptr, weights_ptr, nll_ptr, terms_ptr,
    V, stride, z_loss, cap, ignore_index,
    CAPPED: tl.constexpr, GRADIENT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    label = tl.load(labels_ptr + row)
    counts, known = label != ignore_index, (label >= 0) & (label < V)
    weight = tl.where(counts, tl.where(known, tl.load(weights_ptr + row), float("nan")), 0.0)
    z_label = tl.load(logits_ptr + label, mask=known, other=float("nan")).to(tl.float32)  # before it is overwritten
    z_label = _capped(z_label, cap, CAPPED)
    label = tl.where(known, label, -1).to(tl.int32)

    top, total = float("-inf"), 0.0
    for start in range(0, V, TILE):
        column = start + tl.arange(0, TILE)
        # Up to the stride: a whole number of vectors whatever V is; the columns past V hold anything.
        z = tl.load(logits_ptr + column, mask=column < stride, other=0.0).to(tl.float32)
        z = tl.where(column < V, _capped(z, cap, CAPPED), float("-inf"))
        higher = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), axis=0)
        top = higher
    lse = top + tl.log(total)
    nll = tl.where(counts, lse - z_label, 0.0)
    tl.store(nll_ptr + row, nll)
    tl.store(terms_ptr + row, weight * (nll + z_loss * lse * lse))

    if GRADIENT:
        slope = weight * (1 + 2 * z_loss * lse)
        for start in range(0, V, TILE):
            column = start + tl.arange(0, TILE)
            z = tl.load(logits_ptr + column, mask=column < stride, other=0.0).to(tl.float32)
            z = tl.where(column < V, _capped(z, cap, CAPPED), float("-inf"))
            dz = slope * tl.exp(z - lse) - tl.where(column == label, weight, 0.0)
            if CAPPED:
                share = tl.where(column < V, z, 0.0) / cap
                dz *= 1 - share * share
            tl.store(logits_ptr + column, dz.to(logits_ptr.dtype.element_ty), mask=column < stride)


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, out_ptr, size, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (x * tl.load(factor_ptr)).to(out_ptr.dtype.element_ty), mask=at < size)


def forward(
    x_ND: torch.Tensor,
    w_VD: torch.Tensor,
    labels_N: torch.Tensor,
    weights_N: torch.Tensor,
    z_loss: float,
    soft_cap: float | None,
    ignore_index: int,
    rows: int,
    *,
    wants_dx: bool,
    wants_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    N, V = x_ND.shape[0], w_VD.shape[0]
    labels_N, weights_N = labels_N.contiguous(), weights_N.float().contiguous()
    nll_N, terms_N = (x_ND.new_empty(N, dtype=torch.float32) for _ in range(2))
    dx = x_ND.new_empty(x_ND.shape if wants_dx else 0)
    dw: torch.Tensor | None = None
    # An odd vocabulary is padded: cuBLAS takes five times as long for 50,257 columns as for 50,304.
    padded = triton.cdiv(V, 64) * 64
    w_VD = F.pad(w_VD, (0, 0, 0, padded - V)) if padded > V else w_VD
    buffer = x_ND.new_empty(min(rows, N), padded)
    tile = min(_TILE, triton.next_power_of_2(V))
    for start in range(0, N, rows):
        x_MD, chunk = x_ND[start : start + rows], slice(start, start + rows)
        logits_MV = buffer[: len(x_MD)]
        torch.mm(x_MD, w_VD.t(), out=logits_MV)
        _row_kernel[(len(x_MD),)](
            logits_MV, labels_N[chunk], weights_N[chunk], nll_N[chunk], terms_N[chunk],
            V, padded, z_loss, 1.0 if soft_cap is None else soft_cap, ignore_index,
            CAPPED=soft_cap is not None, GRADIENT=wants_dx or wants_dw, TILE=tile,
            num_warps=max(1, min(16, tile // 512)),
        )  # fmt: skip
        if wants_dx:
            torch.mm(logits_MV, w_VD, out=dx[chunk])
        if wants_dw and rows >= N:
            dw = logits_MV.t() @ x_MD
        elif wants_dw:
            dw = _plus_product(dw, logits_MV.t(), x_MD)
    if dw is None:
        dw = w_VD.new_zeros(w_VD.shape if wants_dw else 0)
    return terms_N.sum(), nll_N, dx, dw[:V]


def _plus_product(total_VD: torch.Tensor | None, a_VM: torch.Tensor, b_MD: torch.Tensor) -> torch.Tensor:
    """`total + a @ b` in fp32, into `total`."""
    if not a_VM.is_cuda:  # the interpreter's: no product of bf16 gives fp32 there
        product = a_VM.float() @ b_MD.float()
        return product if total_VD is None else total_VD.add_(product)
    if total_VD is None:
        return torch.mm(a_VM, b_MD, out_dtype=torch.float32)
    return torch.addmm(total_VD, a_VM, b_MD, out_dtype=torch.float32, out=total_VD)


def scaled(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A new tensor `x * factor` in another dtype; the factor stays on the device."""
    out = torch.empty_like(x, dtype=dtype)
    if x.numel():
        tile = 4096
        _scale_kernel[(triton.cdiv(x.numel(), tile),)](x, factor, out, x.numel(), TILE=tile, num_warps=4)
    return out
