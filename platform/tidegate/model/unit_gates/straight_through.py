"""Bernoulli gates trained by the straight-through estimator (Bengio, Leonard & Courville 2013, arXiv 1308.3432).

`h ~ Bernoulli(sigmoid(a))`, one draw a unit and step. The estimator is biased: exact where the loss is linear in h,
and of the wrong sign where its curvature outweighs its slope.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from tidegate.model.clock import Clock
from tidegate.model.unit_gates.base import BudgetedConfig, BudgetedGates
from tidegate.model.unit_gates.units import Units

__all__ = ["StraightThrough", "StraightThroughConfig", "straight_through"]


def straight_through(h: torch.Tensor, logits: torch.Tensor, estimator: Literal["plain", "sigmoid"]) -> torch.Tensor:
    """`h` forward; backward `dL/da = dL/dh` (plain), or that times sigmoid'(a)."""
    path = logits if estimator == "plain" else logits.sigmoid()
    return h.detach() + (path - path.detach())


class StraightThroughConfig(BudgetedConfig):
    kind: Literal["straight_through"] = "straight_through"
    summary: ClassVar[str] = "Bernoulli gates with the gradient passed straight through"
    source: ClassVar[str] = "Bengio, Leonard & Courville 2013, arXiv 1308.3432"
    estimator: Literal["plain", "sigmoid"] = "sigmoid"
    """`plain` passes the gradient of the gate on to its logit; `sigmoid` multiplies it by the slope sigmoid'(a)."""

    def build(self, units: Units, keep: float, freeze_tokens: int | None, width: int) -> StraightThrough:
        return StraightThrough(self, units, keep, freeze_tokens, width)


class StraightThrough(BudgetedGates):
    config: StraightThroughConfig

    def probabilities(self, clock: Clock) -> torch.Tensor:
        return self.logits_U.sigmoid()

    def sample(self, h_BTD: torch.Tensor, clock: Clock) -> tuple[torch.Tensor, torch.Tensor]:
        logits_U = self.logits_U
        probabilities_U = logits_U.sigmoid()
        drawn_U = (self.noise(clock) < probabilities_U).float()
        mask_U = straight_through(drawn_U, logits_U, self.config.estimator)
        return self.units.with_needed_experts(mask_U, logits_U), self.budget_penalty(probabilities_U)
