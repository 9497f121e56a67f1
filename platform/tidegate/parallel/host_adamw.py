"""AdamW on the host's cores, one pass over weights, gradients and moments, and the weights in use.

The pass is torch's own fused kernel. DeepSpeed's for the host does as much and no more, but is compiled when it is
first imported, which needs a compiler and over a minute. What lies in memory-mapped files is moved like anything else.

Letters: N weights.
"""

from __future__ import annotations

import torch
from torch.optim.adamw import adamw

from tidegate_kernels.adamw import Rates

__all__ = ["host_adamw"]

_CHUNK = 1 << 21  # numbers at a time: what the kernel wrote is still in the cache when it is cast


def host_adamw(
    weights_N: torch.Tensor,
    in_use_N: torch.Tensor,
    gradients_N: torch.Tensor,
    mean_N: torch.Tensor,
    square_N: torch.Tensor,
    *,
    step: int,
    scale: float,
    rates: Rates,
) -> None:
    """One step, in place, on the CPU; `gradients` are scaled in place too.

    Args:
        weights_N, gradients_N, mean_N, square_N: (N,) fp32, as for `tidegate_kernels.adamw`.
        in_use_N: (N,) of any floating dtype; becomes a copy of the weights.
        step: the number of this step, counted from 1.
        scale: of the gradients, above 0.
        rates: hyperparameters.
    """
    before, inverse = torch.tensor(step - 1.0), torch.tensor(1 / scale)
    for parts in zip(*(x.split(_CHUNK) for x in (weights_N, in_use_N, gradients_N, mean_N, square_N)), strict=True):
        weights, in_use, gradients, mean, square = parts
        adamw(
            [weights],
            [gradients],
            [mean],
            [square],
            [],
            [before.clone()],
            fused=True,
            grad_scale=inverse,  # the kernel divides by it
            amsgrad=False,
            beta1=rates.betas[0],
            beta2=rates.betas[1],
            lr=rates.learning_rate,
            weight_decay=rates.weight_decay,
            eps=rates.eps,
            maximize=False,
        )
        in_use.copy_(weights)
