"""What each method of gating units promises on its own.

Letters: U units, B sequences, T tokens, H heads, F hidden width, E experts, R rows, n units of a row.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from tidegate.model.clock import Clock
from tidegate.model.decoder import Decoder, ModelConfig, materialize
from tidegate.model.unit_gates.continuation import Continuation
from tidegate.model.unit_gates.dynamic_sparse import DynamicSparse
from tidegate.model.unit_gates.export import export
from tidegate.model.unit_gates.hard_concrete import hard_concrete, probability_not_zero
from tidegate.model.unit_gates.knapsack import Knapsack, fractional_knapsack
from tidegate.model.unit_gates.nested import Nested
from tidegate.model.unit_gates.polarization import Polarization
from tidegate.model.unit_gates.random_mask import erk_densities
from tidegate.model.unit_gates.reinforce import Reinforce, least_variance_baseline, score_function_gradient
from tidegate.model.unit_gates.straight_through import straight_through
from tidegate.model.unit_gates.strengths import strengths

CPU = torch.device("cpu")
DENSE = {"kind": "dense", "hidden_dim": 48}
MIXTURE = {"kind": "moe", "num_experts": 8, "top_k": 2, "expert_dim": 16, "shared": {"num": 1}}
STEPS = 300


def build(method: dict[str, Any], over: tuple[str, ...] = ("heads", "channels"), **changes: Any) -> Decoder:
    fixed = method["kind"] in ("random", "nested")
    units = {"over": over, "keep": changes.pop("keep", 0.5), "method": method}
    fields = {
        "vocab_size": 31,
        "width": 24,
        "num_layers": 2,
        "init_std": 0.1,
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
        "ffn": DENSE,
        "units": units | ({} if fixed else {"freeze_tokens": 1000 * STEPS}),
    }
    config = ModelConfig.model_validate(fields | changes)
    return materialize(lambda: Decoder(config), CPU, 0)


def gates_of(model: Decoder) -> Any:
    assert model.units is not None
    return model.units


def alone(_: torch.Tensor) -> None:
    """The all-reduce of a world of one."""


def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arithmetic sequences: the stride has to be found in the context."""
    generator = torch.Generator().manual_seed(step)
    start, stride = (torch.randint(low, high, (8, 1), generator=generator) for low, high in ((0, 31), (1, 4)))
    sequences = (start + stride * torch.arange(18)) % 31
    return sequences[:, :-1], sequences[:, 1:], torch.ones(8, 17, dtype=torch.bool)


def clock_of(step: int) -> Clock:
    return Clock(step, 1000 * step, 0)


def train(model: Decoder, steps: int, learning_rate: float = 1e-2) -> list[float]:
    """Losses of AdamW steps; the mask is not frozen before step `STEPS`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(1, steps + 1):
        output = model(*batch_of(step), clock=clock_of(step))
        loss = output.nll / (8 * 17)
        (loss + output.unit_penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
        gates_of(model).update(model, clock_of(step), loss.detach(), alone)
        losses.append(loss.item())
    return losses


# --- budgets


@pytest.mark.parametrize("over", [("heads", "channels"), ("experts",)], ids="-".join)
@pytest.mark.parametrize("kind", ["straight_through", "hard_concrete", "continuation", "reinforce", "polarization"])
def test_the_multiplier_brings_the_expected_cost_to_the_budget(kind: str, over: tuple[str, ...]) -> None:
    """From nearly all units; and the task is learned meanwhile (ln 31 = 3.4 at the start)."""
    model = build({"kind": kind}, over, ffn=MIXTURE if over == ("experts",) else DENSE)
    gates = gates_of(model)
    start = float(gates.expected_cost(clock_of(1)).detach()) / gates.units.total_cost
    losses = train(model, STEPS - 1)
    share = float(gates.expected_cost(clock_of(STEPS - 1)).detach()) / gates.units.total_cost
    assert start > (0.6 if kind == "continuation" else 0.8)
    assert abs(share - 0.5) < 0.07
    assert sum(losses[-20:]) / 20 < (1.0 if kind == "reinforce" else 0.3)


def test_the_multiplier_does_not_wind_up_on_the_way_to_a_small_budget() -> None:
    """Adding up all of the excess took the share from 0.97 to 0.10, where it stayed."""
    model = build({"kind": "hard_concrete"}, keep=0.2)
    gates = gates_of(model)
    excess = []

    def look(*_: Any) -> None:
        excess.append(gates.excess(gates.probabilities(clock_of(1))).detach())

    gates.register_forward_hook(look)
    train(model, STEPS - 1)
    assert min(excess) > -0.07
    assert max(excess[STEPS // 2 :]) < 0.02


# --- straight-through


def straight_through_mean(loss: Any, a: float, estimator: Any) -> float:
    """The estimator's expectation, by enumeration of h."""
    logit = torch.tensor(a, dtype=torch.float64, requires_grad=True)
    p = torch.sigmoid(logit.detach())
    mean = 0.0
    for h, weight in ((torch.ones((), dtype=torch.float64), p), (torch.zeros((), dtype=torch.float64), 1 - p)):
        (gradient,) = torch.autograd.grad(loss(straight_through(h, logit, estimator)), logit)
        mean += float(weight * gradient)
    return mean


def true_gradient(loss: Any, a: float) -> float:
    logit = torch.tensor(a, dtype=torch.float64, requires_grad=True)
    p = torch.sigmoid(logit)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(p * loss(one) + (1 - p) * loss(zero), logit)
    return float(gradient)


def test_straight_through_has_the_wrong_sign_on_a_curved_loss() -> None:
    """L = (h - 0.3)^2 at a = -1: the estimator descends where the loss rises. A known defect, not ours to hide."""

    def loss(h: torch.Tensor) -> torch.Tensor:
        return (h - 0.3) ** 2

    assert true_gradient(loss, -1.0) == pytest.approx(0.079, abs=5e-4)
    assert straight_through_mean(loss, -1.0, "sigmoid") == pytest.approx(-0.012, abs=5e-4)
    assert straight_through_mean(loss, -1.0, "plain") == pytest.approx(-0.062, abs=5e-4)


@pytest.mark.parametrize("a", [-3.0, -1.0, 0.0, 2.0])
def test_straight_through_times_the_slope_is_exact_on_a_linear_loss(a: float) -> None:
    def loss(h: torch.Tensor) -> torch.Tensor:
        return 1.7 * h - 0.4

    assert straight_through_mean(loss, a, "sigmoid") == pytest.approx(true_gradient(loss, a), rel=1e-12)
    assert straight_through_mean(loss, a, "plain") == pytest.approx(1.7)


def test_bernoulli_gates_are_drawn_with_their_probability() -> None:
    gates = gates_of(build({"kind": "straight_through", "initial": 0.7}))
    h = torch.zeros(1, 1, 24)
    masks = torch.stack([gates.sample(h, clock_of(step))[0].detach() for step in range(1, 2001)])
    p = gates.probabilities(clock_of(1)).detach()
    assert masks.unique().tolist() == [0, 1]
    assert ((masks.mean(dim=0) - p).abs() < 5 * (p * (1 - p) / 2000).sqrt()).all()


# --- REINFORCE


def test_reinforce_is_unbiased_and_its_baseline_has_less_variance_than_the_mean() -> None:
    """Three gates and a loss with interactions, everything by enumeration of the eight masks, in fp64."""
    a_U = torch.tensor([-1.0, 0.5, 1.5], dtype=torch.float64, requires_grad=True)
    masks = torch.tensor(list(product((0.0, 1.0), repeat=3)), dtype=torch.float64)
    losses = 3 + (masks[:, 0] - 0.3) ** 2 + masks[:, 1] * masks[:, 2] - 0.7 * masks[:, 0] * masks[:, 2]
    p_U = a_U.sigmoid()
    weights = torch.where(masks > 0, p_U, 1 - p_U).prod(dim=1)
    (truth_U,) = torch.autograd.grad((weights * losses).sum(), a_U)
    p_U, weights = p_U.detach(), weights.detach()

    def moments(baseline_U: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        estimates = score_function_gradient(masks, p_U, losses[:, None], baseline_U)
        mean_U = (weights[:, None] * estimates).sum(dim=0)
        return mean_U, (weights[:, None] * (estimates - mean_U) ** 2).sum(dim=0)

    squares = (masks - p_U) ** 2 * weights[:, None]
    least_U = least_variance_baseline((squares * losses[:, None]).sum(dim=0), squares.sum(dim=0))
    mean_U = (weights * losses).sum().expand(3)
    variances = []
    for baseline_U in (least_U, mean_U, torch.zeros(3, dtype=torch.float64)):
        estimate_U, variance_U = moments(baseline_U)
        torch.testing.assert_close(estimate_U, truth_U, rtol=1e-9, atol=1e-12)
        variances.append(variance_U)
    assert (variances[0] < variances[1]).all()
    assert (variances[1] < variances[2]).all()
    for shift in (-0.1, 0.1):
        assert (moments(least_U + shift)[1] > variances[0]).all(), "no other baseline has less"


def test_reinforce_finds_the_units_that_the_loss_wants() -> None:
    """L counts the units that differ from a pattern of half the cost; no gradient is ever given."""
    model = build({"kind": "reinforce", "initial": 0.0, "rate": 0.1}, ("heads",))
    gates = gates_of(model)
    assert isinstance(gates, Reinforce)
    wanted_U = torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 0])
    for step in range(1, STEPS):
        loss = (gates.draw(clock_of(step)) != wanted_U).float().sum() + 7
        gates.update(model, clock_of(step), loss, alone)
    assert torch.equal(gates.hard_mask(), wanted_U)
    assert ((gates.logits_U > 1) == (wanted_U > 0)).all()
    p_U = gates.logits_U.sigmoid()
    # Lbar of a unit: E[(h - p)^2 L] weighs the rarer value more; here the others' errors and its own.
    others = 7 + torch.where(wanted_U > 0, 1 - p_U, p_U).sum()
    assert ((least_variance_baseline(gates.weighted_loss_U, gates.weight_U) - others).abs() < 2).all()


# --- hard concrete


@pytest.mark.parametrize("log_alpha", [-3.0, -1.0, 0.0, 2.0])
def test_hard_concrete_is_not_zero_with_the_formulas_probability(log_alpha: float) -> None:
    n = 400_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # quantiles: the error is 1 / n and not a sampling error
    z = hard_concrete(torch.tensor(log_alpha, dtype=torch.float64), u)
    assert z.min() == 0
    assert z.max() == 1, "both ends are hit exactly"
    assert ((z > 0) & (z < 1)).any()
    formula = float(probability_not_zero(torch.tensor(log_alpha, dtype=torch.float64)))
    assert float((z > 0).double().mean()) == pytest.approx(formula, abs=1e-5)


def test_hard_concrete_gates_come_back_from_their_limits() -> None:
    model = build({"kind": "hard_concrete", "initial": -12.0})
    gates = gates_of(model)
    assert gates.log_alpha_U.abs().max() <= 4.6052
    gates.budget_penalty(gates.probabilities(clock_of(1))).backward()
    assert (gates.parameter.grad < 0).all(), "below the budget every gate is pushed up"


# --- polarization


def test_polarization_drives_batch_means_to_the_ends() -> None:
    model = build({"kind": "polarization"})
    gates = gates_of(model)
    assert isinstance(gates, Polarization)
    train(model, 1)
    h = model.embedding(batch_of(0)[0])
    assert ((gates.sample(h, clock_of(1))[0].mean(dim=(0, 1)) - 0.5).abs() < 0.45).float().mean() > 0.5, "not yet"
    gates._seen.clear()
    train(model, STEPS - 1)
    gbar_U = torch.cat([gates.sample(model.embedding(batch_of(s)[0]), clock_of(1))[0] for s in range(8)]).mean((0, 1))
    assert ((gbar_U - 0.5).abs() > 0.45).float().mean() > 0.95
    gates._seen.clear()
    gates.freeze()
    assert ((gbar_U > 0.5) == (gates.hard_mask() > 0)).float().mean() > 0.95, "the hard mask is what the means say"


def test_polarization_does_not_see_later_tokens() -> None:
    model = build({"kind": "polarization", "initial": 0.0})
    tokens = batch_of(1)[0]
    other = tokens.clone()
    other[:, 9:] = (other[:, 9:] + 5) % 31
    masks = [gates_of(model).sample(model.embedding(t), clock_of(1))[0] for t in (tokens, other)]
    assert torch.equal(masks[0][:, :9], masks[1][:, :9])
    assert not torch.equal(masks[0][:, 9:], masks[1][:, 9:])


def test_the_penalty_of_polarization_is_the_derivative_of_its_formula() -> None:
    """At the running means: s sum w (1 - 2 gbar) + m + DAMPING v; the mean over micro-batches is the whole batch's."""
    gradients = []
    for cuts in (1, 4):
        model = build({"kind": "polarization", "initial": 0.1, "strength": 3.0})
        gates = gates_of(model)
        h = model.embedding(batch_of(1)[0]).detach()
        gates.mean_gate_U.copy_(torch.rand(gates.units.num, generator=torch.Generator().manual_seed(1)))
        gates.multiplier.fill_(0.3)
        for part in h.chunk(cuts):
            (gates.sample(part, clock_of(1))[1] / cuts).backward()
        gradients.append({name: p.grad for name, p in gates.named_parameters()})
        seen = torch.stack(gates._seen).mean(dim=0)
        before = gates.mean_gate_U.clone()
        gates.update(model, clock_of(1), torch.zeros(()), alone)
        torch.testing.assert_close(gates.mean_gate_U, 0.9 * before + 0.1 * seen)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)

    gbar_U = before.clone().requires_grad_()
    share_U = gates.units.costs(CPU) / gates.units.total_cost
    excess = (share_U * gbar_U).sum() - 0.5
    formula = (3.0 * share_U * gbar_U * (1 - gbar_U)).sum() + 0.3 * excess + 10.0 * excess**2 / 2
    (slope_U,) = torch.autograd.grad(formula, gbar_U)
    logits_BTU = torch.nn.functional.rms_norm(h, (24,)) @ gates.projection.view(24, -1) @ gates.loading.view(4, -1)
    p_BTU = (logits_BTU + gates.logits_U).sigmoid()
    expected = 10.0 * slope_U * (p_BTU * (1 - p_BTU)).mean(dim=(0, 1))  # logits are 10 times the parameter
    torch.testing.assert_close(gradients[0]["parameter"], expected, rtol=1e-4, atol=1e-7)


# --- continuation


def test_continuation_begins_at_one_and_ends_at_zero_or_one() -> None:
    model = build({"kind": "continuation"})
    gates = gates_of(model)
    assert isinstance(gates, Continuation)
    h = torch.zeros(1, 1, 24)
    start = gates.sample(h, Clock(1, 0, 0))[0]
    torch.testing.assert_close(start, torch.ones_like(start), rtol=0, atol=0.02)
    assert [gates.temperature(Clock(1, t, 0)) for t in (0, 150_000, 300_000, 900_000)] == pytest.approx(
        [1, 1000**0.5, 1000, 1000]
    )
    train(model, STEPS - 1)
    end = gates.sample(h, clock_of(STEPS))[0].detach()
    assert torch.minimum(end.abs(), (end - 1).abs()).max() < 1e-3, "kept units are at 1, not at 1 / sigmoid(m0)"
    assert 0.3 < end.mean() < 0.7
    gates.freeze()
    assert ((end > 0.5).float() == gates.hard_mask()).float().mean() > 0.9


# --- knapsack


def greedy_by_value(values: list[float], costs: list[float], budget: float) -> float:
    """What pFedGate publishes as `found_max_value_greedy`: by raw value, skipping what does not fit."""
    gained = 0.0
    for value, cost in sorted(zip(values, costs, strict=True), reverse=True):
        if cost <= budget:
            gained, budget = gained + value, budget - cost
    return gained


def test_the_fractional_knapsack_is_the_optimum_of_the_linear_program() -> None:
    """Twelve items, against scipy; and pFedGate's published greedy is neither that nor the integer optimum."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        values, costs = torch.rand(2, 12, generator=generator, dtype=torch.float64) + 0.05
        budget = float(costs.sum()) * (0.05 + 0.9 * seed / 50)
        share = fractional_knapsack(values / costs, costs, budget)
        assert float(share @ costs) == pytest.approx(budget, rel=1e-12)
        assert ((share > 0) & (share < 1)).sum() <= 1
        solved = linprog(-values.numpy(), A_ub=costs[None].numpy(), b_ub=[budget], bounds=(0, 1))
        assert float(share @ values) == pytest.approx(-solved.fun, rel=1e-9)
    # One item of value 1 and cost 10 shuts out ten of value 0.9 and cost 1.
    values, costs = [1.0] + [0.9] * 10, [10.0] + [1.0] * 10
    assert greedy_by_value(values, costs, 10.0) == 1.0
    value, cost = torch.tensor(values, dtype=torch.float64), torch.tensor(costs, dtype=torch.float64)
    assert float(fractional_knapsack(value / cost, cost, 10.0) @ value) == pytest.approx(9.0)


@pytest.mark.parametrize("ffn", [DENSE, MIXTURE], ids=["dense", "moe"])
def test_the_knapsack_spends_the_budget_exactly_in_every_pass(ffn: dict[str, Any]) -> None:
    model = build({"kind": "knapsack"}, ffn=ffn, keep=0.53)
    gates = gates_of(model)
    assert isinstance(gates, Knapsack)
    for _ in range(3):
        mask_U = gates.sample(torch.zeros(1, 1, 24), clock_of(1))[0].detach()
        assert float((mask_U * gates.units.costs(CPU)).sum()) == pytest.approx(0.53 * gates.units.total_cost, rel=1e-5)
        with torch.no_grad():
            gates.parameter += torch.randn(gates.units.num)
    losses = train(model, 150)
    assert sum(losses[-20:]) / 20 < 0.4


# --- random masks


def test_erk_densities_sum_to_the_budget() -> None:
    shapes = [(24, 32), (24, 48), (1024, 1024), (1024, 4096), (32000, 1024), (8, 8)]
    costs = [float(rows * columns) for rows, columns in shapes]
    raw = [(rows + columns) / (rows * columns) for rows, columns in shapes]
    for keep in (0.02, 0.1, 0.5, 0.9, 1.0):
        densities = erk_densities(raw, costs, keep)
        assert sum(d * c for d, c in zip(densities, costs, strict=True)) == pytest.approx(keep * sum(costs), rel=5e-3)
        assert all(0 < d <= 1 for d in densities)
        free = [(d / r) for d, r in zip(densities, raw, strict=True) if d < 1]
        assert max(free, default=1.0) == pytest.approx(min(free, default=1.0)), "proportional where below 1"
    assert erk_densities(raw, costs, 0.1)[5] == 1.0, "small tensors stay whole"


def test_random_masks_keep_their_densities() -> None:
    shares: dict[str, list[float]] = {}
    for densities in ("uniform", "erk"):
        ffn = {"kind": "dense", "hidden_dim": 480}
        heads = {"num_heads": 20, "num_kv_heads": 2, "head_dim": 8}
        model = build({"kind": "random", "densities": densities}, ffn=ffn, attention=heads)
        gates = gates_of(model)
        shares[densities] = [float(part.mean()) for part in gates.units.parts(gates.hard_mask())]
        other = build({"kind": "random", "densities": densities, "seed": 1}, ffn=ffn, attention=heads)
        assert not torch.equal(gates.hard_mask(), gates_of(other).hard_mask())
    assert shares["uniform"] == pytest.approx([0.5] * 4, abs=0.03)
    raw = [(24 + 160) / (24 * 160), (24 + 480) / (24 * 480)] * 2
    costs = [20.0 * 3 * 24 * 8, 480.0 * 3 * 24] * 2
    assert shares["erk"] == pytest.approx(erk_densities(raw, costs, 0.5), abs=0.03)
    assert shares["erk"][0] > shares["erk"][1]


# --- dynamic sparse training


@pytest.mark.parametrize("over", [("heads", "channels"), ("heads", "experts"), ("blocks",)], ids="-".join)
@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_dynamic_sparse_training_keeps_every_count(growth: str, over: tuple[str, ...]) -> None:
    if growth == "gradient" and "experts" in over:
        return
    model = build({"kind": "dynamic_sparse", "growth": growth, "every": 2}, over, ffn=MIXTURE, num_layers=4)
    gates = gates_of(model)
    assert isinstance(gates, DynamicSparse)
    counts = [part.sum(dim=-1) for part in gates.units.parts(gates.mask_U)]
    changes = []
    for step in range(1, 9):
        before = gates.mask_U.clone()
        output = model(*batch_of(step), clock=clock_of(step))
        output.nll.backward()
        gates.update(model, clock_of(step), output.nll.detach(), alone)
        for part, count in zip(gates.units.parts(gates.mask_U), counts, strict=True):
            assert torch.equal(part.sum(dim=-1), count)
        changes.append(int((gates.mask_U != before).sum()))
    assert not any(changes[::2])
    assert all(changes[1::2])


def test_dynamic_sparse_training_drops_the_weakest_and_grows_the_steepest() -> None:
    """Against gradients of an all-differentiable mask, summed over two micro-batches, and norms written out."""
    model = build({"kind": "dynamic_sparse", "every": 1, "drop": 0.3}, ("channels",))
    gates = gates_of(model)
    mask_LF = gates.mask_U.clone().view(2, 48)
    truth = torch.zeros(96)
    for step in (1, 2):
        leaf = gates.mask_U.clone().requires_grad_()
        plain = materialize(lambda: Decoder(model.config), CPU, 0)
        plain.units.sample = lambda h, clock, leaf=leaf: (leaf, torch.zeros(()))
        plain(*batch_of(step), clock=clock_of(1)).nll.backward()
        assert leaf.grad is not None
        truth += leaf.grad
        with torch.no_grad():
            model(*batch_of(step), clock=clock_of(1))
        model(*batch_of(step), clock=clock_of(1)).nll.backward()
    gates.update(model, clock_of(1), torch.zeros(()), alone)
    for layer, (before, after, slope) in enumerate(
        zip(mask_LF, gates.mask_U.view(2, 48), truth.view(2, 48).abs(), strict=True)
    ):
        strength = model.blocks[layer].ffn.w2.weight.norm(dim=0)
        num = int((before > after).sum())
        assert num == 8, "0.3 of 24, rounded up"
        kept, idle = before.nonzero().flatten(), (before == 0).nonzero().flatten()
        weakest = kept[strength[kept].argsort()[:num]]
        steepest = idle[slope[idle].argsort(descending=True)[:num]]
        assert set((before > after).nonzero().flatten().tolist()) == set(weakest.tolist())
        assert set((after > before).nonzero().flatten().tolist()) == set(steepest.tolist())


@pytest.mark.parametrize("over", [("heads", "channels"), ("heads", "experts"), ("blocks",)], ids="-".join)
def test_strengths_are_root_mean_squares_of_what_is_written(over: tuple[str, ...]) -> None:
    model = build({"kind": "dynamic_sparse", "growth": "random"}, over, ffn=MIXTURE)
    units = gates_of(model).units
    blocks: list[Any] = list(model.blocks)
    for group, part in zip(units.groups, units.parts(strengths(model, units, alone)), strict=True):
        wo, ffn = blocks[group.layer].attention.wo.weight, blocks[group.layer].ffn
        if group.place == "heads":
            squares = wo.view(24, 4, 8).square().mean(dim=(0, 2))
        elif group.place == "channels":
            squares = ffn.shared_experts.w2.weight.square().mean(dim=0)
        elif group.place == "expert_channels":
            squares = ffn.experts.w2.square().mean(dim=1)
        elif group.place == "experts":
            squares = ffn.experts.w2.square().mean(dim=(1, 2))
        else:
            written = [torch.cat([b.attention.wo.weight.flatten(), b.ffn.experts.w2.flatten()]) for b in blocks]
            squares = torch.stack(written).square().mean(dim=1)
        torch.testing.assert_close(part, squares.sqrt().view_as(part))


# --- nested sub-models


def test_every_nested_model_is_a_slice_of_the_next() -> None:
    """Exported at each share it equals the masked model, and is the first units of each tensor."""
    keeps = (0.25, 0.5, 0.75, 1.0)
    model = build({"kind": "nested", "keeps": keeps}, ("channels",))
    gates = gates_of(model)
    assert isinstance(gates, Nested)
    train(model, 20)
    model.eval()
    tokens, labels, counted = batch_of(0)
    last = 0
    for keep in keeps:
        gates.keep = keep
        smaller = export(model, gates.hard_mask(keep))
        size = sum(p.numel() for p in smaller.parameters())
        assert size > last
        last = size
        for block, whole in zip(smaller.blocks, model.blocks, strict=True):
            num = round(48 * keep)
            assert torch.equal(block.ffn.w1.weight, whole.ffn.w1.weight[:num])
            assert torch.equal(block.ffn.w2.weight, whole.ffn.w2.weight[:, :num])
        torch.testing.assert_close(
            smaller(tokens, labels, counted).nll_B, model(tokens, labels, counted).nll_B, rtol=1e-5, atol=1e-5
        )


def test_nested_steps_train_each_share_alike_and_all_learn() -> None:
    model = build({"kind": "nested", "keeps": [0.25, 0.5, 1.0]}, ("channels",))
    gates = gates_of(model)
    chosen = [gates.chosen(clock_of(step)) for step in range(1, 3001)]
    for keep in (0.25, 0.5, 1.0):
        assert abs(chosen.count(keep) - 1000) < 5 * (3000 * 2 / 9) ** 0.5
    mask_U = gates.sample(torch.zeros(1, 1, 24), clock_of(1))[0]
    assert torch.equal(mask_U, gates.hard_mask(chosen[0]))
    train(model, 200)
    model.eval()
    for keep in (0.25, 0.5, 1.0):
        gates.keep = keep
        assert model(*batch_of(0)).nll / (8 * 17) < 0.5
    assert isinstance(model.units, nn.Module)


def test_bf16_tells_initial_logits_apart() -> None:
    """Around 2 a bf16 step is as large as the noise that keeps units from falling by their position."""
    decoder = build({"kind": "hard_concrete"}).bfloat16()
    logits_U = decoder.units.logits_U
    assert len(logits_U.unique()) > 0.9 * len(logits_U)
    assert logits_U.mean().item() == pytest.approx(decoder.units.config.initial, abs=0.01)
