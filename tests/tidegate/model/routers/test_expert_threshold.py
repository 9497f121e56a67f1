"""Expert-side selection: thresholds that follow the global quantile, and expert choice with its leak.

Letters: N rows, B sequences, T tokens, E experts, K mean experts a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tidegate.model.routers.expert_threshold import ExpertChoiceConfig, ExpertThresholdConfig

LEAKY = ExpertChoiceConfig(allow_future_leak=True)


def scores_of(router: Any, x: torch.Tensor) -> torch.Tensor:
    return (x @ router.weight.detach().T).sigmoid()


# --- expert threshold


@pytest.mark.parametrize("bins", [64, 1024])
def test_the_threshold_is_the_quantile_of_the_pooled_scores(
    bins: int, build: Callable[..., Any], context: Callable[..., Any], routed: Any
) -> None:
    """Of three micro-batches or ranks, over counted tokens, to a bin's width."""
    router = build(ExpertThresholdConfig(bins=bins))
    parts = [torch.randn(63, 24) + shift for shift in (0.0, 0.3, -0.4)]
    counted = [torch.rand(7, 9) < 0.8 for _ in parts]
    routings = [router(x, context(7, 9, counted_BT=c)) for x, c in zip(parts, counted, strict=True)]
    router.update(routed(*routings))
    pooled = torch.cat([scores_of(router, x)[c.flatten()] for x, c in zip(parts, counted, strict=True)])
    exact = pooled.quantile(1 - 3 / 7, dim=0)
    # Between two neighbours in the pool every value splits the shares alike.
    neighbours = pooled.sort(dim=0).values.diff(dim=0).quantile(0.99)
    assert (router.threshold_E - exact).abs().max() < 1 / bins + neighbours


def test_an_update_does_not_depend_on_the_cut(
    build: Callable[..., Any], context: Callable[..., Any], routed: Any
) -> None:
    x, thresholds = torch.randn(64, 24), []
    for rows in (64, 32, 8):
        router = build(ExpertThresholdConfig())
        router.update(routed(*(router(part, context(1, rows)) for part in x.split(rows))))
        thresholds.append(router.threshold_E)
    assert torch.equal(thresholds[0], thresholds[1])
    assert torch.equal(thresholds[0], thresholds[2])


def test_the_moving_average(build: Callable[..., Any], context: Callable[..., Any], routed: Any) -> None:
    router, fresh = (build(ExpertThresholdConfig(ema=0.75)) for _ in range(2))
    x = torch.randn(2, 63, 24)
    router.update(routed(router(x[0], context(7, 9))))
    first = router.threshold_E.clone()
    router.update(routed(router(x[1], context(7, 9))))
    fresh.update(routed(fresh(x[1], context(7, 9))))
    torch.testing.assert_close(router.threshold_E, 0.75 * first + 0.25 * fresh.threshold_E, rtol=1e-6, atol=0)
    resumed = build(ExpertThresholdConfig(ema=0.75))
    resumed.load_state_dict(router.state_dict())
    for one in (router, resumed):
        one.update(routed(one(x[0], context(7, 9))))
    assert torch.equal(router.threshold_E, resumed.threshold_E)


def test_selection_is_causal_and_of_each_token_alone(
    build: Callable[..., Any], context: Callable[..., Any], by_expert: Any
) -> None:
    router, x = build(ExpertThresholdConfig()), torch.randn(63, 24)
    weights, chosen = by_expert(router(x, context(7, 9)))
    assert torch.equal(chosen, scores_of(router, x) > router.threshold_E)
    torch.testing.assert_close(weights, scores_of(router, x) * chosen, rtol=1e-5, atol=0)
    changed = x.clone().view(7, 9, 24)
    changed[:, 5:] = torch.randn(7, 4, 24)
    after, _ = by_expert(router(changed.flatten(0, 1), context(7, 9)))
    assert torch.equal(after.view(7, 9, 7)[:, :5], weights.view(7, 9, 7)[:, :5])
    evaluated, _ = by_expert(router.eval()(x, context(7, 9)))
    assert torch.equal(evaluated, weights)
    assert router(x, context(7, 9)).observed is None


@pytest.mark.parametrize(("num_experts", "top_k"), [(7, 1), (7, 3), (64, 8), (5, 5)])
def test_loads_are_near_their_share(
    num_experts: int, top_k: int, build: Callable[..., Any], context: Callable[..., Any], routed: Any
) -> None:
    """From the first step on for centred rows; after some steps also for rows that favour some experts."""
    router = build(ExpertThresholdConfig(), num_experts, top_k, std=0.02, width=96)
    shift = torch.zeros(96)
    shares = []
    for step in range(70):
        x = torch.randn(2000, 96) + shift
        x = x / x.square().mean(1, keepdim=True).sqrt()
        now = routed(router(x, context(20, 100)))
        router.update(now)
        shares.append(now.counts_E / now.tokens * num_experts / top_k)
        if step == 0:
            shift = torch.randn(96)
    assert float(shares[0].mean()) == pytest.approx(1.0, abs=0.2), "no step uses a multiple of K experts"
    assert (torch.stack(shares[-10:]).mean(0) - 1).abs().max() < 0.1


# --- expert choice


def test_expert_choice_wants_to_be_asked_twice() -> None:
    with pytest.raises(ValueError, match=r"kind=expert_choice .* leaks the labels .* kind=expert_threshold"):
        ExpertChoiceConfig()
    assert not LEAKY.capabilities.causal
    assert ExpertThresholdConfig().capabilities.causal


@pytest.mark.parametrize(("num_experts", "top_k", "capacity"), [(7, 3, 3), (7, 1, 1), (7, 7, 9), (33, 2, 1)])
def test_capacity_is_exact_in_every_sequence(
    num_experts: int, top_k: int, capacity: int, build: Callable[..., Any], context: Callable[..., Any], by_expert: Any
) -> None:
    router, x = build(LEAKY, num_experts, top_k), torch.randn(63, 24)
    routing = router(x, context(7, 9))
    weights, chosen = by_expert(routing)
    assert (chosen.view(7, 9, num_experts).sum(1) == capacity).all()
    torch.testing.assert_close(weights, routing.probs_NE * chosen)
    probs = routing.probs_NE.view(7, 9, num_experts)
    worst_in = probs.masked_fill(~chosen.view_as(probs), 2.0).amin(1)
    best_out = probs.masked_fill(chosen.view_as(probs), -1.0).amax(1)
    assert (worst_in >= best_out).all()


def test_padding_is_taken_last(build: Callable[..., Any], context: Callable[..., Any], by_expert: Any) -> None:
    counted = torch.ones(7, 9, dtype=torch.bool)
    counted[:, 5:] = False
    chosen = by_expert(build(LEAKY)(torch.randn(63, 24), context(7, 9, counted_BT=counted)))[1].view(7, 9, 7)
    assert not chosen[:, 5:].any()
    assert (chosen.sum(1) == 3).all()


def test_a_later_token_changes_an_earlier_ones_experts(
    build: Callable[..., Any], context: Callable[..., Any], by_expert: Any
) -> None:
    """The leak that the override admits to."""
    router, x = build(LEAKY), torch.randn(63, 24)
    before = by_expert(router(x, context(7, 9)))[1].view(7, 9, 7)
    x.view(7, 9, 24)[:, 8] *= 10
    after = by_expert(router(x, context(7, 9)))[1].view(7, 9, 7)
    assert (before != after)[:, :8].any()
