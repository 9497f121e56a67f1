"""What a sweep found: the Pareto front of metric and cost, and whether the best is better than chance would make it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["Verdict", "hypervolume", "pareto", "verdict"]


class Verdict(NamedTuple):
    """The best candidate against another, over the seeds that both ran with."""

    better: bool
    """By more than two standard errors."""
    difference: float
    """Mean over seeds of how much better it is, in units of the metric."""
    error: float
    """Standard error of that mean; NaN from one seed."""
    seeds: int


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points (cost, loss) that no other is below in one and at most equal in the other."""
    kept: list[int] = []
    for place in sorted(range(len(points)), key=lambda place: points[place]):
        if not kept or points[place][1] < points[kept[-1]][1] or points[place] == points[kept[-1]]:
            kept.append(place)
    return kept


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Area of what is worse than one of the points (cost, loss) in both, and better than the reference."""
    area, loss = 0.0, reference[1]
    for cost, below in (points[place] for place in pareto(points)):
        if cost < reference[0] and below < loss:
            area, loss = area + (reference[0] - cost) * (loss - below), below
    return area


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
