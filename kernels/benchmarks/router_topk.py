"""`router_topk`: softmax top-k with weights, counts and sums, and gradients of the weights and both sums.

Letters: N = B T rows, B sequences, T tokens, E experts, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.harness import Case, Floor
from tidegate_kernels.router_topk import RoutedTopK, reference, router_topk

Routed = Callable[..., RoutedTopK]


def cases() -> Iterator[Case]:
    for E in (64, 128, 256, 512, 160):
        yield _case(4, 4096, E, 8, "softmax")
    yield _case(4, 4096, 256, 8, "sigmoid")
    yield _case(16, 4096, 128, 8, "softmax")
    yield _case(4, 4096, 128, 8, "softmax", signals=True)


def _case(B: int, T: int, E: int, K: int, score: str, signals: bool = False) -> Case:
    N = B * T
    options = {"top_k": K, "score": score, "renormalize": True, "scale": 1.0, "signals": signals}

    def inputs() -> tuple[torch.Tensor, ...]:
        # No two experts of a row are so close that rounding decides.
        logits = (torch.rand(N, E, device="cuda").argsort(dim=1) * (6 / E) - 3).requires_grad_()
        counted = torch.rand(B, T, device="cuda") > 0.1
        dprobs, dz, g = (torch.randn(shape, device="cuda") for shape in ((B, E), (B,), (N, K)))
        return logits, torch.zeros(E, device="cuda"), counted, dprobs, dz, g

    def fed(op: Routed) -> Callable[..., torch.Tensor]:
        def run(
            logits: torch.Tensor, bias: torch.Tensor, counted: torch.Tensor, dprobs: torch.Tensor, dz: torch.Tensor
        ) -> torch.Tensor:
            out = op(logits, bias, counted, **options)
            return _WithGradients.apply(out.weights_NK, out.prob_sums_BE, out.z_sums_B, dprobs, dz)

        return run

    # Logits are read each way, and weights (4 bytes) and experts (8) written, then read; gradients of the logits.
    floor = Floor(bytes=4 * 3 * N * E + 2 * 12 * N * K)
    return Case(
        "router_topk",
        {"B": B, "T": T, "E": E, "K": K, "score": score, "signals": signals},
        floor,
        inputs,
        {
            "triton": fed(router_topk),
            "reference": fed(reference.router_topk),
            "torch.compile": fed(torch.compile(reference.router_topk)),
        },
        target=1.3,
    )


class _WithGradients(torch.autograd.Function):
    """Hands gradients of the sums to their operation together with that of the weights, without a launch."""

    @staticmethod
    def forward(ctx, weights, prob_sums, z_sums, dprobs, dz):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(dprobs, dz)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        dprobs, dz = ctx.saved_tensors
        return g, dprobs, dz, None, None
