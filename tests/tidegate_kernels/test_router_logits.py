"""router_logits against fp64.

Letters: N rows, D width, E experts.
"""

from __future__ import annotations

import pytest
import torch

from tidegate_kernels.choice import chosen
from tidegate_kernels.router_logits import reference, router_logits
from tidegate_kernels.router_logits.triton import split


def inputs(N: int, D: int, E: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, w = torch.randn(N, D).bfloat16().requires_grad_(), torch.randn(E, D).bfloat16().requires_grad_()
    return x, w, torch.randn(N, E)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("N", "D", "E"), [(1, 8, 3), (63, 64, 7), (1000, 32, 64), (130, 48, 160)])
def test_values_and_gradients(N: int, D: int, E: int) -> None:
    x, w, g = inputs(N, D, E)
    logits = router_logits(x, w)
    assert logits.dtype == torch.float32
    dx, dw = torch.autograd.grad(logits, (x, w), g)
    x64, w64, g64 = (t.detach().double() for t in (x, w, g))
    torch.testing.assert_close(logits.double(), x64 @ w64.t(), rtol=1e-6, atol=3e-7 * D)
    # The last rounding to bf16 is all that may be seen of the gradients' errors.
    for found, truth in ((dx, g64 @ w64), (dw, g64.t() @ x64)):
        assert found.dtype == torch.bfloat16
        nearest = (truth.bfloat16().double() - truth).norm()
        assert (found.double() - truth).norm() <= 1.05 * nearest


def test_a_gradient_keeps_sixteen_bits() -> None:
    x = torch.randn(100, 33) * torch.logspace(-20, 20, 33)
    high, low = split(x).double().chunk(2, dim=1)
    bits = 16 if x.is_cuda else 14  # the interpreter cuts off where a GPU rounds
    assert ((high + low - x.double()).abs() <= 2.0**-bits * x.double().abs()).all()
    assert ((high - x.double()).abs() >= 2.0**-9 * x.double().abs()).any()


def test_fp32_is_the_reference() -> None:
    x, w = torch.randn(63, 32), torch.randn(8, 32)
    with chosen("triton"):
        assert torch.equal(router_logits(x, w), reference.router_logits(x, w))


def test_no_rows() -> None:
    x, w, g = inputs(0, 16, 4)
    with chosen("triton"):
        dx, dw = torch.autograd.grad(router_logits(x, w), (x, w), g)
    assert dx.shape == (0, 16)
    assert not dw.any()


def test_operator_and_compiled_graph() -> None:
    x, w, g = inputs(40, 16, 8)
    torch.library.opcheck(torch.ops.tidegate.router_logits.default, (x, w))
    torch.library.opcheck(torch.ops.tidegate.router_logits_backward.default, (g, x.detach(), w.detach()))
    with chosen("triton"):
        compiled = torch.compile(lambda x, w: router_logits(x, w) * 2, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(x, w), (x, w), g)
        expected = torch.autograd.grad(router_logits(x, w) * 2, (x, w), g)
    assert all(map(torch.equal, found, expected))
