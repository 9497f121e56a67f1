"""Weights, experts and sinks are read by the element: every operation takes them with any stride.

Letters: N rows, D width, E experts, F expert width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tidegate_kernels.choice import Kernels
from tidegate_kernels.gated_attention import Documents, gated_attention
from tidegate_kernels.moe_dispatch import combine, place
from tidegate_kernels.moe_experts import moe_experts
from tidegate_kernels.qk_norm_rope import qk_norm_rope
from tidegate_kernels.rms_norm import add_rms_norm, rms_norm

N, D, E, F, H = 7, 8, 3, 16, 4
EXPERTS = [2, 0, 1, 1, 2, 0, 0]


def _combined(weights_N: torch.Tensor) -> torch.Tensor:
    return combine(_numbers(N, D), weights_N, place(torch.tensor(EXPERTS), E, per_row=1))


def _through_experts(weights_N: torch.Tensor) -> torch.Tensor:
    w1, w3, w2 = _numbers(E, F, D), _numbers(E, F, D), _numbers(E, D, F)
    return moe_experts(_numbers(N, D), weights_N, place(torch.tensor(EXPERTS), E, per_row=1), w1, w3, w2)


def _attended(sink_H: torch.Tensor) -> torch.Tensor:
    x = _numbers(1, N, H, D)
    return gated_attention(x, x, x, None, documents=Documents(torch.zeros(1, N, dtype=torch.int64)), sink_H=sink_H)


def _rotated(weight_D: torch.Tensor) -> torch.Tensor:
    x, ones = _numbers(1, N, H, D), torch.ones(N, D // 2)
    return torch.cat(qk_norm_rope(x, x, weight_D, weight_D, ones, ones, 1e-6))


OPERATIONS: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = {
    "combine": (N, _combined),
    "moe_experts": (N, _through_experts),
    "gated_attention": (H, _attended),
    "qk_norm_rope": (D, _rotated),
    "rms_norm": (D, lambda weight_D: rms_norm(_numbers(N, D), weight_D, 1e-6)),
    "add_rms_norm": (D, lambda weight_D: add_rms_norm(_numbers(N, D), _numbers(N, D), weight_D, 1e-6).normalised),
}


def _numbers(*shape: int) -> torch.Tensor:
    """The same at every call."""
    return torch.linspace(-1, 1, torch.Size(shape).numel()).square().view(shape) - 0.3


@pytest.mark.parametrize(("length", "operation"), OPERATIONS.values(), ids=OPERATIONS.keys())
def test_vectors_of_any_stride(
    kernels: Kernels, length: int, operation: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    pairs = torch.rand(length, 2)

    def run(vector: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = vector.requires_grad_()
        out = operation(leaf)
        return out, torch.autograd.grad(out.square().sum(), leaf)[0]

    dense, apart = run(pairs[:, 0].contiguous()), run(pairs.clone()[:, 0])
    for actual, expected in zip(apart, dense, strict=True):
        assert torch.equal(actual, expected)


def test_experts_of_any_stride(kernels: Kernels) -> None:
    dense = torch.tensor(EXPERTS)
    apart = torch.stack([dense, dense.flip(0)], dim=1)[:, 0]
    assert torch.equal(place(apart, E, per_row=1).slot_A, place(dense, E, per_row=1).slot_A)
