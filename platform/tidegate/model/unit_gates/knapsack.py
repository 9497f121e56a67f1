"""Gates that meet the budget in every pass, by a fractional knapsack (pFedGate: Chen et al. 2023, arXiv 2305.02776).

A unit's value is sigmoid(logit), its weight its cost. The pass takes the optimum of the linear program
`max sum v x, sum c x = keep sum c, 0 <= x <= 1`: bundles by value over weight until the budget is spent, the last one
in part. Straight-through: the gradient goes to the values as if they were the mask.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from tidegate.model.clock import Clock
from tidegate.model.unit_gates.base import LogitConfig, LogitGates
from tidegate.model.unit_gates.units import Units

__all__ = ["Knapsack", "KnapsackConfig", "fractional_knapsack"]


def fractional_knapsack(density_Q: torch.Tensor, costs_Q: torch.Tensor, budget: float) -> torch.Tensor:
    """(Q,) shares in [0, 1] of the items, the best value for a cost of exactly `budget` (at most that of all items).

    Args:
        density_Q: (Q,) value over cost.
        costs_Q: (Q,) positive.
        budget: up to the sum of the costs.
    """
    order = density_Q.argsort(descending=True, stable=True)
    ordered = costs_Q[order]
    before = ordered.cumsum(0) - ordered
    return torch.zeros_like(ordered).scatter_(0, order, ((budget - before) / ordered).clamp(0, 1))


class KnapsackConfig(LogitConfig):
    kind: Literal["knapsack"] = "knapsack"
    summary: ClassVar[str] = "the best mask of exactly the budget in every step, by a fractional knapsack"
    source: ClassVar[str] = "pFedGate, arXiv 2305.02776"
    initial: float = 0.0

    def build(self, units: Units, keep: float, freeze_tokens: int | None, width: int) -> Knapsack:
        return Knapsack(self, units, keep, freeze_tokens, width)


class Knapsack(LogitGates):
    def scores(self) -> torch.Tensor:
        costs_U = self.units.costs(self.parameter.device)
        return self.logits_U.sigmoid() * costs_U.mean() / costs_U

    def probabilities(self, clock: Clock) -> torch.Tensor:
        """The mask itself: it is not drawn."""
        bundles = self.units.bundles(self.scores())
        # What must stay comes first; scores lie in (0, max cost ratio].
        density_Q = bundles.scores_Q + bundles.mandatory_Q * (1 + bundles.scores_Q.max())
        share_Q = fractional_knapsack(density_Q, bundles.costs_Q, self.keep * self.units.total_cost)
        return share_Q[bundles.bundle_of_unit_U].float()

    def sample(self, h_BTD: torch.Tensor, clock: Clock) -> tuple[torch.Tensor, torch.Tensor]:
        values_U = self.logits_U.sigmoid()
        return self.probabilities(clock) + (values_U - values_U.detach()), values_U.new_zeros(())
