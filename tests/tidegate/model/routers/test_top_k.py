"""The top-k routers: their common properties, then each one's formula.

Letters: N rows, D width, E experts, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tidegate.model.routers import Router, RouterContext, RouterShape, Routing, SigmoidTopKConfig, SoftmaxTopKConfig
from tidegate.model.routers.top_k import SqrtSoftplusTopKConfig

D, E, K = 24, 7, 3

VARIANTS = [
    SoftmaxTopKConfig(),
    SigmoidTopKConfig(),
    SqrtSoftplusTopKConfig(),
    SoftmaxTopKConfig(renormalize=False),
    SigmoidTopKConfig(scale=2.5),
]


def config_id(config: Any) -> str:
    return "-".join(f"{value}" for value in config.model_dump().values())


every_router = pytest.mark.parametrize("config", VARIANTS, ids=config_id)


@pytest.fixture
def build(initialise: Callable[..., nn.Module]) -> Callable[..., Router]:
    def make(config: Any, num_experts: int = E, top_k: int = K, std: float = 0.3) -> Router:
        router = config.build(RouterShape(D, num_experts, top_k, std))
        initialise(router)
        return router

    return make


def route(router: Router, x_ND: torch.Tensor) -> Routing:
    return router(x_ND, RouterContext.alone(torch.ones(1, len(x_ND), dtype=torch.bool)))


def weights_by_expert(routing: Routing) -> torch.Tensor:
    """(N, E), zero where an expert was not chosen."""
    return torch.zeros_like(routing.probs_NE).scatter(1, routing.experts_NS, routing.weights_NS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (7, 1), (7, 3), (7, 7), (33, 8)])
@pytest.mark.parametrize("rows", [1, 63, 1000])
@every_router
def test_contract(
    config: Any, rows: int, num_experts: int, top_k: int, dtype: torch.dtype, build: Callable[..., Router]
) -> None:
    router = build(config, num_experts, top_k).to(dtype)
    x = torch.randn(rows, D).to(dtype)
    routing = route(router, x)
    assert routing.experts_NS.shape == routing.weights_NS.shape == (rows, top_k)
    assert routing.probs_NE.shape == routing.logits_NE.shape == (rows, num_experts)
    assert routing.experts_NS.dtype == torch.int64
    assert {field.dtype for field in routing[1:4]} == {torch.float32}, "routing is fp32 whatever the input"
    assert all(field.isfinite().all() for field in routing[:4])

    chosen = routing.experts_NS.sort(dim=1).values
    assert chosen.min() >= 0
    assert chosen.max() < num_experts
    assert (chosen.diff(dim=1) > 0).all(), "a token chose an expert twice"
    assert (routing.probs_NE > 0).all()
    torch.testing.assert_close(routing.probs_NE.sum(dim=1), torch.ones(rows), rtol=0, atol=1e-6)
    assert (routing.weights_NS > 0).all()
    exact = x.double() @ router.weight.double().T
    torch.testing.assert_close(routing.logits_NE.double(), exact, rtol=1e-5, atol=1e-5)

    # The chosen ones are the k most probable, best first.
    cutoff = routing.probs_NE.topk(top_k, dim=1).values
    torch.testing.assert_close(routing.probs_NE.gather(1, routing.experts_NS), cutoff, rtol=1e-6, atol=0)

    again = route(router, x)
    assert all(torch.equal(one, other) for one, other in zip(routing[:4], again[:4], strict=True))


@every_router
def test_rows_do_not_see_each_other(config: Any, build: Callable[..., Router]) -> None:
    router, x = build(config), torch.randn(63, D)
    order = torch.randperm(63)
    together, shuffled = route(router, x), route(router, x[order])
    assert torch.equal(shuffled.experts_NS, together.experts_NS[order])
    torch.testing.assert_close(shuffled.weights_NS, together.weights_NS[order], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shuffled.probs_NE, together.probs_NE[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("field", ["weights_NS", "probs_NE", "logits_NE"])
@every_router
def test_the_gradient_reaches_weight_and_input(config: Any, field: str, build: Callable[..., Router]) -> None:
    router, x = build(config), torch.randn(63, D, requires_grad=True)
    values = getattr(route(router, x), field)
    values.backward(torch.randn_like(values))
    for leaf in (router.weight, x):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert leaf.grad.abs().amax(dim=1).min() > 1e-6, "a row gets no gradient"


@every_router
def test_bias_changes_the_selection(config: Any, build: Callable[..., Router]) -> None:
    router, x = build(config), torch.randn(1000, D)
    before = route(router, x)
    router.expert_bias[4] = 100.0
    router.expert_bias[2] = -100.0
    after = route(router, x)
    assert (after.experts_NS == 4).any(dim=1).all()
    assert not (after.experts_NS == 2).any()
    assert not (before.experts_NS == 4).any(dim=1).all()
    assert (before.experts_NS == 2).any()
    assert torch.equal(after.probs_NE, before.probs_NE)
    assert torch.equal(after.logits_NE, before.logits_NE)


@every_router
def test_bias_stays_out_of_the_weights(config: Any, build: Callable[..., Router]) -> None:
    """Where all experts are chosen, or the same ones, no bias may change a factor."""
    x = torch.randn(1000, D)
    for top_k in (E, K):
        router = build(config, top_k=top_k)
        before = route(router, x)
        router.expert_bias.copy_(torch.randn(E) * 0.1)
        after = route(router, x)
        same = (before.experts_NS.sort(dim=1).values == after.experts_NS.sort(dim=1).values).all(dim=1)
        assert 100 < same.sum() <= (1000 if top_k == E else 999)
        torch.testing.assert_close(weights_by_expert(after)[same], weights_by_expert(before)[same], rtol=1e-6, atol=0)


@pytest.mark.parametrize("constant", [-3.0, 0.25, 2.0])
@every_router
def test_adding_a_constant_to_the_bias_changes_nothing(
    config: Any, constant: float, build: Callable[..., Router]
) -> None:
    router, x = build(config), torch.randn(1000, D)
    router.expert_bias.copy_(torch.randn(E) * 0.1)
    before = route(router, x)
    router.expert_bias.add_(constant)
    after = route(router, x)
    torch.testing.assert_close(weights_by_expert(after), weights_by_expert(before), rtol=1e-6, atol=0)


@every_router
def test_bias_is_no_parameter(config: Any, build: Callable[..., Router]) -> None:
    router, x = build(config), torch.randn(63, D)
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert "expert_bias" in router.state_dict()
    assert torch.equal(router.expert_bias, torch.zeros(E))
    router.expert_bias.copy_(torch.randn(E)).requires_grad_()
    routing = route(router, x)
    sum(field.sum() for field in routing[1:4]).backward()  # type: ignore[union-attr]
    assert router.expert_bias.grad is None


@pytest.mark.parametrize("cast", [torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.double])
@every_router
def test_a_cast_leaves_the_bias_alone(
    config: Any, cast: Callable[[nn.Module], nn.Module], build: Callable[..., Router]
) -> None:
    """1.001 in bf16 is 1: a bias that went through bf16 has lost its last steps, whatever its dtype says."""
    parent = nn.Sequential(build(config))
    parent[0].expert_bias.copy_(1 + 1e-3 * torch.arange(E))
    before = parent[0].expert_bias.clone()
    cast(parent)
    assert parent[0].expert_bias.dtype == torch.float32
    assert torch.equal(parent[0].expert_bias, before)
    assert parent[0].weight.dtype != torch.float32
    assert "expert_bias" in parent[0].state_dict()


@every_router
def test_bias_goes_from_meta_to_a_device(config: Any, initialise: Callable[..., nn.Module]) -> None:
    with torch.device("meta"):
        router = config.build(RouterShape(D, E, K, 0.3))
    assert router.expert_bias.is_meta
    router.bfloat16().to_empty(device="cpu")
    initialise(router)
    assert (router.expert_bias.dtype, router.expert_bias.device.type) == (torch.float32, "cpu")
    assert torch.equal(router.expert_bias, torch.zeros(E))


@every_router
def test_zero_matrix_routes_evenly(config: Any, build: Callable[..., Router]) -> None:
    router = build(config)
    nn.init.zeros_(router.weight)
    routing = route(router, torch.randn(63, D))
    torch.testing.assert_close(routing.probs_NE, torch.full((63, E), 1 / E), rtol=1e-6, atol=0)
    assert (routing.weights_NS == routing.weights_NS[0, 0]).all()


@every_router
def test_chosen_probabilities_hold_between_the_even_share_and_all(config: Any, build: Callable[..., Router]) -> None:
    routing = route(build(config), torch.randn(1000, D))
    share = routing.probs_NE.gather(1, routing.experts_NS).sum(dim=1)
    assert share.min() > K / E
    assert share.max() <= 1 + 1e-6


@every_router
def test_huge_logits_stay_finite(config: Any, build: Callable[..., Router]) -> None:
    """Scores that underflow must not divide zero by zero, forward or backward."""
    router = build(config)
    for sign in (1.0, -1.0):
        nn.init.constant_(router.weight, sign)
        x = torch.full((3, D), 100.0)
        routing = route(router, x)
        assert all(field.isfinite().all() for field in routing[:4])
        (gradient,) = torch.autograd.grad(routing.weights_NS.sum() + routing.probs_NE.sum(), router.weight)
        assert gradient.isfinite().all()


def chosen(scores_NE: torch.Tensor, bias_E: torch.Tensor) -> torch.Tensor:
    """The k best of every row by sorting, in fp64."""
    return (scores_NE + bias_E).argsort(dim=1, descending=True)[:, :K]


@pytest.mark.parametrize("biased", [False, True])
@every_router
def test_formula(config: Any, biased: bool, build: Callable[..., Router]) -> None:
    """Selection, weights, probabilities and their gradients, written out in fp64."""
    router, x = build(config), torch.randn(63, D)
    if biased:
        router.expert_bias.copy_(torch.linspace(-0.3, 0.3, E))
    logits = (x.double() @ router.weight.detach().double().T).requires_grad_()
    exponentials = logits.exp()
    if isinstance(config, SoftmaxTopKConfig):
        scores = probs = exponentials / exponentials.sum(dim=1, keepdim=True)
        experts = chosen(scores.detach(), router.expert_bias)
        weights = scores.gather(1, experts)
        weights = weights / weights.sum(dim=1, keepdim=True) if config.renormalize else weights
    elif isinstance(config, SigmoidTopKConfig):
        scores = exponentials / (1 + exponentials)
        probs = scores / scores.sum(dim=1, keepdim=True)
        experts = chosen(scores.detach(), router.expert_bias)
        weights = scores.gather(1, experts)
        weights = config.scale * weights / weights.sum(dim=1, keepdim=True)
    else:
        scores = (1 + exponentials).log().sqrt()
        probs = scores / scores.sum(dim=1, keepdim=True)
        experts = chosen(scores.detach(), router.expert_bias)
        weights = scores.gather(1, experts)
        weights = weights / weights.sum(dim=1, keepdim=True)
    routing = route(router, x)
    assert torch.equal(routing.experts_NS, experts)
    torch.testing.assert_close(routing.weights_NS.double(), weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(routing.probs_NE.double(), probs, rtol=1e-5, atol=1e-6)

    factor, pull = torch.randn(63, K, dtype=torch.float64), torch.randn(63, E, dtype=torch.float64)
    ((weights * factor).sum() + (probs * pull).sum()).backward()
    ((routing.weights_NS * factor.float()).sum() + (routing.probs_NE * pull.float()).sum()).backward()
    assert logits.grad is not None
    assert router.weight.grad is not None
    torch.testing.assert_close(router.weight.grad.double(), logits.grad.T @ x.double(), rtol=1e-4, atol=1e-4)


def test_declared_sums_of_weights(build: Callable[..., Router]) -> None:
    x = torch.randn(1000, D)
    ones = torch.ones(1000)
    renormalised = route(build(SoftmaxTopKConfig()), x).weights_NS.sum(dim=1)
    torch.testing.assert_close(renormalised, ones, rtol=0, atol=1e-6)
    plain = route(build(SoftmaxTopKConfig(renormalize=False)), x)
    assert torch.equal(plain.weights_NS, plain.probs_NE.gather(1, plain.experts_NS))
    assert plain.weights_NS.sum(dim=1).max() < 1
    scaled = route(build(SigmoidTopKConfig(scale=2.5)), x).weights_NS.sum(dim=1)
    torch.testing.assert_close(scaled, 2.5 * ones, rtol=0, atol=1e-5)


def test_sigmoid_scores_are_independent(build: Callable[..., Router]) -> None:
    """Raising one logit moves no other score, unlike a softmax; only the normalisation is shared."""
    router = build(SigmoidTopKConfig())
    x = torch.randn(63, D)
    before = route(router, x)
    ratio_before = before.probs_NE[:, 1] / before.probs_NE[:, 2]
    with torch.no_grad():
        router.weight[0] += 1
    after = route(router, x)
    torch.testing.assert_close(after.probs_NE[:, 1] / after.probs_NE[:, 2], ratio_before, rtol=1e-5, atol=0)
    logits = before.logits_NE.double()
    expected = (1 + torch.exp(-logits[:, 2])) / (1 + torch.exp(-logits[:, 1]))
    torch.testing.assert_close(ratio_before.double(), expected, rtol=1e-5, atol=0)
