"""Softmax over all experts, then the k largest (Shazeer et al. 2017; Qwen3 renormalises the chosen ones)."""

from __future__ import annotations

from typing import Literal

import torch

from tidegate.config import Config
from tidegate.model.routers.base import Router, Routing

__all__ = ["SoftmaxTopK", "SoftmaxTopKConfig"]


class SoftmaxTopKConfig(Config):
    kind: Literal["softmax_top_k"] = "softmax_top_k"
    renormalize: bool = True
    """Divide the chosen probabilities by their sum, so that the weights of a token sum to 1."""

    def build(self, width: int, num_experts: int, top_k: int, std: float) -> SoftmaxTopK:
        return SoftmaxTopK(self, width, num_experts, top_k, std)


class SoftmaxTopK(Router):
    def __init__(self, config: SoftmaxTopKConfig, width: int, num_experts: int, top_k: int, std: float) -> None:
        super().__init__(width, num_experts, top_k, std)
        self.renormalize = config.renormalize

    def forward(self, x_ND: torch.Tensor) -> Routing:
        logits_NE = self.logits(x_ND)
        probs_NE = logits_NE.softmax(dim=-1)
        experts_NK, weights_NK = self.select(probs_NE)
        if self.renormalize:
            weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True)
        return Routing(experts_NK, weights_NK, probs_NE, logits_NE)
