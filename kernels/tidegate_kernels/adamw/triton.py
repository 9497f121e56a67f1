"""AdamW in one pass over weights, gradients and moments, which also writes the weights in use.

Letters: N weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tidegate_kernels.adamw.reference import Rates, StepFactors

__all__ = ["adamw"]

_BLOCK = 1024


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _rounded(x, bits):
    """To what bf16 can hold, up with the probability of what is cut off."""
    return ((x.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _adamw_kernel(
    weights_ptr, in_use_ptr, gradients_ptr, mean_ptr, square_ptr,
    scale_ptr, correction1_ptr, correction2_ptr, skip_ptr, seed_ptr,
    N, place, lr, keep, beta1_rest, beta2, beta2_rest, eps,
    ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(skip_ptr) == 0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        there = at < N
        g = tl.load(gradients_ptr + at, mask=there, other=0.0) * tl.load(scale_ptr)
        mean = tl.load(mean_ptr + at, mask=there, other=0.0).to(tl.float32)
        mean += beta1_rest * (g - mean)
        square = beta2 * tl.load(square_ptr + at, mask=there, other=0.0).to(tl.float32) + beta2_rest * g * g
        direction = mean * tl.load(correction1_ptr) / (tl.sqrt(square * tl.load(correction2_ptr)) + eps)
        weights = tl.load(weights_ptr + at, mask=there, other=0.0) * keep - lr * direction
        if ROUND:
            bits = _mixed(((place + at) ^ tl.load(seed_ptr)).to(tl.uint32))
            mean, square = _rounded(mean, bits & 0xFFFF), _rounded(square, bits >> 16)
        tl.store(mean_ptr + at, mean.to(mean_ptr.dtype.element_ty), mask=there)
        tl.store(square_ptr + at, square.to(square_ptr.dtype.element_ty), mask=there)
        tl.store(weights_ptr + at, weights, mask=there)
        tl.store(in_use_ptr + at, weights.to(in_use_ptr.dtype.element_ty), mask=there)


def adamw(
    weights_N: torch.Tensor,
    in_use_N: torch.Tensor,
    gradients_N: torch.Tensor,
    mean_N: torch.Tensor,
    square_N: torch.Tensor,
    factors: StepFactors,
    rates: Rates,
    place: int,
) -> None:
    N, (beta1, beta2) = weights_N.numel(), rates.betas
    keep = 1 - rates.learning_rate * rates.weight_decay
    if N:
        _adamw_kernel[(triton.cdiv(N, _BLOCK),)](
            weights_N, in_use_N, gradients_N, mean_N, square_N, *factors,
            N, place, rates.learning_rate, keep, 1 - beta1, beta2, 1 - beta2, rates.eps,
            ROUND=mean_N.dtype == torch.bfloat16, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
