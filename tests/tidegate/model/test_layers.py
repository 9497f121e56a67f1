"""Leaf layers against fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tidegate.model.layers import Embedding, FeedForward, RMSNorm


@pytest.mark.parametrize("rows", [1, 63, 1000])
@pytest.mark.parametrize("scale", [1e-2, 1, 1e3])
def test_rms_norm(rows: int, scale: float, initialise: Callable[..., nn.Module]) -> None:
    norm = RMSNorm(7, eps=1e-6)
    initialise(norm)
    assert torch.equal(norm.weight, torch.ones(7))
    nn.init.normal_(norm.weight)
    x, g = scale * torch.randn(rows, 7), torch.randn(rows, 7)
    x.requires_grad_()
    out = norm(x)
    out.backward(g)
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, norm.weight))
    exact = exact_x / (exact_x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * exact_weight
    exact.backward(g.double())
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    assert x.grad is not None
    assert norm.weight.grad is not None
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-4, atol=1e-5 / scale)
    torch.testing.assert_close(norm.weight.grad.double(), exact_weight.grad, rtol=1e-4, atol=1e-4)


def test_rms_norm_is_fp32_inside(initialise: Callable[..., nn.Module]) -> None:
    """One rounding to bf16 for a weight of one: the mean square of 1000 numbers would be far off in bf16."""
    norm = RMSNorm(1000, eps=1e-6)
    initialise(norm)
    norm.bfloat16()
    x = 30 * torch.randn(63, 1000).bfloat16()
    out = norm(x)
    assert out.dtype == torch.bfloat16
    exact = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()


@pytest.mark.parametrize("rows", [1, 63, 1000])
def test_feed_forward(rows: int, initialise: Callable[..., nn.Module]) -> None:
    layer = FeedForward(7, 13, std=0.5, out_std=0.5)
    initialise(layer)
    x, g = torch.randn(rows, 7, requires_grad=True), torch.randn(rows, 7)
    out = layer(x)
    out.backward(g)
    exact = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    exact_x = x.detach().double().requires_grad_()
    gate = exact_x @ exact["w1.weight"].T
    expected = (gate / (1 + torch.exp(-gate)) * (exact_x @ exact["w3.weight"].T)) @ exact["w2.weight"].T
    expected.backward(g.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-4, atol=1e-4)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), exact[name].grad, rtol=1e-4, atol=1e-3)


def test_embedding_rows(initialise: Callable[..., nn.Module]) -> None:
    table = Embedding(11, 5, std=0.5)
    initialise(table)
    tokens = torch.tensor([[3, 10, 3], [0, 1, 2]])
    out = table(tokens)
    assert torch.equal(out, table.weight[tokens])
    out.sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad[:, 0].tolist() == [1, 1, 1, 2, 0, 0, 0, 0, 0, 0, 1]
