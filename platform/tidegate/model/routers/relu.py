"""ReLU routing: an expert is used where its logit is positive, and an adaptive L1 holds the mean number at K.

The weights are R = relu(W x): no top-k, continuous everywhere. The L1 has the form of the balance loss with R in place
of the probabilities, `lambda E sum_i f_i mean(R_i)`, so that overused experts pay more; lambda is multiplied by
`multiplier` after a step that used more than K experts a token, divided after one that used fewer. Both f and the
number used are the global batch's, at any world size. Source: ReMoE, Wang et al., ICLR 2025 (arXiv 2412.14711).

Letters: N rows, E experts, K mean experts a row.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

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

__all__ = ["ReluConfig", "ReluRouter"]


class ReluConfig(Variant):
    kind: Literal["relu"] = "relu"
    summary: ClassVar[str] = "experts whose logit is positive; an adaptive L1 holds their mean number at k"
    source: ClassVar[str] = "ReMoE, Wang et al., ICLR 2025, arXiv 2412.14711"
    capabilities: ClassVar[Capabilities] = Capabilities(
        ragged=True, normalized=False, dense_phase=True, z_loss=False, own_balance_weight=True
    )

    l1_start: float = Field(default=1e-8, gt=0)
    """lambda of the first step; it grows by `multiplier` a step until the budget is met."""
    multiplier: float = Field(default=1.2, gt=1)

    def build(self, shape: RouterShape) -> ReluRouter:
        return ReluRouter(self, shape)


class ReluRouter(LearnedRouter):
    l1: torch.Tensor

    def __init__(self, config: ReluConfig, shape: RouterShape) -> None:
        super().__init__(shape)
        self.config = config
        self.register_buffer("l1", torch.empty((), dtype=torch.float32))

    def init_weights(self, draw: Draw) -> None:
        super().init_weights(draw)
        self.l1.fill_(self.config.l1_start)

    def forward(self, x_ND: torch.Tensor, context: RouterContext) -> Routing:
        logits_NE = self.logits(x_ND)
        gate_NE = logits_NE.relu()
        routing = self._open_routing(gate_NE, gate_NE > 0, gate_NE, logits_NE)
        return routing._replace(balance_weight=self.l1.clone())  # the step's value, whenever it is read

    def update(self, routed: RoutedStep) -> None:
        active = routed.counts_E.sum() / routed.tokens.clamp(min=1)
        self.l1.mul_(self.config.multiplier ** torch.sign(active - self.top_k))
