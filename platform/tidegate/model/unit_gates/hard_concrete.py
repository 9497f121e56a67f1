"""Hard-concrete gates (Louizos, Welling & Kingma 2018, arXiv 1712.01312), with a budget instead of a fixed weight.

`s = sigmoid((log u - log(1 - u) + log alpha) / beta) (zeta - gamma) + gamma`, `z = clip(s, 0, 1)`;
`P(z != 0) = sigmoid(log alpha - beta log(-gamma / zeta))` (Eq. 10-12). The paper's penalty is a fixed weight times the
sum of those; here a multiplier drives their expected cost to `keep`.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch

from tidegate.model.clock import Clock
from tidegate.model.unit_gates.base import BudgetedConfig, BudgetedGates
from tidegate.model.unit_gates.units import Units

__all__ = ["HardConcrete", "HardConcreteConfig", "hard_concrete", "probability_not_zero"]

_GAMMA, _ZETA, _BETA = -0.1, 1.1, 2 / 3
_LIMIT = math.log(100)  # of |log alpha|, where the authors' code clamps the parameter


def hard_concrete(log_alpha: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Gates in [0, 1], exactly 0 or 1 with positive probability, from uniform numbers in (0, 1)."""
    s = torch.sigmoid((u.log() - torch.log1p(-u) + log_alpha) / _BETA)
    return (s * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)


def probability_not_zero(log_alpha: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(log_alpha - _BETA * math.log(-_GAMMA / _ZETA))


class HardConcreteConfig(BudgetedConfig):
    kind: Literal["hard_concrete"] = "hard_concrete"
    summary: ClassVar[str] = "L0 by stretched concrete gates, the budget by a multiplier"
    source: ClassVar[str] = "Louizos et al. 2018, arXiv 1712.01312"

    def build(self, units: Units, keep: float, freeze_tokens: int | None, width: int) -> HardConcrete:
        return HardConcrete(self, units, keep, freeze_tokens, width)


class HardConcrete(BudgetedGates):
    @property
    def log_alpha_U(self) -> torch.Tensor:
        """Within the limit by a tanh: behind a clamp a gate that went over it would get no gradient again."""
        return _LIMIT * torch.tanh(self.logits_U / _LIMIT)

    def probabilities(self, clock: Clock) -> torch.Tensor:
        return probability_not_zero(self.log_alpha_U)

    def sample(self, h_BTD: torch.Tensor, clock: Clock) -> tuple[torch.Tensor, torch.Tensor]:
        log_alpha_U = self.log_alpha_U
        mask_U = hard_concrete(log_alpha_U, self.noise(clock))
        return self.units.with_needed_experts(mask_U, log_alpha_U), self.budget_penalty(self.probabilities(clock))
