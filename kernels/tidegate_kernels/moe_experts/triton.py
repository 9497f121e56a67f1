"""The activation between the grouped products of the routed feed-forward, and one product that the library has not.

Letters: A rows sorted by expert, E experts, F expert width, K and N sides of a matrix, t tiles of 128 rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["ActivationGradients", "swiglu", "swiglu_backward", "two_products"]

_TILE_M, _TILE_N, _TILE_K = 128, 256, 64
"""Of `two_products`: two warpgroups hold 128 x 256 sums in registers, three stages of tiles fill shared memory."""


@triton.jit
def _sigmoid(z):
    e = tl.exp(-tl.abs(z))  # not exp(-z), which overflows
    return tl.where(z < 0, e, 1.0) / (1 + e)


@triton.jit
def _swiglu_kernel(
    gate_ptr, up_ptr, weight_ptr, out_ptr, A, F, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr
):
    a = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    there = (a < A) & (f < F)
    g = tl.load(gate_ptr + a * F + f, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + a * F + f, mask=there, other=0.0).to(tl.float32)
    act = g * _sigmoid(g) * u
    if WEIGHTED:
        act = act * tl.load(weight_ptr + a, mask=a < A, other=0.0)
    tl.store(out_ptr + a * F + f, act.to(out_ptr.dtype.element_ty), mask=there)


def swiglu(gate_AF: torch.Tensor, up_AF: torch.Tensor, weight_A: torch.Tensor | None) -> torch.Tensor:
    """(A, F) `silu(gate) up`, times the weight of the row."""
    A, F = gate_AF.shape
    out = torch.empty_like(gate_AF)
    if A:
        block = min(triton.next_power_of_2(F), 1024)
        rows = 4096 // block
        _swiglu_kernel[(triton.cdiv(A, rows), triton.cdiv(F, block))](
            gate_AF, up_AF, weight_A, out, A, F, WEIGHTED=weight_A is not None, ROWS=rows, BLOCK_F=block, num_warps=4
        )
    return out


@triton.jit
def _swiglu_backward_kernel(
    dact_ptr, gate_ptr, up_ptr, weight_ptr, dgate_ptr, dup_ptr, act_ptr, dweight_ptr, A, F,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    a = row[:, None]
    total = tl.zeros([ROWS], dtype=tl.float32)
    weight = tl.load(weight_ptr + a, mask=a < A, other=0.0) if WEIGHTED else 1.0
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)[None, :]
        there = (a < A) & (f < F)
        dact = tl.load(dact_ptr + a * F + f, mask=there, other=0.0).to(tl.float32)
        g = tl.load(gate_ptr + a * F + f, mask=there, other=0.0).to(tl.float32)
        u = tl.load(up_ptr + a * F + f, mask=there, other=0.0).to(tl.float32)
        s = _sigmoid(g)
        silu = g * s
        if WEIGHTED:
            total += tl.sum(dact * silu * u, axis=1)
            tl.store(act_ptr + a * F + f, (silu * u * weight).to(act_ptr.dtype.element_ty), mask=there)
            dact = dact * weight
        else:
            tl.store(act_ptr + a * F + f, (silu * u).to(act_ptr.dtype.element_ty), mask=there)
        tl.store(dup_ptr + a * F + f, (dact * silu).to(dup_ptr.dtype.element_ty), mask=there)
        dgate = dact * u * (s + silu * (1 - s))
        tl.store(dgate_ptr + a * F + f, dgate.to(dgate_ptr.dtype.element_ty), mask=there)
    if WEIGHTED:
        tl.store(dweight_ptr + row, total, mask=row < A)


class ActivationGradients(NamedTuple):
    dgate_AF: torch.Tensor
    dup_AF: torch.Tensor
    act_AF: torch.Tensor
    """The weighted activation again, for the gradient of the matrix behind it."""
    dweight_A: torch.Tensor | None


def swiglu_backward(
    dact_AF: torch.Tensor, gate_AF: torch.Tensor, up_AF: torch.Tensor, weight_A: torch.Tensor | None
) -> ActivationGradients:
    A, F = gate_AF.shape
    dgate, dup, act = (torch.empty_like(gate_AF) for _ in range(3))
    dweight = None if weight_A is None else torch.empty_like(weight_A)
    if A:
        block = min(triton.next_power_of_2(F), 1024)
        rows = max(1, 2048 // block)
        _swiglu_backward_kernel[(triton.cdiv(A, rows),)](
            dact_AF, gate_AF, up_AF, weight_A, dgate, dup, act, dweight, A, F,
            WEIGHTED=weight_A is not None, ROWS=rows, BLOCK_F=block, num_warps=4,
        )  # fmt: skip
    return ActivationGradients(dgate, dup, act, dweight)


@triton.jit
def _dot(a, b, acc, WIDE: tl.constexpr):
    if WIDE:  # the interpreter would multiply the bits of bf16 numbers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc)


@triton.jit
def _two_products_kernel(
    a_desc, b_desc, a2_desc, b2_desc, out_ptr, expert_ptr, first_ptr, last_ptr, tiles_ptr, N, K, programs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(N, BLOCK_N)
    total = tl.load(tiles_ptr) * across
    for tile in tl.range(tl.program_id(0), total, programs):
        t, n = tile // across, tile % across * BLOCK_N
        m, row = tl.load(first_ptr + t), tl.load(expert_ptr + t) * K
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        # A tile may read rows of the next expert, which are not stored, and columns of K past the end, which are zero.
        for k in range(0, K, BLOCK_K):
            acc = _dot(a_desc.load([m, k]), b_desc.load([row + k, n]), acc, WIDE)
        for k in range(0, K, BLOCK_K):
            acc = _dot(a2_desc.load([m, k]), b2_desc.load([row + k, n]), acc, WIDE)
        r = m + tl.arange(0, BLOCK_M)[:, None]
        c = n + tl.arange(0, BLOCK_N)[None, :]
        there = (r < tl.load(last_ptr + t)) & (c < N)
        tl.store(out_ptr + r.to(tl.int64) * N + c, acc.to(out_ptr.dtype.element_ty), mask=there)


def two_products(
    a_AK: torch.Tensor, b_EKN: torch.Tensor, a2_AK: torch.Tensor, b2_EKN: torch.Tensor, ends_E: torch.Tensor
) -> torch.Tensor:
    """(A, N) `a b + a2 b2`, each row with its expert's matrices: one accumulator where two products take two passes.

    bf16 only; K and N are multiples of 8, as TMA wants rows of whole 16 bytes.
    """
    A, K = a_AK.shape
    E, _, N = b_EKN.shape
    out = torch.empty(A, N, dtype=a_AK.dtype, device=a_AK.device)
    if A == 0:
        return out
    starts_E = torch.cat([ends_E.new_zeros(1), ends_E[:-1]])
    tiles_E = (ends_E - starts_E + _TILE_M - 1) // _TILE_M
    after_E = tiles_E.cumsum(0, dtype=torch.int32)
    t = torch.arange(triton.cdiv(A, _TILE_M) + E, device=out.device, dtype=torch.int32)
    expert_t = torch.searchsorted(after_E, t, right=True, out_int32=True).clamp_(max=E - 1)
    first_t = starts_E[expert_t] + (t - (after_E - tiles_E)[expert_t]) * _TILE_M
    programs = torch.cuda.get_device_properties(out.device).multi_processor_count if out.is_cuda else 2
    descriptors = [
        TensorDescriptor.from_tensor(x, block)
        for rows, matrices in ((a_AK, b_EKN), (a2_AK, b2_EKN))
        for x, block in ((rows, [_TILE_M, _TILE_K]), (matrices.flatten(0, 1), [_TILE_K, _TILE_N]))
    ]
    _two_products_kernel[(programs,)](
        *descriptors, out, expert_t, first_t, ends_E[expert_t], after_E[-1:], N, K, programs,
        BLOCK_M=_TILE_M, BLOCK_N=_TILE_N, BLOCK_K=_TILE_K, WIDE=not out.is_cuda, num_stages=3, num_warps=8,
    )  # fmt: skip
    return out
