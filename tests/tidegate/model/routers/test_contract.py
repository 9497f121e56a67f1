"""What every router in `RouterConfig` keeps to, by what it declares.

Letters: N rows, B sequences, T tokens, D width, E experts, K chosen experts, S slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import nn

from tidegate.model.clock import Clock
from tidegate.model.decoder import Decoder, ModelConfig, materialize
from tidegate.model.dispatch import plan
from tidegate.model.moe import MoEConfig, routing_stats
from tidegate.model.routers import RoutedStep, Router, RouterConfig, RouterContext, RouterShape, Routing
from tidegate.model.routers.comet import CometConfig
from tidegate.model.routers.permutation import PermutationSearchConfig
from tidegate.model.routers.top_k import QuantileBalancing, SoftmaxTopKConfig

B, T, D, E, K, V = 4, 21, 24, 7, 3, 97
CPU = torch.device("cpu")
NEEDED: dict[str, dict[str, Any]] = {
    "dense_to_sparse": {"anneal_tokens": 1000},
    "expert_choice": {"allow_future_leak": True},
    "sinkhorn": {"probability": 0.5},
    "decoupled": {"width": 16, "num_heads": 2},
}
"""Fields without a default, and defaults too large or too rare for a test."""

CLASSES = get_args(get_args(RouterConfig)[0])
CONFIGS = [config(**NEEDED.get(config.model_fields["kind"].default, {})) for config in CLASSES]
VARIANTS = [
    *CONFIGS,
    SoftmaxTopKConfig(quantile=QuantileBalancing()),
    SoftmaxTopKConfig(renormalize=False),
    CometConfig(search=PermutationSearchConfig(tokens=300)),
]
NUMBERS = [1, 2, 3, 7]  # steps; with 100 tokens each, 300 are within all annealing


def config_id(config: Any) -> str:
    extra = [name for name in ("quantile", "search") if getattr(config, name, None) is not None]
    return "-".join([config.kind, *extra, *(["plain"] if getattr(config, "renormalize", True) is False else [])])


every_router = pytest.mark.parametrize("config", VARIANTS, ids=config_id)


def clock(step: int) -> Clock:
    return Clock(step, 100 * step, seed=3)


class Batch:
    """B sequences, some tokens of which do not count."""

    def __init__(self, batch: int = B, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(batch)
        self.x_BTD = torch.randn(batch, T, D, generator=generator).to(dtype)
        self.tokens_BT = torch.randint(0, V, (batch, T), generator=generator)
        self.counted_BT = torch.rand(batch, T, generator=generator) < 0.8
        self.places_B = torch.arange(batch)

    def context(self, step: int = 0, rows: slice = slice(None)) -> RouterContext:
        at = clock(step) if step else Clock(0, 0, 0)
        return RouterContext(self.counted_BT[rows], self.tokens_BT[rows], self.places_B[rows], at)

    def route(self, router: Router, step: int = 0, rows: slice = slice(None)) -> Routing:
        return router(self.x_BTD[rows].flatten(0, 1), self.context(step, rows))


@pytest.fixture
def build(initialise: Callable[..., nn.Module]) -> Callable[..., Router]:
    def make(config: Any, num_experts: int = E, top_k: int = K, seed: int = 0) -> Router:
        router = config.build(RouterShape(D, num_experts, top_k, 0.3, layer=1, vocab_size=V))
        initialise(router, seed)
        router.fit_tokens(torch.arange(1.0, V + 1) / torch.arange(1.0, V + 1).sum())
        return router

    return make


def used(routing: Routing) -> torch.Tensor:
    """(N, S) bool."""
    return torch.ones_like(routing.experts_NS, dtype=torch.bool) if routing.chosen_NS is None else routing.chosen_NS


def by_expert(routing: Routing) -> torch.Tensor:
    """(N, E) weights; NaN where an expert is not used."""
    closed = torch.full_like(routing.probs_NE, torch.nan)
    weights_NS = routing.weights_NS.detach().masked_fill(~used(routing), torch.nan)
    return closed.scatter(1, routing.experts_NS, weights_NS)


def routed(router: Router, routings: list[Routing], batch: Batch, step: int, rows: list[slice]) -> RoutedStep:
    """What the trainer would tell the router of a step that was cut into these parts."""
    parts = [routing_stats(routing, batch.context(step, part)) for routing, part in zip(routings, rows, strict=True)]
    observed = None if parts[0].observed is None else sum(part.observed for part in parts)
    counts_E = sum(part.counts_BE.sum(dim=0) for part in parts)
    return RoutedStep(counts_E, batch.counted_BT.sum().float(), observed, clock(step))


def train(router: Router, batch: Batch, steps: list[int], cuts: list[slice]) -> list[torch.Tensor]:
    """Route and update for some steps, the batch cut into parts; weights by expert of every step."""
    seen = []
    for step in steps:
        with torch.no_grad():
            routings = [batch.route(router, step, cut) for cut in cuts]
        seen.append(torch.cat([by_expert(routing) for routing in routings]))
        router.update(routed(router, routings, batch, step, cuts))
    return seen


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_kinds_are_unique_and_described() -> None:
    kinds = [config.kind for config in CONFIGS]
    assert len(set(kinds)) == len(kinds)
    for config in CLASSES:
        assert len(config.summary) > 20, config
        assert config.source, config


@every_router
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 1), (7, 3), (33, 8)])
@pytest.mark.parametrize("training", [True, False])
def test_weights_are_finite_normalised_and_of_distinct_experts(
    config: Any, dtype: torch.dtype, num_experts: int, top_k: int, training: bool, build: Callable[..., Router]
) -> None:
    router = build(config, num_experts, top_k).to(dtype).train(training)
    batch = Batch(dtype=dtype)
    for step in NUMBERS if training else [0]:
        routing = batch.route(router, step)
        rows, slots = routing.experts_NS.shape
        assert rows == B * T
        assert slots == (num_experts if routing.chosen_NS is not None else top_k)
        assert routing.weights_NS.shape == (rows, slots)
        assert routing.probs_NE.shape == routing.logits_NE.shape == (rows, num_experts)
        assert routing.experts_NS.dtype == torch.int64
        fp32 = [routing.weights_NS, routing.probs_NE, routing.logits_NE, routing.penalty_N, routing.balance_weight]
        assert {field.dtype for field in fp32 if field is not None} == {torch.float32}
        assert all(field.isfinite().all() for field in fp32 if field is not None)
        ordered = routing.experts_NS.sort(dim=1).values
        assert ordered.min() >= 0
        assert ordered.max() < num_experts
        assert (ordered.diff(dim=1) > 0).all(), "a token has an expert twice"
        assert (routing.weights_NS >= 0).all()
        assert not routing.weights_NS[~used(routing)].any(), "an expert that is not used has a weight"
        sums = routing.weights_NS.sum(dim=1)
        if config.capabilities.normalized and getattr(config, "renormalize", True):
            torch.testing.assert_close(sums, torch.ones(rows), rtol=0, atol=1e-5)
        if config.kind != "relu":
            torch.testing.assert_close(routing.probs_NE.sum(dim=1), torch.ones(rows), rtol=0, atol=1e-5)
        if not config.capabilities.ragged:
            assert routing.chosen_NS is None
        elif not config.capabilities.dense_phase and config.kind == "top_p":
            assert used(routing).sum(dim=1).min() >= 1


@every_router
def test_gradients_reach_every_parameter(config: Any, build: Callable[..., Router]) -> None:
    router, batch = build(config), Batch()
    parameters = dict(router.named_parameters())
    assert bool(parameters) == config.capabilities.learned
    routing = batch.route(router, step=1)
    terms = [routing.weights_NS, routing.probs_NE, routing.logits_NE]
    loss = sum((term * torch.randn_like(term)).sum() for term in terms)
    if routing.penalty_N is not None:
        loss = loss + routing.penalty_N.sum()
    assert loss.requires_grad == config.capabilities.learned
    if config.capabilities.learned:
        loss.backward()
        for name, parameter in parameters.items():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 1e-8, name


@every_router
@pytest.mark.parametrize("step", [0, 1, 2])
def test_tokens_that_do_not_count_change_nothing_for_the_others(
    config: Any, step: int, build: Callable[..., Router]
) -> None:
    router, batch, other = build(config).train(step > 0), Batch(), Batch()
    # The first token of each sequence counts, and those after an uncounted one of a bigram hash do not.
    counted_BT = (torch.arange(T) < 13).expand(B, T)
    batch.counted_BT = other.counted_BT = counted_BT
    noise = torch.randn_like(other.x_BTD)
    other.x_BTD = torch.where(counted_BT.unsqueeze(-1), other.x_BTD, noise)
    other.tokens_BT = torch.where(counted_BT, other.tokens_BT, (other.tokens_BT + 1) % V)
    one, two = (by_expert(b.route(router, step)).view(B, T, E)[counted_BT] for b in (batch, other))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6, equal_nan=True)
    stats = [routing_stats(b.route(router, step), b.context(step)) for b in (batch, other)]
    for name in ("counts_BE", "prob_sums_BE", "z_sums_B", "penalty_sums_B", "observed"):
        left, right = (getattr(s, name) for s in stats)
        if left is not None:
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5, msg=name)


@every_router
def test_counts_are_those_of_the_dispatch(config: Any, build: Callable[..., Router]) -> None:
    """Expert parallelism sends rows by these counts: they must add up whatever the router did."""
    router, batch = build(config), Batch()
    batch.counted_BT = torch.ones_like(batch.counted_BT)
    for step in NUMBERS:
        routing = batch.route(router, step)
        dispatch = plan(routing, (1,) * E)
        stats = routing_stats(routing, batch.context(step))
        assert torch.equal(dispatch.slots().counts_E.float(), stats.counts_BE.sum(dim=0))
        assert int(dispatch.slots().counts_E.sum()) == int(used(routing).sum()) == len(dispatch.weights_A)
        if not config.capabilities.ragged:
            assert int(used(routing).sum()) == B * T * K


@every_router
def test_the_seed_decides_everything(config: Any, build: Callable[..., Router]) -> None:
    batch, cuts = Batch(), [slice(None)]
    first, second = (train(build(config), batch, NUMBERS, cuts) for _ in range(2))
    assert all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(first, second, strict=True))
    if config.capabilities.learned:
        other = train(build(config, seed=1), batch, NUMBERS, cuts)
        assert not all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(first, other, strict=True))


@every_router
def test_any_cut_of_the_batch_routes_alike_where_declared(config: Any, build: Callable[..., Router]) -> None:
    """Four ranks, two, or one: the same experts and weights, also after controllers have moved."""
    batch = Batch()
    whole = train(build(config), batch, NUMBERS, [slice(0, 4)])
    for cuts in ([slice(0, 2), slice(2, 4)], [slice(i, i + 1) for i in range(4)], [slice(0, 1), slice(1, 4)]):
        parts = train(build(config), batch, NUMBERS, cuts)
        if not config.capabilities.needs_global_batch:
            equal(parts, whole)
        else:
            with pytest.raises(AssertionError):
                equal(parts, whole)


@every_router
def test_training_routes_like_evaluation_unless_declared(config: Any, build: Callable[..., Router]) -> None:
    if not config.capabilities.learned or getattr(config, "search", None) is not None:
        pytest.skip("draws its experts, or searches their order")
    router, batch = build(config), Batch()
    training = [by_expert(batch.route(router, step)) for step in NUMBERS]
    evaluation = by_expert(batch.route(router.eval()))
    if not config.capabilities.training_branch:
        equal(training, [evaluation] * len(NUMBERS))
    else:
        with pytest.raises(AssertionError):
            equal(training, [evaluation] * len(NUMBERS))


@every_router
def test_layers_draw_differently(config: Any, initialise: Callable[..., nn.Module]) -> None:
    """With the same weights, routers of two layers differ in what they draw, and in nothing else."""
    routings = []
    for layer in (1, 2):
        router = config.build(RouterShape(D, E, K, 0.3, layer=layer, vocab_size=V))
        initialise(router, 0)
        routings.append([by_expert(Batch().route(router, step)) for step in NUMBERS])
    draws = config.capabilities.training_branch or config.kind in ("hash", "random", "thor")
    if not draws:
        equal(*routings)
    else:
        with pytest.raises(AssertionError):
            equal(*routings)


@every_router
def test_state_saves_and_resumes(config: Any, build: Callable[..., Router]) -> None:
    batch, cuts = Batch(), [slice(None)]
    straight = build(config)
    train(straight, batch, [1, 2], cuts)
    stored = {name: value.clone() for name, value in straight.state_dict().items()}
    resumed = build(config, seed=5)
    resumed.load_state_dict(stored)
    # `fit_tokens` runs before the first step only; what it learnt is in the state.
    equal(train(resumed, batch, [3, 4, 11], cuts), train(straight, batch, [3, 4, 11], cuts))


@every_router
def test_casting_to_bf16_leaves_controllers_in_fp32(config: Any, build: Callable[..., Router]) -> None:
    router = build(config)
    before = {name: buffer.clone() for name, buffer in router.named_buffers()}
    router.bfloat16()
    for name, buffer in router.named_buffers():
        assert buffer.dtype == before[name].dtype, name
        assert torch.equal(buffer, before[name]), name


@every_router
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # where a graph breaks
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin `_hashlib")  # it breaks there
@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole(config: Any, training: bool, build: Callable[..., Router]) -> None:
    router, batch = build(config).train(training), Batch()
    # Sinkhorn's branch is decided on the host: one graph break.
    compiled = torch.compile(router, backend="aot_eager", fullgraph=config.kind != "sinkhorn")
    for step in (1, 2) if training else (0,):
        expected, actual = (batch.route(run, step) for run in (router, compiled))
        equal([by_expert(actual)], [by_expert(expected)])
        for one, two in zip(expected, actual, strict=True):
            if isinstance(one, torch.Tensor):
                torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


@every_router
def test_config_goes_through_json(config: Any) -> None:
    moe = MoEConfig(num_experts=E, top_k=K, expert_dim=8, router=config)
    assert MoEConfig.model_validate_json(moe.model_dump_json()) == moe
    assert MoEConfig.model_validate_json(moe.model_dump_json()).capabilities == config.capabilities


@every_router
@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_trains_with_it(config: Any, recompute: bool) -> None:
    """Loss falls on a text to learn by heart; a pass without gradient counts what the training pass counts."""
    moe = {"kind": "moe", "num_experts": E, "top_k": K, "expert_dim": 8, "router": config.model_dump()}
    attention = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    model_config = ModelConfig.model_validate(
        {"vocab_size": V, "width": D, "num_layers": 2, "attention": attention, "ffn": moe, "init_std": 0.1}
    )
    model = materialize(lambda: Decoder(model_config, recompute=recompute), CPU, seed=0)
    for router in model.routers():
        router.fit_tokens(torch.ones(V) / V)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(0))
    counted = torch.ones(B, T, dtype=torch.bool)
    losses = []
    for step in range(1, 9):
        with torch.no_grad():
            counting = model(tokens[:, :-1], tokens[:, 1:], counted, clock=clock(step)).stats
        output = model(tokens[:, :-1], tokens[:, 1:], counted, clock=clock(step))
        stats = output.stats
        if not config.capabilities.double_forward:
            assert torch.equal(counting.counts_BE, stats.counts_BE)
        loss = (output.nll + stats.penalty_sums_B.sum()) / counted.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(output.nll.detach()) / (B * T))
        for layer, router in enumerate(model.routers()):
            observed = None if stats.observed is None else stats.observed[layer]
            router.update(RoutedStep(stats.counts_BE[layer].sum(0), counted.sum().float(), observed, clock(step)))
    assert losses[-1] < losses[0] - 0.05, losses
