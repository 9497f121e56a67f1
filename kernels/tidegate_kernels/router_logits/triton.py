"""An fp32 matrix as the sum of two bf16 ones, side by side, so that tensor cores multiply it with 16 bits of its 24.

Letters: N rows, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["split"]

_BLOCK = 1024


@triton.jit
def _split_kernel(x_ptr, out_ptr, size, E, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + at, mask=at < size, other=0.0)
    high = value.to(tl.bfloat16)
    low = (value - high.to(tl.float32)).to(tl.bfloat16)
    out_ptr += at + at // E * E  # twice as far apart
    tl.store(out_ptr, high, mask=at < size)
    tl.store(out_ptr + E, low, mask=at < size)


def split(x_NE: torch.Tensor) -> torch.Tensor:
    """(N, 2 E) bf16: the nearest bf16 numbers, then those nearest to what is left."""
    N, E = x_NE.shape
    out = x_NE.new_empty(N, 2 * E, dtype=torch.bfloat16)
    if N:
        _split_kernel[(triton.cdiv(N * E, _BLOCK),)](x_NE.contiguous(), out, N * E, E, BLOCK=_BLOCK)
    return out
