"""One or two gradients to their fp32 sum, 8 numbers a thread.

Letters: N numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["add_gradients"]

_BLOCK = 2048


@triton.jit
def _add_kernel(
    total_ptr, gradient_ptr, other_ptr, N, FIRST: tl.constexpr, PAIR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(gradient_ptr + at, mask=at < N, other=0.0).to(tl.float32)
    if not FIRST:
        value += tl.load(total_ptr + at, mask=at < N, other=0.0)
    if PAIR:
        value += tl.load(other_ptr + at, mask=at < N, other=0.0).to(tl.float32)
    tl.store(total_ptr + at, value, mask=at < N)


def add_gradients(total_N: torch.Tensor, gradient_N: torch.Tensor, other_N: torch.Tensor | None, first: bool) -> None:
    N = total_N.numel()
    if N:
        _add_kernel[(triton.cdiv(N, _BLOCK),)](
            total_N, gradient_N, other_N, N, FIRST=first, PAIR=other_N is not None, BLOCK=_BLOCK, num_warps=8
        )
