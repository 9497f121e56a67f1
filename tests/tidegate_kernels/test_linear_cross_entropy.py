"""linear_cross_entropy against its formulas in fp64.

Letters: N rows, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch

from tidegate_kernels.choice import chosen
from tidegate_kernels.linear_cross_entropy import linear_cross_entropy
from tidegate_kernels.linear_cross_entropy.reference import linear_cross_entropy as plain

D = 24
IGNORED = -7
SHAPES = [(1, 2), (63, 100), (7, 1000), (3, 9001)]
"""N and V; 9,001 columns are two tiles, none of them whole."""
OPTIONS = {
    "plain": (0.0, None),
    "z_loss": (1e-2, None),
    "soft_cap": (0.0, 3.0),
    "both": (1e-2, 3.0),
}
with_both_kernels = pytest.mark.usefixtures("kernels")
in_every_shape = pytest.mark.parametrize(("N", "V"), SHAPES)
with_every_option = pytest.mark.parametrize(("z_loss", "soft_cap"), OPTIONS.values(), ids=OPTIONS.keys())


class Inputs(NamedTuple):
    x: torch.Tensor
    w: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor


class Results(NamedTuple):
    loss: torch.Tensor
    nll: torch.Tensor
    dx: torch.Tensor
    dw: torch.Tensor


def inputs(N: int, V: int) -> Inputs:
    """fp64 numbers that bf16 can hold; a third of the labels ignored, some weights 0."""
    x, w = (torch.randn(shape).bfloat16().double() for shape in [(N, D), (V, D)])
    labels = torch.randint(V, (N,))
    labels[1::3] = IGNORED
    weights = torch.rand(N) * (torch.rand(N) > 0.2)
    return Inputs(x, w, labels, weights)


def by_formula(given: Inputs, g: float, z_loss: float, soft_cap: float | None) -> Results:
    """No autograd: p = softmax(z), dz = weight (p (1 + 2 c lse) - [label]) (1 - (z / cap)^2)."""
    x, w, labels, weights = given
    z = x @ w.T
    slope = torch.ones_like(z)
    if soft_cap is not None:
        z = soft_cap * torch.tanh(z / soft_cap)
        slope = 1 - (z / soft_cap) ** 2
    lse = z.exp().sum(dim=1).log()
    used = (labels != IGNORED).double()
    label = labels.where(labels != IGNORED, 0)
    nll = used * (lse - z[torch.arange(len(x)), label])
    weights = weights.double() * used
    p = (z - lse[:, None]).exp()
    hit = torch.zeros_like(z).scatter(1, label[:, None], 1.0)
    dz = g * weights[:, None] * (p * (1 + 2 * z_loss * lse[:, None]) - hit) * slope
    return Results((weights * (nll + z_loss * lse**2)).sum(), nll, dz @ w, dz.T @ x)


def run(op, given: Inputs, dtype: torch.dtype, g: float, **options) -> Results:  # type: ignore[no-untyped-def]
    x, w = (t.to(dtype).requires_grad_() for t in given[:2])
    out = op(x, w, given.labels, given.weights, ignore_index=IGNORED, **options)
    out.loss.backward(torch.full_like(out.loss, g))
    assert not out.nll_N.requires_grad
    assert x.grad is not None
    assert w.grad is not None
    return Results(out.loss.detach(), out.nll_N, x.grad, w.grad)


def assert_all_close(actual: Results, expected: Results) -> None:
    # fp32 inside: roundings of 6e-8 of logits up to 30, and sums of up to 1,000 rows.
    for name, one, other in zip(Results._fields, actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=5e-5, msg=lambda m, name=name: f"{name}: {m}")


@with_both_kernels
@in_every_shape
@with_every_option
def test_values_and_gradients(N: int, V: int, z_loss: float, soft_cap: float | None) -> None:
    given = inputs(N, V)
    actual = run(linear_cross_entropy, given, torch.float32, 0.7, z_loss=z_loss, soft_cap=soft_cap)
    assert_all_close(actual, by_formula(given, 0.7, z_loss, soft_cap))


@with_both_kernels
@pytest.mark.parametrize("wrong", [(0.0, 3.0), (1e-2, None), (2e-2, 3.0), (1e-2, 3.1)])
def test_a_wrong_option_is_noticed(wrong: tuple[float, float | None]) -> None:
    given = inputs(63, 100)
    actual = run(linear_cross_entropy, given, torch.float32, 0.7, z_loss=wrong[0], soft_cap=wrong[1])
    with pytest.raises(AssertionError):
        assert_all_close(actual, by_formula(given, 0.7, 1e-2, 3.0))


@pytest.mark.parametrize("rows", [1, 4, 8, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_nothing(rows: int, dtype: torch.dtype) -> None:
    given = inputs(9, 100)
    options = {"z_loss": 1e-2, "soft_cap": 3.0}
    limit = rows * 100 * (4 if dtype == torch.float32 else 2)
    with chosen("triton"):
        whole = run(linear_cross_entropy, given, dtype, 0.7, **options)
        cut = run(linear_cross_entropy, given, dtype, 0.7, max_bytes=limit, **options)
    step = 1e-5 if dtype == torch.float32 else 2**-7
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other, rtol=step, atol=step)


@pytest.mark.parametrize(("N", "V"), SHAPES[1:])  # with one row of two columns, errors are luck
@with_every_option
@pytest.mark.parametrize("chunks", [1, 2])
def test_bf16_error(N: int, V: int, z_loss: float, soft_cap: float | None, chunks: int) -> None:
    """At most twice the error of the reference in bf16, for nll and both gradients."""
    given = inputs(N, V)
    truth = by_formula(given, 0.7, z_loss, soft_cap)
    options = {"z_loss": z_loss, "soft_cap": soft_cap}
    with chosen("triton"):
        limited = functools.partial(linear_cross_entropy, max_bytes=-(-N // chunks) * V * 2)
        actual = run(limited, given, torch.bfloat16, 0.7, **options)
    reference = run(plain, given, torch.bfloat16, 0.7, **options)
    assert actual.loss.dtype == actual.nll.dtype == torch.float32
    assert actual.dx.dtype == actual.dw.dtype == torch.bfloat16
    for name in ("nll", "dx", "dw"):
        exact = getattr(truth, name)
        error, allowed = ((getattr(t, name).double() - exact).square().mean().sqrt() for t in (actual, reference))
        # Where the reference happens to be exact, half a bf16 step of the largest value is still fine.
        assert error <= max(2 * allowed, 2**-9 * exact.abs().max()), name


@with_both_kernels
def test_ignored_rows_and_weights_of_zero_pass_no_gradient() -> None:
    given = inputs(63, 100)
    result = run(linear_cross_entropy, given, torch.float32, 1.0, z_loss=1e-2, soft_cap=None)
    ignored = given.labels == IGNORED
    assert not result.nll[ignored].any()
    assert (result.nll[~ignored] > 0).all(), "a weight of 0 takes nothing from the nll"
    dead = ignored | (given.weights == 0)
    assert 0 < dead.sum() < 63
    assert not result.dx[dead].any()
    assert result.dx[~dead].any(dim=1).all()


@with_both_kernels
def test_shifting_all_logits_of_a_row_changes_no_nll() -> None:
    """Softmax is invariant; also far up and far down, where exp of the logits would overflow or vanish."""
    given = inputs(5, 100)
    x, w = torch.cat([given.x, torch.ones(5, 1)], dim=1), torch.cat([given.w, torch.zeros(100, 1)], dim=1)
    labels = torch.arange(5)
    results = []
    for shift in (0.0, 300.0, -300.0):
        w[:, -1] = shift
        options = {"z_loss": 0.0, "soft_cap": None, "ignore_index": IGNORED}
        results.append(linear_cross_entropy(x.float(), w.float(), labels, torch.ones(5), **options).nll_N)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=2e-4)  # 300 has roundings of 3e-5


@pytest.mark.parametrize("label", [-1, 100, 1 << 40])
def test_labels_outside_of_the_vocabulary_give_nan(label: int) -> None:
    given = inputs(3, 100)
    given.labels[:] = torch.tensor([5, label, 6])
    with chosen("triton"):
        result = run(linear_cross_entropy, given, torch.float32, 1.0, z_loss=0.0, soft_cap=None)
    assert result.nll.isnan().tolist() == [False, True, False]
    assert result.loss.isnan()
    assert result.dx.isnan().any(dim=1).tolist() == [False, True, False]
    assert result.dw.isnan().all()


@pytest.mark.parametrize(("x_learns", "w_learns"), [(True, False), (False, True), (False, False)])
def test_only_wanted_gradients_are_computed(x_learns: bool, w_learns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from tidegate_kernels.linear_cross_entropy import triton

    x, w, labels, weights = inputs(63, 100)
    x, w = x.float().requires_grad_(x_learns), w.float().requires_grad_(w_learns)
    wanted = []
    forward = triton.forward

    def spy(*args, wants_dx: bool, wants_dw: bool):  # type: ignore[no-untyped-def]
        wanted.append((wants_dx, wants_dw))
        return forward(*args, wants_dx=wants_dx, wants_dw=wants_dw)

    monkeypatch.setattr(triton, "forward", spy)
    options = {"z_loss": 0.0, "soft_cap": None, "ignore_index": IGNORED}
    with chosen("triton"):
        with torch.no_grad():
            linear_cross_entropy(x, w, labels, weights, **options)
        loss = linear_cross_entropy(x, w, labels, weights, **options).loss
    assert wanted == [(False, False), (x_learns, w_learns)]
    assert loss.requires_grad == (x_learns or w_learns)
    if loss.requires_grad:
        loss.backward()
        assert (x.grad is not None, w.grad is not None) == (x_learns, w_learns)


@with_both_kernels
def test_backward_twice_and_inputs_left_alone() -> None:
    x, w, labels, weights = inputs(63, 100)
    x, w = x.float().requires_grad_(), w.float().requires_grad_()
    kept = x.detach().clone(), w.detach().clone()
    loss = linear_cross_entropy(
        x, w, labels, weights, z_loss=1e-2, soft_cap=None, ignore_index=IGNORED, max_bytes=3200
    ).loss
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (x, w))
    for one, three in zip(first, second, strict=True):
        torch.testing.assert_close(three, 3 * one)
    assert torch.equal(x, kept[0])
    assert torch.equal(w, kept[1])


@with_both_kernels
def test_strided_views() -> None:
    given = inputs(63, 100)
    options = {"z_loss": 1e-2, "soft_cap": 3.0}
    wide = torch.cat([given.x, given.x], dim=1)[:, :D]
    labels = torch.stack([given.labels, given.labels], dim=1)[:, 0]
    views = Inputs(wide, given.w.T.contiguous().T, labels, given.weights.repeat_interleave(2)[::2])
    assert not any(t.is_contiguous() for t in views)
    assert_all_close(run(linear_cross_entropy, views, torch.float32, 0.7, **options), by_formula(given, 0.7, 1e-2, 3.0))


@with_both_kernels
def test_no_rows() -> None:
    result = run(linear_cross_entropy, inputs(0, 100), torch.float32, 1.0, z_loss=1e-2, soft_cap=None)
    assert result.loss == 0
    assert result.nll.shape == (0,)
    assert result.dx.shape == (0, D)
    assert torch.equal(result.dw, torch.zeros(100, D))


@with_both_kernels
def test_compiles_in_one_graph() -> None:
    given = inputs(63, 100)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    options = {"z_loss": 1e-2, "soft_cap": 3.0}
    actual = run(compiled, given, torch.float32, 0.7, **options)
    for one, other in zip(actual, run(linear_cross_entropy, given, torch.float32, 0.7, **options), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [5, 2])
def test_registered_operation(rows: int) -> None:
    """Schema, fake and autograd registration agree with what the kernels do; whole, and in chunks."""
    x, w, labels, weights = inputs(5, 10)
    arguments = (x.float().requires_grad_(), w.float().requires_grad_(), labels, weights, 1e-2, 3.0, IGNORED, rows)
    torch.library.opcheck(torch.ops.tidegate.linear_cross_entropy.default, (*arguments, True, True))


def test_no_silent_fallback() -> None:
    given = inputs(3, 10)
    with chosen("triton"), pytest.raises(ValueError, match=r"no kernel takes a \(3, 24\) input of torch.float64"):
        run(linear_cross_entropy, given, torch.float64, 1.0, z_loss=0.0, soft_cap=None)
