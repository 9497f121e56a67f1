"""Whether one setting is better than another, or chance would make it so: over seeds that both ran with."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["Verdict", "verdict"]


class Verdict(NamedTuple):
    """One setting against another."""

    better: bool
    """By more than two standard errors."""
    difference: float
    """Mean over seeds of how much better it is, in units of the metric."""
    error: float
    """Standard error of that mean; NaN from one seed."""
    seeds: int

    def in_words(self, one: str, other: str, what: str = "") -> str:
        """A sentence.

        Args:
            one, other: names of the settings.
            what: the metric, where it is not clear.
        """
        of = f" in {what}" if what else ""
        if self.seeds == 1:
            return (
                f"{one} is ahead of {other}{of} by {self.difference:.4f} with one seed in common: whether chance would "
                "make it so is not known"
            )
        return (
            f"{one} {'beats' if self.better else 'does not beat'} {other}{of} by more than two standard errors: "
            f"{self.difference:+.4f} +- {self.error:.4f} over {self.seeds} paired seeds"
        )


def verdict(best: Mapping[int, float], other: Mapping[int, float], *, smaller_is_better: bool = True) -> Verdict:
    """Compare two candidates seed by seed: what a seed does to both is no difference between them.

    Args:
        best, other: metric by seed; at least one seed is in both.
        smaller_is_better: of the metric.
    """
    sign = 1 if smaller_is_better else -1
    shared = sorted(best.keys() & other.keys())
    differences = [sign * (other[seed] - best[seed]) for seed in shared]
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(shared)) if len(shared) > 1 else math.nan
    return Verdict(mean > 2 * error, mean, error, len(shared))
