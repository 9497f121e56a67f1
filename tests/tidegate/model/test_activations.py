"""Activations of the feed-forward against their formulas, alone and inside the layers.

Letters: N rows, D width, F hidden width, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import nn

from tidegate.model.activations import (
    ActivationName,
    activate,
    has_coefficients,
    init_coefficients,
    is_gated,
    num_matrices,
)
from tidegate.model.layers import FeedForward
from tidegate.model.moe import Experts

NAMES = get_args(ActivationName)
every_activation = pytest.mark.parametrize("name", NAMES)


def formula(name: str, h: torch.Tensor, up: Any, c: Any) -> torch.Tensor:
    """Written from the papers, one power at a time."""
    if name == "swiglu":
        return h / (1 + torch.exp(-h)) * up
    if name == "geglu":
        return h * 0.5 * (1 + torch.erf(h / math.sqrt(2))) * up
    positive = torch.where(h > 0, h, torch.zeros_like(h))
    if name == "relu2":
        return positive * positive
    if name == "poly_relu":
        return sum((c[..., i, None] * positive**i for i in range(1, 4)), c[..., 0, None] * torch.ones_like(h))
    powers = [h**i for i in range(1, 4)]
    return sum(
        (c[..., i, None] * p / (p.square().mean(-1, keepdim=True) + 1e-6).sqrt() for i, p in enumerate(powers, 1)),
        c[..., 0, None] * torch.ones_like(h),
    )


def inputs(name: Any, rows: int, dtype: torch.dtype, per_row: bool = False) -> list[torch.Tensor | None]:
    h, up = torch.randn(2, rows, 13, dtype=dtype).unbind()
    c = torch.randn((rows, 4) if per_row else (4,), dtype=dtype)
    return [
        h.clone().requires_grad_(),
        up.clone().requires_grad_() if is_gated(name) else None,
        c.requires_grad_() if has_coefficients(name) else None,
    ]


@every_activation
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("rows", [1, 63])
def test_values_and_gradients(name: Any, rows: int, per_row: bool) -> None:
    x = inputs(name, rows, torch.float64, per_row)
    out, expected = activate(name, *x), formula(name, *x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    leaves, g = [t for t in x if t is not None], torch.randn_like(out)
    for one, other in zip(torch.autograd.grad(out, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@every_activation
def test_gradcheck(name: Any) -> None:
    x = inputs(name, 5, torch.float64)
    present = [t for t in x if t is not None]

    def run(*leaves: torch.Tensor) -> torch.Tensor:
        left = iter(leaves)
        return activate(name, *(None if t is None else next(left) for t in x))

    assert torch.autograd.gradcheck(run, present)


@every_activation
def test_bf16_error(name: Any) -> None:
    """At most twice the error of the formula in bf16, also where cubes reach 1e5 and their squares 1e10."""
    for scale in (1, 30):
        x = [None if t is None else (scale * t.detach()).bfloat16() for t in inputs(name, 63, torch.float32)]
        exact = formula(name, *(None if t is None else t.double() for t in x))
        out = activate(name, *x)
        assert out.dtype == torch.bfloat16
        assert out.isfinite().all()
        assert (out.double() - exact).norm() <= 2 * (formula(name, *x).double() - exact).norm()


def test_coefficients_start_as_in_the_paper() -> None:
    c = torch.empty(3, 1, 4)
    init_coefficients(c)
    assert torch.equal(c, torch.tensor([0, 1 / 3, 1 / 3, 1 / 3]).expand(3, 1, 4))


def test_no_two_activations_agree() -> None:
    """So that a test with one would fail with another."""
    h, up = torch.randn(2, 63, 13).unbind()
    c = torch.empty(4)
    init_coefficients(c)
    outs = [activate(n, h, up if is_gated(n) else None, c if has_coefficients(n) else None) for n in NAMES]
    for i, one in enumerate(outs):
        assert all((one - other).abs().max() > 0.05 for other in outs[:i])


@every_activation
def test_the_dense_layer(name: Any, initialise: Callable[..., nn.Module]) -> None:
    layer = FeedForward(7, 13, 0.5, 0.5, name)
    initialise(layer)
    assert sum(p.ndim == 2 for p in layer.parameters()) == num_matrices(name)
    x, g = torch.randn(63, 7, requires_grad=True), torch.randn(63, 7)
    out = layer(x)
    out.backward(g)
    exact = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}
    exact_x = x.detach().double().requires_grad_()
    up = exact_x @ exact["w3.weight"].T if "w3.weight" in exact else None
    hidden = formula(name, exact_x @ exact["w1.weight"].T, up, exact.get("coefficients"))
    (hidden @ exact["w2.weight"].T).backward(g.double())
    torch.testing.assert_close(out.double(), hidden @ exact["w2.weight"].T, rtol=1e-4, atol=1e-4)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-3, atol=1e-3)
    for n, parameter in layer.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), exact[n].grad, rtol=1e-3, atol=1e-2)


@every_activation
@pytest.mark.parametrize("counts", [[20, 0, 31, 12], [0, 0, 0, 1], [0, 0, 0, 0]])
def test_experts_are_dense_layers_with_numbers_of_their_own(
    name: Any, counts: list[int], initialise: Callable[..., nn.Module]
) -> None:
    """Rows sorted by expert through all experts equal each slice through a dense layer of that expert's tensors."""
    experts = Experts(4, 24, 8, 0.3, 0.3, activation=name)
    initialise(experts)
    if experts.coefficients is not None:
        nn.init.normal_(experts.w3)
    rows, g = torch.randn(sum(counts), 24), torch.randn(sum(counts), 24)
    out = experts(rows, torch.tensor(counts))
    out.backward(g)
    for e, (part, pull, mine) in enumerate(zip(rows.split(counts), g.split(counts), out.split(counts), strict=True)):
        dense = FeedForward(24, 8, 0.3, 0.3, name)
        with torch.no_grad():
            for layer in ("w1", "w2", "w3"):
                if getattr(dense, layer) is not None:
                    getattr(dense, layer).weight.copy_(getattr(experts, layer)[e])
            if dense.coefficients is not None:
                dense.coefficients.copy_(experts.w3[e, 0])
        expected = dense(part)
        expected.backward(pull)
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
        pairs = [(experts.w1, dense.w1.weight), (experts.w2, dense.w2.weight)]
        if is_gated(name):
            pairs.append((experts.w3, dense.w3.weight))
        if dense.coefficients is not None:
            pairs.append((experts.w3, dense.coefficients))
        for one, other in pairs:
            assert one.grad is not None
            torch.testing.assert_close(one.grad[e].view_as(other), other.grad, rtol=1e-3, atol=1e-3)
