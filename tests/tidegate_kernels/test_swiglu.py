"""swiglu against its formulas in fp64.

Letters: N rows, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from tidegate_kernels.choice import chosen, interpreted
from tidegate_kernels.swiglu import swiglu

SHAPES = [(1, 1), (63, 1000), (1000, 7), (3, 4097), (0, 8)]
with_both_kernels = pytest.mark.usefixtures("kernels")
in_every_shape = pytest.mark.parametrize(("N", "width"), SHAPES)
with_and_without_weights = pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])


class Results(NamedTuple):
    out: torch.Tensor
    dgate: torch.Tensor
    dup: torch.Tensor
    dweights: torch.Tensor


class Inputs(NamedTuple):
    gate: torch.Tensor
    up: torch.Tensor
    weights: torch.Tensor | None
    g: torch.Tensor


def inputs(N: int, width: int, weighted: bool) -> Inputs:
    """fp64 numbers that bf16 can hold."""
    gate, up, g = (torch.randn(N, width).bfloat16().double() for _ in range(3))
    return Inputs(3 * gate, up, torch.rand(N).double() if weighted else None, g)


def by_formula(i: Inputs) -> Results:
    """Output and gradients in closed form; no autograd."""
    weights = torch.ones(len(i.gate), dtype=torch.float64) if i.weights is None else i.weights
    w = weights.unsqueeze(-1)
    s = 1 / (1 + torch.exp(-i.gate))
    silu, slope = i.gate * s, s * (1 + i.gate * (1 - s))
    dweights = (i.g * silu * i.up).sum(dim=-1)
    return Results(
        w * silu * i.up, w * i.g * i.up * slope, w * i.g * silu, 0 * dweights if i.weights is None else dweights
    )


def in_pytorch(gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    activated = F.silu(gate) * up
    return activated if weights is None else activated * weights.to(activated.dtype).unsqueeze(-1)


def run(op: Callable[..., torch.Tensor], i: Inputs, dtype: torch.dtype) -> Results:
    gate, up = (t.to(dtype).requires_grad_() for t in i[:2])
    weights = None if i.weights is None else i.weights.float().requires_grad_()
    out = op(gate, up, weights)
    gradients = torch.autograd.grad(out, [gate, up] if weights is None else [gate, up, weights], i.g.to(dtype))
    return Results(out.detach(), *gradients[:2], torch.zeros(len(gate)) if weights is None else gradients[2])


def assert_all_close(actual: Results, expected: Results) -> None:
    # fp32 inside: roundings of 6e-8 of terms up to 50, some thousand of them in a gradient of a weight.
    for name, one, other in zip(Results._fields, actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=5e-5, msg=lambda m, name=name: f"{name}: {m}")


@with_both_kernels
@with_and_without_weights
@in_every_shape
def test_values_and_gradients(weighted: bool, N: int, width: int) -> None:
    i = inputs(N, width, weighted)
    assert_all_close(run(swiglu, i, torch.float32), by_formula(i))


@with_both_kernels
def test_a_wrong_gate_is_noticed() -> None:
    i = inputs(63, 7, weighted=True)
    actual = run(swiglu, i, torch.float32)
    with pytest.raises(AssertionError):
        assert_all_close(actual, by_formula(i._replace(gate=i.up, up=i.gate)))
    gelu = F.gelu(i.gate) * i.up * i.weights.unsqueeze(-1)
    assert not torch.allclose(actual.out.double(), gelu, rtol=1e-2, atol=1e-2)


@with_both_kernels
@with_and_without_weights
@pytest.mark.parametrize(("N", "width"), [(63, 1000), (1000, 7)])
def test_bf16_error(weighted: bool, N: int, width: int) -> None:
    """At most twice the error of the same expression in bf16 PyTorch, for output and gradients."""
    i = inputs(N, width, weighted)
    truth, actual, plain = by_formula(i), run(swiglu, i, torch.bfloat16), run(in_pytorch, i, torch.bfloat16)
    for name, one, other, exact in zip(Results._fields, actual, plain, truth, strict=True):
        error, allowed = ((t.double() - exact).square().mean().sqrt() for t in (one, other))
        # Where PyTorch happens to be exact, half a bf16 step of the largest value is still fine.
        assert error <= max(2 * allowed, 2**-9 * exact.abs().max()), name
    assert actual.out.dtype == actual.dgate.dtype == actual.dup.dtype == torch.bfloat16
    assert actual.dweights.dtype == torch.float32


@with_both_kernels
def test_large_gates_neither_overflow_nor_leak() -> None:
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]]).requires_grad_()
    out = swiglu(gate, torch.ones(1, 5))
    out.backward(torch.ones(1, 5))
    assert out.tolist() == [[0.0, pytest.approx(0, abs=1e-35), 0.0, 100.0, 1e4]]
    torch.testing.assert_close(gate.grad, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]]))


@with_both_kernels
def test_views() -> None:
    """The halves of one product apart, more axes, and a gradient that is not contiguous."""
    wide = torch.randn(2, 9, 16)
    one, other = wide.clone().requires_grad_(), wide.clone().requires_grad_()
    weights = torch.rand(9, 2).t()
    out = swiglu(one[..., 1:6], one[..., 9:14], weights)
    expected = F.silu(other[..., 1:6]) * other[..., 9:14] * weights.unsqueeze(-1)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.skipif(not interpreted(), reason="kernels run on the CPU in the interpreter only")
@with_and_without_weights
@in_every_shape
def test_the_backward_leaves_the_activation_again(weighted: bool, N: int, width: int) -> None:
    from tidegate_kernels.swiglu import triton

    i = inputs(N, width, weighted)
    truth = by_formula(i)
    weights = None if i.weights is None else i.weights.float()
    gate, up = i.gate.float(), i.up.float()
    dgate, dup, activated, dweights = triton.backward(i.g.float(), gate, up, weights, activated=True)
    assert torch.equal(activated, triton.forward(gate, up, weights))
    assert (dweights is None) == (not weighted)
    results = Results(activated, dgate, dup, torch.zeros(N) if dweights is None else dweights)
    assert_all_close(results, truth)


@with_both_kernels
def test_inputs_are_left_alone() -> None:
    gate, up, weights, g = (t.float() for t in inputs(63, 7, weighted=True))
    kept = [t.clone() for t in (gate, up, weights, g)]
    leaves = [t.requires_grad_() for t in (gate, up, weights)]
    torch.autograd.grad(swiglu(*leaves), leaves, g)
    for one, other in zip((gate, up, weights, g), kept, strict=True):
        assert torch.equal(one, other)


@with_both_kernels
@with_and_without_weights
def test_compiles_in_one_graph(weighted: bool) -> None:
    i = inputs(63, 7, weighted)
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(run(compiled, i, torch.float32), run(swiglu, i, torch.float32), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@with_and_without_weights
def test_registered_operation(weighted: bool) -> None:
    """Schema, fake and autograd registration agree with what the kernels do."""
    i = inputs(3, 6, weighted)
    gate, up = (t.float().requires_grad_() for t in i[:2])
    weights = None if i.weights is None else i.weights.float().requires_grad_()
    torch.library.opcheck(torch.ops.tidegate.swiglu.default, (gate, up, weights))


def test_no_silent_fallback() -> None:
    x = torch.randn(2, 3)
    with chosen("triton"):
        with pytest.raises(ValueError, match=r"no kernel takes a \(2, 3\) input of torch.float64"):
            swiglu(x.double(), x.double())
        with pytest.raises(ValueError, match=r"no kernel takes a \(2, 3\) input of torch.float32"):
            swiglu(x, x, torch.ones(2, dtype=torch.bfloat16))
