"""Dense-to-sparse routing: the schedule, what it does to the number of experts, and the noise.

Letters: N rows, D width, E experts, K chosen experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tidegate.model.routers.dense_to_sparse import DenseToSparseConfig

X = torch.randn(63, 24, generator=torch.Generator().manual_seed(0))


def test_temperature_by_formula() -> None:
    exponential = DenseToSparseConfig(anneal_tokens=1000, tau_start=2.0, tau_end=0.5)
    linear = exponential.model_copy(update={"schedule": "linear"})
    for tokens, part in ((0, 0.0), (1, 0.001), (250, 0.25), (777, 0.777), (1000, 1.0), (5000, 1.0)):
        assert exponential.temperature(tokens) == pytest.approx(2.0 * math.exp(math.log(0.25) * part), rel=1e-12)
        assert linear.temperature(tokens) == pytest.approx(2.0 - 1.5 * part, rel=1e-12)


def test_a_temperature_that_does_not_fall_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tau_end=0\.3 is not below tau_start=0\.3"):
        DenseToSparseConfig(anneal_tokens=10, tau_start=0.3)


@pytest.mark.parametrize("schedule", ["exponential", "linear"])
@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("activation", ["none", "tanh", "gelu", "sigmoid"])
def test_experts_and_entropy_fall_with_the_schedule(
    activation: Any,
    noise: float,
    schedule: Any,
    build: Callable[..., Any],
    context: Callable[..., Any],
    by_expert: Callable[..., Any],
) -> None:
    """On fixed logits and draws: dense at the start, monotone in between, exactly K from the last token on."""
    config = DenseToSparseConfig(
        anneal_tokens=1000, tau_start=5.0, tau_end=0.02, noise=noise, activation=activation, schedule=schedule
    )
    router = build(config)
    numbers, entropies = [], []
    for tokens in (1, 100, 300, 500, 700, 900, 970, 999):
        weights, chosen = by_expert(router(X, context(7, 9, tokens=tokens)))
        torch.testing.assert_close(weights.sum(1), torch.ones(63), rtol=0, atol=1e-6)
        assert chosen.sum(1).min() >= 3
        numbers.append(float(chosen.sum(1).float().mean()))
        entropies.append(float(torch.special.entr(weights.detach()).sum(1).mean()))
    assert numbers[0] == 7
    assert numbers[-1] < 5
    assert numbers == sorted(numbers, reverse=True)
    assert entropies == sorted(entropies, reverse=True)
    assert len(set(entropies)) == len(entropies)
    end = router(X, context(7, 9, tokens=1000))
    assert end.chosen_NS is None
    assert end.experts_NS.shape == (63, 3)
    evaluated = router.eval()(X, context(7, 9, tokens=1))
    assert torch.equal(evaluated.weights_NS, end.weights_NS)


@pytest.mark.parametrize("activation", ["none", "tanh", "gelu", "sigmoid"])
def test_the_gate_by_formula(
    activation: str, build: Callable[..., Any], context: Callable[..., Any], by_expert: Callable[..., Any]
) -> None:
    config = DenseToSparseConfig(anneal_tokens=1000, noise=0.0, activation=activation, cutoff=0.1)
    router = build(config)
    weights, chosen = by_expert(router(X, context(7, 9, tokens=500)))
    linear = X.double() @ router.weight.detach().double().T
    activated = {"none": linear, "tanh": linear.tanh(), "gelu": F.gelu(linear), "sigmoid": linear.sigmoid()}[activation]
    y = (activated / (2.0 * 0.3) ** 0.5).softmax(-1)  # half way of an exponential schedule: the geometric mean
    expected = y > 0.1
    expected.scatter_(1, y.topk(3).indices, True)
    assert torch.equal(chosen, expected)
    kept = y * expected
    torch.testing.assert_close(weights.double(), kept / kept.sum(1, keepdim=True), rtol=1e-5, atol=1e-7)


def test_the_temperature_is_exact_after_a_resume(build: Callable[..., Any], context: Callable[..., Any]) -> None:
    """Nothing but the weight is state: a router that never saw the first steps routes as one that did."""
    config = DenseToSparseConfig(anneal_tokens=1000)
    router = build(config)
    assert list(router.state_dict()) == ["weight"]
    for step in range(1, 5):
        router(X, context(7, 9, step=step, tokens=100 * step))
    fresh = build(config, seed=9)
    fresh.load_state_dict(router.state_dict())
    one, other = (r(X, context(7, 9, step=5, tokens=500)) for r in (router, fresh))
    assert all(torch.equal(a, b) for a, b in zip(one[:5], other[:5], strict=True))


def test_the_noise_is_gumbel(build: Callable[..., Any], context: Callable[..., Any]) -> None:
    """The largest of logits + Gumbel noise is a draw from their softmax, at any temperature."""
    router = build(DenseToSparseConfig(anneal_tokens=1000))
    routing = router(X[:1].expand(20_000, 24), context(20, 1000, tokens=300))
    frequency = torch.bincount(routing.weights_NS.argmax(1), minlength=7) / 20_000
    p = routing.logits_NE[0].softmax(-1)
    assert ((frequency - p).abs() < 4 * (p * (1 - p) / 20_000).sqrt()).all()
    assert not torch.equal(router(X, context(7, 9, step=1)).weights_NS, router(X, context(7, 9, step=2)).weights_NS)


def test_the_balance_loss_sees_no_noise(build: Callable[..., Any], context: Callable[..., Any]) -> None:
    noisy, quiet = (build(DenseToSparseConfig(anneal_tokens=1000, noise=noise)) for noise in (1.0, 0.0))
    one, other = noisy(X, context(7, 9)), quiet(X, context(7, 9))
    assert torch.equal(one.probs_NE, other.probs_NE)
    assert not torch.allclose(one.weights_NS, other.weights_NS)


def test_gradients_of_the_soft_phase_are_those_of_autograd(
    build: Callable[..., Any], context: Callable[..., Any]
) -> None:
    """With every expert in use and no noise the gate is a softmax."""
    router = build(DenseToSparseConfig(anneal_tokens=1000, tau_start=5.0, noise=0.0, cutoff=1e-6, activation="tanh"))
    upstream = torch.randn(63, 7)
    router(X, context(7, 9, tokens=0)).weights_NS.backward(upstream)
    weight = router.weight.detach().double().requires_grad_()
    ((X.double() @ weight.T).tanh() / 5).softmax(-1).backward(upstream.double())
    torch.testing.assert_close(router.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-6)
