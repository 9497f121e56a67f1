"""Bernoulli gates trained by REINFORCE with the baseline of least variance (Bengio, Leonard & Courville 2013).

`h ~ Bernoulli(p)`, `p = sigmoid(a)`, one draw a unit and step, and the step's loss L over the global batch:
`g = (h - p) (L - Lbar)` is an unbiased estimate of dE[L]/da for any Lbar that does not depend on h, and
`Lbar = E[(h - p)^2 L] / E[(h - p)^2]` (a unit's own) has the least variance (arXiv 1308.3432, section 4). Both
expectations are running means over earlier steps. No gradient goes through the mask: the logits are a buffer.

Letters: U units.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from tidegate.config import Variant
from tidegate.model.clock import Clock
from tidegate.model.initialisation import Draw
from tidegate.model.unit_gates.base import DAMPING, NOISE, WINDUP, AllReduce, UnitGates
from tidegate.model.unit_gates.units import Units

if TYPE_CHECKING:
    from tidegate.model.decoder import Decoder

__all__ = ["Reinforce", "ReinforceConfig", "least_variance_baseline", "score_function_gradient"]

_DECAY = 0.95  # of the running means
_LIMIT = 5.0  # of |a|: a gate that is drawn once in 150 steps can still be learned about
_TINY = 1e-12


def score_function_gradient(
    h: torch.Tensor, p: torch.Tensor, loss: torch.Tensor, baseline: torch.Tensor
) -> torch.Tensor:
    """`(h - p) (L - Lbar)`."""
    return (h - p) * (loss - baseline)


def least_variance_baseline(weighted_loss: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`E[(h - p)^2 L] / E[(h - p)^2]`."""
    return weighted_loss / weight.clamp(min=_TINY)


class ReinforceConfig(Variant):
    kind: Literal["reinforce"] = "reinforce"
    summary: ClassVar[str] = "Bernoulli gates by score function with the minimal-variance baseline"
    source: ClassVar[str] = "Bengio, Leonard & Courville 2013, arXiv 1308.3432"
    rate: float = Field(default=0.05, gt=0)
    """Step of the logits, after the estimate is divided by its running root mean square over units."""
    initial: float = 2.0
    """Logit of every gate at the start."""
    multiplier_rate: float = Field(default=0.1, gt=0)
    """The multiplier grows by this times (expected share - keep) a step, which counts as 0.1 at most, either way."""

    def build(self, units: Units, keep: float, freeze_tokens: int | None, width: int) -> Reinforce:
        return Reinforce(self, units, keep, freeze_tokens, width)


class Reinforce(UnitGates):
    logits_U: torch.Tensor
    weighted_loss_U: torch.Tensor
    weight_U: torch.Tensor
    square: torch.Tensor
    multiplier: torch.Tensor

    def __init__(
        self, config: ReinforceConfig, units: Units, keep: float, freeze_tokens: int | None, width: int
    ) -> None:
        super().__init__(units, keep, freeze_tokens, width)
        self.config = config
        for name in ("logits_U", "weighted_loss_U", "weight_U"):
            self.register_buffer(name, torch.empty(units.num, dtype=torch.float32))
        for name in ("square", "multiplier"):
            self.register_buffer(name, torch.empty((), dtype=torch.float32))

    def init_weights(self, draw: Draw) -> None:
        super().init_weights(draw)
        draw.normal_(self.logits_U, NOISE, "logits_U")
        self.logits_U += self.config.initial
        for buffer in (self.weighted_loss_U, self.weight_U, self.square, self.multiplier):
            nn.init.zeros_(buffer)

    def scores(self) -> torch.Tensor:
        return self.logits_U

    def probabilities(self, clock: Clock) -> torch.Tensor:
        return self.logits_U.sigmoid()

    def draw(self, clock: Clock) -> torch.Tensor:
        """(U,) 0/1 of the clock's step."""
        return (self.noise(clock) < self.logits_U.sigmoid()).float()

    def sample(self, h_BTD: torch.Tensor, clock: Clock) -> tuple[torch.Tensor, torch.Tensor]:
        mask_U = self.units.with_needed_experts(self.draw(clock), self.logits_U)
        return mask_U, mask_U.new_zeros(())

    def learn(self, model: Decoder, clock: Clock, loss: torch.Tensor, all_reduce: AllReduce) -> None:
        loss = loss.clone()
        all_reduce(loss)
        drawn_U, p_U = self.draw(clock), self.logits_U.sigmoid()
        started = self.weight_U.any()
        baseline_U = torch.where(started, least_variance_baseline(self.weighted_loss_U, self.weight_U), loss)
        gradient_U = score_function_gradient(drawn_U, p_U, loss, baseline_U)
        squared_U = (drawn_U - p_U).square()
        self.weighted_loss_U.lerp_(squared_U * loss, 1 - _DECAY)
        self.weight_U.lerp_(squared_U, 1 - _DECAY)
        self.square.lerp_(gradient_U.square().mean(), 1 - _DECAY)
        # The budget's gradient is exact: no need to estimate it. Costs in units of the mean cost.
        costs_U = self.units.costs(p_U.device)
        excess = self.excess(p_U)
        budget_U = (self.multiplier + DAMPING * excess) * costs_U / costs_U.mean() * p_U * (1 - p_U)
        step_U = gradient_U * (self.square + _TINY).rsqrt() + budget_U
        self.logits_U.sub_(self.config.rate * step_U).clamp_(-_LIMIT, _LIMIT)
        self.multiplier += self.config.multiplier_rate * excess.clamp(-WINDUP, WINDUP)
