"""Nested sub-models, trained together: each step uses one prefix of the units (SortedNet, arXiv 2309.00255).

Units stand in the order of their position; a smaller sub-model holds the first units of a larger one. Every step draws
one share from `keeps`, the same on all ranks, and trains that prefix. Evaluation uses `keep`; any of `keeps` can be
exported. Nothing is learned about which units to keep: training makes the first ones the most useful.

Letters: U units.
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from tidegate.config import Variant
from tidegate.model.clock import Clock
from tidegate.model.unit_gates.base import UnitGates
from tidegate.model.unit_gates.units import Units

__all__ = ["Nested", "NestedConfig"]


class NestedConfig(Variant):
    kind: Literal["nested"] = "nested"
    summary: ClassVar[str] = "every step trains one of several nested sub-models"
    source: ClassVar[str] = "SortedNet, arXiv 2309.00255"
    keeps: tuple[float, ...] = Field(default=(0.25, 0.5, 1.0), min_length=1)
    """Shares of the cost that are trained; `keep` is one of them."""

    @model_validator(mode="after")
    def _each_once(self) -> NestedConfig:
        if len(set(self.keeps)) < len(self.keeps):
            raise ValueError(f"keeps={list(self.keeps)} names a share twice")
        return self

    def build(self, units: Units, keep: float, freeze_tokens: int | None, width: int) -> Nested:
        return Nested(self, units, keep, freeze_tokens, width)


class Nested(UnitGates):
    """Raises ValueError if a share cannot be reached, or a smaller mask is not part of a larger one."""

    def __init__(self, config: NestedConfig, units: Units, keep: float, freeze_tokens: int | None, width: int) -> None:
        super().__init__(units, keep, freeze_tokens, width)
        self.config = config
        scores = [
            -((torch.arange(g.num, device="cpu") + 0.5) / g.num).expand(g.rows, -1).flatten() for g in units.groups
        ]
        self._masks = {share: units.select(torch.cat(scores), share) for share in sorted(config.keeps)}
        masks = list(self._masks.items())
        for (share, mask_U), (larger, larger_U) in pairwise(masks):
            if (mask_U > larger_U).any():
                raise ValueError(f"keeps={share} is not a part of keeps={larger} for these units; gate one kind alone")

    def hard_mask(self, keep: float | None = None) -> torch.Tensor:
        """(U,) 0/1 of one of `keeps`; None is the configured `keep`."""
        return self._masks[self.keep if keep is None else keep].to(self.frozen_mask.device)

    def chosen(self, clock: Clock) -> float:
        """The share that a step trains."""
        keeps = self.config.keeps
        return keeps[int(clock.draw("unit gates") * len(keeps))]

    def probabilities(self, clock: Clock) -> torch.Tensor:
        return torch.stack(list(self._masks.values())).mean(dim=0).to(self.frozen_mask.device)

    def sample(self, h_BTD: torch.Tensor, clock: Clock) -> tuple[torch.Tensor, torch.Tensor]:
        mask_U = self.hard_mask(self.chosen(clock))
        return mask_U, mask_U.new_zeros(())
