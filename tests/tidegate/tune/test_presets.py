"""Presets: every value fits the job, alone and in company, and what does not is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, get_args

import pytest

from tidegate.config import ConfigError
from tidegate.train.search import PresetName
from tidegate.tune.budget import QUANTITIES
from tidegate.tune.presets import PRESETS
from tidegate.tune.space import Space

DEMO = Path(__file__).parents[3] / "jobs" / "demo.yaml"


def space_of(*presets: str, job: Path = DEMO, overrides: tuple[str, ...] = (), **search: Any) -> Space:
    return Space(job, [f"search={json.dumps({'presets': presets, **search})}", *overrides])


def everything_but(other: str) -> tuple[str, ...]:
    return tuple(name for name in PRESETS if name != other)


@pytest.mark.parametrize(
    "presets", [*((name,) for name in PRESETS), everything_but("experts"), everything_but("granularity")], ids="-".join
)
def test_every_draw_is_a_valid_job_and_every_value_is_drawn(presets: tuple[str, ...]) -> None:
    space, chance = space_of(*presets), random.Random(0)
    drawn = [space.draw(chance) for _ in range(250)]
    for values in drawn[:120]:
        space.at(values)
    for path, variation in space.config.space.items():
        chosen = [values[path] for values in drawn if path in values]
        assert chosen, path
        assert all(value in chosen for value in variation.choice or ()), path


def test_presets_are_those_that_a_job_may_name() -> None:
    assert list(PRESETS) == list(get_args(PresetName))


def test_finer_experts_cost_the_same_but_for_the_router() -> None:
    space = space_of("granularity")
    jobs = [space.at({"model.ffn": value}).job for value in space.config.space["model.ffn"].choice or ()]
    assert [job.model.ffn.num_experts for job in jobs] == [8, 16, 32]
    routers = [job.model.num_layers * job.model.width * job.model.ffn.num_experts for job in jobs]
    for quantity in ("active_params", "total_params"):
        costs = [QUANTITIES[quantity].of(job) - router for job, router in zip(jobs, routers, strict=True)]
        assert set(costs) == {costs[0]}, quantity


def test_what_hangs_on_the_router_follows_the_routers_of_the_space() -> None:
    biased = {"softmax_top_k", "sigmoid_top_k", "sqrt_softplus_top_k"}
    space = space_of("routers", "temperature", "balance").config.space
    assert {router["kind"] for router in space["balance.bias_rate"].when["model.ffn.router"]} == biased
    assert "relu" not in {router["kind"] for router in space["balance.scope"].when["model.ffn.router"]}
    alone = space_of("balance", overrides=("model.ffn.router={kind: relu}",)).config.space
    assert set(alone) == {"balance.loss_weight"}
    assert space_of("balance").config.space["balance.bias_rate"].when == {}


def test_what_the_job_says_itself_wins_over_a_preset() -> None:
    own = {"balance.loss_weight": {"choice": [0.02]}}
    space = space_of("balance", space=own)
    assert space.config.space["balance.loss_weight"].choice == (0.02,)
    assert "balance.scope" in space.config.space


@pytest.mark.parametrize(
    ("presets", "overrides", "problem"),
    [
        (("wisdom",), (), r"search.presets.0: Input should be 'gates', .*got 'wisdom'"),
        ((), (), "vary nothing; name a path or a preset"),
        (("experts", "granularity"), (), "granularity and experts both set model.ffn.num_experts"),
        (("granularity",), ("model.ffn.expert_dim=24",), "granularity cannot cut model.ffn.expert_dim=24"),
        *(
            ((name,), ("model.ffn={kind: dense, hidden_dim: 64}", "parallel.expert=1"), f"{name} needs experts, but")
            for name in ("routers", "experts", "granularity", "temperature", "balance")
        ),
    ],
)
def test_a_preset_that_does_not_fit_is_refused(
    presets: tuple[str, ...], overrides: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        space_of(*presets, overrides=overrides)


def test_presets_that_need_no_experts_fit_a_dense_job() -> None:
    dense = ("model.ffn={kind: dense, hidden_dim: 64}", "parallel.expert=1")
    space = space_of("gates", "unit_gates", "learning_rate", overrides=dense)
    chance = random.Random(1)
    for _ in range(40):
        space.at(space.draw(chance))
