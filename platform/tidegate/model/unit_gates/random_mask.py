"""A random mask that never changes: the baseline every learned one must beat (Liu et al. 2022, arXiv 2202.02643).

`uniform` keeps the same share of every group; `erk` (Erdos-Renyi-Kernel, Evci et al. 2020) keeps more of small tensors:
density proportional to sum(shape) / prod(shape), groups that would be over 1 kept whole and the rest solved again.

Letters: U units, n units of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from tidegate.config import Variant
from tidegate.model.clock import Clock, derive_key, uniform
from tidegate.model.initialisation import Draw
from tidegate.model.unit_gates.base import UnitGates
from tidegate.model.unit_gates.units import Units

__all__ = ["RandomMask", "RandomMaskConfig", "erk_densities", "random_scores"]


def erk_densities(raw: Sequence[float], costs: Sequence[float], keep: float) -> list[float]:
    """Densities `min(1, eps raw)` with eps such that `sum density cost = keep sum cost`.

    Args:
        raw: sum(shape) / prod(shape) of each tensor.
        costs: of each tensor.
        keep: in (0, 1].
    """
    whole: set[int] = set()
    while True:
        left = keep * sum(costs) - sum(costs[i] for i in whole)
        free = [i for i in range(len(costs)) if i not in whole]
        eps = left / sum(raw[i] * costs[i] for i in free) if free else 0.0
        over = {i for i in free if eps * raw[i] > 1}
        if not over:
            return [1.0 if i in whole else eps * raw[i] for i in range(len(costs))]
        whole |= over


def random_scores(units: Units, keep: float, densities: Literal["uniform", "erk"], key: int) -> torch.Tensor:
    """(U,) on the CPU: ranked by these, each group keeps its density of units, which ones at random.

    The unit of rank k of n in its row scores `density - (k + 1/2) / n`: above 0 for the share that is to stay, and
    around 0 what is nearest to it, so that rounding is settled over all groups.
    """
    groups = units.groups
    raw = [sum(g.shape) / torch.Size(g.shape).numel() if densities == "erk" else 1.0 for g in groups]
    density = erk_densities(raw, [float(g.size * g.cost) for g in groups], keep)
    draws_U = uniform(torch.arange(units.num, device="cpu"), 1, key)[:, 0]
    scores = []
    for group, share, part_1Rn in zip(groups, density, units.parts(draws_U), strict=True):
        rank_Rn = part_1Rn.argsort(dim=-1).argsort(dim=-1)
        scores.append((share - (rank_Rn + 0.5) / group.num).flatten())
    return torch.cat(scores)


class RandomMaskConfig(Variant):
    kind: Literal["random"] = "random"
    summary: ClassVar[str] = "baseline: a fixed random mask, uniform or by ERK densities"
    source: ClassVar[str] = "random pruning, Liu et al. 2022, arXiv 2202.02643"
    densities: Literal["uniform", "erk"] = "uniform"
    seed: int = Field(default=0, ge=0)

    def build(self, units: Units, keep: float, freeze_tokens: int | None, width: int) -> RandomMask:
        return RandomMask(self, units, keep, freeze_tokens, width)


class RandomMask(UnitGates):
    """Frozen from the start."""

    def __init__(
        self, config: RandomMaskConfig, units: Units, keep: float, freeze_tokens: int | None, width: int
    ) -> None:
        super().__init__(units, keep, freeze_tokens, width)
        self.config = config

    @torch.no_grad()
    def init_weights(self, draw: Draw) -> None:
        super().init_weights(draw)
        self.frozen_mask.copy_(self.units.select(self.scores(), self.keep))
        self.is_frozen.fill_(True)

    @property
    def frozen(self) -> bool:
        return True

    def scores(self) -> torch.Tensor:
        key = derive_key(self.config.seed, "unit_gates", "random")
        return random_scores(self.units, self.keep, self.config.densities, key).to(self.frozen_mask.device)

    def probabilities(self, clock: Clock) -> torch.Tensor:
        return self.frozen_mask
