"""Where assignments of rows to experts go when they are sorted by expert, and rows on the way there and back.

Assignments are numbered by row; `slot_A` says where each lies. Rows are spread from row order (each is read once and
written K times) and gathered back to it, so no inverse permutation, no source index and no host sync is needed.

Letters: N rows, A assignments, D width, E experts, b blocks of assignments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["combine", "combine_backward", "fan_out", "place"]

_FLAGS = 2**15
"""Of a block of assignments by experts, in registers."""


@triton.jit
def _count_kernel(expert_ptr, counts_ptr, A, E, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    a = b * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(expert_ptr + a, mask=a < A, other=-1).to(tl.int32)
    e = tl.arange(0, BLOCK_E)
    counts = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + b * E + e, counts, mask=e < E)


@triton.jit
def _place_kernel(expert_ptr, first_ptr, slot_ptr, A, E, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    a = b * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(expert_ptr + a, mask=a < A, other=-1).to(tl.int32)
    e = tl.arange(0, BLOCK_E)
    mine = (expert[:, None] == e[None, :]).to(tl.int32)
    before = tl.cumsum(mine, axis=0) - mine
    first = tl.load(first_ptr + b * E + e, mask=e < E, other=0).to(tl.int32)
    slot = tl.sum(mine * (before + first[None, :]), axis=1)
    tl.store(slot_ptr + a, slot, mask=a < A)


def place(expert_A: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A stable counting sort: slot of every assignment, and where each expert's slots end; both int32."""
    A, device = expert_A.shape[0], expert_A.device
    wide = triton.next_power_of_2(num_experts)
    block = max(16, min(512, _FLAGS // wide))
    blocks = triton.cdiv(A, block)
    counts_bE = torch.empty(blocks, num_experts, dtype=torch.int32, device=device)
    slot_A = torch.empty(A, dtype=torch.int32, device=device)
    if A == 0:
        return slot_A, torch.zeros(num_experts, dtype=torch.int32, device=device)
    _count_kernel[(blocks,)](expert_A, counts_bE, A, num_experts, BLOCK=block, BLOCK_E=wide, num_warps=8)
    # By expert, then block: where the assignments of each begin.
    ends_Eb = counts_bE.t().flatten().cumsum(0, dtype=torch.int32)
    first_bE = (ends_Eb.view(num_experts, blocks) - counts_bE.t()).t().contiguous()
    _place_kernel[(blocks,)](expert_A, first_bE, slot_A, A, num_experts, BLOCK=block, BLOCK_E=wide, num_warps=8)
    return slot_A, ends_Eb.view(num_experts, blocks)[:, -1].contiguous()


@triton.jit
def _span(starts_ptr, n, PER_ROW: tl.constexpr):
    """First and last + 1 assignment of a row."""
    if PER_ROW > 0:
        return n * PER_ROW, (n + 1) * PER_ROW
    else:  # the compiler would go on past a return
        return tl.load(starts_ptr + n).to(tl.int64), tl.load(starts_ptr + n + 1).to(tl.int64)


@triton.jit
def _fan_out_kernel(
    x_ptr, slot_ptr, starts_ptr, weight_ptr, out_ptr, sorted_ptr, D, x_row,
    PER_ROW: tl.constexpr, SORT_WEIGHTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    first, last = _span(starts_ptr, n, PER_ROW)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + n * x_row + d, mask=d < D, other=0.0)
        for a in range(first, last):
            slot = tl.load(slot_ptr + a).to(tl.int64)
            tl.store(out_ptr + slot * D + d, x, mask=d < D)
    if SORT_WEIGHTS:
        for a in range(first, last):
            tl.store(sorted_ptr + tl.load(slot_ptr + a), tl.load(weight_ptr + a))


def fan_out(
    x_ND: torch.Tensor,
    slot_A: torch.Tensor,
    starts_N1: torch.Tensor | None,
    per_row: int,
    weight_A: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(A, D) every row in all its slots, and the weights, if given, sorted by slot."""
    N, D = x_ND.shape
    A = slot_A.shape[0]
    out = torch.empty(A, D, dtype=x_ND.dtype, device=x_ND.device)
    sorted_A = None if weight_A is None else torch.empty_like(weight_A)
    if A:
        block = min(triton.next_power_of_2(D), 4096)
        _fan_out_kernel[(N,)](
            x_ND, slot_A, starts_N1, weight_A, out, sorted_A, D, x_ND.stride(0),
            PER_ROW=0 if starts_N1 is not None else per_row, SORT_WEIGHTS=weight_A is not None, BLOCK_D=block,
            num_warps=_warps(block),
        )  # fmt: skip
    return out, sorted_A


@triton.jit
def _combine_kernel(
    y_ptr, slot_ptr, starts_ptr, weight_ptr, out_ptr, D,
    PER_ROW: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        total = tl.zeros([BLOCK_D], dtype=tl.float32)
        if PER_ROW > 0:
            for i in tl.static_range(PER_ROW):  # unrolled, so that the loads of all experts are in flight at once
                total += _weighted(y_ptr, slot_ptr, weight_ptr, n * PER_ROW + i, d, D, WEIGHTED)
        else:
            first, last = _span(starts_ptr, n, PER_ROW)
            for a in range(first, last):
                total += _weighted(y_ptr, slot_ptr, weight_ptr, a, d, D, WEIGHTED)
        tl.store(out_ptr + n * D + d, total.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _weighted(y_ptr, slot_ptr, weight_ptr, a, d, D, WEIGHTED: tl.constexpr):
    slot = tl.load(slot_ptr + a).to(tl.int64)
    y = tl.load(y_ptr + slot * D + d, mask=d < D, other=0.0).to(tl.float32)
    if WEIGHTED:
        y = y * tl.load(weight_ptr + a)
    return y


def combine(
    y_AD: torch.Tensor,
    slot_A: torch.Tensor,
    starts_N1: torch.Tensor | None,
    per_row: int,
    rows: int,
    weight_A: torch.Tensor | None = None,
) -> torch.Tensor:
    """(N, D) the sum over each row's slots, weighted if weights are given; fp32 inside."""
    D = y_AD.shape[1]
    out = torch.empty(rows, D, dtype=y_AD.dtype, device=y_AD.device)
    if rows:
        block = min(triton.next_power_of_2(D), 2048)
        _combine_kernel[(rows,)](
            y_AD, slot_A, starts_N1, weight_A, out, D,
            PER_ROW=0 if starts_N1 is not None else per_row, WEIGHTED=weight_A is not None, BLOCK_D=block,
            num_warps=_warps(block),
        )  # fmt: skip
    return out


@triton.jit
def _combine_backward_kernel(
    g_ptr, y_ptr, slot_ptr, starts_ptr, weight_ptr, dy_ptr, dweight_ptr, D, g_row,
    PER_ROW: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    first, last = _span(starts_ptr, n, PER_ROW)
    for a in range(first, last):
        slot = tl.load(slot_ptr + a).to(tl.int64)
        weight = tl.load(weight_ptr + a)
        product = tl.zeros([BLOCK_D], dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            g = tl.load(g_ptr + n * g_row + d, mask=d < D, other=0.0).to(tl.float32)
            product += g * tl.load(y_ptr + slot * D + d, mask=d < D, other=0.0).to(tl.float32)
            tl.store(dy_ptr + slot * D + d, (g * weight).to(dy_ptr.dtype.element_ty), mask=d < D)
        tl.store(dweight_ptr + a, tl.sum(product, axis=0))


def combine_backward(
    g_ND: torch.Tensor,
    y_AD: torch.Tensor,
    slot_A: torch.Tensor,
    starts_N1: torch.Tensor | None,
    per_row: int,
    weight_A: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the slots (A, D) and of the weights (A,) of a weighted `combine`."""
    N, D = g_ND.shape
    dy, dweight = torch.empty_like(y_AD), torch.empty_like(weight_A)
    if y_AD.shape[0]:
        block = min(triton.next_power_of_2(D), 2048)
        _combine_backward_kernel[(N,)](
            g_ND, y_AD, slot_A, starts_N1, weight_A, dy, dweight, D, g_ND.stride(0),
            PER_ROW=0 if starts_N1 is not None else per_row, BLOCK_D=block, num_warps=_warps(block),
        )  # fmt: skip
    return dy, dweight


def _warps(block: int) -> int:
    """Eight elements of a row a thread: 16 bytes of bf16."""
    return max(1, min(8, block // 256))
