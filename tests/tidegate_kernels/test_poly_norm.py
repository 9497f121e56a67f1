"""poly_norm against its formulas in fp64.

Letters: N rows, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from tidegate_kernels.choice import chosen
from tidegate_kernels.poly_norm import poly_norm

EPS = 1e-6
SHAPES = [(1, 1), (9, 1000), (63, 7), (3, 2049), (2, 16384), (0, 8)]
with_both_kernels = pytest.mark.usefixtures("kernels")
in_every_shape = pytest.mark.parametrize(("N", "width"), SHAPES)
with_and_without_weights = pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
shared_or_not = pytest.mark.parametrize("shared", [True, False], ids=["shared", "each-row"])


class Results(NamedTuple):
    out: torch.Tensor
    dx: torch.Tensor
    dcoefficients: torch.Tensor
    dweights: torch.Tensor


class Inputs(NamedTuple):
    x: torch.Tensor
    coefficients: torch.Tensor
    weights: torch.Tensor | None
    g: torch.Tensor


def inputs(N: int, width: int, shared: bool, weighted: bool) -> Inputs:
    """fp64 numbers that bf16 can hold, rows of very different size among them."""
    x, g = (torch.randn(N, width).bfloat16().double() for _ in range(2))
    x[1::2] *= 2**-4
    coefficients = torch.randn((4,) if shared else (N, 4)).bfloat16().double()
    return Inputs(x, coefficients, torch.rand(N).double() if weighted else None, g)


def by_formula(i: Inputs) -> Results:
    """Output and gradients in closed form; no autograd."""
    w = torch.ones(len(i.x), 1, dtype=torch.float64) if i.weights is None else i.weights.unsqueeze(-1)
    c = i.coefficients.expand(len(i.x), 4)
    out, dx = c[:, :1].expand_as(i.x), torch.zeros_like(i.x)
    by_coefficient = [i.g]
    for power in (1, 2, 3):
        r = (i.x ** (2 * power)).mean(dim=-1, keepdim=True).add(EPS).rsqrt()
        y = i.x**power * r
        by_coefficient.append(i.g * y)
        out = out + c[:, power, None] * y
        dy = w * i.g * c[:, power, None]
        dx = dx + power * i.x ** (power - 1) * r * (dy - y * (dy * y).mean(dim=-1, keepdim=True))
    dc = torch.stack([w[:, 0] * column.sum(dim=-1) for column in by_coefficient], dim=-1)
    dweights = torch.zeros(len(i.x)).double() if i.weights is None else (i.g * out).sum(dim=-1)
    return Results(w * out, dx, dc.sum(dim=0) if i.coefficients.ndim == 1 else dc, dweights)


def in_pytorch(x: torch.Tensor, coefficients: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    c = coefficients.expand(len(x), 4)
    out = c[:, :1].expand_as(x)
    for power in (1, 2, 3):
        y = x**power
        out = out + c[:, power, None] * y * (y.square().mean(dim=-1, keepdim=True) + EPS).rsqrt()
    return out if weights is None else out * weights.to(out.dtype).unsqueeze(-1)


def run(op: Callable[..., torch.Tensor], i: Inputs, dtype: torch.dtype) -> Results:
    x, coefficients = (t.to(dtype).requires_grad_() for t in i[:2])
    weights = None if i.weights is None else i.weights.float().requires_grad_()
    out = op(x, coefficients, weights)
    leaves = [x, coefficients] if weights is None else [x, coefficients, weights]
    gradients = torch.autograd.grad(out, leaves, i.g.to(dtype))
    return Results(out.detach(), *gradients[:2], torch.zeros(len(x)) if weights is None else gradients[2])


def assert_all_close(actual: Results, expected: Results) -> None:
    # fp32 inside: relative roundings of 6e-8 of sums over up to 16,384 terms.
    for name, one, other in zip(Results._fields, actual, expected, strict=True):
        atol = 1e-6 * max(1.0, float(other.abs().max())) * 10 if other.numel() else 0.0
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@with_both_kernels
@shared_or_not
@with_and_without_weights
@in_every_shape
def test_values_and_gradients(N: int, width: int, shared: bool, weighted: bool) -> None:
    i = inputs(N, width, shared, weighted)
    assert_all_close(run(poly_norm, i, torch.float32), by_formula(i))


@with_both_kernels
def test_swapped_coefficients_are_noticed() -> None:
    i = inputs(63, 7, shared=False, weighted=True)
    actual = run(poly_norm, i, torch.float32)
    with pytest.raises(AssertionError):
        assert_all_close(actual, by_formula(i._replace(coefficients=i.coefficients[:, [0, 1, 3, 2]])))


@with_both_kernels
@shared_or_not
@with_and_without_weights
@pytest.mark.parametrize(("N", "width"), [(9, 1000), (63, 7)])
def test_bf16_error(N: int, width: int, shared: bool, weighted: bool) -> None:
    """At most twice the error of the same expression in bf16 PyTorch, for output and gradients."""
    i = inputs(N, width, shared, weighted)
    truth, actual, plain = by_formula(i), run(poly_norm, i, torch.bfloat16), run(in_pytorch, i, torch.bfloat16)
    for name, one, other, exact in zip(Results._fields, actual, plain, truth, strict=True):
        error, allowed = ((t.double() - exact).square().mean().sqrt() for t in (one, other))
        # Where PyTorch happens to be exact, half a bf16 step of the largest value is still fine.
        assert error <= max(2 * allowed, 2**-9 * exact.abs().max()), name
    assert actual.out.dtype == actual.dx.dtype == torch.bfloat16


@with_both_kernels
def test_each_power_has_mean_square_one() -> None:
    x = 3 * torch.randn(9, 1000)
    for power in (1, 2, 3):
        c = torch.zeros(4)
        c[power] = 1
        out = poly_norm(x, c)
        torch.testing.assert_close(out.square().mean(dim=-1), torch.ones(9), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(poly_norm(-x, c), (-1) ** power * out, rtol=1e-5, atol=1e-5)


@with_both_kernels
def test_views() -> None:
    """Rows cut out of wider ones, more axes, and a gradient that is not contiguous."""
    wide, c = torch.randn(2, 9, 16), torch.randn(2, 9, 4)
    weights = torch.rand(9, 2).t()
    one, other = wide.clone().requires_grad_(), wide.clone().requires_grad_()
    out = poly_norm(one[..., 3:10], c, weights)
    rows = other[..., 3:10].reshape(18, 7).contiguous()
    expected = in_pytorch(rows, c.view(18, 4), weights.reshape(18)).view(2, 9, 7)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@with_both_kernels
def test_inputs_are_left_alone() -> None:
    x, c, weights, g = (t.float() for t in inputs(63, 7, shared=False, weighted=True))
    kept = [t.clone() for t in (x, c, weights, g)]
    leaves = [t.requires_grad_() for t in (x, c, weights)]
    torch.autograd.grad(poly_norm(*leaves), leaves, g)
    for one, other in zip((x, c, weights, g), kept, strict=True):
        assert torch.equal(one, other)


@with_both_kernels
@shared_or_not
@with_and_without_weights
def test_compiles_in_one_graph(shared: bool, weighted: bool) -> None:
    i = inputs(63, 7, shared, weighted)
    compiled = torch.compile(poly_norm, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(run(compiled, i, torch.float32), run(poly_norm, i, torch.float32), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@with_and_without_weights
def test_registered_operation(weighted: bool) -> None:
    """Schema, fake and autograd registration agree with what the kernels do."""
    i = inputs(3, 6, False, weighted)
    x, c = (t.float().requires_grad_() for t in i[:2])
    weights = None if i.weights is None else i.weights.float().requires_grad_()
    torch.library.opcheck(torch.ops.tidegate.poly_norm.default, (x, c, weights))


def test_no_silent_fallback() -> None:
    with chosen("triton"), pytest.raises(ValueError, match=r"no kernel takes a \(1, 16385\) input of torch.float32"):
        poly_norm(torch.randn(1, 16385), torch.ones(4))
