"""Dynamic sparse training: every so often drop the weakest kept units and grow as many others, at constant cost.

SET (Mocanu et al. 2018) grows at random, RigL (Evci et al. 2020, arXiv 1911.11134) where the gradient is largest; the
share that is dropped falls along a half cosine to 0. Units are dropped and grown inside a row of a group, so every
count, and with it the cost, stays what it was. A unit's strength is the root mean square of the weights that it writes
to the residual stream with; its gradient is that of its factor in the mask, summed over the step's global batch.
A grown unit starts from the weights that it was dropped with (RigL starts from 0: with a mask over whole units both
matrices of a channel would then get no gradient).

Letters: U units, R rows, n units of a row.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from tidegate.config import Variant
from tidegate.model.clock import Clock, derive_key
from tidegate.model.initialisation import Draw
from tidegate.model.unit_gates.base import AllReduce, UnitGates
from tidegate.model.unit_gates.random_mask import random_scores
from tidegate.model.unit_gates.units import Units

if TYPE_CHECKING:
    from tidegate.model.decoder import Decoder

__all__ = ["DynamicSparse", "DynamicSparseConfig"]


class DynamicSparseConfig(Variant):
    kind: Literal["dynamic_sparse"] = "dynamic_sparse"
    summary: ClassVar[str] = "baseline: drop the weakest units and grow others at a constant budget"
    source: ClassVar[str] = "SET / RigL, arXiv 1911.11134; DSL"
    growth: Literal["random", "gradient"] = "gradient"
    every: int = Field(default=100, ge=1)
    """Steps between two changes of the mask."""
    drop: float = Field(default=0.3, gt=0, le=1)
    """Share of the kept units of a row that the first change drops, rounded up; it falls to 0 at `freeze_tokens`."""
    densities: Literal["uniform", "erk"] = "uniform"
    """Of the first mask, which is random; the number of units of each row stays."""
    seed: int = Field(default=0, ge=0)

    def build(self, units: Units, keep: float, freeze_tokens: int | None, width: int) -> DynamicSparse:
        return DynamicSparse(self, units, keep, freeze_tokens, width)


class DynamicSparse(UnitGates):
    mask_U: torch.Tensor

    def __init__(
        self, config: DynamicSparseConfig, units: Units, keep: float, freeze_tokens: int | None, width: int
    ) -> None:
        super().__init__(units, keep, freeze_tokens, width)
        self.config = config
        self.register_buffer("mask_U", torch.empty(units.num, dtype=torch.float32))
        self._gradients: list[torch.Tensor] = []

    def init_weights(self, draw: Draw) -> None:
        super().init_weights(draw)
        key = derive_key(self.config.seed, "unit_gates", "random")
        scores_U = random_scores(self.units, self.keep, self.config.densities, key).to(self.mask_U.device)
        self.mask_U.copy_(self.units.select(scores_U, self.keep))

    def hard_mask(self) -> torch.Tensor:
        return self.mask_U.clone()

    def probabilities(self, clock: Clock) -> torch.Tensor:
        return self.mask_U

    def due(self, clock: Clock) -> bool:
        """Whether the mask changes after this step."""
        return clock.step % self.config.every == 0 and self._share(clock) > 0

    def sample(self, h_BTD: torch.Tensor, clock: Clock) -> tuple[torch.Tensor, torch.Tensor]:
        mask_U = self.mask_U.clone()
        if self.config.growth == "gradient" and self.due(clock):
            mask_U.requires_grad_().register_hook(self._gradients.append)
        return mask_U, mask_U.new_zeros(())

    def learn(self, model: Decoder, clock: Clock, loss: torch.Tensor, all_reduce: AllReduce) -> None:
        if not self.due(clock):
            return
        from tidegate.model.unit_gates.strengths import strengths  # which needs the model's classes, which need this

        strength_U = strengths(model, self.units, all_reduce)
        growth_U = self.noise(clock)
        if self.config.growth == "gradient":
            growth_U = torch.stack([*self._gradients, torch.zeros_like(growth_U)]).sum(dim=0)
            self._gradients.clear()
            all_reduce(growth_U)
            growth_U = growth_U.abs()
        masks, strong, growths = map(self.units.parts, (self.mask_U, strength_U, growth_U))
        changed = [
            _changed(mask_Rn, strength_Rn, growth_Rn, self._share(clock)).flatten()
            for mask_Rn, strength_Rn, growth_Rn in zip(masks, strong, growths, strict=True)
        ]
        self.mask_U.copy_(torch.cat(changed))

    def _share(self, clock: Clock) -> float:
        assert self.freeze_tokens is not None
        return self.config.drop * (1 + math.cos(math.pi * min(1.0, clock.tokens / self.freeze_tokens))) / 2


def _changed(mask_Rn: torch.Tensor, strength_Rn: torch.Tensor, growth_Rn: torch.Tensor, share: float) -> torch.Tensor:
    kept = int(mask_Rn[0].sum())  # a host sync, once in `every` steps
    num = min(math.ceil(share * kept), mask_Rn.shape[-1] - kept)
    dropped = torch.where(mask_Rn > 0, strength_Rn, torch.inf).argsort(dim=-1, stable=True)[:, :num]
    grown = torch.where(mask_Rn > 0, -torch.inf, growth_Rn).argsort(dim=-1, descending=True, stable=True)[:, :num]
    return mask_Rn.scatter(-1, dropped, 0.0).scatter(-1, grown, 1.0)
