"""Softmax with a sink: equal to one more logit, and to a gate on plain attention, with all gradients.

Letters: B batch, T tokens, D width, H query heads, G key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tidegate_kernels.gated_attention import Documents
from tidegate_kernels.gated_attention.sdpa import attend, attend_with_sink

GROUPINGS = [(1, 1), (4, 2), (5, 1)]


@pytest.fixture(autouse=True)
def _on_cpu() -> Iterator[None]:
    """In fp64 and with heads of 6, which the CUDA path refuses; test_gpu.py tests that one."""
    with torch.device("cpu"):
        yield


def visible(length: int, packed: bool) -> torch.Tensor | None:
    return Documents((torch.arange(length) // 9).expand(2, -1)).mask if packed else None


def one_more_logit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, sink: torch.Tensor) -> torch.Tensor:
    return explicit(q, k, v, mask, sink)[0]


def gate_on_plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, sink: torch.Tensor) -> torch.Tensor:
    """sigmoid(lse - s) times plain attention."""
    y, lse_BHT = explicit(q, k, v, mask, None)
    return y * torch.sigmoid(lse_BHT - sink[:, None]).transpose(1, 2).unsqueeze(-1)


def explicit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, sink: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    T, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    logits = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    seen = torch.ones(T, T, dtype=torch.bool).tril() if mask is None else mask
    logits = logits.masked_fill(~seen, -torch.inf)
    lse = logits.logsumexp(dim=-1)
    if sink is not None:
        logits = torch.cat([logits, sink[:, None, None].expand(*logits.shape[:3], 1)], dim=-1)
    return torch.einsum("bhts,bshd->bthd", logits.softmax(dim=-1)[..., :T], v), lse


def inputs(length: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = [(2, length, heads, 6) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in [*shapes, (num_heads,)]]


@pytest.mark.parametrize("truth", [one_more_logit, gate_on_plain])
@pytest.mark.parametrize("length", [1, 63, 200])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), GROUPINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, packed: bool, length: int, truth: Callable[..., torch.Tensor]
) -> None:
    q, k, v, sink = inputs(length, num_heads, num_kv_heads, dtype)
    mask, g = visible(length, packed), torch.randn(2, length, num_heads, 6, dtype=dtype)
    out = attend_with_sink(q, k, v, mask, sink)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v, sink)]
    expected = truth(*exact[:3], mask, exact[3])
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    gradients = zip(
        torch.autograd.grad(out, (q, k, v, sink), g), torch.autograd.grad(expected, exact, g.double()), strict=True
    )
    for name, (one, other) in zip(("q", "k", "v", "sink"), gradients, strict=True):
        torch.testing.assert_close(
            one.double(), other, rtol=tolerance, atol=10 * tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed: bool) -> None:
    q, k, v, sink = inputs(11, 4, 2, torch.float64)
    mask = visible(11, packed)
    assert torch.autograd.gradcheck(lambda *leaves: attend_with_sink(*leaves[:3], mask, leaves[3]), (q, k, v, sink))


@pytest.mark.parametrize("packed", [False, True])
def test_bf16_error(packed: bool) -> None:
    """At most twice the error of the formula in bf16."""
    leaves = [t.detach().bfloat16().requires_grad_() for t in inputs(63, 4, 2, torch.float32)]
    mask, g = visible(63, packed), torch.randn(2, 63, 4, 6).bfloat16()
    results = []
    for run, dtype in (
        (attend_with_sink, torch.bfloat16),
        (one_more_logit, torch.bfloat16),
        (one_more_logit, torch.float64),
    ):
        x = [t.detach().to(dtype).requires_grad_() for t in leaves]
        out = run(*x[:3], mask, x[3])
        assert out.dtype == dtype
        results.append([out, *torch.autograd.grad(out, x, g.to(dtype))])
    for one, formula, exact in zip(*results, strict=True):
        error, allowed = ((t.double() - exact).norm() for t in (one, formula))
        assert error <= 2 * allowed


def test_a_low_sink_is_plain_attention_and_a_high_one_closes_the_head() -> None:
    q, k, v, _ = inputs(63, 4, 2, torch.float32)
    sink = torch.tensor([-40.0, 40.0, -40.0, 40.0])
    out, plain = attend_with_sink(q, k, v, None, sink), attend(q, k, v, None)
    torch.testing.assert_close(out[:, :, ::2], plain[:, :, ::2], rtol=1e-6, atol=1e-6)
    assert out[:, :, 1::2].abs().max() < 1e-10
