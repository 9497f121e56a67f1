"""Quantiles of the global batch from histograms, which add over micro-batches and ranks.

Letters: N rows, E experts, H bins.
"""

from __future__ import annotations

import torch

__all__ = ["histogram", "quantile"]


def histogram(values_NE: torch.Tensor, counted_N: torch.Tensor, bins: int, *, low: float, high: float) -> torch.Tensor:
    """How often each column falls into each of equal bins; values outside go to the first and last.

    Returns:
        (E, H) fp32 counts over the rows where `counted_N`.
    """
    width = (high - low) / bins
    bin_NE = ((values_NE - low) / width).long().clamp(0, bins - 1)
    num_experts = values_NE.shape[1]
    counts_EH = values_NE.new_zeros(num_experts, bins, dtype=torch.float32)
    weights_EN = counted_N.float().expand(num_experts, -1)
    return counts_EH.scatter_add_(1, bin_NE.T, weights_EN)


def quantile(counts_EH: torch.Tensor, q: float, *, low: float, high: float) -> torch.Tensor:
    """(E,) value below which a share q of each row's counts lies, linear inside a bin."""
    width = (high - low) / counts_EH.shape[1]
    cumulative_EH = counts_EH.double().cumsum(dim=1)
    wanted_E1 = q * cumulative_EH[:, -1:]
    bin_E1 = (cumulative_EH < wanted_E1).sum(dim=1, keepdim=True).clamp(max=counts_EH.shape[1] - 1)
    inside_E1 = counts_EH.double().gather(1, bin_E1)
    before_E1 = cumulative_EH.gather(1, bin_E1) - inside_E1
    part_E1 = ((wanted_E1 - before_E1) / inside_E1.clamp(min=1)).clamp(0, 1)
    return (low + width * (bin_E1 + part_E1)).squeeze(1).float()
