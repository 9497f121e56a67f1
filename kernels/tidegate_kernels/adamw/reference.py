"""The truth of `adamw`, in plain PyTorch.

Letters: N weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Rates", "StepFactors", "adamw", "step_factors"]


class Rates(NamedTuple):
    """Hyperparameters of AdamW for one set of weights."""

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class StepFactors(NamedTuple):
    """What a step decides on the device, each () fp32."""

    scale: torch.Tensor
    """Of the gradients: averages over ranks and clips."""
    correction1: torch.Tensor
    """1 / (1 - beta1^t)."""
    correction2: torch.Tensor
    """1 / (1 - beta2^t)."""
    skip: torch.Tensor
    """1: leave everything as it is, whatever the gradients hold; else 0."""
    seed: torch.Tensor
    """Of the step's roundings; int64 below 2^32."""


def step_factors(
    step: torch.Tensor, betas: tuple[float, float], scale: torch.Tensor, skip: torch.Tensor
) -> StepFactors:
    """The factors of a step, from its () number t, counted from 1."""
    powers = step.double().unsqueeze(0).new_tensor(betas).pow(step.double())
    correction1, correction2 = (1 / (1 - powers)).float().unbind()
    return StepFactors(scale.float(), correction1, correction2, skip.float(), _mixed(step.long()))


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit numbers, held in int64, in which every bit of the result hangs on every bit of `x`."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _rounded(x_N: torch.Tensor, bits_N: torch.Tensor) -> torch.Tensor:
    """`x` in bf16, rounded up with the probability of what is cut off, by 16 random bits each."""
    return ((x_N.view(torch.int32) + bits_N.int()) & -0x10000).view(torch.float32).bfloat16()


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
    """One step of AdamW in place, and the weights in their dtype in use.

    Args:
        weights_N: (N,) fp32 master weights.
        in_use_N: (N,) what the model computes with, of any floating dtype; becomes a copy of the weights.
        gradients_N: (N,) fp32.
        mean_N, square_N: (N,) running means of gradients and of their squares, both fp32 or both bf16. bf16 ones are
            rounded stochastically: to the nearest, a mean of squares that a step changes by less than 2^-9 of itself
            (any that falls, for beta2 > 0.998) would stand still.
        factors: of this step.
        rates: hyperparameters.
        place: of the first weight among all weights: the random bits hang on a weight's place and on the step alone.

    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), Algorithm 2, with the schedule as part of the learning rate.
    """
    (beta1, beta2), lr = rates.betas, rates.learning_rate
    g = gradients_N * factors.scale
    mean = mean_N.float() + (1 - beta1) * (g - mean_N.float())
    square = beta2 * square_N.float() + (1 - beta2) * g * g
    direction = mean * factors.correction1 / ((square * factors.correction2).sqrt() + rates.eps)
    weights = weights_N * (1 - lr * rates.weight_decay) - lr * direction
    if mean_N.dtype == torch.bfloat16:
        bits = _mixed(torch.arange(place, place + len(g), device=g.device) ^ factors.seed)
        mean, square = _rounded(mean, bits & 0xFFFF), _rounded(square, bits >> 16)
    skip = factors.skip != 0
    for old, new in ((mean_N, mean), (square_N, square), (weights_N, weights)):
        old.copy_(torch.where(skip, old, new))
    in_use_N.copy_(weights_N)
