"""What every method of gating units is built from: a mask a training pass, a hard mask on the budget, a freeze.

Masks are functions of parameters, buffers and the clock alone, so they are the same on every rank, in every
micro-batch and recomputation of an optimizer step, and after a restart.

Letters: U units, B sequences, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import Field
from torch import nn

from tidegate.config import Variant
from tidegate.model.clock import STILL, Clock, derive_key, uniform
from tidegate.model.initialisation import Draw
from tidegate.model.layers import Fp32Buffers
from tidegate.model.unit_gates.units import LayerMasks, Units

if TYPE_CHECKING:
    from tidegate.model.decoder import Decoder

__all__ = [
    "DAMPING",
    "WINDUP",
    "AllReduce",
    "BudgetedConfig",
    "BudgetedGates",
    "LogitConfig",
    "LogitGates",
    "UnitGates",
    "UnitPass",
]

AllReduce = Callable[[torch.Tensor], None]
"""Sums a tensor over all ranks in place."""

DAMPING = 10.0
"""Weight of the squared excess: at 1 the multiplier overshoots and the share swings for hundreds of steps."""

WINDUP = 0.1
"""Excess that counts of a step at most. Logits move so far a step and no faster: all of it, added up for as long as
they need, takes the share far below the budget and leaves it there for hundreds of steps."""

NOISE = 0.01
"""Standard deviation of initial logits: equal ones would fall by their position, or by rounding."""


class UnitPass(NamedTuple):
    """What gates give to one forward pass."""

    masks: list[LayerMasks]
    """One a layer."""
    penalty: torch.Tensor
    """Scalar fp32, to be added to the loss of each micro-batch as it is: the engine's average is then the penalty."""


class UnitGates(Fp32Buffers):
    """Masks over the units of a model under a budget.

    A method says how important units are (`scores`), what a training pass sees (`sample`), how probable each unit is
    to be in it (`probabilities`) and what it learns after a step (`learn`).

    Args:
        units: what is gated.
        keep: share of the units' cost in the hard mask.
        freeze_tokens: the step that reaches this many tokens fixes the hard mask for good; None is never.
        width: D.
    """

    frozen_mask: torch.Tensor
    is_frozen: torch.Tensor

    def __init__(self, units: Units, keep: float, freeze_tokens: int | None, width: int) -> None:
        super().__init__()
        self.units, self.keep, self.freeze_tokens, self.width = units, keep, freeze_tokens, width
        self.register_buffer("frozen_mask", torch.empty(units.num, dtype=torch.float32))
        self.register_buffer("is_frozen", torch.empty((), dtype=torch.bool))
        self._frozen: bool | None = None

    def init_weights(self, draw: Draw) -> None:
        nn.init.ones_(self.frozen_mask)
        self.is_frozen.fill_(False)
        self._frozen = False

    @property
    def frozen(self) -> bool:
        """Whether the mask is fixed. Reads the device once after loading."""
        if self._frozen is None:
            self._frozen = bool(self.is_frozen)
        return self._frozen

    def scores(self) -> torch.Tensor:
        """(U,) importance of each unit per unit of its cost: what `hard_mask` ranks."""
        raise TypeError(f"{type(self).__name__} does not rank units")  # pragma: no cover

    def probabilities(self, clock: Clock) -> torch.Tensor:
        """(U,) expected factor of each unit in the training passes of the clock's step; carries gradient."""
        raise TypeError(f"{type(self).__name__} does not say how probable units are")  # pragma: no cover

    def sample(self, h_BTD: torch.Tensor, clock: Clock) -> tuple[torch.Tensor, torch.Tensor]:
        """The mask of a training pass, (U,) or (B, T, U), and the penalty; h is the embedded tokens."""
        raise TypeError(f"{type(self).__name__} does not sample masks")  # pragma: no cover

    def learn(self, model: Decoder, clock: Clock, loss: torch.Tensor, all_reduce: AllReduce) -> None:
        """Move what the optimizer does not move."""

    @torch.no_grad()
    def hard_mask(self) -> torch.Tensor:
        """(U,) 0/1 within `TOLERANCE` of the budget: what evaluation and export use."""
        return self.frozen_mask if self.frozen else self.units.select(self.scores(), self.keep)

    def expected_cost(self, clock: Clock = STILL) -> torch.Tensor:
        """Parameters that a training pass of the clock's step keeps in the mean."""
        kept_U = self.frozen_mask if self.frozen else self.probabilities(clock)
        return (kept_U * self.units.costs(kept_U.device)).sum()

    def excess(self, probabilities_U: torch.Tensor) -> torch.Tensor:
        """The expected share of the cost minus `keep`."""
        costs_U = self.units.costs(probabilities_U.device)
        return (probabilities_U * costs_U).sum() / self.units.total_cost - self.keep

    def forward(self, h_BTD: torch.Tensor, clock: Clock) -> UnitPass:
        """Masks for one pass: hard ones in evaluation, without a clock and when frozen."""
        if self.training and clock.step > 0 and not self.frozen:
            mask, penalty = self.sample(h_BTD, clock)
            return UnitPass(self.units.split(mask), penalty)
        # DeepSpeed wants a gradient for every parameter in every step.
        unused = [parameter.sum() * 0.0 for parameter in self.parameters()]
        return UnitPass(self.units.split(self.hard_mask()), sum(unused, h_BTD.new_zeros((), dtype=torch.float32)))

    @torch.no_grad()
    def update(self, model: Decoder, clock: Clock, loss: torch.Tensor, all_reduce: AllReduce) -> None:
        """After the optimizer step; every rank must call it.

        Args:
            model: that holds these gates.
            clock: of the step just taken.
            loss: scalar, this rank's share of the step's loss; summed over ranks it is the step's.
            all_reduce: sums over ranks.
        """
        if self.frozen:
            return
        self.learn(model, clock, loss, all_reduce)
        if self.freeze_tokens is not None and clock.tokens >= self.freeze_tokens:
            self.freeze()

    def freeze(self) -> None:
        """Fix the hard mask for good."""
        self.frozen_mask.copy_(self.hard_mask())
        self.is_frozen.fill_(True)
        self._frozen = True

    def noise(self, clock: Clock) -> torch.Tensor:
        """(U,) uniform numbers of the clock's step."""
        rows = torch.arange(self.units.num, device=self.frozen_mask.device)
        return uniform(rows, 1, clock.key ^ derive_key("unit gates"))[:, 0]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._frozen = None


class LogitConfig(Variant):
    """Gates whose logits the optimizer trains."""

    rate: float = Field(default=10.0, gt=0)
    """Logits are `initial` plus `rate` times the trained parameter. AdamW moves a parameter by about the learning rate
    a step whatever its gradient, so logits move by `rate` times that; at 1 and 3e-4, 3 would take 10,000 steps."""
    initial: float = 2.0
    """Logit of every gate at the start."""


class LogitGates(UnitGates):
    """A logit a unit, which is also its score."""

    def __init__(self, config: LogitConfig, units: Units, keep: float, freeze_tokens: int | None, width: int) -> None:
        super().__init__(units, keep, freeze_tokens, width)
        self.config = config
        self.parameter = nn.Parameter(torch.empty(units.num))

    def init_weights(self, draw: Draw) -> None:
        super().init_weights(draw)
        draw.normal_(self.parameter, NOISE / self.config.rate, "parameter")

    @property
    def logits_U(self) -> torch.Tensor:
        """(U,) fp32."""
        # The parameter is what was learned, near 0, where bf16 tells neighbours apart; at 0.2 it would not.
        return self.config.initial + self.parameter.float() * self.config.rate

    def scores(self) -> torch.Tensor:
        return self.logits_U


class BudgetedConfig(LogitConfig):
    """Gates whose expected cost a multiplier moves to the budget."""

    multiplier_rate: float = Field(default=0.1, gt=0)
    """The multiplier grows by this times (expected share - keep) a step, which counts as 0.1 at most, either way."""


class BudgetedGates(LogitGates):
    """Logits, and a Lagrange multiplier on the expected cost.

    The penalty is `m v + DAMPING v^2 / 2` with v the expected share of the cost minus `keep`; after each step
    `m += rate v`, v within `WINDUP` (the method of multipliers, Hestenes 1969). No weight has to be tuned for a
    budget; m may be negative.
    """

    config: BudgetedConfig
    multiplier: torch.Tensor

    def __init__(
        self, config: BudgetedConfig, units: Units, keep: float, freeze_tokens: int | None, width: int
    ) -> None:
        super().__init__(config, units, keep, freeze_tokens, width)
        self.register_buffer("multiplier", torch.empty((), dtype=torch.float32))

    def init_weights(self, draw: Draw) -> None:
        super().init_weights(draw)
        nn.init.zeros_(self.multiplier)

    def budget_penalty(self, probabilities_U: torch.Tensor) -> torch.Tensor:
        """`m v + DAMPING v^2 / 2`."""
        excess = self.excess(probabilities_U)
        return self.multiplier * excess + DAMPING * excess.square() / 2

    def learn(self, model: Decoder, clock: Clock, loss: torch.Tensor, all_reduce: AllReduce) -> None:
        excess = self.excess(self.probabilities(clock))
        self.multiplier += self.config.multiplier_rate * excess.clamp(-WINDUP, WINDUP)
