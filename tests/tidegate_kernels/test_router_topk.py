"""router_topk against its formulas in fp64.

Letters: N = B T rows, B sequences, T tokens, E experts, K chosen experts.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch

from tidegate_kernels.choice import chosen
from tidegate_kernels.router_topk import SCORES, RoutedTopK, router_topk
from tidegate_kernels.router_topk.reference import router_topk as plain

SHAPES = [(1, 1, 1, 1), (2, 63, 60, 3), (2, 1, 1000, 5), (2, 3, 40, 32), (2, 7, 200, 8), (1, 1000, 4, 2)]
"""B, T, E, K; 200 and 1,000 experts are several runs of 128."""
with_both_kernels = pytest.mark.usefixtures("kernels")
in_every_shape = pytest.mark.parametrize(("B", "T", "E", "K"), SHAPES)
with_every_score = pytest.mark.parametrize("score", SCORES)
with_every_option = pytest.mark.parametrize(
    ("score", "renormalize"), list(itertools.product(SCORES, (True, False))), ids=lambda value: str(value)
)


class Inputs(NamedTuple):
    logits: torch.Tensor
    bias: torch.Tensor
    counted: torch.Tensor


class Upstream(NamedTuple):
    dense: torch.Tensor
    """(N, E) gradient of the weight of each expert, if it is chosen."""
    probs: torch.Tensor
    z: torch.Tensor


class Results(NamedTuple):
    weights: torch.Tensor
    """(N, E), 0 where not chosen."""
    counts: torch.Tensor
    prob_sums: torch.Tensor
    z_sums: torch.Tensor
    signals: torch.Tensor
    dlogits: torch.Tensor


def inputs(B: int, T: int, E: int) -> Inputs:
    """fp64 numbers that fp32 can hold; a tenth of the experts closed, two of them for all rows; a third not counted."""
    logits = (2 * torch.randn(B * T, E)).double()
    if E > 4:
        logits[torch.rand(B * T, E) < 0.05] = -torch.inf
        logits[:, [1, E - 2]] = -torch.inf
    return Inputs(logits, (0.1 * torch.randn(E)).double(), torch.rand(B, T) > 0.3)


def upstream(B: int, T: int, E: int) -> Upstream:
    return Upstream(*(torch.randn(shape).double() for shape in [(B * T, E), (B, E), (B,)]))


def by_formula(given: Inputs, g: Upstream, K: int, score: str, renormalize: bool, scale: float) -> Results:
    """No autograd: the Jacobians written out."""
    z, bias, counted = given
    (N, E), (B, T) = z.shape, counted.shape
    q = z.exp() / z.exp().sum(dim=1, keepdim=True)
    sigma = 1 / (1 + torch.exp(-z))
    s = {"softmax": q, "sigmoid": sigma, "sqrt_softplus": torch.sqrt(torch.log1p(z.exp()) + 1e-20)}[score]
    biased = torch.where(z > -torch.inf, s + bias, -torch.inf)
    taken = torch.zeros(N, E).double()
    for n in range(N):  # a stable sort: of equal ones, the lowest expert
        taken[n, sorted(range(E), key=lambda e, n=n: -float(biased[n, e]))[:K]] = 1
    mine = taken * s
    norm = mine.sum(dim=1, keepdim=True) + 1e-20
    weights = scale * (mine / norm if renormalize else mine)
    total = s.sum(dim=1, keepdim=True)
    used = counted.double().flatten()[:, None]
    lse = z.exp().sum(dim=1, keepdim=True).log()

    def per_sequence(x: torch.Tensor) -> torch.Tensor:
        return (x * used).view(B, T, -1).sum(dim=1)

    ds = scale * taken * g.dense
    if renormalize:
        ds = taken * (ds - (ds * mine).sum(dim=1, keepdim=True) / norm) / norm
    dp = g.probs.repeat_interleave(T, dim=0) * used
    ds = ds + (dp if score == "softmax" else (dp - (dp * s).sum(dim=1, keepdim=True) / total) / total)
    if score == "softmax":
        dz = s * (ds - (ds * s).sum(dim=1, keepdim=True))
    else:
        dz = ds * (sigma * (1 - sigma) if score == "sigmoid" else sigma / (2 * s))
    dz = dz + g.z.repeat_interleave(T)[:, None] * used * 2 * lse * q
    p = s / total
    entropy = -torch.where(p > 0, p * p.log(), 0).sum(dim=1)
    norm = torch.where(z > -torch.inf, z, 0).square().sum(dim=1).sqrt()
    signals = per_sequence(torch.stack([entropy, norm, (taken * p).sum(dim=1)], dim=1))
    sums = (per_sequence(taken), per_sequence(p), per_sequence(lse**2).squeeze(1), signals)
    return Results(weights, *sums, dz)


def run(op, given: Inputs, g: Upstream, **options) -> Results:  # type: ignore[no-untyped-def]
    logits = given.logits.float().requires_grad_()
    out: RoutedTopK = op(logits, given.bias.float(), given.counted, signals=True, **options)
    assert out.experts_NK.dtype == torch.int64
    assert out.signals_B3 is not None
    assert not any(t.requires_grad for t in (out.experts_NK, out.counts_BE, out.signals_B3))
    g_NK = g.dense.float().gather(1, out.experts_NK)
    torch.autograd.backward((out.weights_NK, out.prob_sums_BE, out.z_sums_B), (g_NK, g.probs.float(), g.z.float()))
    assert logits.grad is not None
    dense = torch.zeros_like(given.logits, dtype=torch.float32).scatter(1, out.experts_NK, out.weights_NK.detach())
    sums = (out.counts_BE, out.prob_sums_BE.detach(), out.z_sums_B.detach(), out.signals_B3)
    return Results(dense, *sums, logits.grad)


def assert_all_close(actual: Results, expected: Results) -> None:
    # fp32: roundings of 6e-8, in sums of up to 1,000 rows of size up to 50.
    for name, one, other in zip(Results._fields, actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@with_both_kernels
@in_every_shape
@with_every_option
def test_values_and_gradients(B: int, T: int, E: int, K: int, score: str, renormalize: bool) -> None:
    given, g = inputs(B, T, E), upstream(B, T, E)
    options = {"score": score, "renormalize": renormalize, "scale": 2.5}
    actual = run(router_topk, given, g, top_k=K, **options)
    assert_all_close(actual, by_formula(given, g, K, **options))


@with_both_kernels
@pytest.mark.parametrize(
    ("name", "value"),
    [("score", "softmax"), ("score", "sqrt_softplus"), ("renormalize", False), ("scale", 2.4), ("top_k", 2)],
)
def test_a_wrong_option_is_noticed(name: str, value: object) -> None:
    given, g = inputs(2, 7, 60), upstream(2, 7, 60)
    options = {"top_k": 3, "score": "sigmoid", "renormalize": True, "scale": 2.5}
    actual = run(router_topk, given, g, **(options | {name: value}))
    options["K"] = options.pop("top_k")
    with pytest.raises(AssertionError):
        assert_all_close(actual, by_formula(given, g, **options))


@with_every_option
def test_error(score: str, renormalize: bool) -> None:
    """At most twice the error of the reference in fp32, for sums, weights and the gradient."""
    given, g = inputs(2, 63, 60), upstream(2, 63, 60)
    options = {"score": score, "renormalize": renormalize, "scale": 2.5}
    truth = by_formula(given, g, 3, **options)
    with chosen("triton"):
        actual = run(router_topk, given, g, top_k=3, **options)
    reference = run(plain, given, g, top_k=3, **options)
    for name, one, other, exact in zip(Results._fields, actual, reference, truth, strict=True):
        error, allowed = ((t.double() - exact).square().mean().sqrt() for t in (one, other))
        assert error <= max(2 * allowed, 2**-24 * exact.abs().max()), name


@pytest.mark.parametrize(
    ("score", "E", "K"), [("softmax", 60, 3), ("sigmoid", 60, 3), ("sqrt_softplus", 200, 8), ("softmax", 1000, 9)]
)
def test_of_equal_experts_the_lowest(score: str, E: int, K: int) -> None:
    """All equal; few distinct values; fewer open experts than K."""
    coarse = torch.randint(0, 3, (4, E)).float()
    equal = torch.zeros(1, E)
    few = torch.full((1, E), -torch.inf)
    few[:, [E // 2, E - 1]] = 1.0
    logits = torch.cat([equal, coarse, few])
    with chosen("triton"):
        out = router_topk(
            logits,
            torch.zeros(E),
            torch.ones(1, 6, dtype=torch.bool),
            top_k=K,
            score=score,
            renormalize=True,
            scale=1.0,
            signals=False,
        )
    best = (-logits).sort(dim=1, stable=True).indices[:, :K]
    assert torch.equal(out.experts_NK, best)
    assert torch.equal(out.counts_BE, torch.bincount(best.flatten(), minlength=E)[None].float())
    torch.testing.assert_close(out.weights_NK.sum(dim=1), torch.ones(6))


@with_both_kernels
@with_every_score
def test_a_bias_selects_but_neither_weighs_nor_reopens(score: str) -> None:
    logits = torch.randn(13, 60)
    logits[:, 7] = -torch.inf
    bias = torch.zeros(60)
    bias[7], bias[9] = 200.0, 100.0
    options = {"top_k": 2, "score": score, "renormalize": False, "scale": 1.0, "signals": False}
    out = router_topk(logits, bias, torch.ones(1, 13, dtype=torch.bool), **options)
    assert (out.experts_NK == 9).any(dim=1).all()
    assert not (out.experts_NK == 7).any()
    mine = out.weights_NK[out.experts_NK == 9]
    torch.testing.assert_close(mine, SCORES[score](logits)[:, 9])


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # the interpreter's
def test_logits_that_are_not_numbers_choose_experts_that_exist() -> None:
    logits = torch.randn(5, 60)
    logits[2, 3] = torch.nan
    with chosen("triton"):
        out = router_topk(
            logits,
            torch.zeros(60),
            torch.ones(1, 5, dtype=torch.bool),
            top_k=3,
            score="sigmoid",
            renormalize=True,
            scale=1.0,
            signals=False,
        )
    assert ((out.experts_NK >= 0) & (out.experts_NK < 60)).all()
    assert all(len(set(row)) == 3 for row in out.experts_NK.tolist())


@with_both_kernels
@with_every_score
def test_large_logits(score: str) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, 30.0, -30.0], [-1e4, -2e4, -3e4, -1e4, -100.0]]).requires_grad_()
    out = router_topk(
        logits,
        torch.zeros(5),
        torch.ones(1, 2, dtype=torch.bool),
        top_k=2,
        score=score,
        renormalize=True,
        scale=1.0,
        signals=True,
    )
    (out.weights_NK[:, 0].sum() + out.prob_sums_BE[0, 0] + 1e-8 * out.z_sums_B.sum()).backward()
    assert all(t.isfinite().all() for t in (*out, logits.grad))


@with_both_kernels
@pytest.mark.parametrize("wanted", ["weights_NK", "prob_sums_BE", "z_sums_B"])
def test_each_result_alone_passes_its_gradient(wanted: str) -> None:
    given = inputs(2, 7, 60)
    options = {"top_k": 3, "score": "sigmoid", "renormalize": True, "scale": 2.5}
    g = upstream(2, 7, 60)
    silent = {"weights_NK": "dense", "prob_sums_BE": "probs", "z_sums_B": "z"}
    only = g._replace(**{name: torch.zeros_like(getattr(g, name)) for at, name in silent.items() if at != wanted})
    logits = given.logits.float().requires_grad_()
    out = router_topk(logits, given.bias.float(), given.counted, signals=True, **options)
    gradient = only.dense.float().gather(1, out.experts_NK) if wanted == "weights_NK" else getattr(g, silent[wanted])
    getattr(out, wanted).backward(gradient.float())
    options["K"] = options.pop("top_k")
    torch.testing.assert_close(logits.grad.double(), by_formula(given, only, **options).dlogits, rtol=2e-5, atol=1e-5)


@with_both_kernels
def test_strided_views_and_inputs_left_alone() -> None:
    given, g = inputs(2, 7, 60), upstream(2, 7, 60)
    options = {"score": "softmax", "renormalize": True, "scale": 1.0}
    views = Inputs(
        given.logits.float().t().contiguous().t(),
        given.bias.float().repeat_interleave(2)[::2],
        given.counted.t().contiguous().t(),
    )
    kept = [t.clone() for t in views]
    actual = run(router_topk, views, g, top_k=3, **options)
    assert_all_close(actual, by_formula(given, g, 3, **options))
    assert all(torch.equal(one, other) for one, other in zip(views, kept, strict=True))


@with_both_kernels
@pytest.mark.parametrize(("B", "T"), [(0, 5), (2, 0)])
def test_no_rows(B: int, T: int) -> None:
    given, g = inputs(B, T, 60), upstream(B, T, 60)
    result = run(router_topk, given, g, top_k=3, score="softmax", renormalize=True, scale=1.0)
    assert result.dlogits.shape == (0, 60)
    assert result.counts.shape == (B, 60)
    assert result.signals.shape == (B, 3)
    assert not any(t.any() for t in result[1:5])


@with_both_kernels
def test_compiles_in_one_graph() -> None:
    given, g = inputs(2, 7, 60), upstream(2, 7, 60)
    options = {"top_k": 3, "score": "sigmoid", "renormalize": True, "scale": 2.5}
    compiled = torch.compile(router_topk, fullgraph=True, backend="aot_eager")
    for one, other in zip(run(compiled, given, g, **options), run(router_topk, given, g, **options), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@with_both_kernels
@with_every_score
def test_signals_cost_nothing_unless_asked_for_and_change_nothing(score: str) -> None:
    logits, bias, counted = inputs(2, 63, 60)
    options = {"top_k": 3, "score": score, "renormalize": True, "scale": 2.5}
    plain, observed = (
        router_topk(logits.float(), bias.float(), counted, signals=signals, **options) for signals in (False, True)
    )
    assert plain.signals_B3 is None
    assert all(torch.equal(one, other) for one, other in zip(plain[:5], observed[:5], strict=True))


@with_both_kernels
@pytest.mark.parametrize("K", range(1, 9))
@pytest.mark.parametrize("E", [20, 130])
def test_every_number_of_chosen_experts(E: int, K: int) -> None:
    given, g = inputs(3, 5, E), upstream(3, 5, E)
    actual = run(router_topk, given, g, top_k=K, score="softmax", renormalize=False, scale=1.0)
    assert_all_close(actual, by_formula(given, g, K, "softmax", False, 1.0))


@pytest.mark.parametrize("signals", [False, True])
def test_registered_operation(signals: bool) -> None:
    """Schema, fake and autograd registration agree with what the kernels do."""
    logits, bias, counted = inputs(2, 7, 60)
    arguments = (logits.float().requires_grad_(), bias.float(), counted, 3, "sigmoid", True, 2.5, signals)
    torch.library.opcheck(torch.ops.tidegate.router_topk.default, arguments)


@pytest.mark.parametrize(("E", "K"), [(1025, 2), (60, 33)])
def test_no_silent_fallback(E: int, K: int) -> None:
    given = inputs(1, 2, E)
    with chosen("triton"), pytest.raises(ValueError, match=rf"no kernel takes a \(2, {E}\) input"):
        run(router_topk, given, upstream(1, 2, E), top_k=K, score="softmax", renormalize=True, scale=1.0)
