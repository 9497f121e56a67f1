"""A gradient to its fp32 sum, 8 numbers a thread.

Letters: N numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["add_gradient"]

_BLOCK = 2048


@triton.jit
def _add_kernel(total_ptr, gradient_ptr, N, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(gradient_ptr + at, mask=at < N, other=0.0).to(tl.float32)
    if not FIRST:
        value += tl.load(total_ptr + at, mask=at < N, other=0.0)
    tl.store(total_ptr + at, value, mask=at < N)


def add_gradient(total_N: torch.Tensor, gradient_N: torch.Tensor, first: bool) -> None:
    N = total_N.numel()
    if N:
        _add_kernel[(triton.cdiv(N, _BLOCK),)](total_N, gradient_N, N, FIRST=first, BLOCK=_BLOCK, num_warps=8)
