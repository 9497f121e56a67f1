"""Learning-rate schedules, as functions of the tokens seen: no state, so nothing to restore."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from tidegate.config import Config

__all__ = ["ScheduleConfig", "WarmupCosine", "WarmupStableDecay"]


class _Schedule(Config):
    peak: float = Field(gt=0)
    """Largest learning rate."""
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    """The last learning rate over the peak."""
    warmup_tokens: int = Field(default=0, ge=0)

    def _warmup(self, tokens: int) -> float:
        return min(1.0, tokens / self.warmup_tokens) if self.warmup_tokens else 1.0


class WarmupCosine(_Schedule):
    """Linear warm-up, then half a cosine down to `final_fraction` (Loshchilov & Hutter 2017)."""

    kind: Literal["cosine"] = "cosine"

    def at(self, tokens: int, total_tokens: int) -> float:
        """Learning rate of the step that ends at `tokens` of `total_tokens`."""
        if tokens < self.warmup_tokens:
            return self.peak * self._warmup(tokens)
        progress = min(1.0, (tokens - self.warmup_tokens) / max(1, total_tokens - self.warmup_tokens))
        fraction = self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.peak * fraction


class WarmupStableDecay(_Schedule):
    """Linear warm-up, constant, then a linear decay over the last tokens (WSD; Hu et al. 2024, arXiv 2404.06395)."""

    kind: Literal["wsd"] = "wsd"
    decay_tokens: int = Field(ge=1)

    def at(self, tokens: int, total_tokens: int) -> float:
        """Learning rate of the step that ends at `tokens` of `total_tokens`."""
        into_decay = min(1.0, max(0.0, (tokens - (total_tokens - self.decay_tokens)) / self.decay_tokens))
        return self.peak * self._warmup(tokens) * (1 - (1 - self.final_fraction) * into_decay)


ScheduleConfig = Annotated[WarmupCosine | WarmupStableDecay, Field(discriminator="kind")]
