"""What the differentiable cardinality routers share: the smooth step and the entropy that makes it bite.

Letters: any shape; E the last axis.
"""

from __future__ import annotations

import torch

__all__ = ["dense_start_std", "entropy", "smooth_step"]


def smooth_step(t: torch.Tensor, gamma: float) -> torch.Tensor:
    """0 below -gamma/2, 1 above gamma/2, a cubic between, with a continuous derivative.

    Source: Hazimeh et al. 2020 (arXiv 2002.07772), Eq. 4.
    """
    x = (t / gamma).clamp(-0.5, 0.5)
    return -2 * x**3 + 1.5 * x + 0.5


def dense_start_std(gamma: float, width: int) -> float:
    """Initial deviation of a linear map into the smooth step, so that every expert starts in use.

    The published code draws within gamma/100 whatever the width: at width 4096 the step's input would already deviate
    by 0.4 gamma, and a part of the splits would begin saturated, without gradient. Here it deviates by 0.05 gamma for
    normalised rows of any width.
    """
    return 0.05 * gamma / width**0.5


def entropy(probs: torch.Tensor) -> torch.Tensor:
    """Entropy in nats over the last axis; 0 log 0 is 0, with a finite gradient."""
    return -(probs * (probs + 1e-6).log()).sum(dim=-1)
