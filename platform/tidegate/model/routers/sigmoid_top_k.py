"""Independent sigmoid scores, the k largest, normalised to sum to one (DeepSeek-V3, arXiv 2412.19437, Eq. 12-16)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from tidegate.config import Config
from tidegate.model.routers.base import Router, Routing

__all__ = ["SigmoidTopK", "SigmoidTopKConfig"]

_TINY = 1e-20  # keeps a row of scores that all underflow from dividing by zero


class SigmoidTopKConfig(Config):
    kind: Literal["sigmoid_top_k"] = "sigmoid_top_k"
    scale: float = Field(default=1.0, gt=0)
    """Factor of the normalised weights (routed scaling; 2.5 in DeepSeek-V3)."""

    def build(self, width: int, num_experts: int, top_k: int, std: float) -> SigmoidTopK:
        return SigmoidTopK(self, width, num_experts, top_k, std)


class SigmoidTopK(Router):
    def __init__(self, config: SigmoidTopKConfig, width: int, num_experts: int, top_k: int, std: float) -> None:
        super().__init__(width, num_experts, top_k, std)
        self.scale = config.scale

    def forward(self, x_ND: torch.Tensor) -> Routing:
        logits_NE = self.logits(x_ND)
        scores_NE = logits_NE.sigmoid()
        experts_NK, weights_NK = self.select(scores_NE)
        weights_NK = self.scale * weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + _TINY)
        # The balance loss wants a distribution; without this division it hardly balances a sigmoid router.
        probs_NE = scores_NE / (scores_NE.sum(dim=-1, keepdim=True) + _TINY)
        return Routing(experts_NK, weights_NK, probs_NE, logits_NE)
