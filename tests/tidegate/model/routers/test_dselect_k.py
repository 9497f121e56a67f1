"""DSelect-k: its codes, its two regularisers, and how it hardens.

Letters: N rows, D width, E experts, K selectors, b bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tidegate.model.routers.dselect_k import DSelectKConfig
from tidegate.model.routers.smooth import smooth_step

SIZES = [2, 3, 6, 7, 8, 33]
X = torch.randn(63, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("gamma", [0.1, 1.0, 7.0])
def test_the_smooth_step_is_a_cubic_between_its_ends(gamma: float) -> None:
    t = torch.linspace(-gamma, gamma, 2001, dtype=torch.float64, requires_grad=True)
    value = smooth_step(t, gamma)
    (slope,) = torch.autograd.grad(value.sum(), t)
    cubic = -2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5
    expected = torch.where(t <= -gamma / 2, 0.0, torch.where(t >= gamma / 2, 1.0, cubic))
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    assert (slope.diff().abs() < 0.02 / gamma).all(), "the derivative is continuous"
    assert slope.max() == pytest.approx(1.5 / gamma)
    fp32 = smooth_step(t.detach().float(), gamma)
    assert fp32.min() >= 0, "rounding must not make a probability negative"
    assert fp32.max() <= 1


def test_codes_by_hand(build: Callable[..., Any], context: Callable[..., Any], by_expert: Any) -> None:
    """Six experts, three bits, two selectors: expert 5 = 101 in binary has bits 0 and 2 set."""
    config = DSelectKConfig(gamma=2.0, entropy_weight=0.3, unreachable_weight=0.7)
    router = build(config, 6, 2)
    with torch.no_grad():
        router.code.normal_(0, 0.08)
    x = X.double()
    z = smooth_step((x @ router.code.detach().double().T).view(63, 2, 3), 2.0)
    shares = torch.ones(63, 2, 6, dtype=torch.float64)
    for expert in range(6):
        for bit in range(3):
            shares[:, :, expert] *= z[:, :, bit] if expert >> bit & 1 else 1 - z[:, :, bit]
    torch.testing.assert_close(router.selectors(X).double(), shares, rtol=1e-4, atol=1e-6)
    mixing = (x @ router.mixing.detach().double().T).softmax(1)
    gate = (mixing[:, :, None] * shares).sum(1)
    assert gate.sum(1).min() < 0.9, "some mass is on the two codes that name nobody"
    gate = gate / gate.sum(1, keepdim=True)
    routing = router(X, context(7, 9))
    weights, chosen = by_expert(routing)
    torch.testing.assert_close(weights.double(), gate, rtol=1e-4, atol=1e-6)
    assert torch.equal(chosen, gate > 0)
    entropy = -(shares * (shares + 1e-6).log()).sum(-1).mean(1)
    reachable = (1 / shares.sum(-1)).mean(1)
    torch.testing.assert_close(routing.penalty_N.double(), 0.3 * entropy + 0.7 * reachable, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_experts", SIZES)
def test_sums(num_experts: int, build: Callable[..., Any], context: Callable[..., Any], by_expert: Any) -> None:
    router = build(DSelectKConfig(), num_experts, 2)
    for scale in (1.0, 30.0):
        router.code.data.mul_(scale)
        shares = router.selectors(X)
        assert shares.min() >= 0
        if num_experts in (2, 8):
            torch.testing.assert_close(shares.sum(-1), torch.ones(63, 2), rtol=0, atol=1e-6)
        else:
            assert shares.sum(-1).max() <= 1 + 1e-6
        weights, _ = by_expert(router(X, context(7, 9)))
        assert (weights.sum(1) <= 1 + 1e-5).all()
        used = shares.sum(-1).amin(1) > 1e-5  # with less, the weights vanish as the mass does
        assert used.float().mean() > 0.4
        torch.testing.assert_close(weights.sum(1)[used], torch.ones(int(used.sum())), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("width", "gamma"), [(8, 1.0), (1000, 1.0), (4096, 0.01), (64, 10.0)])
def test_the_start_is_dense_at_any_width(
    width: int, gamma: float, build: Callable[..., Any], context: Callable[..., Any], by_expert: Any
) -> None:
    router = build(DSelectKConfig(gamma=gamma), 16, 2, width=width, std=0.02)
    x = torch.randn(99, width)
    x = x / x.square().mean(1, keepdim=True).sqrt()
    assert router.selectors(x).min() > 0.2 / 16
    assert by_expert(router(x, context(11, 9)))[1].all()


def train(router: Any, context: Any, steps: int, learning_rate: float = 0.3) -> None:
    optimizer = torch.optim.SGD([router.code], lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        router(X, context(7, 9)).penalty_N.mean().backward()
        optimizer.step()


def test_the_entropy_hardens_selectors_into_at_most_k_experts(
    build: Callable[..., Any], context: Callable[..., Any], by_expert: Any
) -> None:
    router = build(DSelectKConfig(entropy_weight=1.0), 8, 2)
    assert by_expert(router(X, context(7, 9)))[1].all()
    train(router, context, 300)
    _, chosen = by_expert(router(X, context(7, 9)))
    assert chosen.sum(1).float().mean() < 3
    with torch.no_grad():
        router.code.mul_(100)
    weights, chosen = by_expert(router(X, context(7, 9)))
    assert chosen.sum(1).max() <= 2
    assert chosen.sum(1).min() >= 1
    torch.testing.assert_close(weights.sum(1), torch.ones(63), rtol=0, atol=1e-6)


def test_mass_leaves_the_codes_that_name_nobody(build: Callable[..., Any], context: Callable[..., Any]) -> None:
    """Six experts of eight codes: a quarter of the mass is lost at the start, next to none after training."""
    router = build(DSelectKConfig(entropy_weight=0.0, unreachable_weight=1.0), 6, 2)
    assert router.selectors(X).sum(-1).mean().item() == pytest.approx(0.75, abs=0.05)
    train(router, context, 300, learning_rate=0.03)
    assert router.selectors(X).sum(-1).mean() > 0.97
    assert router.selectors(X).sum(-1).min() > 0.8


def test_a_row_whose_codes_name_nobody_uses_no_expert_and_stays_finite(
    build: Callable[..., Any], context: Callable[..., Any], by_expert: Any
) -> None:
    router = build(DSelectKConfig(), 6, 2)
    with torch.no_grad():
        router.code.zero_()
        router.code[:, 0] = torch.tensor([0.0, 9, 9] * 2)  # bits 1 and 2: codes 6 and 7
    x = X.clone()
    x[:, 0] = 1.0
    routing = router(x, context(7, 9))
    weights, chosen = by_expert(routing)
    assert not chosen.any()
    assert not weights.any()
    (routing.penalty_N.sum() + routing.weights_NS.sum()).backward()
    assert router.code.grad.isfinite().all()


def test_a_small_gamma_hardens_early(build: Callable[..., Any], context: Callable[..., Any], by_expert: Any) -> None:
    numbers = []
    for gamma in (10.0, 1.0, 0.1):
        router = build(DSelectKConfig(gamma=gamma), 8, 2)
        with torch.no_grad():
            router.code.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        numbers.append(float(by_expert(router(X, context(7, 9)))[1].sum(1).float().mean()))
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] > 7.5
    assert numbers[-1] < 3
