"""rms_norm and add_rms_norm against their formulas in fp64.

Letters: N rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from tidegate_kernels.choice import chosen
from tidegate_kernels.rms_norm import add_rms_norm, rms_norm

EPS = 1e-3
SHAPES = [(1, 1), (63, 1000), (1000, 7), (5, 128), (3, 2049), (0, 8)]
with_both_kernels = pytest.mark.usefixtures("kernels")
in_every_shape = pytest.mark.parametrize(("N", "D"), SHAPES)


class Results(NamedTuple):
    normalised: torch.Tensor
    total: torch.Tensor
    dx: torch.Tensor
    dresidual: torch.Tensor
    dweight: torch.Tensor


class Inputs(NamedTuple):
    x: torch.Tensor
    residual: torch.Tensor
    weight: torch.Tensor
    g: torch.Tensor
    g_total: torch.Tensor


def inputs(N: int, D: int) -> Inputs:
    """fp64 numbers that bf16 can hold, rows of very different size among them; so are their sums."""
    x, residual = ((torch.randn(N, D) * 16).round().double() / 16 for _ in range(2))
    residual[1::2] *= 2**-3
    x[1::2] *= 2**-3
    weight, g, g_total = (torch.randn(shape).bfloat16().double() for shape in ((D,), (N, D), (N, D)))
    return Inputs(x, residual, weight, g, g_total)


def by_formula(i: Inputs) -> Results:
    """Output and gradients in closed form; no autograd."""
    total = i.x + i.residual
    rstd = (total.square().mean(dim=-1, keepdim=True) + EPS) ** -0.5
    y = total * rstd
    dy = i.g * i.weight
    dx = rstd * (dy - y * (dy * y).mean(dim=-1, keepdim=True)) + i.g_total
    return Results(y * i.weight, total, dx, dx, (i.g * y).sum(dim=0))


def in_pytorch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return total * (total.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight, total


def run(op: Callable[..., tuple[torch.Tensor, torch.Tensor]], i: Inputs, dtype: torch.dtype) -> Results:
    arguments = [t.to(dtype).requires_grad_() for t in i[:3]]
    normalised, total = op(*arguments, EPS)
    gradients = torch.autograd.grad((normalised, total), arguments, (i.g.to(dtype), i.g_total.to(dtype)))
    return Results(normalised.detach(), total.detach(), *gradients)


def assert_all_close(actual: Results, expected: Results) -> None:
    # fp32 inside: roundings of 6e-8 of terms up to 10, 1000 of them in a gradient of the weight.
    for name, one, other in zip(Results._fields, actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=3e-5, msg=lambda m, name=name: f"{name}: {m}")


@with_both_kernels
@in_every_shape
def test_values_and_gradients(N: int, D: int) -> None:
    i = inputs(N, D)
    assert_all_close(run(add_rms_norm, i, torch.float32), by_formula(i))


@with_both_kernels
@in_every_shape
def test_alone_it_is_that_of_a_sum_with_nothing(N: int, D: int) -> None:
    i = inputs(N, D)
    i = i._replace(residual=torch.zeros_like(i.x), g_total=torch.zeros_like(i.x))
    x, weight = i.x.float().requires_grad_(), i.weight.float().requires_grad_()
    out = rms_norm(x, weight, EPS)
    dx, dweight = torch.autograd.grad(out, (x, weight), i.g.float())
    assert_all_close(Results(out.detach(), i.x, dx, dx, dweight), by_formula(i))


@with_both_kernels
def test_a_mean_in_place_of_the_mean_square_is_noticed() -> None:
    i = inputs(63, 1000)
    actual = run(add_rms_norm, i, torch.float32)
    total = i.x + i.residual
    centred = total - total.mean(dim=-1, keepdim=True)
    wrong = by_formula(i._replace(x=centred, residual=torch.zeros_like(centred)))
    for one, other in ((actual.normalised, wrong.normalised), (actual.dx, wrong.dx)):
        assert not torch.allclose(one.double(), other, rtol=1e-3, atol=1e-3)


@with_both_kernels
@pytest.mark.parametrize(("N", "D"), [shape for shape in SHAPES if min(shape) > 1])  # enough numbers for a mean
def test_bf16_error(N: int, D: int) -> None:
    """At most twice the error of the same expression in bf16 PyTorch, for outputs and gradients."""
    i = inputs(N, D)
    truth, actual, plain = by_formula(i), run(add_rms_norm, i, torch.bfloat16), run(in_pytorch, i, torch.bfloat16)
    for name, one, other, exact in zip(Results._fields, actual, plain, truth, strict=True):
        assert one.dtype == torch.bfloat16, name
        error, allowed = ((t.double() - exact).square().mean().sqrt() for t in (one, other))
        # Where PyTorch happens to be exact, half a bf16 step of the largest value is still fine.
        assert error <= max(2 * allowed, 2**-9 * exact.abs().max()), name


@with_both_kernels
def test_the_sum_is_rounded_before_it_is_normalised() -> None:
    x, residual, weight = torch.full((1, 2), 1.0), torch.tensor([[2.0**-9, 256.0]]), torch.ones(2)
    normalised, total = add_rms_norm(x.bfloat16(), residual.bfloat16(), weight.bfloat16(), EPS)
    assert total.tolist() == [[1.0, 256.0]]  # in bf16 the next values are 1 + 2^-7 and 258
    again = rms_norm(total, weight.bfloat16(), EPS)
    assert torch.equal(normalised, again)


@with_both_kernels
@pytest.mark.parametrize("scale", [2.0**-3, 2.0**9])
def test_scale_of_the_input_is_taken_out(scale: float) -> None:
    x, weight = torch.randn(63, 1000), torch.randn(1000)
    torch.testing.assert_close(rms_norm(scale * x, weight, 1e-20), rms_norm(x, weight, 1e-20), rtol=1e-6, atol=1e-6)


@with_both_kernels
def test_views() -> None:
    """Rows cut out of wider ones, heads of a fused projection, and a gradient that is not contiguous."""
    wide, weight = torch.randn(4, 9, 3, 16), torch.randn(8)
    for view in (
        lambda t: t[:, :, 1, 4:12],
        lambda t: t[..., 4:12],
        lambda t: t[0, :, 0, ::2],
        lambda t: t[0, 0, 0, 8:],
    ):
        one, other = wide.clone().requires_grad_(), wide.clone().requires_grad_()
        out = rms_norm(view(one), weight, EPS)
        expected = torch.nn.functional.rms_norm(view(other), (8,), weight, EPS)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(one.grad, other.grad)


@with_both_kernels
def test_inputs_are_left_alone() -> None:
    i = [t.float() for t in inputs(63, 7)]
    kept = [t.clone() for t in i]
    x, residual, weight = (t.requires_grad_() for t in i[:3])
    torch.autograd.grad(add_rms_norm(x, residual, weight, EPS), (x, residual, weight), (i[3], i[4]))
    for one, other in zip(i, kept, strict=True):
        assert torch.equal(one, other)


@with_both_kernels
def test_compiles_in_one_graph() -> None:
    i = inputs(63, 7)
    compiled = torch.compile(add_rms_norm, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(run(compiled, i, torch.float32), run(add_rms_norm, i, torch.float32), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("adds", [False, True])
def test_registered_operation(adds: bool) -> None:
    """Schema, fake and autograd registration agree with what the kernels do."""
    x, residual, weight = (t.float().requires_grad_() for t in inputs(3, 7)[:3])
    torch.library.opcheck(torch.ops.tidegate.rms_norm.default, (x, residual if adds else None, weight, EPS))


def test_no_silent_fallback() -> None:
    x = torch.randn(2, 3)
    with chosen("triton"):
        with pytest.raises(ValueError, match=r"no kernel takes a \(2, 3\) input of torch.float64"):
            rms_norm(x.double(), torch.ones(3, dtype=torch.float64), EPS)
        with pytest.raises(ValueError, match=r"no kernel takes a \(2, 3\) input of torch.float32"):
            add_rms_norm(x, x.bfloat16(), torch.ones(3), EPS)
