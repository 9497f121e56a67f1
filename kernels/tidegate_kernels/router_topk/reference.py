"""The truth of `router_topk`, in plain PyTorch.

Letters: N = B T rows, B sequences, T tokens, E experts, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

__all__ = ["SCORES", "TINY", "RoutedTopK", "router_topk"]

TINY = 1e-20
"""Keeps a row of scores that all underflow from dividing by zero."""


class RoutedTopK(NamedTuple):
    weights_NK: torch.Tensor
    """(N, K) fp32, the factors of the chosen experts; carries gradient."""
    experts_NK: torch.Tensor
    """(N, K) int64, distinct, by falling biased score."""
    counts_BE: torch.Tensor
    """(B, E) fp32, how often each expert was chosen by the counted tokens of a sequence; no gradient."""
    prob_sums_BE: torch.Tensor
    """(B, E) fp32, scores divided by their sum over experts, summed over counted tokens; carries gradient."""
    z_sums_B: torch.Tensor
    """(B,) fp32, squared logsumexp of the logits, summed over counted tokens; carries gradient."""


def _softmax(logits_NE: torch.Tensor) -> torch.Tensor:
    return logits_NE.softmax(dim=-1)


def _sqrt_softplus(logits_NE: torch.Tensor) -> torch.Tensor:
    return (F.softplus(logits_NE) + TINY).sqrt()  # the gradient of sqrt at an underflowed 0 is infinite


SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": _softmax,
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": _sqrt_softplus,
}


def router_topk(
    logits_NE: torch.Tensor,
    bias_E: torch.Tensor,
    counted_BT: torch.Tensor,
    *,
    top_k: int,
    score: str,
    renormalize: bool,
    scale: float,
) -> RoutedTopK:
    """Choose the K experts of each row with the largest `score + bias`, weigh them by their scores, and sum up.

    Args:
        logits_NE: (N, E) fp32; -inf for an expert that is not there: no bias brings it back.
        bias_E: (E,) fp32, for selection only; no gradient.
        counted_BT: (B, T) bool, tokens that enter the sums.
        top_k: K, at most E.
        score: a key of `SCORES`.
        renormalize: divide a row's weights by their sum.
        scale: factor of the weights.

    Source: softmax: Shazeer et al. 2017 (arXiv 1701.06538); sigmoid, bias: DeepSeek-V3 (arXiv 2412.19437), Eq. 12-16;
    sums: load-balance loss of Switch (arXiv 2101.03961), Eq. 4-6, and z-loss of ST-MoE (arXiv 2202.08906), Eq. 5.
    """
    (B, T), E = counted_BT.shape, logits_NE.shape[1]
    scores_NE = SCORES[score](logits_NE)
    biased_NE = (scores_NE.detach() + bias_E).masked_fill(logits_NE == -torch.inf, -torch.inf)
    experts_NK = biased_NE.topk(top_k, dim=-1).indices
    weights_NK = scores_NE.gather(1, experts_NK)
    if renormalize:
        weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + TINY)
    # A softmax is a distribution already; dividing it by its sum again would change its last bits.
    probs_NE = scores_NE if score == "softmax" else scores_NE / (scores_NE.sum(dim=-1, keepdim=True) + TINY)
    counted = counted_BT.to(logits_NE.dtype)
    counts_BE = counted.new_zeros(B, E).scatter_add_(
        1, experts_NK.view(B, T * top_k), counted.repeat_interleave(top_k, dim=1)
    )
    prob_sums_BE = (probs_NE.view(B, T, E) * counted.unsqueeze(-1)).sum(dim=1)
    z_BT = logits_NE.logsumexp(dim=-1).square().view(B, T)
    return RoutedTopK(scale * weights_NK, experts_NK, counts_BE, prob_sums_BE, (z_BT * counted).sum(dim=1))
