"""ReLU routing: the L1 in the form of a balance loss, and its coefficient's controller.

Letters: N rows, E experts, K mean experts a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tidegate.model.balance import BalanceConfig, Balancer
from tidegate.model.clock import STILL, Clock
from tidegate.model.moe import MoEConfig, RoutingStats, routing_stats
from tidegate.model.routers import RoutedStep
from tidegate.model.routers.relu import ReluConfig


def told(counts: list[float], tokens: float) -> RoutedStep:
    return RoutedStep(torch.tensor(counts), torch.tensor(tokens), None, STILL)


def stacked(stats: RoutingStats) -> RoutingStats:
    """One layer's statistics as those of a model of one layer."""
    return RoutingStats(*(None if field is None else field[None] for field in stats))


def balancer_for(router_config: ReluConfig, **balance: Any) -> Balancer:
    moe = MoEConfig(num_experts=7, top_k=2, expert_dim=8, router=router_config)
    return Balancer(BalanceConfig(z_loss_weight=0, **balance), lambda tensor: None, 1, 1, moe)


def test_the_coefficient_moves_by_exactly_the_multiplier(build: Callable[..., Any]) -> None:
    router = build(ReluConfig(l1_start=1e-8, multiplier=1.2), 4, 2)
    assert router.l1.item() == pytest.approx(1e-8)
    router.update(told([9, 5, 4, 3], 10.0))  # 2.1 experts a token
    assert router.l1.item() == pytest.approx(1.2e-8, rel=1e-6)
    router.update(told([6, 6, 4, 3], 10.0))  # 1.9
    assert router.l1.item() == pytest.approx(1e-8, rel=1e-6)
    router.update(told([6, 6, 5, 3], 10.0))  # 2.0
    assert router.l1.item() == pytest.approx(1e-8, rel=1e-6)
    router.update(told([0, 0, 0, 0], 0.0))  # a step without counted tokens used fewer
    assert router.l1.item() == pytest.approx(1e-8 / 1.2, rel=1e-6)


def test_the_coefficient_stays_fp32_under_bf16(build: Callable[..., Any]) -> None:
    router = build(ReluConfig()).to(torch.bfloat16)
    assert router.l1.dtype == torch.float32
    assert router.weight.dtype == torch.bfloat16


def test_experts_and_weights_are_those_of_positive_logits(
    build: Callable[..., Any], context: Callable[..., Any], by_expert: Any
) -> None:
    router, x = build(ReluConfig()), torch.randn(63, 24)
    x[3] = 0.0  # no logit is positive: a row without experts
    weights, chosen = by_expert(router(x, context(7, 9)))
    exact = x.double() @ router.weight.detach().double().T
    assert torch.equal(chosen, exact > 0)
    assert not chosen[3].any()
    torch.testing.assert_close(weights.double(), exact.clamp(min=0), rtol=1e-5, atol=1e-6)


def test_the_l1_by_hand(build: Callable[..., Any], context: Callable[..., Any]) -> None:
    """lambda E sum_i f_i mean(R_i): value, and gradient lambda E f_i / T where the logit is positive."""
    config = ReluConfig(l1_start=0.3)
    router, x, counted = build(config, 7, 2), torch.randn(63, 24), torch.rand(7, 9) < 0.7
    batch = context(7, 9, counted_BT=counted)
    balancer = balancer_for(config, loss_weight=123.0)  # replaced by the router's own
    balancer.begin_step()
    tokens = counted.sum().float()
    stats = stacked(routing_stats(router(x, batch), batch, ReluConfig.capabilities))
    losses = balancer.losses(stats, counted.sum(1).float(), tokens)
    losses.total.backward()
    weight = router.weight.detach().double().requires_grad_()
    gates = (x.double() @ weight.T).clamp(min=0)[counted.flatten()]
    f = (gates > 0).sum(0) / (gates > 0).sum()
    lbl = 7 * (f * gates.mean(0)).sum()
    (0.3 * lbl).backward()
    assert losses.load_balancing.item() == pytest.approx(0.3 * lbl.item(), rel=1e-5)
    assert losses.lbl.item() == pytest.approx(lbl.item(), rel=1e-5)
    torch.testing.assert_close(router.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-7)


def test_the_l1_acts_without_a_loss_weight() -> None:
    assert balancer_for(ReluConfig(), loss_weight=0.0).needs_counting_pass is False
    moe = MoEConfig(num_experts=7, top_k=2, expert_dim=8, router=ReluConfig())
    assert Balancer(BalanceConfig(loss_weight=0.0), lambda tensor: None, 1, 2, moe).needs_counting_pass


def test_the_mean_number_of_experts_settles_near_k(build: Callable[..., Any], context: Callable[..., Any]) -> None:
    """Against a pull that opens gates: from 3.5 of 7 experts to 2, held there."""
    config = ReluConfig(l1_start=1e-3)
    router, generator = build(config, 7, 2), torch.Generator().manual_seed(0)
    balancer = balancer_for(config)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.3)
    counted = torch.ones(7, 9, dtype=torch.bool)
    active = []
    for step in range(1, 301):
        x = torch.randn(63, 24, generator=generator) + 0.5
        batch = context(7, 9)
        routing = router(x, batch)
        balancer.begin_step()
        losses = balancer.losses(
            stacked(routing_stats(routing, batch, ReluConfig.capabilities)), counted.sum(1).float(), torch.tensor(63.0)
        )
        optimizer.zero_grad()
        (losses.total - 0.05 * routing.probs_NE.sum(1).clamp(max=3).mean()).backward()
        optimizer.step()
        (told_step,) = balancer.routed_layers(Clock(step, step, 0))
        router.update(told_step)
        active.append(float(told_step.counts_E.sum() / 63))
    assert active[0] > 3
    assert sum(active[-100:]) / 100 == pytest.approx(2.0, rel=0.15)
