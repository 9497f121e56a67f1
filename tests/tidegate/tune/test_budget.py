"""Budgets as people write them, and candidates that keep them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tidegate.config import ConfigError, load
from tidegate.model.decoder import Decoder, materialize
from tidegate.model.memory import model_on_meta
from tidegate.model.unit_gates.export import export
from tidegate.train.job import Job
from tidegate.tune.budget import QUANTITIES, TOLERANCE, Budget, known_of, parse, shown, violations
from tidegate.tune.space import Space, draw


@pytest.fixture
def base(tiny_job: Callable[..., Path]) -> Job:
    job: Job = load(tiny_job(), Job).config
    return job


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("active_params<=300M", Budget("active_params", False, 300e6)),
        (" total_params == 1.5B ", Budget("total_params", True, 1.5e9)),
        ("flops_per_token<=2e9", Budget("flops_per_token", False, 2e9)),
        ("peak_memory<=79GiB", Budget("peak_memory", False, 79 * 2**30)),
        ("kv_cache<=4kB", Budget("kv_cache", False, 4000)),
    ],
)
def test_budgets_are_read(base: Job, text: str, expected: Budget) -> None:
    assert parse(text, base) == expected


def test_a_share_is_of_the_job_as_it_stands(base: Job) -> None:
    assert parse("active_params<=40%", base).limit == pytest.approx(0.4 * QUANTITIES["active_params"].of(base))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("active_params", "not of the form active_params<=300M"),
        ("active_params>=3", "not of the form"),
        ("wisdom<=3", "unknown quantity 'wisdom'; known are active_params, "),
        ("peak_memory<=3M", "unknown unit 'M' of peak_memory; known are %, B, "),
        ("active_params<=3GiB", "unknown unit 'GiB' of active_params"),
        ("active_params<=0", "leaves nothing"),
    ],
)
def test_other_budgets_are_refused(base: Job, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse(text, base)


def test_quantities_are_those_of_the_model_that_is_trained(base: Job) -> None:
    model = model_on_meta(base.model, torch.float32)
    assert QUANTITIES["total_params"].of(base) == sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".ffn.experts." in name)
    idle = experts * (1 - base.model.ffn.top_k / base.model.ffn.num_experts)
    embedding = model.embedding.weight.numel()
    assert QUANTITIES["active_params"].of(base) == pytest.approx(
        sum(p.numel() for p in model.parameters()) - idle - embedding, rel=0.01
    )
    attention = base.model.attention
    assert QUANTITIES["kv_cache"].of(base) == 4 * base.model.num_layers * attention.num_kv_heads * attention.head_dim


@pytest.mark.parametrize("over", [["heads"], ["channels"], ["experts"]], ids=str)
def test_exported_parameters_are_those_of_the_model_that_is_cut(tiny_job: Callable[..., Path], over: list[str]) -> None:
    ffn = {"kind": "moe", "num_experts": 4, "top_k": 2, "expert_dim": 64, "shared": {"num": 1}}
    units = {"over": over, "keep": 0.5, "method": {"kind": "random"}}
    job: Job = load(tiny_job(model={"ffn": ffn, "units": units}, balance={"bias_rate": 0.0}), Job).config
    model = materialize(lambda: Decoder(job.model), torch.device("cpu"), seed=0)
    cut = export(model)
    left = sum(parameter.numel() for parameter in cut.parameters())
    # Keys and values go with the last of their heads, which units do not count; masks are exact to within 1 % of units.
    assert QUANTITIES["exported_params"].of(job) == pytest.approx(left, rel=0.02)
    assert left < 0.99 * QUANTITIES["total_params"].of(job)
    plain = job.model_copy(update={"model": job.model.model_copy(update={"units": None})})
    assert QUANTITIES["exported_params"].of(plain) == QUANTITIES["total_params"].of(plain)


def test_a_job_is_within_all_of_itself(base: Job) -> None:
    for name in known_of(base):
        quantity = QUANTITIES[name]
        for share in (100, 33, 7):
            budget = parse(f"{name}<={share}%", base)
            limit = budget._replace(limit=budget.limit * 100 / share)
            assert limit.excess(base) == 0, name
            assert budget._replace(limit=quantity.of(base) * 0.999).excess(base) == pytest.approx(0.001, rel=0.01)


@pytest.mark.parametrize(("value", "text"), [(3.09e6, "3.09M"), (999, "999"), (1.2e12, "1.2T")])
def test_numbers_are_shown_in_three_digits(value: float, text: str) -> None:
    assert shown("active_params", value) == text
    assert shown("peak_memory", 2.5 * 2**30) == "2.5GiB"


# --- candidates --------------------------------------------------------------------------------------------------


def space_of(tiny_job: Callable[..., Path], **search: Any) -> Space:
    return Space(tiny_job(search=search))


WIDTHS = {"model.ffn.num_experts": {"choice": [4, 8, 16]}, "balance.loss_weight": {"log": [1e-4, 1e-1]}}


def test_every_candidate_meets_an_exact_budget_by_the_width_that_is_solved(tiny_job: Callable[..., Path]) -> None:
    solve = {"path": "model.ffn.expert_dim", "smallest": 8, "step": 8}
    large = {"model.width": {"choice": [64, 96]}, "model.ffn.top_k": {"choice": [1, 2, 3]}, **WIDTHS}
    job = tiny_job(search={"space": large, "budgets": ["active_params==400k"], "solve": solve})
    space = Space(job)
    found = list(draw(space, 6, random.Random(1)))
    assert len({str(candidate.values) for candidate in found}) == 6
    for candidate in found:
        assert abs(QUANTITIES["active_params"].of(candidate.job) / 400e3 - 1) <= TOLERANCE
        assert candidate.job.model.ffn.expert_dim == candidate.values["model.ffn.expert_dim"]
        assert load(job, Job, candidate.overrides).config == candidate.job


def test_no_candidate_outside_of_the_budget_is_drawn(tiny_job: Callable[..., Path]) -> None:
    space = space_of(tiny_job, space=WIDTHS, budgets=["total_params<=60k"])
    found = list(draw(space, 10, random.Random(0)))
    assert {candidate.job.model.ffn.num_experts for candidate in found} == {4, 8}
    assert not any(violations(candidate.job, space.budgets) for candidate in found)
    assert all(1e-4 <= candidate.values["balance.loss_weight"] <= 1e-1 for candidate in found)


def test_what_is_conditional_is_varied_only_where_its_condition_holds(tiny_job: Callable[..., Path]) -> None:
    gates = [{"kind": "none"}, {"kind": "sdpa_output", "granularity": "headwise"}]
    conditional = {"integer": [1, 3], "when": {"model.attention.gate": gates[1:]}}
    space = space_of(tiny_job, space={"model.attention.gate": {"choice": gates}, "model.ffn.top_k": conditional})
    drawn = [space.draw(random.Random(seed)) for seed in range(40)]
    assert {("model.ffn.top_k" in values, values["model.attention.gate"]["kind"]) for values in drawn} == {
        (False, "none"),
        (True, "sdpa_output"),
    }
    assert {values["model.ffn.top_k"] for values in drawn if "model.ffn.top_k" in values} == {1, 2, 3}


@pytest.mark.parametrize(
    ("search", "problem"),
    [
        ({"space": WIDTHS, "budgets": ["total_params<=10k"]}, "the nearest: .* misses total_params<=10k by "),
        ({"space": {"model.ffn.nonsense": {"choice": [1, 2]}}}, "model.ffn.nonsense: unknown field"),
        ({"space": {"model.ffn.router": {"choice": [{"kind": "top"}, {"kind": "relu"}]}}}, "unknown kind 'top'"),
        (
            {
                "space": {
                    "model.attention.gate": {"choice": [{"kind": "value", "granularity": "head"}, {"kind": "none"}]}
                }
            },
            "granularity: Input should be 'elementwise' or 'headwise' .got 'head'.",
        ),
        ({"space": {"model.ffn.top_k": {"choice": [2, 3]}}}, "only 2 candidates are within the budgets, not 5"),
        ({"space": {"model.ffn.top_k": {"choice": [9]}}}, "the nearest: .*top_k=9 is more than num_experts=4"),
    ],
)
def test_a_space_that_has_too_little_is_refused(
    tiny_job: Callable[..., Path], search: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        list(draw(space_of(tiny_job, **search), 5, random.Random(0)))


@pytest.mark.parametrize(
    ("search", "problem"),
    [
        ({"space": WIDTHS, "budgets": ["total_params==60k"]}, "needs search.solve.path"),
        ({"space": WIDTHS, "solve": {"path": "model.ffn.expert_dim"}}, "has no == budget to meet"),
        ({"space": WIDTHS, "metric": "val/wisdom/loss"}, "is never reported; the job has val/loss, val/letters/loss"),
        (
            {"space": WIDTHS, "scheduler": "asha"},
            "train.eval_every=100 makes none before the end, at train.tokens=6144",
        ),
        ({"space": WIDTHS, "scheduler": "asha", "metric": "train/loss"}, "metric=train/loss is not of evaluations"),
        ({"space": WIDTHS, "max_tokens": 43007}, "is less than the 43008 of one candidate .* and 6 reruns"),
        ({"space": {"balance.loss_weight": {"log": [0, 1]}}}, r"log=\[0.0, 1.0\] is no range of positive numbers"),
        ({"space": {"train.seed": {"choice": [0, 1]}}}, "search.space.train.seed: all candidates have the job's seed"),
        ({"space": {"balance.loss_weight": {}}}, "give one of choice, integer, uniform and log"),
        ({"space": {"model.ffn.top_k": {"choice": [1], "when": {"a.b": [1]}}}}, "when: a.b is not in the space"),
    ],
)
def test_a_search_that_cannot_be_is_refused(
    tiny_job: Callable[..., Path], search: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        space_of(tiny_job, **search)


def test_a_job_without_a_search_is_no_sweep(tiny_job: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"a sweep needs search.space"):
        Space(tiny_job())
