"""Expert-side selection: expert-threshold routing, which is causal, and expert choice, which is not.

Both let each expert take the K/E of all tokens that score highest for it, so loads are balanced without a loss and a
token gets as many experts as it is worth. Expert choice ranks the tokens of a sequence, later ones included: a language
model can read the future off its own routing. Expert threshold replaces the rank by a threshold, a moving average of
the (1 - K/E) quantile of the global batch, so that a token's experts depend on itself alone, in training and inference.
Sources: Zhou et al. 2022 (arXiv 2202.09368), Sun et al. 2026 (arXiv 2603.11535).

Letters: N rows, B sequences, T tokens, E experts, K mean experts a row, H histogram bins, C capacity.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

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
from tidegate.model.routers.quantile import histogram, quantile

__all__ = ["ExpertChoice", "ExpertChoiceConfig", "ExpertThreshold", "ExpertThresholdConfig"]

_TINY = 1e-20


class ExpertThresholdConfig(Variant):
    kind: Literal["expert_threshold"] = "expert_threshold"
    summary: ClassVar[str] = "experts whose score passes their own moving threshold: expert choice made causal"
    source: ClassVar[str] = "expert threshold routing, Sun et al. 2026, arXiv 2603.11535"
    capabilities: ClassVar[Capabilities] = Capabilities(ragged=True, normalized=False)

    ema: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old threshold that a step keeps; the first step replaces the guess that training begins with."""
    bins: int = Field(default=1024, ge=16)
    """Of the scores' histogram over [0, 1]."""

    def build(self, shape: RouterShape) -> ExpertThreshold:
        return ExpertThreshold(self, shape)


class ExpertThreshold(LearnedRouter):
    """Sigmoid scores; an expert takes the tokens above its threshold, weighted by their score."""

    threshold_E: torch.Tensor
    steps: torch.Tensor

    def __init__(self, config: ExpertThresholdConfig, shape: RouterShape) -> None:
        super().__init__(shape)
        self.config = config
        self.register_buffer("threshold_E", torch.empty(shape.num_experts, dtype=torch.float32))
        self.register_buffer("steps", torch.empty((), dtype=torch.int64))

    def init_weights(self, draw: Draw) -> None:
        super().init_weights(draw)
        # The first step too must use about K experts a row: logits of a normalised row deviate by std sqrt(D).
        share = self.top_k / self.num_experts
        logits = NormalDist(0, self.std * self.shape.width**0.5)
        self.threshold_E.fill_(1 / (1 + math.exp(-logits.inv_cdf(1 - share))) if share < 1 else 0.0)
        self.steps.zero_()

    def forward(self, x_ND: torch.Tensor, context: RouterContext) -> Routing:
        logits_NE = self.logits(x_ND)
        scores_NE = logits_NE.sigmoid()
        probs_NE = scores_NE / (scores_NE.sum(dim=-1, keepdim=True) + _TINY)
        routing = self._open_routing(scores_NE, scores_NE > self.threshold_E, probs_NE, logits_NE)
        if not self.training:
            return routing
        counted_N = context.counted_BT.flatten()
        return routing._replace(observed=histogram(scores_NE.detach(), counted_N, self.config.bins, low=0.0, high=1.0))

    def update(self, routed: RoutedStep) -> None:
        assert routed.observed is not None
        now_E = quantile(routed.observed, 1 - self.top_k / self.num_experts, low=0.0, high=1.0)
        keep = torch.where(self.steps > 0, self.config.ema, 0.0)
        self.threshold_E.copy_(keep * self.threshold_E + (1 - keep) * now_E)
        self.steps += 1


class ExpertChoiceConfig(Variant):
    kind: Literal["expert_choice"] = "expert_choice"
    summary: ClassVar[str] = "each expert takes its best tokens of a sequence; LEAKS FUTURE TOKENS into a causal model"
    source: ClassVar[str] = "expert choice, Zhou et al. 2022, arXiv 2202.09368"
    example: ClassVar[str] = "allow_future_leak: true"
    capabilities: ClassVar[Capabilities] = Capabilities(ragged=True, normalized=False, causal=False)

    allow_future_leak: bool = False
    """Expert choice cannot be used to generate text, and its loss is not a language model's; say that you know."""

    @model_validator(mode="after")
    def _leaks(self) -> ExpertChoiceConfig:
        if not self.allow_future_leak:
            raise ValueError(
                "kind=expert_choice lets a token's experts depend on later tokens, which leaks the labels into a "
                "causal model; use kind=expert_threshold, or set allow_future_leak=true if that is what you study"
            )
        return self

    def build(self, shape: RouterShape) -> ExpertChoice:
        return ExpertChoice(shape)


class ExpertChoice(LearnedRouter):
    """Softmax over experts; each expert takes its C = max(1, floor(T K / E)) best counted tokens of every sequence."""

    def forward(self, x_ND: torch.Tensor, context: RouterContext) -> Routing:
        length = context.tokens_BT.shape[1]
        logits_NE = self.logits(x_ND)
        probs_NE = logits_NE.softmax(dim=-1)
        capacity = max(1, length * self.top_k // self.num_experts)
        ranked_BTE = probs_NE.detach().unflatten(0, (-1, length))
        # Tokens that do not count come last, as the published code does with padding.
        ranked_BTE = ranked_BTE.masked_fill(~context.counted_BT.unsqueeze(-1), -1.0)
        taken_BCE = ranked_BTE.topk(capacity, dim=1).indices
        chosen_NE = torch.zeros_like(ranked_BTE, dtype=torch.bool).scatter(1, taken_BCE, True).flatten(0, 1)
        return self._open_routing(probs_NE, chosen_NE, probs_NE, logits_NE)
