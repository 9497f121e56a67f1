"""gated_output against its formulas in fp64.

Letters: B batch, T tokens, H heads, d head width, s score width (d elementwise, 1 headwise).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from tidegate_kernels.choice import chosen
from tidegate_kernels.gated_output import ACTIVATIONS, gated_output

B, H, d = 2, 3, 5
LENGTHS = (1, 63, 1000)
FORMS = ("multiplicative", "additive")


def sigmoid(z: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-z))


class Curve(NamedTuple):
    value: Callable[[torch.Tensor], torch.Tensor]
    slope: Callable[[torch.Tensor], torch.Tensor]


CURVES = {
    "sigmoid": Curve(sigmoid, lambda z: sigmoid(z) * (1 - sigmoid(z))),
    "silu": Curve(lambda z: z * sigmoid(z), lambda z: sigmoid(z) + z * sigmoid(z) * (1 - sigmoid(z))),
    "ns_sigmoid": Curve(lambda z: 0.5 + 0.5 * sigmoid(z), lambda z: 0.5 * sigmoid(z) * (1 - sigmoid(z))),
    "identity": Curve(lambda z: z, torch.ones_like),
}

CASES = [
    pytest.param(
        *case,
        id=f"{case[0]}-{case[1]}-{'shared' if case[2] else 'specific'}-{'headwise' if case[3] else 'elementwise'}",
    )
    for case in itertools.product(ACTIVATIONS, FORMS, (False, True), (False, True))
]
with_both_kernels = pytest.mark.usefixtures("kernels")
in_every_case = pytest.mark.parametrize(("activation", "form", "shared", "headwise"), CASES)


class Results(NamedTuple):
    out: torch.Tensor
    dy: torch.Tensor
    dz: torch.Tensor


def inputs(length: int, headwise: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, scores and the gradient of the output, fp64 numbers that bf16 can hold."""
    shapes = [(B, length, H, d), (B, length, H, 1 if headwise else d), (B, length, H, d)]
    y, z, g = (torch.randn(shape).bfloat16().double() for shape in shapes)
    return y, 3 * z, g


def by_formula(y: torch.Tensor, z: torch.Tensor, g: torch.Tensor, activation: str, form: str, shared: bool) -> Results:
    """Output and gradients in closed form; no autograd."""
    a, slope = CURVES[activation].value(z), CURVES[activation].slope(z)
    if shared:
        a = a.mean(dim=-2, keepdim=True)
    out, dy, da = (y * a, g * a, g * y) if form == "multiplicative" else (y + a, g, g)
    if z.shape[-1] == 1:
        da = da.sum(dim=-1, keepdim=True)
    if shared:
        da = da.sum(dim=-2, keepdim=True) / H
    return Results(out, dy, da * slope)


def run(op: Callable[..., torch.Tensor], y: torch.Tensor, z: torch.Tensor, g: torch.Tensor, **options) -> Results:
    y, z = y.detach().requires_grad_(), z.detach().requires_grad_()
    out = op(y, z, **options)
    out.backward(g.to(out.dtype))
    assert y.grad is not None
    assert z.grad is not None
    return Results(out.detach(), y.grad, z.grad)


def assert_all_close(actual: Results, expected: Results) -> None:
    # fp32 inside: a few roundings of 6e-8, times sums over at most H d = 15 terms of size up to 10.
    for name, one, other in zip(Results._fields, actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_every_activation_has_its_formula_here() -> None:
    assert CURVES.keys() == ACTIVATIONS.keys()


@with_both_kernels
@pytest.mark.parametrize("length", LENGTHS)
@in_every_case
def test_values_and_gradients(activation: str, form: str, shared: bool, headwise: bool, length: int) -> None:
    y, z, g = inputs(length, headwise)
    expected = by_formula(y, z, g, activation, form, shared)
    actual = run(gated_output, y.float(), z.float(), g, activation=activation, form=form, shared=shared)
    assert_all_close(actual, expected)


def test_the_recommended_gate_written_out() -> None:
    y, z, g = inputs(63, headwise=False)
    a = torch.sigmoid(z)
    actual = run(gated_output, y.float(), z.float(), g, activation="sigmoid", form="multiplicative", shared=False)
    assert_all_close(actual, Results(y * a, g * a, g * y * a * (1 - a)))


@with_both_kernels
@pytest.mark.parametrize(("chosen", "other"), list(itertools.permutations(ACTIVATIONS, 2)))
def test_a_wrong_activation_is_noticed(chosen: str, other: str) -> None:
    y, z, g = inputs(1, headwise=True)
    actual = run(gated_output, y.float(), z.float(), g, activation=chosen, form="multiplicative", shared=False)
    with pytest.raises(AssertionError):
        assert_all_close(actual, by_formula(y, z, g, other, "multiplicative", False))


@in_every_case
def test_gradcheck(activation: str, form: str, shared: bool, headwise: bool) -> None:
    # fp64 in and out, but fp32 inside: differences of values near 10 carry 1e-6, so a step of 1e-2 measures slopes
    # to about 1e-4 and the curvature adds less than that.
    y, z, _ = inputs(2, headwise)
    y, z = y[:1].clone().requires_grad_(), z[:1].clone().requires_grad_()

    def op(y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return gated_output(y, z, activation=activation, form=form, shared=shared)

    assert torch.autograd.gradcheck(op, (y, z), eps=1e-2, atol=2e-3, rtol=1e-3)


@with_both_kernels
def test_ns_sigmoid_cannot_close() -> None:
    z = torch.cat([torch.tensor([-torch.inf]), torch.arange(-500, 501) / 4, torch.tensor([torch.inf])])
    gate = gated_output(
        torch.ones(1003, 1, 1), z.view(-1, 1, 1), activation="ns_sigmoid", form="multiplicative", shared=False
    ).flatten()
    assert (gate.min().item(), gate.max().item()) == (0.5, 1.0)
    assert (gate.diff() >= 0).all()
    assert gate[501] == 0.75  # z = 0


@with_both_kernels
@pytest.mark.parametrize("headwise", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_shared_gives_every_head_the_mean_gate(form: str, headwise: bool) -> None:
    y, z, _ = (t.float() for t in inputs(63, headwise))
    options = {"activation": "sigmoid", "form": form}
    neutral = torch.ones_like(y) if form == "multiplicative" else torch.zeros_like(y)
    specific = gated_output(neutral, z, shared=False, **options)
    shared = gated_output(neutral, z, shared=True, **options)
    torch.testing.assert_close(shared, specific.mean(dim=2, keepdim=True).expand_as(shared), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(shared, specific)


@with_both_kernels
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("headwise", [False, True])
def test_strided_views(headwise: bool, length: int) -> None:
    """Scores cut out of a fused projection, y as attention returns it (heads before tokens in memory)."""
    y, z, g = (t.float() for t in inputs(length, headwise))
    options = {"activation": "sigmoid", "form": "multiplicative", "shared": False}
    expected = run(gated_output, y, z, g, **options)
    width = z.shape[-1]
    fused = torch.randn(B, length, H, 2 * width + 1)
    fused[..., width : 2 * width] = z
    fused.requires_grad_()
    heads_first = y.transpose(1, 2).contiguous().requires_grad_()
    view_y, view_z = heads_first.transpose(1, 2), fused[..., width : 2 * width]
    assert not view_z.is_contiguous()
    out = gated_output(view_y, view_z, **options)
    out.backward(g.transpose(1, 2).contiguous().transpose(1, 2))
    assert heads_first.grad is not None
    assert fused.grad is not None
    torch.testing.assert_close(out.detach(), expected.out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(heads_first.grad.transpose(1, 2), expected.dy, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fused.grad[..., width : 2 * width], expected.dz, rtol=1e-6, atol=1e-6)
    assert not fused.grad[..., :width].any()
    assert not fused.grad[..., 2 * width :].any()


@with_both_kernels
@pytest.mark.parametrize("length", LENGTHS)
@in_every_case
def test_bf16_error(activation: str, form: str, shared: bool, headwise: bool, length: int) -> None:
    """At most twice the error of the same expression in bf16 PyTorch, for the output and both gradients."""
    y, z, g = inputs(length, headwise)

    def in_bf16(y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        gate = ACTIVATIONS[activation](z)
        gate = gate.mean(dim=-2, keepdim=True) if shared else gate
        return y * gate if form == "multiplicative" else y + gate

    truth = by_formula(y, z, g, activation, form, shared)
    actual = run(
        gated_output, y.bfloat16(), z.bfloat16(), g.bfloat16(), activation=activation, form=form, shared=shared
    )
    reference = run(in_bf16, y.bfloat16(), z.bfloat16(), g.bfloat16())
    for name, one, other, exact in zip(Results._fields, actual, reference, truth, strict=True):
        assert one.dtype == torch.bfloat16, name
        error, allowed = ((t.double() - exact).square().mean().sqrt() for t in (one, other))
        # Where the reference happens to be exact, half a bf16 step of the largest value is still fine.
        assert error <= max(2 * allowed, 2**-9 * exact.abs().max()), name


@pytest.mark.parametrize("score_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_result_has_the_dtype_of_y(dtype: torch.dtype, score_dtype: torch.dtype) -> None:
    y, z, _ = inputs(63, headwise=False)
    y, z = y.to(dtype), z.to(score_dtype)
    kept = y.clone(), z.clone()
    out = gated_output(y, z, activation="silu", form="additive", shared=False)
    assert out.dtype == dtype
    steps = {torch.float64: 2**-20, torch.float32: 2**-20, torch.bfloat16: 2**-8}  # fp32 inside
    torch.testing.assert_close(
        out.double(), y.double() + CURVES["silu"].value(z.double()), rtol=steps[dtype], atol=1e-5
    )
    assert torch.equal(y, kept[0])
    assert torch.equal(z, kept[1])


@with_both_kernels
def test_compiles_in_one_graph() -> None:
    y, z, g = (t.float() for t in inputs(63, headwise=True))
    options = {"activation": "sigmoid", "form": "multiplicative", "shared": True}
    compiled = torch.compile(gated_output, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(run(compiled, y, z, g, **options), run(gated_output, y, z, g, **options), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("headwise", [False, True])
def test_registered_operation(headwise: bool) -> None:
    """Schema, fake and autograd registration agree with what the kernels do."""
    y, z, _ = (t.float() for t in inputs(3, headwise))
    arguments = (y.requires_grad_(), z.requires_grad_(), "silu", False)
    torch.library.opcheck(torch.ops.tidegate.gated_output.default, arguments)


def test_no_silent_fallback() -> None:
    y = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    with chosen("triton"), pytest.raises(ValueError, match=r"no kernel takes a \(1, 2, 3, 4\) input of torch.float64"):
        gated_output(y, y, activation="sigmoid", form="multiplicative", shared=False)
