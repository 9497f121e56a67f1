"""One product of the routed feed-forward that the library has not.

Letters: A rows sorted by expert, E experts, K and N sides of a matrix, t tiles of m rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tidegate_kernels.tiles import num_processors
from tidegate_kernels.tuning import Blocks, blocks_of

__all__ = ["two_products"]


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
    a_AK: torch.Tensor,
    b_EKN: torch.Tensor,
    a2_AK: torch.Tensor,
    b2_EKN: torch.Tensor,
    ends_E: torch.Tensor,
    blocks: Blocks | None = None,
) -> torch.Tensor:
    """(A, N) `a b + a2 b2`, each row with its expert's matrices: one accumulator where two products take two passes.

    bf16 only; K and N are multiples of 8, as TMA wants rows of whole 16 bytes. Blocks are the tuned ones
    unless they are given.
    """
    A, K = a_AK.shape
    E, _, N = b_EKN.shape
    out = torch.empty(A, N, dtype=a_AK.dtype, device=a_AK.device)
    if A == 0:
        return out
    blocks = blocks or blocks_of("moe_experts.two_products", "all", out.device)
    m, n, k = blocks.block
    starts_E = torch.cat([ends_E.new_zeros(1), ends_E[:-1]])
    tiles_E = (ends_E - starts_E + m - 1) // m
    after_E = tiles_E.cumsum(0, dtype=torch.int32)
    t = torch.arange(triton.cdiv(A, m) + E, device=out.device, dtype=torch.int32)
    expert_t = torch.searchsorted(after_E, t, right=True, out_int32=True).clamp_(max=E - 1)
    first_t = starts_E[expert_t] + (t - (after_E - tiles_E)[expert_t]) * m
    programs = num_processors(out.device)
    descriptors = [
        TensorDescriptor.from_tensor(x, block)
        for rows, matrices in ((a_AK, b_EKN), (a2_AK, b2_EKN))
        for x, block in ((rows, [m, k]), (matrices.flatten(0, 1), [k, n]))
    ]
    _two_products_kernel[(programs,)](
        *descriptors, out, expert_t, first_t, ends_E[expert_t], after_E[-1:], N, K, programs,
        BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, WIDE=not out.is_cuda, num_stages=blocks.stages, num_warps=blocks.warps,
    )  # fmt: skip
    return out
