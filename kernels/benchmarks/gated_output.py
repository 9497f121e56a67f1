"""`gated_output`: the elementwise sigmoid gate of the attention output, and one score a head.

Letters: B batch, T tokens, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Case, Floor
from tidegate_kernels.gated_output import gated_output, reference


def cases() -> Iterator[Case]:
    for B, T, H, d, headwise in ((4, 4096, 16, 128, False), (4, 4096, 16, 128, True), (16, 2048, 16, 64, False)):
        yield _case(B, T, H, d, headwise)


def _case(B: int, T: int, H: int, d: int, headwise: bool) -> Case:
    options = {"activation": "sigmoid", "form": "multiplicative", "shared": False}

    def inputs() -> tuple[torch.Tensor, ...]:
        y, g = (torch.randn(B, T, H, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        width = 1 if headwise else d
        fused = torch.randn(B, T, 2, H, width, device="cuda", dtype=torch.bfloat16)  # with a neighbour: a strided view
        return y.requires_grad_(), fused[:, :, 1].detach().requires_grad_(), g

    def ours(y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return gated_output(y, z, **options)

    def plain(y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return reference.gated_output(y, z, **options)

    def eager(y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return y * torch.sigmoid(z)

    elements = B * T * H * d
    scores = B * T * H if headwise else elements
    # Forward y, z, out; backward g, y, z, dy, dz; 2 bytes each.
    floor = Floor(bytes=2 * (5 * elements + 3 * scores))
    return Case(
        "gated_output",
        {"B": B, "T": T, "H": H, "d": d, "headwise": headwise},
        floor,
        inputs,
        {"triton": ours, "reference": plain, "eager bf16": eager, "torch.compile": torch.compile(eager)},
        target=1.15,
    )
