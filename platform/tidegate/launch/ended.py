"""What a launcher gives back."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tidegate.track import Delivery

if TYPE_CHECKING:  # the driver need not import DeepSpeed
    from tidegate.train.loop import Outcome

__all__ = ["Ended"]


class Ended(NamedTuple):
    """A run's end, as the driver sees it."""

    outcome: Outcome
    delivery: Delivery
    """What MLflow took."""
