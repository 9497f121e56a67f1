"""Flash attention with documents, grouped queries, a sink and the output gate in its epilogue.

Queries of a block see keys from the first token of their documents, or of their window, to themselves, so blocks before
that are not visited at all. The backward pass is one elementwise kernel (through the gate, and the row sums of the
softmax's gradient) and two of products: one for keys and values, one for queries; no atomics, so it is deterministic.
Source: FlashAttention-2 (arXiv 2307.08691), Alg. 1 and 2.

Letters: B batch, T tokens, H query heads, G key/value heads, d head width; m queries and n keys of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tidegate_kernels.gated_output.triton import activate
from tidegate_kernels.tiles import strides
from tidegate_kernels.tuning import Blocks, attention_size, blocks_of

__all__ = ["Gate", "Spans", "backward", "forward"]

_LOG2_E = tl.constexpr(1.4426950408889634)
_NONE = tl.constexpr("")


class Spans(NamedTuple):
    """(B, T) int32: the first token that each token sees, and the last that sees it, + 1. Neither falls."""

    first_BT: torch.Tensor
    end_BT: torch.Tensor


class Gate(NamedTuple):
    """Multiplicative, by (B, T, H, d) or (B, T, H, 1) scores."""

    scores_BTHs: torch.Tensor
    activation: str


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "wide":  # the interpreter would multiply the bits of bf16 numbers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _rows(ptr, row, stride, d, T, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, d) of one head."""
    i = tl.arange(0, BLOCK)
    return tl.load(ptr + row[:, None] * stride + i[None, :], mask=(row < T)[:, None] & (i < HEAD)[None, :], other=0.0)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, z_ptr, first_ptr, sink_ptr, y_ptr, out_ptr, lse_ptr, T, H, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, z_b, z_t, z_h, y_b, y_t, y_h,
    GROUP: tl.constexpr, HEAD: tl.constexpr, DOCUMENTS: tl.constexpr, SINK: tl.constexpr, ACTIVATION: tl.constexpr,
    HEADWISE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_d: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # The last queries see the most keys: they go first.
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
    q = _rows(q_ptr + b * q_b + h * q_h, row, q_t, HEAD, T, HEAD, BLOCK_d)
    k_ptr += b * k_b + h // GROUP * k_h
    v_ptr += b * v_b + h // GROUP * v_h
    top = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_d], dtype=tl.float32)
    low = 0
    first = tl.zeros([BLOCK_M], dtype=tl.int32)
    if DOCUMENTS:
        first = tl.load(first_ptr + b * T + row, mask=row < T, other=T)
        low = tl.load(first_ptr + b * T + start) // BLOCK_N * BLOCK_N
    else:  # blocks that every query sees in full
        for n in range(0, start // BLOCK_N * BLOCK_N, BLOCK_N):
            col = (n + tl.arange(0, BLOCK_N)).to(tl.int64)
            k = _rows(k_ptr, col, k_t, HEAD, T, HEAD, BLOCK_d)
            s = dot(q, k.T, tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), PRECISION) * (scale * _LOG2_E)
            higher = tl.maximum(top, tl.max(s, axis=1))
            shrink = tl.exp2(top - higher)
            p = tl.exp2(s - higher[:, None])
            v = _rows(v_ptr, col, v_t, HEAD, T, HEAD, BLOCK_d)
            acc = dot(p.to(v.dtype), v, acc * shrink[:, None], PRECISION)
            total = total * shrink + tl.sum(p, axis=1)
            top = higher
        low = start // BLOCK_N * BLOCK_N
    for n in range(low, tl.minimum(start + BLOCK_M, T), BLOCK_N):
        col = (n + tl.arange(0, BLOCK_N)).to(tl.int64)
        k = _rows(k_ptr, col, k_t, HEAD, T, HEAD, BLOCK_d)
        s = dot(q, k.T, tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), PRECISION) * (scale * _LOG2_E)
        seen = col[None, :] <= row[:, None]
        if DOCUMENTS:
            seen = seen & (col[None, :] >= first[:, None])
        s = tl.where(seen, s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # a row that has seen no key yet
        shrink = tl.exp2(top - base)
        p = tl.exp2(s - base[:, None])
        v = _rows(v_ptr, col, v_t, HEAD, T, HEAD, BLOCK_d)
        acc = dot(p.to(v.dtype), v, acc * shrink[:, None], PRECISION)
        total = total * shrink + tl.sum(p, axis=1)
        top = higher
    top = tl.where(row < T, top, 0.0)
    if SINK:
        sink = tl.load(sink_ptr + h).to(tl.float32) * _LOG2_E
        higher = tl.maximum(top, sink)
        shrink = tl.exp2(top - higher)
        acc = acc * shrink[:, None]
        total = total * shrink + tl.exp2(sink - higher)
        top = higher
    total = tl.where(row < T, total, 1.0)
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * T + row, (top + tl.log2(total)) / _LOG2_E, mask=row < T)
    y = (acc / total[:, None]).to(y_ptr.dtype.element_ty)
    i = tl.arange(0, BLOCK_d)[None, :]
    there = (row < T)[:, None] & (i < HEAD)
    at = b * y_b + row[:, None] * y_t + h * y_h + i
    tl.store(y_ptr + at, y, mask=there)
    if ACTIVATION != _NONE:
        z_at = z_ptr + b * z_b + row[:, None] * z_t + h * z_h
        if HEADWISE:
            z = tl.load(z_at, mask=(row < T)[:, None], other=0.0).to(tl.float32)
        else:
            z = tl.load(z_at + i, mask=there, other=0.0).to(tl.float32)
        gate, _ = activate(z, ACTIVATION)
        tl.store(out_ptr + at, (y.to(tl.float32) * gate).to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _through_gate_kernel(
    g_ptr, y_ptr, z_ptr, dy_ptr, dz_ptr, sums_ptr, T, H,
    g_b, g_t, g_h, y_b, y_t, y_h, z_b, z_t, z_h, dz_b, dz_t, dz_h,
    HEAD: tl.constexpr, ACTIVATION: tl.constexpr, HEADWISE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_d: tl.constexpr,
):  # fmt: skip
    """dy, dz and the row sums of dy * y."""
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.arange(0, BLOCK_d)[None, :]
    there = (row < T)[:, None] & (i < HEAD)
    g = tl.load(g_ptr + b * g_b + row[:, None] * g_t + h * g_h + i, mask=there, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + b * y_b + row[:, None] * y_t + h * y_h + i, mask=there, other=0.0).to(tl.float32)
    if ACTIVATION != _NONE:
        z_at = z_ptr + b * z_b + row[:, None] * z_t + h * z_h
        dz_at = dz_ptr + b * dz_b + row[:, None] * dz_t + h * dz_h
        if HEADWISE:
            z = tl.load(z_at, mask=(row < T)[:, None], other=0.0).to(tl.float32)
        else:
            z = tl.load(z_at + i, mask=there, other=0.0).to(tl.float32)
        gate, slope = activate(z, ACTIVATION)
        if HEADWISE:
            dz = tl.sum(g * y, axis=1, keep_dims=True) * slope
            tl.store(dz_at, dz.to(dz_ptr.dtype.element_ty), mask=(row < T)[:, None])
        else:
            tl.store(dz_at + i, (g * y * slope).to(dz_ptr.dtype.element_ty), mask=there)
        low = (g * gate).to(dy_ptr.dtype.element_ty)
        tl.store(dy_ptr + b * y_b + row[:, None] * y_t + h * y_h + i, low, mask=there)
        g = low.to(tl.float32)
    tl.store(sums_ptr + tl.program_id(1).to(tl.int64) * T + row, tl.sum(g * y, axis=1), mask=row < T)


@triton.jit
def _keys_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, first_ptr, end_ptr, lse_ptr, sums_ptr, dk_ptr, dv_ptr, T, H, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dy_b, dy_t, dy_h, dk_b, dk_t, dk_h,
    GROUP: tl.constexpr, HEAD: tl.constexpr, DOCUMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_d: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BLOCK_N
    G = H // GROUP
    b, kv = (tl.program_id(1) // G).to(tl.int64), (tl.program_id(1) % G).to(tl.int64)
    col = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = _rows(k_ptr + b * k_b + kv * k_h, col, k_t, HEAD, T, HEAD, BLOCK_d)
    v = _rows(v_ptr + b * v_b + kv * v_h, col, v_t, HEAD, T, HEAD, BLOCK_d)
    dk = tl.zeros([BLOCK_N, BLOCK_d], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_d], dtype=tl.float32)
    end = T
    if DOCUMENTS:
        end = tl.load(end_ptr + b * T + tl.minimum(start + BLOCK_N, T) - 1)
    for member in range(GROUP):
        h = kv * GROUP + member
        for m in range(start // BLOCK_M * BLOCK_M, end, BLOCK_M):
            row = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
            at = (b * H + h) * T + row
            q = _rows(q_ptr + b * q_b + h * q_h, row, q_t, HEAD, T, HEAD, BLOCK_d)
            dy = _rows(dy_ptr + b * dy_b + h * dy_h, row, dy_t, HEAD, T, HEAD, BLOCK_d)
            lse = tl.load(lse_ptr + at, mask=row < T, other=0.0) * _LOG2_E
            sums = tl.load(sums_ptr + at, mask=row < T, other=0.0)
            s = dot(k, q.T, tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32), PRECISION) * (scale * _LOG2_E)
            seen = (col[:, None] <= row[None, :]) & (row < T)[None, :]
            if DOCUMENTS:
                seen = seen & (col[:, None] >= tl.load(first_ptr + b * T + row, mask=row < T, other=T)[None, :])
            p = tl.exp2(tl.where(seen, s - lse[None, :], -float("inf")))
            dv = dot(p.to(dy.dtype), dy, dv, PRECISION)
            dp = dot(v, dy.T, tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32), PRECISION)
            ds = p * (dp - sums[None, :])
            dk = dot(ds.to(q.dtype), q, dk, PRECISION)
    i = tl.arange(0, BLOCK_d)[None, :]
    there = (col < T)[:, None] & (i < HEAD)
    at = b * dk_b + col[:, None] * dk_t + kv * dk_h + i
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=there)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=there)


@triton.jit
def _queries_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, first_ptr, lse_ptr, sums_ptr, dq_ptr, T, H, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dy_b, dy_t, dy_h, dq_b, dq_t, dq_h,
    GROUP: tl.constexpr, HEAD: tl.constexpr, DOCUMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_d: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
    q = _rows(q_ptr + b * q_b + h * q_h, row, q_t, HEAD, T, HEAD, BLOCK_d)
    dy = _rows(dy_ptr + b * dy_b + h * dy_h, row, dy_t, HEAD, T, HEAD, BLOCK_d)
    at = tl.program_id(1).to(tl.int64) * T + row
    lse = tl.load(lse_ptr + at, mask=row < T, other=0.0) * _LOG2_E
    sums = tl.load(sums_ptr + at, mask=row < T, other=0.0)
    k_ptr += b * k_b + h // GROUP * k_h
    v_ptr += b * v_b + h // GROUP * v_h
    dq = tl.zeros([BLOCK_M, BLOCK_d], dtype=tl.float32)
    low = 0
    first = tl.zeros([BLOCK_M], dtype=tl.int32)
    if DOCUMENTS:
        first = tl.load(first_ptr + b * T + row, mask=row < T, other=T)
        low = tl.load(first_ptr + b * T + start) // BLOCK_N * BLOCK_N
    for n in range(low, tl.minimum(start + BLOCK_M, T), BLOCK_N):
        col = (n + tl.arange(0, BLOCK_N)).to(tl.int64)
        k = _rows(k_ptr, col, k_t, HEAD, T, HEAD, BLOCK_d)
        v = _rows(v_ptr, col, v_t, HEAD, T, HEAD, BLOCK_d)
        s = dot(q, k.T, tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), PRECISION) * (scale * _LOG2_E)
        seen = col[None, :] <= row[:, None]
        if DOCUMENTS:
            seen = seen & (col[None, :] >= first[:, None])
        p = tl.exp2(tl.where(seen, s - lse[:, None], -float("inf")))
        dp = dot(dy, v.T, tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), PRECISION)
        ds = p * (dp - sums[:, None])
        dq = dot(ds.to(k.dtype), k, dq, PRECISION)
    i = tl.arange(0, BLOCK_d)[None, :]
    there = (row < T)[:, None] & (i < HEAD)
    tl.store(
        dq_ptr + b * dq_b + row[:, None] * dq_t + h * dq_h + i, (dq * scale).to(dq_ptr.dtype.element_ty), mask=there
    )


def _constants(
    q_BTHd: torch.Tensor, k_BTGd: torch.Tensor, documents: bool, blocks: Blocks
) -> dict[str, int | str | bool]:
    precision = "ieee" if q_BTHd.dtype == torch.float32 else "tf32"
    return {
        "GROUP": q_BTHd.shape[2] // k_BTGd.shape[2],
        "HEAD": q_BTHd.shape[3],
        "DOCUMENTS": documents,
        "BLOCK_M": blocks.block[0],
        "BLOCK_N": blocks.block[1],
        "BLOCK_d": max(16, triton.next_power_of_2(q_BTHd.shape[3])),
        "PRECISION": precision if q_BTHd.is_cuda else "wide",
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def forward(
    q_BTHd: torch.Tensor,
    k_BTGd: torch.Tensor,
    v_BTGd: torch.Tensor,
    spans: Spans | None,
    sink_H: torch.Tensor | None,
    gate: Gate | None,
    blocks: Blocks | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ungated output, gated output (the same tensor without a gate), log-sum-exp (B, H, T) in fp32, sink included.

    Blocks are the tuned ones unless they are given.
    """
    B, T, H, d = q_BTHd.shape
    y = torch.empty_like(q_BTHd, memory_format=torch.contiguous_format)
    out = y if gate is None else torch.empty_like(y)
    lse_BHT = torch.empty(B, H, T, dtype=torch.float32, device=y.device)
    blocks = blocks or blocks_of("gated_attention.forward", attention_size(d, q_BTHd.dtype), q_BTHd.device)
    scores = None if gate is None else gate.scores_BTHs
    if y.numel():
        _forward_kernel[(triton.cdiv(T, blocks.block[0]), B * H)](
            q_BTHd, k_BTGd, v_BTGd, scores, None if spans is None else spans.first_BT, sink_H, y, out, lse_BHT,
            T, H, d**-0.5, *strides(q_BTHd, k_BTGd, v_BTGd, scores, y),
            SINK=sink_H is not None, ACTIVATION="" if gate is None else gate.activation,
            HEADWISE=scores is not None and scores.shape[3] == 1,
            **_constants(q_BTHd, k_BTGd, spans is not None, blocks),
        )  # fmt: skip
    return y, out, lse_BHT


class Gradients(NamedTuple):
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dscores: torch.Tensor | None
    sums_BHT: torch.Tensor
    """Row sums of dy * y, fp32: what the gradient of a sink is made of."""


def backward(
    g_BTHd: torch.Tensor,
    q_BTHd: torch.Tensor,
    k_BTGd: torch.Tensor,
    v_BTGd: torch.Tensor,
    y_BTHd: torch.Tensor,
    lse_BHT: torch.Tensor,
    spans: Spans | None,
    gate: Gate | None,
    keys: Blocks | None = None,
    queries: Blocks | None = None,
) -> Gradients:
    """Blocks of the two kernels are the tuned ones unless they are given."""
    B, T, H, d = q_BTHd.shape
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BTHd, k_BTGd, v_BTGd))
    sums_BHT = torch.empty_like(lse_BHT)
    scores = None if gate is None else gate.scores_BTHs
    dscores = None if scores is None else torch.empty_like(scores, memory_format=torch.contiguous_format)
    dy = g_BTHd if gate is None else torch.empty_like(y_BTHd)
    if not q_BTHd.numel():
        return Gradients(dq, dk, dv, dscores, sums_BHT)
    documents, size = spans is not None, attention_size(d, q_BTHd.dtype)
    first, end = (None, None) if spans is None else spans
    block_d = max(16, triton.next_power_of_2(d))
    rows = max(1, 4096 // block_d)
    _through_gate_kernel[(triton.cdiv(T, rows), B * H)](
        g_BTHd, y_BTHd, scores, dy, dscores, sums_BHT, T, H, *strides(g_BTHd, y_BTHd, scores, dscores),
        HEAD=d, ACTIVATION="" if gate is None else gate.activation,
        HEADWISE=scores is not None and scores.shape[3] == 1, BLOCK_M=rows, BLOCK_d=block_d, num_warps=4,
    )  # fmt: skip
    shared = q_BTHd, k_BTGd, v_BTGd, dy
    blocks = keys or blocks_of("gated_attention.keys", size, q_BTHd.device)
    _keys_kernel[(triton.cdiv(T, blocks.block[1]), B * k_BTGd.shape[2])](
        *shared, first, end, lse_BHT, sums_BHT, dk, dv, T, H, d**-0.5, *strides(*shared, dk),
        **_constants(q_BTHd, k_BTGd, documents, blocks),
    )  # fmt: skip
    blocks = queries or blocks_of("gated_attention.queries", size, q_BTHd.device)
    _queries_kernel[(triton.cdiv(T, blocks.block[0]), B * H)](
        *shared, first, lse_BHT, sums_BHT, dq, T, H, d**-0.5, *strides(*shared, dq),
        **_constants(q_BTHd, k_BTGd, documents, blocks),
    )  # fmt: skip
    return Gradients(dq, dk, dv, dscores, sums_BHT)
