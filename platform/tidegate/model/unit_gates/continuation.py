"""Gates that harden by continuation: a sigmoid whose temperature grows until it is a step (OptFS: Lyu et al. 2023).

`mask = sigmoid(tau m) / sigmoid(tau m0)` with `tau = final^(tokens / freeze_tokens)`: 1 at the start, where m = m0, and
0 or 1 at the end. OptFS divides by sigmoid(m0), so its soft and its hard masks both keep units at 1 / sigmoid(m0),
1.6 for its m0 = 0.5, and a network without gates cannot be cut out; dividing at the same temperature repairs that.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from tidegate.model.clock import Clock
from tidegate.model.unit_gates.base import BudgetedConfig, BudgetedGates
from tidegate.model.unit_gates.units import Units

__all__ = ["Continuation", "ContinuationConfig"]


class ContinuationConfig(BudgetedConfig):
    kind: Literal["continuation"] = "continuation"
    summary: ClassVar[str] = "sigmoid gates sharpened to 0 and 1 as training goes on"
    source: ClassVar[str] = "OptFS, Lyu et al. 2023, arXiv 2301.10909"
    initial: float = Field(default=0.5, gt=0)
    """m0."""
    final_temperature: float = Field(default=1000.0, gt=1)

    def build(self, units: Units, keep: float, freeze_tokens: int | None, width: int) -> Continuation:
        return Continuation(self, units, keep, freeze_tokens, width)


class Continuation(BudgetedGates):
    config: ContinuationConfig

    def temperature(self, clock: Clock) -> float:
        """tau, which multiplies: 1 at the start."""
        assert self.freeze_tokens is not None
        return self.config.final_temperature ** min(1.0, clock.tokens / self.freeze_tokens)

    def probabilities(self, clock: Clock) -> torch.Tensor:
        return torch.sigmoid(self.temperature(clock) * self.logits_U)

    def sample(self, h_BTD: torch.Tensor, clock: Clock) -> tuple[torch.Tensor, torch.Tensor]:
        soft_U = self.probabilities(clock)
        start = torch.sigmoid(soft_U.new_tensor(self.temperature(clock) * self.config.initial))
        mask_U = self.units.with_needed_experts(soft_U / start, self.logits_U)
        return mask_U, self.budget_penalty(soft_U)
