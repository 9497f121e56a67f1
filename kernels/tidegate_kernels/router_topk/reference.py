"""The truth of `router_topk`, in plain PyTorch.

Letters: N = B T rows, B sequences, T tokens, E experts, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

__all__ = ["SCORES", "TINY", "RoutedTopK", "router_signals", "router_topk"]

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
    signals_B3: torch.Tensor | None
    """(B, 3) fp32 of `router_signals`, if asked for."""


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
    signals: bool,
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
        signals: compute what telemetry wants.

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
    z_sums_B = (z_BT * counted).sum(dim=1)
    signals_B3 = None
    if signals:
        signals_B3 = router_signals(probs_NE, logits_NE, probs_NE.gather(1, experts_NK), counted)
    return RoutedTopK(scale * weights_NK, experts_NK, counts_BE, prob_sums_BE, z_sums_B, signals_B3)


@torch.no_grad()
def router_signals(
    probs_NE: torch.Tensor, logits_NE: torch.Tensor, chosen_NS: torch.Tensor, counted_BT: torch.Tensor
) -> torch.Tensor:
    """Sum up what telemetry shows of a router, without gradient.

    Args:
        probs_NE: (N, E) fp32, rows sum to 1.
        logits_NE: (N, E) fp32; -inf and NaN enter no norm.
        chosen_NS: (N, S) fp32, probabilities of the chosen experts, 0 elsewhere.
        counted_BT: (B, T) fp32, 1 for tokens that enter the sums, else 0.

    Returns:
        (B, 3): entropy of the probabilities in nats, Euclidean norm of the logits, probability of the chosen experts.
    """
    norm_N = logits_NE.nan_to_num(nan=0.0, posinf=torch.inf, neginf=0.0).norm(dim=-1)
    signals_N3 = torch.stack([torch.special.entr(probs_NE).sum(dim=-1), norm_N, chosen_NS.sum(dim=-1)], dim=-1)
    return (signals_N3.view(*counted_BT.shape, 3) * counted_BT.unsqueeze(-1)).sum(dim=1)
