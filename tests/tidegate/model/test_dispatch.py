"""Dispatch of ragged routings and uneven experts, against a loop over tokens in fp64.

Letters: B sequences, T tokens, N rows, D width, E experts, S slots, A assignments, s slices, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tidegate.model.dispatch import plan
from tidegate.model.moe import MoE, MoEConfig
from tidegate.model.routers import RouterContext, Routing
from tidegate_kernels.moe_dispatch import combine, fan_out

D, E, WIDTH = 24, 5, 8

SIZES: dict[str, list[dict[str, int]]] = {
    "even": [],
    "uneven": [{"num": 1, "times": 3}, {"num": 2, "times": 1}, {"num": 1, "times": 2}, {"num": 1, "times": 1}],
    "identity": [{"num": 1, "times": 0}, {"num": 2, "times": 2}, {"num": 2, "times": 0}],
    "twos": [{"num": 5, "times": 2}],
}
every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def random_routing(rows: int, kind: str) -> Routing:
    """Weights and choices that no router made; leaves that want a gradient."""
    logits = torch.randn(rows, E)
    if kind == "top_k":
        experts = logits.topk(2, dim=1).indices
        return Routing(experts, torch.rand(rows, 2).requires_grad_(), logits.softmax(1), logits)
    chosen = {
        "ragged": torch.rand(rows, E) < torch.rand(rows, 1),
        "none": torch.zeros(rows, E, dtype=torch.bool),
        "all": torch.ones(rows, E, dtype=torch.bool),
        "one_expert": torch.arange(E).expand(rows, E) == 3,
        "last_row": (torch.arange(rows) == rows - 1)[:, None].expand(rows, E),
    }[kind]
    if kind == "ragged":
        chosen[:: max(1, rows // 3)] = False  # rows without any expert, the first among them
    experts = torch.arange(E).expand(rows, E)
    return Routing(experts, torch.rand(rows, E).requires_grad_(), logits.softmax(1), logits, chosen)


def loop_over_tokens(
    moe: MoE, x: torch.Tensor, weights: torch.Tensor, routing: Routing, w: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Sum over chosen experts of weight times SwiGLU, one token and one expert at a time."""
    slices = moe.config.slices
    first = [sum(slices[:e]) for e in range(E)]
    out = []
    for n, row in enumerate(x):
        total = torch.zeros_like(row)
        for slot, expert in enumerate(routing.experts_NS[n].tolist()):
            if routing.chosen_NS is not None and not routing.chosen_NS[n, slot]:
                continue
            if slices[expert] == 0:
                continue  # the identity adds nothing to the residual stream
            own = slice(first[expert], first[expert] + slices[expert])
            w1, w3 = (w[name][own].flatten(0, 1) for name in ("w1", "w3"))  # (m F, D)
            w2 = w["w2"][own].transpose(0, 1).flatten(1)  # (D, m F)
            total = total + weights[n, slot] * (w2 @ (F.silu(w1 @ row) * (w3 @ row)))
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("rows", [1, 63])
@pytest.mark.parametrize("kind", ["top_k", "ragged", "none", "all", "one_expert", "last_row"])
@every_size
def test_values_and_gradients_are_those_of_a_loop(
    sizes: list[dict[str, int]], kind: str, rows: int, initialise: Callable[..., Any]
) -> None:
    config = MoEConfig.model_validate({"num_experts": E, "top_k": 2, "expert_dim": WIDTH, "sizes": sizes})
    moe = MoE(config, D, std=0.3, out_std=0.3)
    initialise(moe)
    routing, x = random_routing(rows, kind), torch.randn(1, rows, D, requires_grad=True)
    context = RouterContext.alone(torch.ones(1, rows, dtype=torch.bool))
    upstream = torch.randn(1, rows, D)
    y, stats = moe(x, context, routing)
    y.backward(upstream)

    exact_x, weights = (t.detach().double().requires_grad_() for t in (x[0], routing.weights_NS))
    w = {name: p.detach().double().requires_grad_() for name, p in moe.experts.named_parameters()}
    expected = loop_over_tokens(moe, exact_x, weights, routing, w)
    # fp32 sums of up to E * 3 F products; without any assignment both sides are exact zeros.
    near: dict[str, float] = {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(y[0].double(), expected, **near)
    if expected.requires_grad:
        expected.backward(upstream[0].double())
    leaves = [(x, exact_x), (routing.weights_NS, weights), *((getattr(moe.experts, name), w[name]) for name in w)]
    for ours, truth in leaves:
        gradient = torch.zeros_like(truth) if truth.grad is None else truth.grad
        assert ours.grad is not None, "a rank must have a gradient to reduce also where no row came"
        torch.testing.assert_close(ours.grad.double().view_as(gradient), gradient, **near)
    used = torch.ones_like(routing.experts_NS, dtype=torch.bool) if routing.chosen_NS is None else routing.chosen_NS
    counts = torch.bincount(routing.experts_NS[used], minlength=E)
    assert torch.equal(stats.counts_BE[0], counts.float()), "identities are counted too"


@pytest.mark.parametrize("kind", ["top_k", "ragged", "none", "one_expert"])
@every_size
def test_a_plan_sorts_by_slice_and_comes_back(sizes: list[dict[str, int]], kind: str) -> None:
    config = MoEConfig.model_validate({"num_experts": E, "top_k": 2, "expert_dim": WIDTH, "sizes": sizes})
    slices, routing, rows = config.slices, random_routing(63, kind), 63
    dispatch = plan(routing, slices)
    used = torch.ones_like(routing.experts_NS, dtype=torch.bool) if routing.chosen_NS is None else routing.chosen_NS
    expected = [0] * sum(slices)
    for n, slot in used.nonzero().tolist():
        expert = int(routing.experts_NS[n, slot])
        for piece in range(slices[expert]):
            expected[sum(slices[:expert]) + piece] += 1
    assert dispatch.slots().counts_E.tolist() == expected
    source_A = fan_out(torch.arange(float(rows))[:, None], dispatch.slots()).squeeze(1).long()
    assert source_A.numel() == sum(expected)
    # Rows come in order inside a slice, and what goes out comes back to where it was.
    for part in source_A.split(expected):
        assert (part.diff() > 0).all()
    x = torch.randn(rows, D)
    assert torch.equal(fan_out(x, dispatch.slots()), x[source_A])
    pieces = torch.tensor(slices, dtype=torch.float32)[routing.experts_NS] * used
    times = (routing.weights_NS.detach() * pieces).sum(1, keepdim=True)
    back = combine(x[source_A], dispatch.weights_A.detach(), dispatch.slots())
    torch.testing.assert_close(back, times * x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("times", [2, 3, 5])
def test_an_expert_of_several_slices_is_one_swiglu_of_their_width(times: int, initialise: Callable[..., Any]) -> None:
    sliced = MoE(
        MoEConfig.model_validate(
            {"num_experts": E, "top_k": 2, "expert_dim": WIDTH, "sizes": [{"num": E, "times": times}]}
        ),
        D,
        std=0.3,
        out_std=0.3,
    )
    whole = MoE(MoEConfig(num_experts=E, top_k=2, expert_dim=times * WIDTH), D, std=0.3, out_std=0.3)
    for moe in (sliced, whole):
        initialise(moe)
    with torch.no_grad():
        for name in ("w1", "w3"):
            getattr(whole.experts, name).copy_(getattr(sliced.experts, name).view(E, times * WIDTH, D))
        w2 = sliced.experts.w2.view(E, times, D, WIDTH).transpose(1, 2).reshape(E, D, times * WIDTH)
        whole.experts.w2.copy_(w2)
    x, counted = torch.randn(3, 21, D), torch.ones(3, 21, dtype=torch.bool)
    one, other = (moe(x, RouterContext.alone(counted))[0] for moe in (sliced, whole))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_token_that_chooses_identities_only_gets_nothing(initialise: Callable[..., Any]) -> None:
    config = MoEConfig.model_validate({"num_experts": E, "top_k": 2, "expert_dim": WIDTH, "sizes": SIZES["identity"]})
    moe = MoE(config, D, std=0.3, out_std=0.3)
    initialise(moe)
    experts = torch.tensor([[0, 3], [1, 4]])
    routing = Routing(experts, torch.full((2, 2), 0.5), torch.full((2, E), 1 / E), torch.zeros(2, E))
    y, stats = moe(torch.randn(1, 2, D), RouterContext.alone(torch.ones(1, 2, dtype=torch.bool)), routing)
    assert not y[0, 0].any()
    assert y[0, 1].any()
    assert stats.counts_BE.tolist() == [[1, 1, 0, 1, 1]]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([{"num": 3, "times": 1}], r"sizes name 3 experts, but num_experts=5"),
        ([{"num": 5, "times": 0}], r"sizes name only identities \(times=0\)"),
    ],
)
def test_sizes_that_do_not_add_up_are_refused(sizes: list[dict[str, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig.model_validate({"num_experts": E, "top_k": 2, "expert_dim": WIDTH, "sizes": sizes})


def test_a_ragged_fan_out_sums_gradients_like_an_even_one() -> None:
    """64 slots in bf16: sums in bf16 would be six times as far from the truth."""
    rows, slots = 40, 64
    experts = torch.arange(slots).expand(rows, -1)
    x = torch.randn(rows, 24).bfloat16()
    upstream = torch.randn(rows * slots, 24).bfloat16()
    probs = torch.full((rows, slots), 1 / slots)
    errors = []
    for chosen in (None, torch.ones(rows, slots, dtype=torch.bool)):
        routing = Routing(experts, torch.ones(rows, slots), probs, probs, chosen)
        dispatch = plan(routing, (1,) * slots)
        leaf = x.clone().requires_grad_()
        fan_out(leaf, dispatch.slots()).backward(upstream)
        truth = upstream.double()[dispatch.slots().slot_A.long()].unflatten(0, (rows, slots)).sum(dim=1)
        errors.append(float((leaf.grad.double() - truth).norm() / truth.norm()))
    assert errors[1] <= 1.01 * errors[0]
