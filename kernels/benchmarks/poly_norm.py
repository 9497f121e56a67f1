"""`poly_norm`: with the coefficients of one feed-forward, and with those of each row's expert and a routing weight.

Letters: N rows, F hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Case, Floor, Implementation
from tidegate_kernels.poly_norm import poly_norm, reference


def cases() -> Iterator[Case]:
    yield _case(131072, 1024, routed=False)
    yield _case(131072, 1536, routed=True)
    yield _case(131072, 1536, routed=False)
    yield _case(16384, 8192, routed=False)


def _case(N: int, F: int, routed: bool) -> Case:
    def inputs() -> tuple:
        x, g = (torch.randn(N, F, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        coefficients = torch.rand((N, 4) if routed else (4,), device="cuda").requires_grad_()
        weights = torch.rand(N, device="cuda").requires_grad_() if routed else None
        return x.requires_grad_(), coefficients, weights, g

    def eager(x: torch.Tensor, coefficients: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        c0, c1, c2, c3 = coefficients.to(x.dtype).unsqueeze(-2).unbind(-1)
        out = c0 + c1 * _normalised(x) + c2 * _normalised(x**2) + c3 * _normalised(x**3)
        return out if weights is None else out * weights.to(x.dtype).unsqueeze(-1)

    def liger(x: torch.Tensor, coefficients: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        from liger_kernel.ops.poly_norm import LigerPolyNormFunction

        # Its weights are those of the cube, the square and the number itself.
        return LigerPolyNormFunction.apply(x, coefficients[1:].flip(0).contiguous(), coefficients[0], 1e-6, False)

    implementations: dict[str, Implementation] = {
        "triton": poly_norm,
        "reference": reference.poly_norm,
        "eager bf16": eager,
        "torch.compile": torch.compile(eager),
        "torch.compile, reference": torch.compile(reference.poly_norm),
    }
    if not routed:  # Liger takes one set of coefficients and no weights
        implementations["Liger"] = liger
    # Forward x, out; backward g, x, dx, 2 bytes each; coefficients and weights twice and their gradients, 4 each.
    floor = Floor(bytes=10 * N * F + (60 * N if routed else 0))
    return Case("poly_norm", {"N": N, "F": F, "routed": routed}, floor, inputs, implementations, target=1.15)


def _normalised(x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
