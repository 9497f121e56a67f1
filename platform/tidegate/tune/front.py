"""What a sweep found: the Pareto front of metric and cost."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["hypervolume", "pareto"]


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
