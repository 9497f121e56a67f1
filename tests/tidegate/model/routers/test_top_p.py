"""Top-p routing: the smallest set, the controller of p, and the normalised logits.

Letters: N rows, E experts, K mean experts a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tidegate.model.clock import STILL
from tidegate.model.routers import RoutedStep
from tidegate.model.routers.top_p import TopPConfig

X = torch.randn(63, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_the_smallest_set_that_holds_p(
    p: float, build: Callable[..., Any], context: Callable[..., Any], by_expert: Any
) -> None:
    """Against all 127 sets of seven experts: none with fewer members holds p, and none of as many holds more."""
    router = build(TopPConfig(p_start=p))
    routing = router(X, context(7, 9))
    weights, chosen = by_expert(routing)
    probs = routing.probs_NE.detach().double()
    sets = torch.tensor(list(itertools.product([0.0, 1.0], repeat=7)), dtype=torch.float64)[1:]
    mass_NS, size_S = probs @ sets.T, sets.sum(1)
    smallest = torch.where(mass_NS >= p, size_S, 8.0).amin(1)
    assert torch.equal(chosen.sum(1).double(), smallest)
    held = (probs * chosen).sum(1)
    best = torch.where(size_S == smallest[:, None], mass_NS, 0.0).amax(1)
    torch.testing.assert_close(held, best, rtol=1e-6, atol=0)
    torch.testing.assert_close(weights.double(), probs * chosen / held[:, None], rtol=1e-5, atol=1e-7)
    assert p in (0.05, 0.999) or len(set(smallest.tolist())) > 1


def test_probabilities_by_formula(build: Callable[..., Any], context: Callable[..., Any]) -> None:
    router = build(TopPConfig())
    with torch.no_grad():
        router.logit_scale.fill_(1.7)
    logits = X.double() @ router.weight.detach().double().T
    normal = (logits - logits.mean(1, keepdim=True)) / (logits.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    routing = router(X, context(7, 9))
    torch.testing.assert_close(routing.probs_NE.double(), (1.7 * normal).softmax(1), rtol=1e-4, atol=1e-6)
    routing.weights_NS.square().sum().backward()
    assert router.logit_scale.grad.abs().sum() > 0
    assert router.weight.grad.abs().amax(1).min() > 0
    plain = build(TopPConfig(normalize_logits=False))
    assert plain.logit_scale is None
    torch.testing.assert_close(plain(X, context(7, 9)).probs_NE.double(), logits.softmax(1), rtol=1e-4, atol=1e-6)


def test_normalised_logits_do_not_see_scale_and_shift(build: Callable[..., Any], context: Callable[..., Any]) -> None:
    """Scale: of the weight. Shift: the same vector added to every expert's row."""
    router = build(TopPConfig())
    before = router(X, context(7, 9)).probs_NE
    with torch.no_grad():
        router.weight.mul_(40.0).add_(torch.randn(24))
    torch.testing.assert_close(router(X, context(7, 9)).probs_NE, before, rtol=1e-3, atol=1e-5)


def mean_used(router: Any, context: Any, by_expert: Any, rows: int = 1000) -> RoutedStep:
    chosen = by_expert(router(torch.randn(rows, 24), context(rows // 10, 10)))[1]
    return RoutedStep(chosen.sum(0).float(), torch.tensor(float(rows)), None, STILL)


@pytest.mark.parametrize("p_start", [0.05, 0.95])
@pytest.mark.parametrize(("num_experts", "top_k"), [(7, 2), (33, 8)])
def test_the_controller_drives_the_mean_to_k(
    num_experts: int,
    top_k: int,
    p_start: float,
    build: Callable[..., Any],
    context: Callable[..., Any],
    by_expert: Any,
) -> None:
    router = build(TopPConfig(p_start=p_start), num_experts, top_k)
    used = []
    for _ in range(150):
        step = mean_used(router, context, by_expert)
        router.update(step)
        used.append(float(step.counts_E.sum() / step.tokens))
    assert abs(used[0] / top_k - 1) > 0.3
    assert sum(used[-30:]) / 30 == pytest.approx(top_k, rel=0.05)


def test_the_controller_by_hand(build: Callable[..., Any]) -> None:
    router = build(TopPConfig(p_start=0.5, proportional=0.05, integral=0.02), 4, 2)
    router.update(RoutedStep(torch.tensor([10.0, 10, 5, 5]), torch.tensor(10.0), None, STILL))  # 3: error -1/2
    assert router.p.item() == pytest.approx(0.5 - 0.05 * 0.5 - 0.02 * 0.5)
    router.update(RoutedStep(torch.tensor([5.0, 5, 2, 3]), torch.tensor(10.0), None, STILL))  # 1.5: error 1/4
    assert router.p.item() == pytest.approx(0.465 + 0.05 * 0.75 + 0.02 * 0.25)
    for _ in range(200):
        router.update(RoutedStep(torch.tensor([1.0, 0, 0, 0]), torch.tensor(10.0), None, STILL))
    assert router.p.item() < 1
    router.update(RoutedStep(torch.tensor([9.0, 9, 9, 9]), torch.tensor(10.0), None, STILL))
    assert router.p.item() < 0.95, "nothing wound up"


def test_without_gains_p_is_fixed(build: Callable[..., Any]) -> None:
    router = build(TopPConfig(p_start=0.4, proportional=0, integral=0), 4, 2)
    for used in (40.0, 3.0):
        router.update(RoutedStep(torch.full((4,), used), torch.tensor(40.0), None, STILL))
    assert router.p.item() == pytest.approx(0.4)


def test_the_entropy_penalty(build: Callable[..., Any], context: Callable[..., Any]) -> None:
    assert build(TopPConfig())(X, context(7, 9)).penalty_N is None
    routing = build(TopPConfig(entropy_weight=0.3))(X, context(7, 9))
    expected = 0.3 * torch.special.entr(routing.probs_NE.detach()).sum(1)
    torch.testing.assert_close(routing.penalty_N, expected, rtol=1e-4, atol=1e-5)
