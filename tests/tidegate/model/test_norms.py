"""Norms of the residual stream against fp64.

Letters: D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from tidegate.model.norms import GatedNorm, NormConfig, PreAffineNorm
from tidegate_kernels.choice import Kernels, chosen

KINDS: dict[str, dict[str, Any]] = {"gated": {"kind": "gated", "rank": 3}, "pre_affine": {"kind": "pre_affine"}}
MakeNorm = Callable[[str], nn.Module]


@pytest.fixture
def norm(initialise: Callable[..., nn.Module]) -> MakeNorm:
    def make(kind: str) -> nn.Module:
        module = TypeAdapter(NormConfig).validate_python(KINDS.get(kind, {"kind": kind})).build(7, 1e-6, 0.5)
        return initialise(module)

    return make


def formula(kind: str, p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    if kind == "pre_affine":
        x = x * p["scale"]
    y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p["weight"]
    if kind == "gated":
        hidden = y @ p["w1.weight"].T
        y = y / (1 + torch.exp(-(hidden / (1 + torch.exp(-hidden))) @ p["w2.weight"].T))
    return y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 63])
def test_values_and_gradients(kind: str, rows: int, norm: MakeNorm) -> None:
    module = norm(kind)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    x, g = torch.randn(rows, 7, requires_grad=True), torch.randn(rows, 7)
    out = module(x)
    out.backward(g)
    exact = {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
    exact_x = x.detach().double().requires_grad_()
    expected = formula(kind, exact, exact_x)
    expected.backward(g.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), exact[name].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_error(kind: str, norm: MakeNorm) -> None:
    module = norm(kind).bfloat16()
    x = torch.randn(63, 7).bfloat16()
    out = module(x)
    assert out.dtype == torch.bfloat16
    truth, plain = (
        formula(kind, {name: p.to(dtype) for name, p in module.named_parameters()}, x.to(dtype))
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert (out.double() - truth).norm() <= 2 * (plain.double() - truth).norm()


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("kind", ["rms", *KINDS])
def test_the_norm_of_a_sum_is_that_of_what_was_added(kind: str, kernels: Kernels, norm: MakeNorm) -> None:
    module = norm(kind)
    x, residual, g, g_total = (torch.randn(63, 7) for _ in range(4))
    leaves = [x.requires_grad_(), residual.requires_grad_(), *module.parameters()]
    total = residual + x
    expected = module(total)
    gradients = torch.autograd.grad((expected, total), leaves, (g, g_total))
    with chosen(kernels):
        added = module.add(x, residual)
        actual = torch.autograd.grad(tuple(added), leaves, (g, g_total))
    assert torch.equal(added.total, total)
    torch.testing.assert_close(added.normalised, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(actual, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_how_they_start(norm: MakeNorm) -> None:
    """PreAffine is RMSNorm at first, to the bit; GatedNorm is half of it where its gate's input is small."""
    x = torch.randn(63, 7)
    rms = torch.nn.functional.rms_norm(x, (7,), eps=1e-6)
    affine, gated = norm("pre_affine"), norm("gated")
    assert isinstance(affine, PreAffineNorm)
    assert isinstance(gated, GatedNorm)
    assert torch.equal(affine(x), rms)
    with torch.no_grad():
        gated.w2.weight.zero_()
    assert torch.equal(gated(x), 0.5 * rms)


def test_pre_affine_rescales_what_a_weight_after_the_norm_cannot(norm: MakeNorm) -> None:
    """A scale of zero takes an outlier out of the mean square."""
    module, x = norm("pre_affine"), torch.randn(63, 7)
    x[:, 2] = 1000
    before = module(x)[:, :2].abs().mean()
    with torch.no_grad():
        module.scale[2] = 0
    assert module(x)[:, :2].abs().mean() > 100 * before
