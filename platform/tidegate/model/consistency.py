"""Two passes of a model that should agree: how far they do not, and their statistics as of one.

Source: THOR, arXiv 2110.04260, Eq. 4.

Letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch

from tidegate.model.moe import RoutingStats

__all__ = ["symmetric_divergence", "with_consistency"]


def symmetric_divergence(one_BTV: torch.Tensor, other_BTV: torch.Tensor) -> torch.Tensor:
    """(B, T) mean of KL(p || q) and KL(q || p) in nats, from logits (THOR, arXiv 2110.04260, Eq. 4)."""
    log_p, log_q = one_BTV.float().log_softmax(dim=-1), other_BTV.float().log_softmax(dim=-1)
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1)


def with_consistency(one: RoutingStats | None, other: RoutingStats | None, consistency_B: torch.Tensor) -> RoutingStats:
    """Statistics of two passes as of one, with the consistency loss spread over the layers' penalties."""
    assert one is not None
    assert other is not None
    layers = one.penalty_sums_B.shape[0]
    counts = (one.counts_BE + other.counts_BE) / 2
    return one._replace(counts_BE=counts, penalty_sums_B=one.penalty_sums_B + consistency_B / layers)
