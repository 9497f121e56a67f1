"""The mixture of experts against a loop over tokens, and what its statistics promise.

Letters: B sequences, T tokens, N = B T rows, D width, E experts, K chosen experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.utils.checkpoint import checkpoint

from tidegate.model.decoder import Decoder, ModelConfig, materialize
from tidegate.model.moe import Experts, MoE, MoEConfig, RoutingStats
from tidegate.model.routers import RouterContext

CPU = torch.device("cpu")
D, F = 24, 8  # rows of 16 bytes: multiples of 4 in fp32, of 8 in bf16

ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {"kind": "softmax_top_k"},
    "softmax_plain": {"kind": "softmax_top_k", "renormalize": False},
    "sigmoid": {"kind": "sigmoid_top_k", "scale": 2.5},
}
SHARED: dict[str, dict[str, Any]] = {"routed": {}, "shared": {"num": 2}, "gated_shared": {"num": 1, "gate": True}}
every_router = pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS.keys())
every_shared = pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED.keys())


@pytest.fixture
def moe(initialise: Callable[..., nn.Module]) -> Callable[..., MoE]:
    """With initial values of 0.3: routing that is far from even."""

    def make(**changes: object) -> MoE:
        fields: dict[str, object] = {"num_experts": 7, "top_k": 3, "expert_dim": F}
        module = MoE(MoEConfig.model_validate(fields | changes), D, std=0.3, out_std=0.3)
        initialise(module)
        return module

    return make


class Naive(NamedTuple):
    out_BTD: torch.Tensor
    counts_BE: torch.Tensor
    prob_sums_BE: torch.Tensor
    z_sums_B: torch.Tensor


def swiglu(x: torch.Tensor, w1: torch.Tensor, w3: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    gate = w1 @ x
    return w2 @ (gate / (1 + torch.exp(-gate)) * (w3 @ x))


def token_by_token(
    config: MoEConfig, weights: dict[str, torch.Tensor], x_BTD: torch.Tensor, counted_BT: torch.Tensor
) -> Naive:
    """One token and one expert at a time, in the dtype of the arguments."""
    B, T, _ = x_BTD.shape
    bias = weights["router.expert_bias"]
    counts = torch.zeros(B, config.num_experts)
    prob_sums, z_sums = [x_BTD.new_zeros(config.num_experts)] * B, [x_BTD.new_zeros(())] * B
    rows = []
    for b in range(B):
        for t in range(T):
            x = x_BTD[b, t]
            logits = weights["router.weight"] @ x
            scores = logits.softmax(0) if config.router.kind == "softmax_top_k" else logits.sigmoid()
            chosen = sorted(range(config.num_experts), key=lambda e: -(scores[e] + bias[e]).item())[: config.top_k]
            factors = scores[chosen]
            if config.router.kind == "sigmoid_top_k":
                factors = config.router.scale * factors / factors.sum()
            elif config.router.renormalize:
                factors = factors / factors.sum()
            row = torch.zeros_like(x)
            for factor, e in zip(factors, chosen, strict=True):
                row = row + factor * swiglu(x, *(weights[f"experts.{name}"][e] for name in ("w1", "w3", "w2")))
            if config.shared.num:
                extra = swiglu(x, *(weights[f"shared_experts.{name}.weight"] for name in ("w1", "w3", "w2")))
                if config.shared.gate:
                    extra = extra * (weights["shared_experts_gate.weight"] @ x).sigmoid()
                row = row + extra
            rows.append(row)
            one = 1.0 if counted_BT[b, t] else 0.0
            counts[b, chosen] += one
            prob_sums[b] = prob_sums[b] + one * scores / scores.sum()
            z_sums[b] = z_sums[b] + one * logits.exp().sum().log() ** 2
    return Naive(torch.stack(rows).view_as(x_BTD), counts, torch.stack(prob_sums), torch.stack(z_sums))


def everything(length: int, batch: int = 2) -> torch.Tensor:
    return torch.ones(batch, length, dtype=torch.bool)


@pytest.mark.parametrize("length", [1, 31])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (7, 1), (7, 3), (5, 5)])
@every_shared
@every_router
def test_values_and_gradients(
    router: dict[str, Any],
    shared: dict[str, Any],
    num_experts: int,
    top_k: int,
    length: int,
    moe: Callable[..., MoE],
) -> None:
    module = moe(router=router, shared=shared, num_experts=num_experts, top_k=top_k)
    module.router.expert_bias.copy_(torch.randn(num_experts) * 0.05)
    x, counted = torch.randn(2, length, D, requires_grad=True), torch.rand(2, length) < 0.7
    exact = {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
    exact_x = x.detach().double().requires_grad_()
    bias = {"router.expert_bias": module.router.expert_bias.double()}
    expected = token_by_token(module.config, exact | bias, exact_x, counted)

    out, stats = module(x, RouterContext.alone(counted))
    # fp32 against fp64: at most 24 * 8 * 7 roundings of 6e-8 of numbers below 30.
    torch.testing.assert_close(out.double(), expected.out_BTD, rtol=1e-4, atol=1e-4)
    assert torch.equal(stats.counts_BE, expected.counts_BE)
    torch.testing.assert_close(stats.prob_sums_BE.double(), expected.prob_sums_BE, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.z_sums_B.double(), expected.z_sums_B, rtol=1e-5, atol=1e-5)
    assert not stats.counts_BE.requires_grad

    pulls = [torch.randn_like(out), torch.randn_like(stats.prob_sums_BE), torch.randn_like(stats.z_sums_B)]
    torch.autograd.backward([out, stats.prob_sums_BE, stats.z_sums_B], pulls)
    torch.autograd.backward(
        [expected.out_BTD, expected.prob_sums_BE, expected.z_sums_B], [pull.double() for pull in pulls]
    )
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-3, atol=1e-3)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(
            parameter.grad.double(), exact[name].grad, rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


@every_shared
def test_bf16_error(shared: dict[str, Any], moe: Callable[..., MoE]) -> None:
    """At most twice the error of the same token loop in bf16, for the output and every gradient."""
    module = moe(shared=shared).bfloat16()
    x, counted = torch.randn(2, 31, D).bfloat16().requires_grad_(), everything(31)
    bias = {"router.expert_bias": torch.zeros(7)}
    out, _ = module(x, RouterContext.alone(counted))
    assert out.dtype == torch.bfloat16
    g = torch.randn(2, 31, D).bfloat16()
    gradients = [torch.autograd.grad(out, [x, *module.parameters()], g)]
    outputs = [out]
    for dtype in (torch.bfloat16, torch.float64):
        weights = {name: p.detach().to(dtype).requires_grad_() for name, p in module.named_parameters()}
        low_x = x.detach().to(dtype).requires_grad_()
        outputs.append(token_by_token(module.config, weights | bias, low_x, counted).out_BTD)
        gradients.append(torch.autograd.grad(outputs[-1], [low_x, *weights.values()], g.to(dtype)))
    names = ["out", "x", *(name for name, _ in module.named_parameters())]
    for name, one, loop, exact in zip(names, *([o, *g] for o, g in zip(outputs, gradients, strict=True)), strict=True):
        error, allowed = ((t.double() - exact).square().mean().sqrt() for t in (one, loop))
        assert error <= 2 * allowed, name


def test_experts_are_mixed_in_fp32(moe: Callable[..., MoE]) -> None:
    """Experts that return their input, with weights that sum to 1, give it back; weights in bf16 would not."""
    module = moe().bfloat16()
    module.experts.activation = "relu2"  # not the one operation of SwiGLU experts
    module.experts.forward = lambda rows_ND, counts_E, channels_EF: rows_ND
    x = torch.randn(2, 63, D).bfloat16()
    assert torch.equal(module(x, RouterContext.alone(everything(63)))[0], x)


@every_router
def test_uncounted_tokens_are_processed_but_not_counted(router: dict[str, Any], moe: Callable[..., MoE]) -> None:
    module, x = moe(router=router), torch.randn(3, 63, D)
    counted = torch.rand(3, 63) < 0.5
    counted[2] = False
    out, stats = module(x, RouterContext.alone(counted))
    all_out, all_stats = module(x, RouterContext.alone(everything(63, 3)))
    assert torch.equal(out, all_out)
    assert torch.equal(stats.counts_BE.sum(dim=1), 3.0 * counted.sum(dim=1))
    torch.testing.assert_close(stats.prob_sums_BE.sum(dim=1), counted.sum(dim=1).float(), rtol=1e-5, atol=0)
    assert not any(field[2].any() for field in stats[:4]), "a sequence without counted tokens counted something"
    rest = module(x, RouterContext.alone(~counted))[1]
    for part, other, whole in zip(stats[:4], rest[:4], all_stats[:4], strict=True):
        torch.testing.assert_close(part + other, whole, rtol=1e-5, atol=1e-5)
    # What an uncounted token is changes its own output and no statistic.
    changed = torch.where(counted.unsqueeze(-1), x, torch.randn_like(x))
    moved, moved_stats = module(changed, RouterContext.alone(counted))
    for one, other in zip(moved_stats[:4], stats[:4], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(moved[counted], out[counted], rtol=1e-5, atol=1e-5)
    assert (moved - out)[~counted].abs().amax(dim=-1).min() > 1e-3


def test_statistics_keep_sequences_apart(moe: Callable[..., MoE]) -> None:
    module, x, counted = moe(), torch.randn(3, 31, D), torch.rand(3, 31) < 0.7
    _, together = module(x, RouterContext.alone(counted))
    for b in range(3):
        _, alone = module(x[b : b + 1], RouterContext.alone(counted[b : b + 1]))
        for one, other in zip(alone[:4], together[:4], strict=True):
            torch.testing.assert_close(one[0], other[b], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [SHARED["routed"], SHARED["gated_shared"]], ids=["routed", "gated_shared"])
@every_router
def test_permuting_tokens_permutes_outputs(
    router: dict[str, Any], shared: dict[str, Any], moe: Callable[..., MoE]
) -> None:
    module = moe(router=router, shared=shared)
    x, g = torch.randn(2, 63, D), torch.randn(2, 63, D)
    order = torch.randperm(126)

    def run(x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, RoutingStats, tuple[torch.Tensor, ...]]:
        x = x.clone().requires_grad_()
        out, stats = module(x, RouterContext.alone(everything(63)))
        return out, stats, torch.autograd.grad(out, [x, *module.parameters()], g)

    def permuted(t: torch.Tensor) -> torch.Tensor:
        return t.flatten(0, 1)[order].view_as(t)

    out, stats, (dx, *gradients) = run(x, g)
    moved, moved_stats, (moved_dx, *moved_gradients) = run(permuted(x), permuted(g))
    torch.testing.assert_close(moved, permuted(out), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved_dx, permuted(dx), rtol=1e-4, atol=1e-4)
    for one, other in zip(moved_stats[:4], stats[:4], strict=True):
        torch.testing.assert_close(one.sum(dim=0), other.sum(dim=0), rtol=1e-5, atol=1e-4)
    for one, other in zip(moved_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_an_expert_without_tokens_gets_a_gradient_of_zero(moe: Callable[..., MoE]) -> None:
    module, x = moe(), torch.randn(2, 63, D)
    for expert in (0, 3, 6):
        module.zero_grad()
        module.router.expert_bias.zero_()
        module.router.expert_bias[expert] = -100.0
        out, stats = module(x, RouterContext.alone(everything(63)))
        assert not stats.counts_BE[:, expert].any()
        out.square().sum().backward()
        for name, weight in module.experts.named_parameters():
            assert weight.grad is not None
            busy = weight.grad.flatten(1).any(dim=1)
            assert busy.tolist() == [other != expert for other in range(7)], name


@pytest.mark.parametrize("length", [1, 1000])
def test_all_tokens_to_the_same_experts(length: int, moe: Callable[..., MoE]) -> None:
    """The most uneven routing there is: four of seven experts idle."""
    module, x = moe(), torch.randn(1, length, D)
    module.router.expert_bias.copy_(torch.tensor([0.0, 50, 0, 50, 0, 0, 50]))
    out, stats = module(x, RouterContext.alone(everything(length, 1)))
    assert stats.counts_BE.tolist() == [[0, length, 0, length, 0, 0, length]]
    probs = (x[0] @ module.router.weight.T).softmax(dim=-1)[:, [1, 3, 6]]
    factors = probs / probs.sum(dim=1, keepdim=True)
    expected = torch.zeros_like(x[0])
    for column, e in enumerate([1, 3, 6]):
        w1, w2, w3 = (getattr(module.experts, name)[e] for name in ("w1", "w2", "w3"))
        expected += factors[:, column : column + 1] * (nn.functional.silu(x[0] @ w1.T) * (x[0] @ w3.T) @ w2.T)
    torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-5)


def test_fan_out_gradient_sums_over_the_chosen_experts(moe: Callable[..., MoE]) -> None:
    """The hand-written backward of the row permutation, against plain indexing."""
    module, x = moe(), torch.randn(2, 31, D)
    order = module.route(x, RouterContext.alone(everything(31))).experts_NS.flatten().argsort(stable=True)
    seen: list[torch.Tensor] = []
    pull = torch.randn(62 * 3, D)

    def linear(rows_ND: torch.Tensor, counts_E: torch.Tensor, channels_EF: None) -> torch.Tensor:
        seen.append(rows_ND)
        return rows_ND * pull

    module.experts.activation, module.experts.forward = "relu2", linear
    leaf = x.clone().requires_grad_()
    out, _ = module(leaf, RouterContext.alone(everything(31)))
    assert torch.equal(seen[0], x.flatten(0, 1)[order // 3])
    plain = x.clone().requires_grad_()
    rows = plain.flatten(0, 1)[order // 3] * pull
    back = torch.empty_like(rows).index_copy(0, order, rows).unflatten(0, (62, 3))
    weights = module.route(plain, RouterContext.alone(everything(31))).weights_NS
    expected = (back * weights.unsqueeze(-1)).sum(dim=1).view_as(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    g = torch.randn_like(out)
    (one,), (other,) = torch.autograd.grad(out, leaf, g), torch.autograd.grad(expected, plain, g)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@every_router
def test_checkpointing_one_layer_changes_nothing(router: dict[str, Any], moe: Callable[..., MoE]) -> None:
    module = moe(router=router, shared=SHARED["gated_shared"])
    x, counted = torch.randn(2, 31, D, requires_grad=True), torch.rand(2, 31) < 0.7
    results = []
    for run in (module, partial(checkpoint, module, use_reentrant=False)):
        out, stats = run(x, RouterContext.alone(counted))
        loss = out.square().sum() + stats.prob_sums_BE.square().sum() + stats.z_sums_B.sum()
        results.append((out, *stats[:4], *torch.autograd.grad(loss, [x, *module.parameters()])))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_recompute_changes_nothing_and_counts_once(model_config: Callable[..., ModelConfig]) -> None:
    config = model_config()
    tokens, labels = torch.randint(101, (2, 2, 63)).unbind()
    counted = torch.rand(2, 63) < 0.7
    results = []
    for recompute in (False, True):
        model = materialize(partial(Decoder, config, recompute=recompute), CPU, seed=3)
        runs = 0

        def count_run(*_: object) -> None:
            nonlocal runs
            runs += 1

        for block in model.blocks:
            block.ffn.router.register_forward_hook(count_run)
        output = model(tokens, labels, counted)
        before = [field.clone() for field in output.stats[:4]]
        (output.nll + output.stats.prob_sums_BE.square().sum() + output.stats.z_sums_B.sum()).backward()
        assert runs == (4 if recompute else 2), "recomputing did not run each block twice"
        assert all(torch.equal(field, old) for field, old in zip(output.stats[:4], before, strict=True))
        assert torch.equal(output.stats.counts_BE.sum(dim=-1), 3.0 * counted.sum(dim=1).expand(2, -1))
        results.append([output.nll_B, *output.stats[:4], *(p.grad for p in model.parameters())])

        model.eval()
        runs = 0
        with torch.no_grad():
            evaluated = model(tokens, labels, counted)
        assert runs == 2
        assert torch.equal(evaluated.stats.counts_BE, output.stats.counts_BE)
        model.train()
        with torch.no_grad():
            assert torch.equal(model(tokens, labels, counted).stats.counts_BE, output.stats.counts_BE)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_experts_run_rows_of_their_own(initialise: Callable[..., nn.Module]) -> None:
    """A shard of the experts computes what those experts compute among all."""
    full, part = Experts(7, D, F, 0.3, 0.3), Experts(2, D, F, 0.3, 0.3, first=4)
    initialise(full)
    initialise(part)
    rows = torch.randn(63, D)
    counts = torch.tensor([0, 0, 0, 0, 20, 43, 0])
    torch.testing.assert_close(part(rows, counts[4:6]), full(rows, counts), rtol=1e-6, atol=1e-6)


def test_too_many_choices_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"top_k=8.*num_experts=7"):
        MoEConfig.model_validate({"num_experts": 7, "top_k": 8, "expert_dim": 8})
