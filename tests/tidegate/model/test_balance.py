"""The balance loss: its formula and limits, and the gradient that N ranks and M accumulation steps add up to.

Letters: N ranks, M accumulation steps, L MoE layers, B sequences, T tokens, E experts, K chosen experts.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from tidegate.model.balance import (
    BalanceConfig,
    Balancer,
    balance_problem,
    load_balancing_loss,
    max_violation,
    updated_bias,
)
from tidegate.model.moe import MoEConfig, RoutingStats, routing_stats
from tidegate.model.routers import RouterContext, RouterShape, Routing, SigmoidTopKConfig, SoftmaxTopKConfig
from tidegate.model.routers.fixed import HashConfig
from tidegate.model.routers.relu import ReluConfig
from tidegate.model.routers.top_k import QuantileBalancing

E, K = 7, 2
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def top_k_counts(logits_TE: torch.Tensor, k: int) -> torch.Tensor:
    """How often each expert is among the k best of a row, in fp64."""
    return torch.bincount(logits_TE.topk(k, dim=-1).indices.flatten(), minlength=logits_TE.shape[-1]).double()


def lbl(logits_TE: torch.Tensor, k: int) -> torch.Tensor:
    """The code's loss over the rows of one scope."""
    return load_balancing_loss(top_k_counts(logits_TE, k), logits_TE.softmax(-1).sum(0), len(logits_TE))


# --- the loss itself


@pytest.mark.parametrize("num_experts", [1, 2, 7, 64])
def test_uniform_probabilities_or_fractions_give_one(num_experts: int) -> None:
    uniform = torch.full((num_experts,), 1 / num_experts, dtype=torch.float64)
    skewed = torch.rand(num_experts, dtype=torch.float64) ** 4
    anything = skewed / skewed.sum()
    assert load_balancing_loss(1000 * anything, 63 * uniform, 63).item() == pytest.approx(1, abs=1e-12)
    assert load_balancing_loss(uniform, 63 * anything, 63).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("config", [SoftmaxTopKConfig(), SigmoidTopKConfig()], ids=lambda c: c.kind)
def test_a_router_of_zeros_has_loss_one_and_z_of_its_size(config: Any) -> None:
    router = config.build(RouterShape(24, E, K, 0.02))
    nn.init.zeros_(router.weight)
    nn.init.zeros_(router.expert_bias)
    context = RouterContext.alone(torch.ones(1, 63, dtype=torch.bool))
    stats = routing_stats(router(torch.randn(63, 24), context), context)
    assert load_balancing_loss(stats.counts_BE, stats.prob_sums_BE, 63.0).item() == pytest.approx(1, abs=1e-6)
    assert stats.z_sums_B.item() / 63 == pytest.approx(torch.tensor(E).log().item() ** 2, rel=1e-6)


@pytest.mark.parametrize("tokens", [1, 63, 1000])
@pytest.mark.parametrize(("num_experts", "k"), [(7, 1), (7, 2), (7, 7), (33, 4)])
def test_range(num_experts: int, k: int, tokens: int) -> None:
    for scale in (0.1, 1, 10):
        loss = lbl(scale * torch.randn(tokens, num_experts, dtype=torch.float64), k)
        assert 0 < loss <= num_experts / k + 1e-12
    # The upper end: every token uses the same k experts and the probabilities sit on them.
    collapsed = torch.zeros(tokens, num_experts, dtype=torch.float64)
    collapsed[:, -k:] = 100
    assert lbl(collapsed, k).item() == pytest.approx(num_experts / k, abs=1e-12)


def test_formula_by_hand() -> None:
    # f = (3, 1, 0) / 4, P = (0.5, 0.3, 0.2): 3 (0.75 * 0.5 + 0.25 * 0.3)
    loss = load_balancing_loss(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([1.0, 0.6, 0.4]), 2)
    assert loss.item() == pytest.approx(1.35)


def test_less_than_one_is_possible() -> None:
    """90 tokens choose the first expert barely, 10 the second firmly: f and P disagree."""
    logits = torch.tensor([[0.01, 0, -0.01]] * 90 + [[0, 10.0, 0]] * 10, dtype=torch.float64)
    assert lbl(logits, 1).item() == pytest.approx(0.938, abs=5e-4)


@pytest.mark.parametrize("k", [1, 3])
def test_gradient_flows_through_probabilities_only(k: int) -> None:
    logits = torch.randn(63, E, dtype=torch.float64, requires_grad=True)
    counts = top_k_counts(logits.detach(), k).requires_grad_()
    load_balancing_loss(counts, logits.softmax(-1).sum(0), 63).backward()
    assert counts.grad is None
    assert logits.grad is not None
    f, p = counts.detach() / counts.sum(), logits.detach().softmax(-1)
    torch.testing.assert_close(logits.grad, E / 63 * p * (f - (p @ f)[:, None]), **EXACT)
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(63, dtype=torch.float64), **EXACT)
    (even,) = torch.autograd.grad(load_balancing_loss(torch.ones(E), logits.softmax(-1).sum(0), 63), logits)
    torch.testing.assert_close(even, torch.zeros_like(even), rtol=0, atol=1e-8)  # these counts are fp32


def test_invariances() -> None:
    logits = torch.randn(63, E, dtype=torch.float64, requires_grad=True)
    tokens, experts = torch.randperm(63), torch.randperm(E)
    shift = torch.randn(63, 1, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(lbl(logits, K), logits)
    for same in (logits[tokens], logits[:, experts], logits + shift):
        torch.testing.assert_close(lbl(same, K), lbl(logits, K), **EXACT)
        torch.testing.assert_close(torch.autograd.grad(lbl(same, K), logits)[0], gradient, **EXACT)
    counted = torch.ones(1, 63, dtype=torch.bool)
    z_sums = [statistics(t[None], counted, K).z_sums_B for t in (logits, logits + shift)]
    assert not torch.allclose(*z_sums), "the z-loss is there to see a shift"
    (z_gradient,) = torch.autograd.grad(z_sums[0].sum() / 63, logits)
    lse = logits.detach().exp().sum(1, keepdim=True).log()
    torch.testing.assert_close(z_gradient, 2 * lse * logits.detach().softmax(-1) / 63, **EXACT)


def test_micro_loss_exceeds_the_global_one_by_a_covariance() -> None:
    """LBL_micro - LBL_global = E sum_i Cov_j(f_i^j, P_i^j), so they agree when all parts route alike."""
    logits = 3 * torch.randn(8, 63, E, dtype=torch.float64)
    logits += 3 * torch.randn(8, 1, E, dtype=torch.float64)  # each part prefers its own experts
    micro = torch.stack([lbl(part, K) for part in logits]).mean()
    pooled = lbl(logits.flatten(0, 1), K)
    f = torch.stack([top_k_counts(part, K) for part in logits]) / (63 * K)
    p = logits.softmax(-1).mean(1)
    covariance = (f * p).mean(0) - f.mean(0) * p.mean(0)
    torch.testing.assert_close(micro - pooled, E * covariance.sum(), **EXACT)
    assert micro - pooled > 0.1
    torch.testing.assert_close(lbl(logits[:1].flatten(0, 1), K), lbl(logits[0], K), **EXACT)
    alike = logits[:1].expand(8, -1, -1)
    torch.testing.assert_close(lbl(alike.flatten(0, 1), K), lbl(logits[0], K), **EXACT)


def test_no_counted_tokens_is_a_zero() -> None:
    sums = torch.zeros(2, E, requires_grad=True)
    loss = load_balancing_loss(torch.zeros(2, E), sums, torch.tensor(1.0))
    loss.sum().backward()
    assert loss.tolist() == [0, 0]
    assert sums.grad is not None
    assert not sums.grad.any()


# --- the Balancer: N ranks are threads, and all_reduce is a meeting of them


class Ranks:
    """Runs one function per rank; `all_reduce` adds up what all of them bring, and fails if one stays away."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._brought: list[torch.Tensor] = [torch.empty(0)] * world_size
        self._barrier = threading.Barrier(world_size, timeout=20)
        self._rank = threading.local()

    def all_reduce(self, tensor: torch.Tensor) -> None:
        assert not tensor.requires_grad
        self._brought[self._rank.value] = tensor.clone()
        self._barrier.wait()
        total = torch.stack(self._brought).sum(dim=0)
        self._barrier.wait()  # nobody brings the next tensor before all have read
        tensor.copy_(total)

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        def one(rank: int) -> Any:
            self._rank.value = rank
            try:
                return function(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(one, range(self.world_size)))


def statistics(logits_BTE: torch.Tensor, counted_BT: torch.Tensor, k: int) -> RoutingStats:
    """One layer's, of a softmax router in fp64."""
    probs = logits_BTE.flatten(0, 1).softmax(-1)
    weights, experts = probs.topk(k, dim=-1)
    stats = routing_stats(Routing(experts, weights, probs, logits_BTE.flatten(0, 1)), RouterContext.alone(counted_BT))
    return RoutingStats(*(field.double() for field in stats[:4]))


class Batch(NamedTuple):
    """One optimizer step of two layers, cut for N ranks of M micro-batches."""

    logits_NMLBTE: torch.Tensor
    counted_NMBT: torch.Tensor

    def cut(self, world_size: int, accumulation: int) -> Batch:
        """The same sequences, dealt out in order over other N and M."""
        _, _, L, _, T, experts = self.logits_NMLBTE.shape
        by_sequence = self.logits_NMLBTE.transpose(2, 3).reshape(world_size, accumulation, -1, L, T, experts)
        return Batch(by_sequence.transpose(2, 3), self.counted_NMBT.reshape(world_size, accumulation, -1, T))


@pytest.fixture
def batch() -> Batch:
    """16 sequences that prefer experts of their own and hold between no and all of 9 counted tokens."""
    logits = torch.randn(1, 1, 2, 16, 9, E, dtype=torch.float64)
    logits += 2 * torch.randn(1, 1, 2, 16, 1, E, dtype=torch.float64)
    counted = torch.rand(1, 1, 16, 9) < torch.linspace(0.1, 1.2, 16)[:, None]
    counted[..., 3, :] = False
    return Batch(logits, counted)


class Step(NamedTuple):
    gradient_NMLBTE: torch.Tensor
    """Averaged over ranks and accumulation steps, as the trainer does."""
    value: torch.Tensor
    """Sum of all losses, averaged likewise."""
    counts_LE: torch.Tensor


def train_step(config: BalanceConfig, batch: Batch) -> Step:
    """What the trainer does with a Balancer, on every rank."""
    N, M, L, *_ = batch.logits_NMLBTE.shape
    tokens = batch.counted_NMBT.sum().double()
    ranks = Ranks(N)

    def rank_step(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        balancer = Balancer(config, ranks.all_reduce, N, M)
        leaves = [batch.logits_NMLBTE[rank, m].clone().requires_grad_() for m in range(M)]

        def micro_batches() -> Iterator[tuple[RoutingStats, torch.Tensor]]:
            for leaf, counted_BT in zip(leaves, batch.counted_NMBT[rank], strict=True):
                layers = [statistics(leaf[layer], counted_BT, K) for layer in range(L)]
                stacked = RoutingStats(
                    *(torch.stack(field) for field in zip(*(layer[:4] for layer in layers), strict=True))
                )
                yield stacked, counted_BT.sum(dim=1).double()

        for _ in range(2):  # the second step must not remember the first
            for leaf in leaves:
                leaf.grad = None
            counts = sum(stats.counts_BE.sum(dim=1) for stats, _ in micro_batches())
            balancer.begin_step(counts if balancer.needs_counting_pass else None)
            value = torch.zeros((), dtype=torch.float64)
            for stats, counted_B in micro_batches():
                losses = balancer.losses(stats, counted_B, tokens)
                value += losses.total.detach()
                if losses.total.requires_grad:
                    losses.total.backward()
            step_counts = balancer.step_counts()
            assert torch.equal(step_counts, balancer.step_counts())
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        return torch.stack(gradients) / (N * M), value / (N * M), step_counts

    gradients, values, counts = zip(*ranks.run(rank_step), strict=True)
    assert all(torch.equal(counts[0], other) for other in counts)
    return Step(torch.stack(gradients), sum(values), counts[0])


def counts_of(logits_ZLTE: torch.Tensor, counted_ZT: torch.Tensor) -> torch.Tensor:
    """(L, E) assignments of the counted tokens, by counting them one by one."""
    L = logits_ZLTE.shape[1]
    counts = torch.zeros(L, E, dtype=torch.float64)
    for z, t in counted_ZT.nonzero().tolist():
        for layer in range(L):
            counts[layer, logits_ZLTE[z, layer, t].topk(K).indices] += 1
    return counts


def closed_form(logits_ZLTE: torch.Tensor, f_LE: torch.Tensor, counted_ZT: torch.Tensor) -> torch.Tensor:
    """d/dlogits of E sum_i f_i S_i, with S the sum over counted tokens: E p (f - sum_i f_i p_i)."""
    p = logits_ZLTE.softmax(-1)
    f = f_LE[:, None, :]
    return E * p * (f - (f * p).sum(-1, keepdim=True)) * counted_ZT[:, None, :, None]


def expected_gradient(batch: Batch, scope: str) -> torch.Tensor:
    """Mean over the scope's groups of the loss of each group, in closed form."""
    N, M, _, B, _, _ = batch.logits_NMLBTE.shape
    logits = batch.logits_NMLBTE.transpose(2, 3)  # N M B L T E
    whole = slice(None)
    each_n, each_m, each_b = ([slice(i, i + 1) for i in range(size)] for size in (N, M, B))
    groups = {
        "global_batch": [(whole, whole, whole)],
        "data_parallel": [(whole, m, whole) for m in each_m],
        "micro_batch": list(itertools.product(each_n, each_m, [whole])),
        "sequence": list(itertools.product(each_n, each_m, each_b)),
    }[scope]
    gradient = torch.zeros_like(logits)
    for group in groups:
        own_ZLTE, counted_ZT = logits[group].flatten(0, 2), batch.counted_NMBT[group].flatten(0, 2)
        counts_LE = counts_of(own_ZLTE, counted_ZT)
        f_LE = counts_LE / counts_LE.sum(-1, keepdim=True).clamp(min=1)
        share = len(groups) * counted_ZT.sum().clamp(min=1)
        gradient[group] = (closed_form(own_ZLTE, f_LE, counted_ZT) / share).view_as(gradient[group])
    return gradient.transpose(2, 3)


CUTS = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4)]
every_cut = pytest.mark.parametrize(("world_size", "accumulation"), CUTS)


@every_cut
def test_exact_counts_give_the_gradient_of_the_global_batch(world_size: int, accumulation: int, batch: Batch) -> None:
    """The same for every N and M, with micro-batches of unequal numbers of counted tokens."""
    cut = batch.cut(world_size, accumulation)
    per_micro_batch = cut.counted_NMBT.sum(dim=(2, 3)).flatten()
    assert len(set(per_micro_batch.tolist())) > 1 or world_size * accumulation == 1
    step = train_step(BalanceConfig(loss_weight=1, z_loss_weight=0), cut)
    whole = expected_gradient(batch, "global_batch")
    torch.testing.assert_close(Batch(step.gradient_NMLBTE, cut.counted_NMBT).cut(1, 1).logits_NMLBTE, whole, **EXACT)
    sequences = batch.logits_NMLBTE[0, 0].transpose(0, 1)
    counts = counts_of(sequences, batch.counted_NMBT[0, 0])
    assert torch.equal(step.counts_LE, counts)
    assert step.counts_LE.sum(dim=1).tolist() == [batch.counted_NMBT.sum() * K] * 2
    counted = batch.counted_NMBT[0, 0]
    p = (sequences.softmax(-1) * counted[:, None, :, None]).sum(dim=(0, 2)) / counted.sum()
    loss = E * (counts / counts.sum(-1, keepdim=True) * p).sum()
    torch.testing.assert_close(step.value, loss, **EXACT)


@every_cut
def test_running_counts_follow_algorithm_1(world_size: int, accumulation: int, batch: Batch) -> None:
    """Qiu et al. 2025: c += all_reduce(counts), f = c / sum c, reset when the step is over; exact when M = 1."""
    cut = batch.cut(world_size, accumulation)
    step = train_step(BalanceConfig(loss_weight=1, z_loss_weight=0, counts="running"), cut)
    logits = cut.logits_NMLBTE.transpose(2, 3)
    expected = torch.zeros_like(logits)
    c = torch.zeros(2, E, dtype=torch.float64)
    for m in range(accumulation):
        for n in range(world_size):
            c += counts_of(logits[n, m], cut.counted_NMBT[n, m])
        for n in range(world_size):
            pull = closed_form(logits[n, m], c / c.sum(-1, keepdim=True), cut.counted_NMBT[n, m])
            expected[n, m] = pull / batch.counted_NMBT.sum()
    torch.testing.assert_close(step.gradient_NMLBTE, expected.transpose(2, 3), **EXACT)
    assert torch.equal(step.counts_LE, c)
    exact = train_step(BalanceConfig(loss_weight=1, z_loss_weight=0), cut).gradient_NMLBTE
    assert torch.allclose(step.gradient_NMLBTE, exact, rtol=1e-12, atol=1e-12) == (accumulation == 1)


@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "data_parallel"])
@every_cut
def test_other_scopes(world_size: int, accumulation: int, scope: str, batch: Batch) -> None:
    cut = batch.cut(world_size, accumulation)
    config = BalanceConfig.model_validate({"scope": scope, "loss_weight": 0.5, "z_loss_weight": 0})
    step = train_step(config, cut)
    torch.testing.assert_close(step.gradient_NMLBTE, 0.5 * expected_gradient(cut, scope), **EXACT)
    sequences = batch.logits_NMLBTE[0, 0].transpose(0, 1)
    assert torch.equal(step.counts_LE, counts_of(sequences, batch.counted_NMBT[0, 0]))


def test_scopes_are_four_different_losses(batch: Batch) -> None:
    cut = batch.cut(2, 2)
    gradients = [
        expected_gradient(cut, scope) for scope in ("sequence", "micro_batch", "data_parallel", "global_batch")
    ]
    for index, one in enumerate(gradients):
        for other in gradients[:index]:
            assert (one - other).abs().max() > 1e-4


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
@every_cut
def test_z_loss_is_the_mean_over_the_step(world_size: int, accumulation: int, scope: str, batch: Batch) -> None:
    cut = batch.cut(world_size, accumulation)
    step = train_step(BalanceConfig.model_validate({"scope": scope, "loss_weight": 0, "z_loss_weight": 0.5}), cut)
    lse = cut.logits_NMLBTE.exp().sum(-1, keepdim=True).log()
    counted = cut.counted_NMBT[:, :, None, :, :, None]
    tokens = batch.counted_NMBT.sum()
    torch.testing.assert_close(
        step.gradient_NMLBTE, 0.5 * counted * 2 * lse * cut.logits_NMLBTE.softmax(-1) / tokens, **EXACT
    )
    torch.testing.assert_close(step.value, 0.5 * (lse.square() * counted).sum() / tokens, **EXACT)


@pytest.mark.parametrize(
    ("fields", "accumulation", "collectives"),
    [
        ({"loss_weight": 0.0}, 1, 0),
        ({"loss_weight": 0.0}, 4, 0),
        ({"loss_weight": 0.0, "counts": "running"}, 4, 0),
        ({"scope": "sequence"}, 4, 0),
        ({"scope": "micro_batch"}, 4, 0),
        ({"scope": "data_parallel"}, 4, 8),
        ({"counts": "exact"}, 1, 1),
        ({"counts": "exact"}, 4, 1),
        ({"counts": "running"}, 4, 4),
    ],
)
def test_collectives_of_a_step(fields: dict[str, Any], accumulation: int, collectives: int) -> None:
    """One for all layers; none when there is nothing to balance."""
    calls = 0

    def all_reduce(tensor: torch.Tensor) -> None:
        nonlocal calls
        calls += 1

    balancer = Balancer(BalanceConfig.model_validate(fields), all_reduce, 1, accumulation)
    counted = torch.ones(2, 9, dtype=torch.bool)
    logits = torch.randn(accumulation, 3, 2, 9, E, dtype=torch.float64)
    micro_batches = [
        RoutingStats(*(torch.stack(f) for f in zip(*(statistics(t, counted, K)[:4] for t in layers), strict=True)))
        for layers in logits
    ]
    total = torch.stack([stats.counts_BE.sum(dim=1) for stats in micro_batches]).sum(dim=0)
    balancer.begin_step(total if balancer.needs_counting_pass else None)
    for stats in micro_batches:
        losses = balancer.losses(stats, torch.full((2,), 9.0), torch.tensor(18.0 * accumulation))
        assert (losses.load_balancing == 0) == (fields.get("loss_weight") == 0)
        assert losses.z > 0
    assert calls == collectives
    assert torch.equal(balancer.step_counts(), total)


def test_counting_pass_is_asked_for_only_when_it_helps() -> None:
    asked = {
        (scope, counts, weight, accumulation)
        for scope in ("sequence", "micro_batch", "data_parallel", "global_batch")
        for counts in ("exact", "running")
        for weight in (0.0, 0.01)
        for accumulation in (1, 2)
        if Balancer(
            BalanceConfig.model_validate({"scope": scope, "counts": counts, "loss_weight": weight}),
            lambda tensor: None,
            2,
            accumulation,
        ).needs_counting_pass
    }
    assert asked == {("global_batch", "exact", 0.01, 2)}


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 2), (4, 1), (1, 4)])
@pytest.mark.parametrize("config", [SoftmaxTopKConfig(), SigmoidTopKConfig(scale=2.5)], ids=lambda c: c.kind)
def test_gradient_of_a_real_router(config: Any, world_size: int, accumulation: int) -> None:
    """The router matrix gets the global gradient; a sigmoid router's scores count after normalisation."""
    D, parts = 24, world_size * accumulation
    x = torch.randn(parts, 2, 9, D) + torch.randn(parts, 1, 1, D)
    counted = torch.rand(parts, 2, 9) < torch.linspace(0.3, 1, parts)[:, None, None]
    weight = 0.3 * torch.randn(E, D)

    exact = weight.double().requires_grad_()
    logits = x.double()[counted] @ exact.T
    scores = logits.softmax(-1) if isinstance(config, SoftmaxTopKConfig) else logits.sigmoid()
    probs = scores / scores.sum(-1, keepdim=True)
    f = top_k_counts(logits.detach(), K) / (len(logits) * K)
    (E * f * probs.mean(0)).sum().backward()

    ranks = Ranks(world_size)

    def rank_step(rank: int) -> torch.Tensor:
        router = config.build(RouterShape(D, E, K, 0.02))
        router.load_state_dict({"weight": weight, "expert_bias": torch.zeros(E)})
        balancer = Balancer(BalanceConfig(loss_weight=1, z_loss_weight=0), ranks.all_reduce, world_size, accumulation)
        own = range(rank * accumulation, (rank + 1) * accumulation)
        contexts = [RouterContext.alone(counted[j]) for j in own]
        routings = [router(x[j].flatten(0, 1), context) for j, context in zip(own, contexts, strict=True)]
        layers = [routing_stats(routing, context) for routing, context in zip(routings, contexts, strict=True)]
        stats = [RoutingStats(*(f[None] for f in layer[:4])) for layer in layers]
        balancer.begin_step(sum(s.counts_BE.sum(1) for s in stats) if balancer.needs_counting_pass else None)
        for s, j in zip(stats, own, strict=True):
            balancer.losses(s, counted[j].sum(1).float(), counted.sum().float()).load_balancing.backward()
        return router.weight.grad / parts

    total = torch.stack(ranks.run(rank_step)).sum(0)
    torch.testing.assert_close(total.double(), exact.grad, rtol=1e-4, atol=1e-7)


def test_a_step_without_counted_tokens_on_one_rank(batch: Batch) -> None:
    cut = batch.cut(2, 2)
    cut.counted_NMBT[1] = False
    for scope in ("sequence", "micro_batch", "data_parallel", "global_batch"):
        step = train_step(BalanceConfig.model_validate({"scope": scope, "loss_weight": 1, "z_loss_weight": 1}), cut)
        assert step.gradient_NMLBTE.isfinite().all()
        assert not step.gradient_NMLBTE[1].any()
        assert step.gradient_NMLBTE[0].abs().max() > 1e-4


# --- bias balancing


def test_bias_moves_by_the_rate() -> None:
    counts = torch.tensor([[0.0, 4, 8, 4], [4, 4, 4, 4], [1, 0, 0, 0]])
    moved = updated_bias(torch.full((3, 4), 0.5), counts, 0.25)
    assert moved.tolist() == [[0.75, 0.5, 0.25, 0.5], [0.5] * 4, [0.25, 0.75, 0.75, 0.75]]


def test_bias_updates_are_bounded() -> None:
    bias = torch.zeros(5, E, dtype=torch.float64)
    for step in range(100):
        counts = torch.randint(20, (5, E)).double()
        before, bias = bias, updated_bias(bias, counts, 1e-3)
        change = bias - before
        assert change.abs().max() <= 1e-3 + 1e-15
        # Uneven counts have an expert above and one below the mean, so at most E - 2 signs are left over.
        assert change.sum(dim=1).abs().max() <= (E - 2) * 1e-3 + 1e-15, step
        assert ((change > 0) == (counts < counts.mean(dim=1, keepdim=True))).all()
    assert bias.abs().max() <= 0.1 + 1e-12


def test_bias_updates_balance_a_router() -> None:
    """Repeated on a skewed router, they bring MaxVio down without touching its matrix."""
    router = SigmoidTopKConfig().build(RouterShape(24, E, K, 0.3))
    nn.init.normal_(router.weight, std=0.1)
    nn.init.zeros_(router.expert_bias)
    x = torch.randn(1000, 24) + 2 * torch.randn(24)
    everyone = RouterContext.alone(torch.ones(1, 1000, dtype=torch.bool))
    violations = []
    for _ in range(300):
        with torch.no_grad():
            counts = torch.bincount(router(x, everyone).experts_NS.flatten(), minlength=E).float()
        violations.append(max_violation(counts).item())
        router.expert_bias.copy_(updated_bias(router.expert_bias, counts, 2e-3))
    assert violations[0] > 1
    assert violations[-1] < 0.2


def test_max_violation_by_hand() -> None:
    counts = torch.tensor([[4.0, 0, 2, 2], [3, 3, 3, 3], [0, 0, 0, 12]])
    assert max_violation(counts).tolist() == [1, 0, 3]


# --- the budget of uneven experts, and what routers bring themselves


UNEVEN = MoEConfig.model_validate(
    {
        "num_experts": E,
        "top_k": K,
        "expert_dim": 8,
        "sizes": [{"num": 2, "times": 4}, {"num": 3, "times": 1}, {"num": 2, "times": 0}],
    }
)
COSTS = torch.tensor([1.0, 1.0, 0.25, 0.25, 0.25, 0.0, 0.0], dtype=torch.float64)


class Own(NamedTuple):
    """What a router adds to the statistics of every micro-batch: here, constants times its probabilities."""

    penalty: float = 0.0
    balance_weight_L: torch.Tensor | None = None


def step_with(
    config: BalanceConfig,
    batch: Batch,
    moe: MoEConfig | None,
    own: Own = Own(),  # noqa: B008
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, M, L, B, T, E) gradient and value of the losses, averaged over ranks and micro-batches."""
    N, M, L, *_ = batch.logits_NMLBTE.shape
    tokens = batch.counted_NMBT.sum().double()
    ranks = Ranks(N)

    def rank_step(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        balancer = Balancer(config, ranks.all_reduce, N, M, moe)
        leaves = [batch.logits_NMLBTE[rank, m].clone().requires_grad_() for m in range(M)]
        stats = []
        for leaf, counted_BT in zip(leaves, batch.counted_NMBT[rank], strict=True):
            layers = [statistics(leaf[layer], counted_BT, K) for layer in range(L)]
            whole = RoutingStats(*(torch.stack(field) for field in zip(*(layer[:4] for layer in layers), strict=True)))
            # The penalty of a row is its first probability.
            penalty = own.penalty * whole.prob_sums_BE[..., 0]
            stats.append(whole._replace(penalty_sums_B=penalty, balance_weight=own.balance_weight_L))
        counts = torch.stack([s.counts_BE.sum(dim=1) for s in stats]).sum(dim=0)
        balancer.begin_step(counts if balancer.needs_counting_pass else None)
        value = torch.zeros((), dtype=torch.float64)
        for s, counted_BT in zip(stats, batch.counted_NMBT[rank], strict=True):
            losses = balancer.losses(s, counted_BT.sum(dim=1).double(), tokens)
            value += losses.total.detach()
            losses.total.backward()
        return torch.stack([leaf.grad for leaf in leaves if leaf.grad is not None]) / (N * M), value / (N * M)

    gradients, values = zip(*ranks.run(rank_step), strict=True)
    return torch.stack(gradients), torch.stack(values).sum()


def whole_batch(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(L, T, E) logits, a leaf, and (L, E) counts of all counted tokens."""
    logits_ZLTE = batch.logits_NMLBTE[0, 0].transpose(0, 1)
    counted_ZT = batch.counted_NMBT[0, 0]
    leaf = logits_ZLTE.transpose(1, 2)[counted_ZT].transpose(0, 1).clone().requires_grad_()
    return leaf, counts_of(logits_ZLTE, counted_ZT)


def compare(gradient: torch.Tensor, cut: Batch, leaf: torch.Tensor, batch: Batch) -> None:
    assert leaf.grad is not None
    whole = Batch(gradient, cut.counted_NMBT).cut(1, 1).logits_NMLBTE[0, 0]
    by_token = whole.permute(1, 2, 0, 3)[batch.counted_NMBT[0, 0]].transpose(0, 1)
    torch.testing.assert_close(by_token, leaf.grad, **EXACT)


@every_cut
@pytest.mark.parametrize("target", [0.1, 0.6])
def test_the_budget_is_the_square_of_what_the_global_batch_costs_too_much(
    target: float, world_size: int, accumulation: int, batch: Batch
) -> None:
    """Gradient: autograd of weight (c - target)^2, with c's value from the choices and its slope from the
    probabilities, at any cut. c is the mean over the layers' assignments."""
    cut = batch.cut(world_size, accumulation)
    config = BalanceConfig(loss_weight=0, z_loss_weight=0, budget={"target": target, "weight": 3.0})
    gradient, value = step_with(config, cut, UNEVEN)
    leaf, counts = whole_batch(batch)
    realised = (counts @ COSTS).sum() / counts.sum()
    expected = (leaf.softmax(-1) @ COSTS).mean()
    c = realised + expected - expected.detach()
    loss = 3.0 * (c - target) ** 2
    loss.backward()
    torch.testing.assert_close(value, loss.detach(), rtol=1e-6, atol=1e-7)  # costs are fp32 beside fp64 counts
    compare(gradient, cut, leaf, batch)
    assert leaf.grad is not None
    assert leaf.grad.abs().max() > 1e-6


def test_the_budget_pushes_towards_its_target(batch: Batch) -> None:
    for target, sign in ((0.0, 1), (1.0, -1)):
        config = BalanceConfig(loss_weight=0, z_loss_weight=0, budget={"target": target})
        gradient, _ = step_with(config, batch, UNEVEN)
        assert sign * gradient[..., :2].sum() > 0, "descent moves probability from, or to, the widest experts"
        assert sign * gradient[..., 5:].sum() < 0


@every_cut
def test_a_layers_own_coefficient_replaces_the_loss_weight(world_size: int, accumulation: int, batch: Batch) -> None:
    moe = MoEConfig(num_experts=E, top_k=K, expert_dim=8, router=ReluConfig())
    own = Own(balance_weight_L=torch.tensor([0.3, 1.7], dtype=torch.float64))
    cut = batch.cut(world_size, accumulation)
    for loss_weight in (0.0, 123.0):
        gradient, value = step_with(BalanceConfig(loss_weight=loss_weight, z_loss_weight=0), cut, moe, own)
        leaf, counts = whole_batch(batch)
        f = counts / counts.sum(-1, keepdim=True)
        lbl = E * (f * leaf.softmax(-1).mean(1)).sum(-1)
        loss = 0.3 * lbl[0] + 1.7 * lbl[1]
        loss.backward()
        torch.testing.assert_close(value, loss.detach(), **EXACT)
        compare(gradient, cut, leaf, batch)


@every_cut
def test_own_penalties_are_the_mean_over_the_steps_counted_tokens(
    world_size: int, accumulation: int, batch: Batch
) -> None:
    cut = batch.cut(world_size, accumulation)
    gradient, value = step_with(BalanceConfig(loss_weight=0, z_loss_weight=0), cut, None, Own(penalty=0.7))
    leaf, _ = whole_batch(batch)
    loss = 0.7 * leaf.softmax(-1)[..., 0].mean(1).sum()
    loss.backward()
    torch.testing.assert_close(value, loss.detach(), **EXACT)
    compare(gradient, cut, leaf, batch)


EVEN = MoEConfig(num_experts=E, top_k=K, expert_dim=8)
THREE_WIDE = MoEConfig.model_validate(
    {
        "num_experts": E,
        "top_k": K,
        "expert_dim": 8,
        "sizes": [{"num": 1, "times": 0}, {"num": 5, "times": 1}, {"num": 1, "times": 4}],
    }
)
HASHED = UNEVEN.model_copy(update={"router": HashConfig()})
QUANTILE = EVEN.model_copy(update={"router": SoftmaxTopKConfig(quantile=QuantileBalancing())})


@pytest.mark.parametrize(
    ("balance", "moe", "message"),
    [
        ({"bias_rate": 0.1}, None, "balance.bias_rate=0.1 needs experts, but model.ffn.kind=dense"),
        ({"budget": {"target": 0.5}}, None, "balance.budget.target=0.5 needs experts, but model.ffn.kind=dense"),
        ({"bias_rate": 0.1}, HASHED, "which model.ffn.router.kind=hash does not have; use a top-k router"),
        ({"bias_rate": 0.1}, QUANTILE, "model.ffn.router.quantile would both set the selection bias"),
        ({"budget": {"target": 0.5}}, EVEN, "needs experts of several widths, but model.ffn.sizes makes all equal"),
        ({"budget": {"target": 0.5}}, HASHED, "cannot act: model.ffn.router.kind=hash learns nothing"),
        # Two of seven experts, none twice: what the cheapest and the dearest two cost on average.
        ({"budget": {"target": 0.9}}, THREE_WIDE, "an assignment costs between 0.125 and 0.625 of the widest expert"),
        ({"budget": {"target": 0.1}}, THREE_WIDE, "balance.budget.target=0.1 is out of reach: with model.ffn.top_k=2"),
    ],
)
def test_balances_that_cannot_act_are_refused(balance: dict[str, Any], moe: MoEConfig | None, message: str) -> None:
    assert message in (balance_problem(BalanceConfig.model_validate(balance), moe) or "")


def test_balances_that_can_act_are_not() -> None:
    for target in (0.125, 0.3, 0.625):
        assert balance_problem(BalanceConfig(budget={"target": target}), THREE_WIDE) is None
    assert balance_problem(BalanceConfig(bias_rate=0.1), EVEN) is None
    assert balance_problem(BalanceConfig(), None) is None
