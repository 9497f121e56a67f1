"""Gates from features whose batch means are driven to 0 or 1: one static sub-network from one training.

A light module makes a gate for every token and unit, binarised straight-through; the loss adds
`strength gbar (1 - gbar)` with gbar a unit's mean gate over the batch (consensus sub-network, arXiv 2302.10798). Where
that has come to 0 or 1 the token has no say any more, and the unit is dropped or kept for good.

The features are a token's own embedding, which gives the gates of all layers at once. The paper pools over positions,
as an image allows; pooled over a sequence, a causal language model would see its future. The gates read the embedding
and do not train it.

gbar is that of the global batch: the penalty of a micro-batch is the sum of its own mean gates, each times the
derivative of the whole at the running gbar, so its gradient does not depend on how the batch was cut.

Letters: U units, B sequences, T tokens, D width, r rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from tidegate.model.clock import Clock
from tidegate.model.initialisation import Draw
from tidegate.model.unit_gates.base import DAMPING, AllReduce, BudgetedConfig, BudgetedGates
from tidegate.model.unit_gates.straight_through import straight_through
from tidegate.model.unit_gates.units import Units

if TYPE_CHECKING:
    from tidegate.model.decoder import Decoder

__all__ = ["Polarization", "PolarizationConfig"]

_DECAY = 0.9  # of the running gbar
_TIE = 1e-3  # among units of equal gbar the logit decides


class PolarizationConfig(BudgetedConfig):
    kind: Literal["polarization"] = "polarization"
    summary: ClassVar[str] = "gates from a token's features whose means are driven to 0 or 1"
    source: ClassVar[str] = "consensus sub-network, arXiv 2302.10798"
    strength: float = Field(default=1.0, gt=0)
    """Of `gbar (1 - gbar)`, averaged over units by cost."""
    rank: int = Field(default=4, ge=1)
    """r: features of a token that the gates see."""
    initial: float = 1.0

    def build(self, units: Units, keep: float, freeze_tokens: int | None, width: int) -> Polarization:
        return Polarization(self, units, keep, freeze_tokens, width)


class Polarization(BudgetedGates):
    config: PolarizationConfig
    mean_gate_U: torch.Tensor

    def __init__(
        self, config: PolarizationConfig, units: Units, keep: float, freeze_tokens: int | None, width: int
    ) -> None:
        super().__init__(config, units, keep, freeze_tokens, width)
        self.projection = nn.Parameter(torch.empty(config.rank * width))  # flat, as all gate parameters: not decayed
        self.loading = nn.Parameter(torch.empty(units.num * config.rank))
        self.register_buffer("mean_gate_U", torch.empty(units.num, dtype=torch.float32))
        self._seen: list[torch.Tensor] = []

    def init_weights(self, draw: Draw) -> None:
        super().init_weights(draw)
        draw.normal_(self.projection, self.width**-0.5, "projection")
        draw.normal_(self.loading, self.config.rank**-0.5, "loading")
        nn.init.ones_(self.mean_gate_U)

    def scores(self) -> torch.Tensor:
        return self.mean_gate_U + _TIE * self.logits_U.sigmoid()

    def probabilities(self, clock: Clock) -> torch.Tensor:
        return self.mean_gate_U

    def sample(self, h_BTD: torch.Tensor, clock: Clock) -> tuple[torch.Tensor, torch.Tensor]:
        x_BTD = F.rms_norm(h_BTD.detach().float(), (self.width,))
        features_BTr = x_BTD @ self.projection.float().view(self.width, -1)
        logits_BTU = features_BTr @ self.loading.float().view(-1, self.units.num) + self.logits_U
        gates_BTU = straight_through((logits_BTU > 0).float(), logits_BTU, "sigmoid")
        gbar_U = gates_BTU.mean(dim=(0, 1))
        if torch.is_grad_enabled():  # a counting pass is not part of the batch
            self._seen.append(gbar_U.detach())
        share_U = self.units.costs(gbar_U.device) / self.units.total_cost
        slope_U = self.config.strength * (1 - 2 * self.mean_gate_U)
        slope_U = slope_U + self.multiplier + DAMPING * self.excess(self.mean_gate_U)
        return self.units.with_needed_experts(gates_BTU, logits_BTU), (share_U * slope_U * gbar_U).sum()

    def learn(self, model: Decoder, clock: Clock, loss: torch.Tensor, all_reduce: AllReduce) -> None:
        total = torch.stack([*self._seen, torch.zeros_like(self.mean_gate_U)]).sum(dim=0)
        total = torch.cat([total, total.new_full((1,), len(self._seen))])  # one collective
        self._seen.clear()
        all_reduce(total)
        self.mean_gate_U.lerp_(total[:-1] / total[-1].clamp(min=1), 1 - _DECAY)
        super().learn(model, clock, loss, all_reduce)
