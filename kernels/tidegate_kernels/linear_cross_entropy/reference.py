"""The truth of `linear_cross_entropy`, in plain PyTorch, fp32 inside.

Letters: N rows, D width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

__all__ = ["LinearCrossEntropy", "linear_cross_entropy"]


class LinearCrossEntropy(NamedTuple):
    loss: torch.Tensor
    """() fp32; carries gradient."""
    nll_N: torch.Tensor
    """(N,) fp32, negative log-likelihood of each label in nats, without its weight; no gradient."""


def linear_cross_entropy(
    x_ND: torch.Tensor,
    w_VD: torch.Tensor,
    labels_N: torch.Tensor,
    weights_N: torch.Tensor,
    *,
    z_loss: float,
    soft_cap: float | None,
    ignore_index: int,
) -> LinearCrossEntropy:
    """Score labels by a linear head: `sum over n of weights[n] * (nll[n] + z_loss * logsumexp[n]^2)`.

    Args:
        x_ND: (N, D) hidden states, any float dtype; the logits `x w^T` have it too.
        w_VD: (V, D) head, same dtype.
        labels_N: (N,) int64 in [0, V), or `ignore_index`.
        weights_N: (N,) fp32, no gradient.
        z_loss: coefficient of the squared log-partition; 0 is none.
        soft_cap: logits become `cap * tanh(logits / cap)`; None leaves them.
        ignore_index: a label that counts for nothing: nll 0, no gradient.

    Source: z-loss: PaLM (arXiv 2204.02311), section 5; soft cap: Gemma 2 (arXiv 2408.00118), section 2.
    """
    logits_NV = F.linear(x_ND, w_VD)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if soft_cap is not None:
        logits_NV = soft_cap * torch.tanh(logits_NV / soft_cap)
    nll_N = F.cross_entropy(logits_NV, labels_N, reduction="none", ignore_index=ignore_index)
    terms_N = nll_N
    if z_loss != 0:
        z_N = logits_NV.logsumexp(dim=-1).square()
        terms_N = nll_N + z_loss * z_N.masked_fill(labels_N == ignore_index, 0.0)
    return LinearCrossEntropy((terms_N * weights_N.detach()).sum(), nll_N.detach())
