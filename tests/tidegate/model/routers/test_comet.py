"""COMET: trees over any number of experts, the gate, and the search for the order of the leaves.

Letters: N rows, D width, E experts and leaves, K trees, C clusters of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tidegate.model.clock import STILL, Clock
from tidegate.model.initialisation import Draw
from tidegate.model.routers import RoutedStep
from tidegate.model.routers.comet import CometConfig, tree_paths
from tidegate.model.routers.permutation import PermutationSearch, PermutationSearchConfig

SIZES = [2, 3, 5, 7, 8, 33]
X = torch.randn(63, 24, generator=torch.Generator().manual_seed(0))


def smooth_step(t: torch.Tensor, gamma: float) -> torch.Tensor:
    """As the paper writes it, in the dtype of its argument."""
    inside = -2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5
    return torch.where(t <= -gamma / 2, 0.0, torch.where(t >= gamma / 2, 1.0, inside))


@pytest.mark.parametrize("num_leaves", SIZES)
def test_a_tree_is_balanced_and_its_ways_lead_to_different_leaves(num_leaves: int) -> None:
    splits, left = tree_paths(num_leaves, torch.device("cpu"))
    ways = [
        [(s, turn) for s, turn in zip(*way, strict=True) if s < num_leaves - 1]
        for way in zip(splits.tolist(), left.tolist(), strict=True)
    ]
    depth = (num_leaves - 1).bit_length()
    assert {len(way) for way in ways} <= {depth, depth - 1}
    assert {way[0][0] for way in ways} == {0}, "all ways begin at the root"
    assert len({tuple(way) for way in ways}) == num_leaves
    used = {step for way in ways for step in way}
    assert used == {(s, turn) for s in range(num_leaves - 1) for turn in (True, False)}


@pytest.mark.parametrize("num_experts", SIZES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1000.0])
def test_leaf_probabilities_sum_to_one(num_experts: int, scale: float, build: Callable[..., Any]) -> None:
    router = build(CometConfig(), num_experts, min(3, num_experts))
    router.splits.data.mul_(scale)
    leaves = router.leaves(X)
    assert leaves.min() >= 0
    torch.testing.assert_close(leaves.sum(-1), torch.ones(63, router.top_k), rtol=0, atol=1e-6)


def test_leaves_and_gate_by_hand(build: Callable[..., Any], context: Callable[..., Any], by_expert: Any) -> None:
    """E = 3 and two trees: the root splits {0, 1} from {2}, the second split 0 from 1."""
    router = build(CometConfig(gamma=2.0, entropy_weight=0.3), 3, 2)
    with torch.no_grad():
        router.splits.normal_(0, 0.1)
        router.split_bias.normal_(0, 0.1)
    x = X.double()
    t = x @ router.splits.detach().double().T + router.split_bias.detach().double()
    a = (x @ router.scores.detach().double().T).view(63, 2, 3)
    scores, entropies, P = [], [], []
    for tree in range(2):
        root, second = (smooth_step(t[:, 2 * tree + j], 2.0) for j in range(2))
        leaves = torch.stack([root * second, root * (1 - second), 1 - root], dim=1)
        P.append(leaves)
        scores.append(a[:, tree] + leaves.log())
        entropies.append(-(leaves * (leaves + 1e-6).log()).sum(1))
    assert min(float(p.min()) for p in P) < 0.01, "the hand calculation covers hardened splits"
    gate = torch.cat(scores, dim=1).softmax(1).view(63, 2, 3).sum(1)
    routing = router(X, context(7, 9))
    weights, chosen = by_expert(routing)
    torch.testing.assert_close(weights.double(), gate, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(routing.probs_NE.double(), gate, rtol=1e-4, atol=1e-6)
    assert torch.equal(chosen, gate > 0)
    expected = 0.3 * (entropies[0] + entropies[1]) / 2
    torch.testing.assert_close(routing.penalty_N.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("width", "gamma"), [(8, 1.0), (1000, 1.0), (4096, 0.01), (64, 10.0)])
def test_the_start_is_dense_at_any_width(
    width: int, gamma: float, build: Callable[..., Any], context: Callable[..., Any], by_expert: Any
) -> None:
    """No split is saturated for normalised rows: every leaf keeps a share, and a gradient."""
    router = build(CometConfig(gamma=gamma), 16, 2, width=width, std=0.02)
    x = torch.randn(99, width)
    x = x / x.square().mean(1, keepdim=True).sqrt()
    leaves = router.leaves(x)
    assert leaves.min() > 0.1 / 16
    assert leaves.max() < 3 / 16
    assert by_expert(router(x, context(11, 9)))[1].all()


def test_at_most_k_experts_once_every_tree_is_one_hot(
    build: Callable[..., Any], context: Callable[..., Any], by_expert: Any
) -> None:
    for num_experts in SIZES:
        router = build(CometConfig(), num_experts, 2)
        with torch.no_grad():
            router.splits.mul_(1e4)
        routing = router(X, context(7, 9))
        weights, chosen = by_expert(routing)
        assert chosen.sum(1).max() <= 2
        assert chosen.sum(1).min() >= 1
        torch.testing.assert_close(weights.sum(1), torch.ones(63), rtol=0, atol=1e-6)
        assert chosen.any(0).sum() > num_experts / 2, "rows still differ"
        routing.weights_NS.square().sum().backward()
        assert router.splits.grad.isfinite().all()
        assert router.scores.grad.isfinite().all()


@pytest.mark.parametrize("num_experts", [3, 8])
def test_the_entropy_hardens_the_splits(
    num_experts: int, build: Callable[..., Any], context: Callable[..., Any]
) -> None:
    router = build(CometConfig(), num_experts, 2)
    optimizer = torch.optim.SGD([router.splits, router.split_bias], lr=0.1)
    entropies = []
    for _ in range(100):
        penalty = router(X, context(7, 9)).penalty_N.mean()
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        entropies.append(penalty.item())
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[-1] < 0.5 * entropies[0]


def test_gradients_are_those_of_fp64(build: Callable[..., Any], context: Callable[..., Any]) -> None:
    router = build(CometConfig(gamma=2.0), 3, 2)
    with torch.no_grad():
        router.splits.normal_(0, 0.05)
    upstream = torch.randn(63, 3)
    router(X, context(7, 9)).weights_NS.backward(upstream)
    splits, scores = (p.detach().double().requires_grad_() for p in (router.splits, router.scores))
    t, a = X.double() @ splits.T, (X.double() @ scores.T).view(63, 2, 3)
    parts = []
    for tree in range(2):
        root, second = (smooth_step(t[:, 2 * tree + j], 2.0) for j in range(2))
        parts.append(a[:, tree] + torch.stack([root * second, root * (1 - second), 1 - root], dim=1).clamp(1e-30).log())
    torch.cat(parts, dim=1).softmax(1).view(63, 2, 3).sum(1).backward(upstream.double())
    torch.testing.assert_close(router.splits.grad.double(), splits.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(router.scores.grad.double(), scores.grad, rtol=1e-3, atol=1e-4)


def test_what_the_published_gate_cannot_do(build: Callable[..., Any], context: Callable[..., Any]) -> None:
    """The published comet.py reads `self.L2`, which nothing sets, so that it raises AttributeError as shipped; and it
    indexes trees by a power of two. Here the default configuration runs with its regulariser, also for six experts."""
    routing = build(CometConfig(), 6, 2)(X, context(7, 9))
    assert (routing.penalty_N > 0).all()
    torch.testing.assert_close(routing.probs_NE.sum(1), torch.ones(63), rtol=0, atol=1e-6)


# --- the search


def search_for(num_experts: int = 8, **changes: Any) -> PermutationSearch:
    search = PermutationSearch(PermutationSearchConfig(**{"tokens": 300} | changes), num_experts)
    search.init_weights(Draw(0, "search"))
    return search


def tell(search: PermutationSearch, step: int) -> None:
    search.update(Clock(step, step, 0))


@pytest.mark.parametrize("tau", [0.1, 0.02, 1e-3])
@pytest.mark.parametrize("num_experts", [2, 7, 33])
def test_the_soft_order_is_doubly_stochastic(num_experts: int, tau: float) -> None:
    """Rows exactly; columns up to what 20 iterations leave, which is nothing near a permutation or far from one."""
    search = search_for(num_experts)
    matrix = search.matrix(tau)
    assert matrix.min() >= 0
    torch.testing.assert_close(matrix.sum(1), torch.ones(num_experts), rtol=0, atol=1e-5)
    torch.testing.assert_close(matrix.sum(0), torch.ones(num_experts), rtol=0, atol=1e-2)
    matrix.square().sum().backward()
    assert search.logits.grad.isfinite().all()
    with torch.no_grad():
        search.logits.copy_(torch.randn(num_experts**2))
    torch.testing.assert_close(search.matrix(tau).sum(1), torch.ones(num_experts), rtol=0, atol=1e-5)


def test_the_temperature_falls_log_linearly() -> None:
    search = search_for(tau_start=0.1, tau_end=1e-3)
    assert [search.temperature(tokens) for tokens in (0, 150, 300, 900)] == pytest.approx([0.1, 0.01, 1e-3, 1e-3])


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_wrong_order_of_specialised_experts_is_recovered(seed: int) -> None:
    """Leaf c gets the rows of cluster c, expert e is good at cluster planted[e] only; the search must undo it."""
    generator = torch.Generator().manual_seed(seed)
    planted_E = torch.randperm(8, generator=generator)
    cost_CE = 1 - torch.nn.functional.one_hot(planted_E, 8).float().T
    search = search_for()
    optimizer = torch.optim.Adam(search.parameters(), lr=0.02)
    for step in range(1, 401):
        cluster_N = torch.randint(0, 8, (64,), generator=generator)
        gate = 0.9 * torch.nn.functional.one_hot(cluster_N, 8).float() + 0.1 / 8  # routers are never quite sure
        loss = (search(gate, Clock(step, step, 0)) * cost_CE[cluster_N]).sum(1).mean()
        optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
            optimizer.step()
        tell(search, step)
        if step == 299:  # fixing the order is no jump: the soft one has arrived there
            gate = torch.rand(63, 8)
            torch.testing.assert_close(search(gate, Clock(step, step, 0)), search(gate, None), rtol=0, atol=1e-3)
    # order[e] is the leaf that expert e serves.
    assert torch.equal(search.order_E, planted_E)


def test_the_order_stays_after_the_search_and_after_a_resume() -> None:
    search = search_for(7)
    tell(search, 10)
    assert not search.fixed
    with torch.no_grad():
        search.logits.copy_(torch.randn(49))
    tell(search, 300)
    order = search.order_E.clone()
    assert search.fixed
    assert order.tolist() != list(range(7))
    resumed = search_for(7)
    resumed.load_state_dict(search.state_dict())
    for one in (search, resumed):
        with torch.no_grad():
            one.logits.copy_(torch.randn(49))  # momentum, or a cosmic ray
        tell(one, 301)
        assert torch.equal(one.order_E, order)
        gate = torch.rand(63, 7)
        for clock in (None, STILL, Clock(301, 301, 0)):
            assert torch.equal(one(gate, clock), gate[:, order])
        assert not one(gate, Clock(301, 301, 0)).requires_grad


def test_the_router_uses_the_search_in_training_and_its_best_order_in_evaluation(
    build: Callable[..., Any], context: Callable[..., Any], by_expert: Any
) -> None:
    plain, router = (build(CometConfig(search=s), 7, 3) for s in (None, PermutationSearchConfig(tokens=300)))
    own = {name: p for name, p in router.named_parameters() if "search" not in name}
    plain.load_state_dict(own)
    with torch.no_grad():
        router.search.logits.copy_(torch.randn(49))
    router.update(RoutedStep(torch.ones(7), torch.tensor(1.0), None, Clock(1, 1, 0)))
    gate, _ = by_expert(plain(X, context(7, 9)))
    weights, _ = by_expert(router.eval()(X, context(7, 9)))
    assert torch.equal(weights, gate[:, router.search.order_E])
    routing = router.train()(X, context(7, 9))
    weights, _ = by_expert(routing)
    torch.testing.assert_close(weights, gate @ router.search.matrix(router.search.temperature(1)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights.sum(1), torch.ones(63), rtol=0, atol=1e-5)
    routing.weights_NS.square().sum().backward()
    assert router.search.logits.grad.abs().sum() > 0
