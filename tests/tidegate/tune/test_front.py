"""The front against its definition, and verdicts over paired seeds."""

from __future__ import annotations

import math
import random

import pytest

from tidegate.tune.front import pareto, verdict


@pytest.mark.parametrize("seed", range(5))
def test_a_point_is_on_the_front_if_none_dominates_it(seed: int) -> None:
    chance = random.Random(seed)
    points = [(float(chance.randrange(8)), float(chance.randrange(8))) for _ in range(40)]

    def dominated(point: tuple[float, float]) -> bool:
        return any(a <= point[0] and b <= point[1] and (a, b) != point for a, b in points)

    assert sorted(pareto(points)) == [place for place, point in enumerate(points) if not dominated(point)]


def test_a_difference_that_all_seeds_show_counts_however_much_seeds_differ() -> None:
    rival = {0: 3.0, 1: 4.0, 2: 5.0}
    best = {seed: value - 0.1 - 0.001 * seed for seed, value in rival.items()}
    found = verdict(best, rival)
    assert found.better
    assert found.difference == pytest.approx(0.101)
    assert found.error == pytest.approx(0.001 / math.sqrt(3))
    assert found.seeds == 3
    assert not verdict(best, rival, smaller_is_better=False).better


def test_what_chance_would_make_is_no_difference() -> None:
    assert not verdict({0: 3.0, 1: 3.2, 2: 2.9}, {0: 3.1, 1: 3.1, 2: 3.1}).better
    alone = verdict({0: 3.0, 7: 1.0}, {0: 9.0, 8: 1.0})
    assert (alone.seeds, alone.better) == (1, False), "one seed shows nothing"
