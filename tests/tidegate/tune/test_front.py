"""The front against its definition, and verdicts over paired seeds."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest

from tidegate.launch.paired import verdict
from tidegate.tune.front import hypervolume, pareto
from tidegate.tune.pictures import Panel, Point, draw_page


@pytest.mark.parametrize("seed", range(5))
def test_a_point_is_on_the_front_if_none_dominates_it(seed: int) -> None:
    chance = random.Random(seed)
    points = [(float(chance.randrange(8)), float(chance.randrange(8))) for _ in range(40)]

    def dominated(point: tuple[float, float]) -> bool:
        return any(a <= point[0] and b <= point[1] and (a, b) != point for a, b in points)

    assert sorted(pareto(points)) == [place for place, point in enumerate(points) if not dominated(point)]


@pytest.mark.parametrize("seed", range(3))
def test_hypervolume_is_the_area_that_the_points_dominate(seed: int) -> None:
    """Counted in unit squares, whose lower corners are at integers."""
    chance = random.Random(seed)
    points = [(float(chance.randrange(12)), float(chance.randrange(12))) for _ in range(7)]
    squares = [(x, y) for x in range(9) for y in range(10)]
    dominated = [(x, y) for x, y in squares if any(cost <= x and loss <= y for cost, loss in points)]
    assert hypervolume(points, (9.0, 10.0)) == len(dominated)
    assert hypervolume([(9.0, 0.0), (0.0, 10.0)], (9.0, 10.0)) == hypervolume([], (9.0, 10.0)) == 0


def test_a_difference_that_all_seeds_show_counts_however_much_seeds_differ() -> None:
    rival = {0: 3.0, 1: 4.0, 2: 5.0}
    best = {seed: value - 0.1 - 0.001 * seed for seed, value in rival.items()}
    found = verdict(best, rival)
    assert found.better
    assert found.difference == pytest.approx(0.101)
    assert found.error == pytest.approx(0.001 / math.sqrt(3))
    assert found.seeds == 3
    assert not verdict(best, rival, smaller_is_better=False).better


@pytest.mark.parametrize("seeds", [2, 3, 5, 61, 400])
def test_chance_alone_wins_one_time_in_forty_at_most(seeds: int) -> None:
    """Of candidates that do not differ; two standard errors would be passed by 15 % of those with 2 seeds."""
    chance = random.Random(seeds)
    tries = 4000 if seeds < 60 else 400
    wins = 0
    for _ in range(tries):
        ours, theirs = ({seed: chance.gauss(3.0, 0.1) for seed in range(seeds)} for _ in range(2))
        found = verdict(ours, theirs)
        wins += found.better
    assert found.errors == pytest.approx({2: 12.706, 3: 4.303, 5: 2.776, 61: 2.0003, 400: 2.0}[seeds], abs=1e-3)
    assert 0.002 < wins / tries < 0.025 + 3 * math.sqrt(0.025 / tries)


def test_what_chance_would_make_is_no_difference() -> None:
    assert not verdict({0: 3.0, 1: 3.2, 2: 2.9}, {0: 3.1, 1: 3.1, 2: 3.1}).better
    alone = verdict({0: 3.0, 7: 1.0}, {0: 9.0, 8: 1.0})
    assert (alone.seeds, alone.better) == (1, False), "one seed shows nothing"


def test_the_page_shows_every_point_with_its_values_and_needs_no_network(tmp_path: Path) -> None:
    def point(trial: int, kind: str, cost: float, mean: float, on_front: bool) -> Point:
        return Point(trial, f"tiny-{trial}", kind, cost, mean, 0.125, 3, on_front, {"model.ffn.top_k": trial + 1})

    points = [
        point(0, "base", 9.0, 3.0, False),
        point(1, "random", 4.0, 2.5, True),
        point(2, "searched", 8.0, 2.0, True),
        point(3, "searched", 8.0, 2.25, False)._replace(values={"data.paths": "<img src=x>"}),
    ]
    draw_page(tmp_path / "front.html", [Panel("active_params", points)], "val/loss", baseline=2.5)
    text = (tmp_path / "front.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|link)[^>]+(src|href)=", text)
    call = text[text.rindex("Plotly.newPlot(") :]
    traces, end = json.JSONDecoder().raw_decode(call, call.index("["))
    layout = json.JSONDecoder().raw_decode(call, call.index("{", end))[0]
    by_name = {trace["name"]: trace for trace in traces}
    assert set(by_name) == {
        "the job as it stands, dominated",
        "random, on the front",
        "searched, on the front",
        "searched, dominated",
        "front",
    }
    found = by_name["random, on the front"]
    assert (found["x"], found["y"], found["error_y"]["array"]) == ([4.0], [2.5], [0.125])
    assert "trial 1: tiny-1" in found["text"][0]
    assert "model.ffn.top_k: 2" in found["text"][0]
    colours = {name: trace["marker"]["color"] for name, trace in by_name.items() if name != "front"}
    assert len({colour for name, colour in colours.items() if name.endswith("dominated")}) == 1
    assert len(set(colours.values())) == 2
    assert "<img" not in by_name["searched, dominated"]["text"][0]
    assert by_name["front"]["x"] == [4.0, 8.0]
    assert layout["shapes"][0]["y0"] == layout["shapes"][0]["y1"] == 2.5
