"""Top-p routing: the fewest experts that hold a share p of the probability, p steered so that K are used on average.

A fixed p spends more and more experts as training goes on. Here a proportional-integral controller moves p once a step
by the mean number of experts of the global batch, and the logits are normalised over the experts with a learned scale,
so that one p suits all layers. Source: top-p: Huang et al. 2024 (arXiv 2403.07652); controller and normalisation:
DTop-p (arXiv 2512.13996).

Letters: N rows, E experts, K mean experts a row.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from tidegate.config import Variant
from tidegate.model.initialisation import Draw
from tidegate.model.routers.base import (
    Capabilities,
    LearnedRouter,
    RoutedStep,
    RouterContext,
    RouterShape,
    Routing,
)
from tidegate.model.routers.smooth import entropy

__all__ = ["TopPConfig", "TopPRouter"]


class TopPConfig(Variant):
    kind: Literal["top_p"] = "top_p"
    summary: ClassVar[str] = "the fewest experts that hold a share p, p steered to k experts on average"
    source: ClassVar[str] = "arXiv 2403.07652; DTop-p, arXiv 2512.13996"
    capabilities: ClassVar[Capabilities] = Capabilities(ragged=True)

    p_start: float = Field(default=0.5, gt=0, lt=1)
    proportional: float = Field(default=0.05, ge=0)
    """Change of p for a change of the relative error (K - used) / K."""
    integral: float = Field(default=0.02, ge=0)
    """Change of p a step for a relative error of 1. With both 0, p is fixed."""
    normalize_logits: bool = True
    """Centre and scale the logits of a row over the experts, times a learned scale that starts at 1."""
    entropy_weight: float = Field(default=0.0, ge=0)
    """Weight of the entropy of the probabilities, nats a token: what keeps a fixed p from spending (2403.07652)."""

    def build(self, shape: RouterShape) -> TopPRouter:
        return TopPRouter(self, shape)


class TopPRouter(LearnedRouter):
    p: torch.Tensor
    last_error: torch.Tensor

    def __init__(self, config: TopPConfig, shape: RouterShape) -> None:
        super().__init__(shape)
        self.config = config
        self.logit_scale = nn.Parameter(torch.empty(1)) if config.normalize_logits else None
        self.register_buffer("p", torch.empty((), dtype=torch.float32))
        self.register_buffer("last_error", torch.empty((), dtype=torch.float32))

    def init_weights(self, draw: Draw) -> None:
        super().init_weights(draw)
        if self.logit_scale is not None:
            nn.init.ones_(self.logit_scale)
        self.p.fill_(self.config.p_start)
        self.last_error.zero_()

    def forward(self, x_ND: torch.Tensor, context: RouterContext) -> Routing:
        logits_NE = self.logits(x_ND)
        if self.logit_scale is not None:
            centred_NE = logits_NE - logits_NE.mean(dim=-1, keepdim=True)
            deviation_N1 = (centred_NE.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
            logits_NE = self.logit_scale.float() * centred_NE / deviation_N1
        probs_NE = logits_NE.softmax(dim=-1)
        sorted_NE, order_NE = probs_NE.detach().sort(dim=-1, descending=True)
        before_NE = sorted_NE.cumsum(dim=-1) - sorted_NE
        # An expert is in while those before it do not hold p yet; the first is always in.
        chosen_NE = torch.zeros_like(before_NE, dtype=torch.bool).scatter(1, order_NE, before_NE < self.p)
        kept_NE = probs_NE * chosen_NE
        routing = self._open_routing(kept_NE / kept_NE.sum(dim=-1, keepdim=True), chosen_NE, probs_NE, logits_NE)
        if self.config.entropy_weight == 0:
            return routing
        return routing._replace(penalty_N=self.config.entropy_weight * entropy(probs_NE))

    def update(self, routed: RoutedStep) -> None:
        used = routed.counts_E.sum() / routed.tokens.clamp(min=1)
        error = (self.top_k - used) / self.top_k
        # The controller's velocity form: nothing winds up while p is at an end of its range.
        self.p += self.config.proportional * (error - self.last_error) + self.config.integral * error
        self.p.clamp_(1e-3, 1 - 1e-4)
        self.last_error.copy_(error)
