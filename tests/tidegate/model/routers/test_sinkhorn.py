"""Selective Sinkhorn routing: the plan, when it is used, and what it does to a planted imbalance.

Letters: N rows, D width, E experts, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tidegate.model.clock import Clock
from tidegate.model.initialisation import Draw
from tidegate.model.moe import MoE, MoEConfig
from tidegate.model.routers import RouterContext, SoftmaxTopKConfig
from tidegate.model.routers.sinkhorn import SinkhornConfig, transport_plan

ALWAYS = SinkhornConfig(probability=1.0)


def by_scaling(cost_NE: torch.Tensor, xi: float, iterations: int = 2000) -> torch.Tensor:
    """The textbook iteration on the kernel itself, in fp64."""
    N, E = cost_NE.shape
    kernel, u = (cost_NE.double() / xi).exp(), torch.ones(N, dtype=torch.float64)
    for _ in range(iterations):
        v = N / E / (kernel.T @ u)
        u = 1 / (kernel @ v)
    return u[:, None] * kernel * v


def test_the_log_domain_plan_is_that_of_naive_scaling() -> None:
    cost = torch.randn(4, 3)
    plan = transport_plan(cost, torch.ones(4, dtype=torch.bool), xi=0.5, tolerance=1e-6, max_iterations=500)
    torch.testing.assert_close(plan.double(), by_scaling(cost, 0.5), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("rows", "num_experts"), [(1, 2), (17, 5), (63, 7), (1000, 33)])
def test_marginals(rows: int, num_experts: int) -> None:
    cost = torch.randn(rows, num_experts)
    plan = transport_plan(cost, torch.ones(rows, dtype=torch.bool), xi=0.5, tolerance=1e-4, max_iterations=500)
    torch.testing.assert_close(plan.sum(dim=1), torch.ones(rows), rtol=0, atol=1e-5)
    # The tolerance is of the logarithm, so relative.
    torch.testing.assert_close(plan.sum(dim=0), torch.full((num_experts,), rows / num_experts), rtol=1.01e-4, atol=0)


def test_the_plan_is_the_optimum_and_not_just_balanced() -> None:
    """Entropy-regularised value: no feasible direction (a 2 x 2 exchange keeps all sums) improves it."""
    cost = torch.randn(6, 4, dtype=torch.float64)
    plan = transport_plan(cost, torch.ones(6, dtype=torch.bool), xi=0.5, tolerance=1e-12, max_iterations=2000)

    def value(pi: torch.Tensor) -> float:
        return float((pi * cost).sum() - 0.5 * (pi * pi.log()).sum())

    for _ in range(50):
        rows, columns = torch.randperm(6)[:2], torch.randperm(4)[:2]
        exchange = torch.zeros_like(plan)
        exchange[rows[:, None], columns] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
        assert value(plan + 1e-4 * exchange) < value(plan)


def test_the_gradient_of_the_plan_is_that_of_its_iteration() -> None:
    cost = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    counted = torch.tensor([True, True, False, True, True])

    def plan(c: torch.Tensor) -> torch.Tensor:
        return transport_plan(c, counted, xi=0.7, tolerance=1e-14, max_iterations=9)

    assert torch.autograd.gradcheck(plan, cost)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (7, 3), (7, 7), (33, 8)])
def test_evaluation_is_bit_equal_to_top_k(
    num_experts: int, top_k: int, build: Callable[..., Any], context: Callable[..., Any]
) -> None:
    router, plain = (build(config, num_experts, top_k) for config in (ALWAYS, SoftmaxTopKConfig()))
    x, batch = torch.randn(63, 24), context(7, 9)
    trained = router(x, batch)
    evaluated, expected = router.eval()(x, batch), plain.eval()(x, batch)
    for one, other in zip(evaluated[:4], expected[:4], strict=True):
        assert torch.equal(one, other)
    if top_k < num_experts:
        assert not torch.equal(trained.experts_NS, evaluated.experts_NS)


def test_without_a_training_clock_nothing_is_random(build: Callable[..., Any], context: Callable[..., Any]) -> None:
    router, x = build(ALWAYS), torch.randn(63, 24)
    assert torch.equal(router(x, context(7, 9, step=0)).weights_NS, router.eval()(x, context(7, 9)).weights_NS)


def test_the_branch_hangs_on_seed_step_and_layer_alone(build: Callable[..., Any], context: Callable[..., Any]) -> None:
    config = SinkhornConfig(probability=0.3)
    layers = [build(config, layer=layer) for layer in range(4)]

    def branches(**changes: Any) -> list[bool]:
        seed = changes.pop("seed", 0)
        return [r.by_plan(context(2, 3, step=s, seed=seed, **changes)) for s in range(1, 501) for r in layers]

    first = branches()
    share = sum(first) / len(first)
    assert share == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / len(first)) ** 0.5)
    assert branches(sequences_B=torch.tensor([5, 6]), tokens=999) == first
    assert [build(config, layer=layer, seed=7).by_plan(context(1, 1, step=3)) for layer in range(4)] == first[8:12]
    assert branches(seed=1) != first
    by_layer = torch.tensor(first).view(500, 4)
    assert not torch.equal(by_layer[:, 0], by_layer[:, 1])
    assert not any(build(SinkhornConfig(probability=0.0)).by_plan(context(1, 1, step=s)) for s in range(1, 200))


@pytest.mark.parametrize("cost", ["logits", "softmax"])
def test_padding_keeps_its_native_route_and_disturbs_nobody(
    cost: Any, build: Callable[..., Any], context: Callable[..., Any], by_expert: Callable[..., Any]
) -> None:
    router = build(SinkhornConfig(probability=1.0, cost=cost, xi=0.3 if cost == "logits" else 0.05))
    x, counted = torch.randn(63, 24), torch.rand(7, 9) < 0.6
    batch, kept = context(7, 9, counted_BT=counted), counted.flatten()
    weights, _ = by_expert(router(x, batch))
    native, _ = by_expert(router.eval()(x, batch))
    assert torch.equal(weights[~kept], native[~kept])
    assert not torch.allclose(weights[kept], native[kept])
    other = torch.where(kept[:, None], x, 10 * torch.randn(63, 24))
    assert torch.equal(by_expert(router.train()(other, batch))[0][kept], weights[kept])
    nobody = router(x, context(7, 9, counted_BT=torch.zeros(7, 9, dtype=torch.bool)))
    assert torch.equal(by_expert(nobody)[0], native)


def test_the_plan_step_takes_the_largest_entries_renormalised(
    build: Callable[..., Any], context: Callable[..., Any]
) -> None:
    router, x = build(ALWAYS), torch.randn(63, 24)
    routing = router(x, context(7, 9))
    plan = by_scaling(routing.logits_NE.detach(), 0.5)
    largest = plan.topk(3, dim=1)
    assert torch.equal(routing.experts_NS, largest.indices)
    expected = largest.values / largest.values.sum(1, keepdim=True)
    torch.testing.assert_close(routing.weights_NS.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_gradient_flows_through_the_plan_iff_asked(
    scale: float, through: bool, build: Callable[..., Any], context: Callable[..., Any]
) -> None:
    """A scale of 1e4 saturates every row: the plan is one-hot, its gradient small, and nothing becomes NaN."""
    router = build(SinkhornConfig(probability=1.0, grad_through_plan=through))
    weights = router(scale * torch.randn(63, 24), context(7, 9)).weights_NS
    assert weights.isfinite().all()
    weights.backward(torch.randn_like(weights))
    assert router.weight.grad.isfinite().all()
    if scale == 1.0:
        assert bool(router.weight.grad.abs().amax(dim=1).min() > 1e-4) is through
    if not through:
        assert not router.weight.grad.any()


def test_steps_without_the_plan_have_noisy_logits(build: Callable[..., Any], context: Callable[..., Any]) -> None:
    router = build(SinkhornConfig(probability=0.0, noise=0.5), num_experts=7, top_k=7).requires_grad_(False)
    x = torch.randn(1, 24).expand(20_000, 24)
    routing = router(x, context(20, 1000))
    ordered = torch.zeros_like(routing.probs_NE).scatter(1, routing.experts_NS, routing.weights_NS)
    # log softmax of (logits + noise), relative to its mean, is logits + noise relative to theirs.
    centred = lambda t: t - t.mean(dim=1, keepdim=True)  # noqa: E731
    noise = centred(ordered.log()) - centred(routing.logits_NE)
    expected_std = 0.5 * (6 / 7) ** 0.5
    assert noise.mean(dim=0).abs().max() < 5 * 0.5 / 20_000**0.5
    torch.testing.assert_close(noise.std(dim=0), torch.full((7,), expected_std), rtol=0.03, atol=0)
    fourth = (noise / noise.std()).pow(4).mean()
    assert fourth == pytest.approx(3.0, abs=0.1), "a Gaussian's"
    again, later = router(x, context(20, 1000)), router(x, context(20, 1000, step=2))
    assert torch.equal(again.weights_NS, routing.weights_NS)
    assert not torch.equal(later.weights_NS, routing.weights_NS)
    quiet = build(SinkhornConfig(probability=0.0, noise=0.0), num_experts=7, top_k=7)
    assert torch.equal(quiet(x, context(20, 1000)).weights_NS, router.eval()(x, context(20, 1000)).weights_NS)


def load_cv_after_training(probability: float) -> float:
    """std / mean of the expert loads in evaluation, from a start where two experts of eight get nearly all tokens."""
    config = MoEConfig(num_experts=8, top_k=2, expert_dim=8, router=SinkhornConfig(probability=probability, noise=0.1))
    moe = MoE(config, 16, std=0.3, out_std=0.3)
    for name, module in moe.named_modules():
        if hasattr(module, "init_weights"):
            module.init_weights(Draw(0, name))
    with torch.no_grad():
        moe.router.weight[:2, 0] += 3.0  # input 0 is always 1
    generator = torch.Generator().manual_seed(0)
    centres, targets = (3 * torch.randn(8, size, generator=generator) for size in (15, 16))

    def sample() -> tuple[torch.Tensor, torch.Tensor]:
        cluster = torch.randint(0, 8, (1, 192), generator=generator)
        x = centres[cluster] + 0.1 * torch.randn(1, 192, 15, generator=generator)
        return torch.cat([torch.ones(1, 192, 1), x / 3], dim=-1), targets[cluster] / 3

    counted = torch.ones(1, 192, dtype=torch.bool)
    optimizer = torch.optim.Adam(moe.parameters(), lr=3e-2)
    for step in range(1, 201):
        x, y = sample()
        mixed, _ = moe(x, RouterContext.alone(counted)._replace(clock=Clock(step, step, 0)))
        optimizer.zero_grad()
        (mixed - y).square().mean().backward()
        optimizer.step()
    moe.eval()
    loads = torch.stack([moe(sample()[0], RouterContext.alone(counted))[1].counts_BE[0] for _ in range(5)]).sum(0)
    return float(loads.std(unbiased=False) / loads.mean())


def test_a_planted_imbalance_is_smaller_than_under_top_k_with_the_same_noise() -> None:
    assert load_cv_after_training(0.3) < 0.8 * load_cv_after_training(0.0)


def test_the_plan_is_blind_to_a_constant_for_an_expert() -> None:
    """Why p = 1 cannot repair an imbalance that evaluation shows: the plan's prices cancel it, and its gradient."""
    cost = torch.randn(63, 7, dtype=torch.float64, requires_grad=True)
    everyone = torch.ones(63, dtype=torch.bool)
    shift = 3 * torch.randn(7, dtype=torch.float64)
    plans = [transport_plan(c, everyone, xi=0.5, tolerance=1e-13, max_iterations=1000) for c in (cost, cost + shift)]
    torch.testing.assert_close(plans[1], plans[0], rtol=1e-9, atol=1e-12)
    (gradient,) = torch.autograd.grad(plans[0], cost, torch.randn(63, 7, dtype=torch.float64))
    assert gradient.abs().max() > 1e-2
    assert gradient.sum(dim=0).abs().max() < 1e-9
