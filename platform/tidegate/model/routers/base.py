"""What every router returns, and what every router is built from.

Letters: N rows (tokens of all sequences), D width, E experts, K chosen experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tidegate.model.initialisation import Draw

__all__ = ["Router", "Routing"]


class Routing(NamedTuple):
    """One layer's decision for N rows, all maths in fp32."""

    experts_NK: torch.Tensor
    """(N, K) int64, distinct experts of each row."""
    weights_NK: torch.Tensor
    """(N, K) fp32, the factor of each expert's output; carries gradient."""
    probs_NE: torch.Tensor
    """(N, E) fp32, rows sum to 1: the P of the balance loss; carries gradient."""
    logits_NE: torch.Tensor
    """(N, E) fp32, before the score function: what the z-loss sees; carries gradient."""


class Router(nn.Module):
    """Holds the routing matrix and the selection bias; a subclass turns logits into a `Routing`.

    `expert_bias` is added to the scores for *selection only* (Wang et al. 2024, arXiv 2408.15664); it stays zero
    unless bias balancing is on. It is a buffer: checkpointed, identical on every rank, not trained.
    """

    expert_bias: torch.Tensor

    def __init__(self, width: int, num_experts: int, top_k: int, std: float) -> None:
        super().__init__()
        self.top_k = top_k
        self.std = std
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.register_buffer("expert_bias", torch.empty(num_experts, dtype=torch.float32))

    def init_weights(self, draw: Draw) -> None:
        draw.normal_(self.weight, self.std, "weight")
        nn.init.zeros_(self.expert_bias)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # Casting the model to bf16 must not cast the bias, not even there and back: steps of 1e-3 vanish beside a bf16
        # value near 1.
        uncast = self.expert_bias
        module = super()._apply(fn, recurse)
        if self.expert_bias.dtype != uncast.dtype:
            self.expert_bias = uncast.to(self.expert_bias.device)
        return module

    def logits(self, x_ND: torch.Tensor) -> torch.Tensor:
        """(N, E) fp32. bf16 logits swap near-equal experts from one run to the next."""
        return F.linear(x_ND.float(), self.weight.float())

    def select(self, scores_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Top-k by biased scores; returns (experts, their unbiased scores), each (N, K)."""
        experts_NK = (scores_NE.detach() + self.expert_bias).topk(self.top_k, dim=-1).indices
        return experts_NK, scores_NE.gather(1, experts_NK)

    def forward(self, x_ND: torch.Tensor) -> Routing:
        raise TypeError(f"{type(self).__name__} does not say how to route")  # pragma: no cover
