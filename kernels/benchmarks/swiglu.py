"""`swiglu` with and without a weight of the row.

Letters: N rows, F hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import silu

from benchmarks.harness import Case, Floor, Implementation
from tidegate_kernels.swiglu import reference, swiglu


def cases() -> Iterator[Case]:
    yield _case(131072, 1024, weighted=False)
    yield _case(131072, 1024, weighted=True)
    yield _case(131072, 768, weighted=True)
    yield _case(16384, 5632, weighted=False)


def _case(N: int, F: int, weighted: bool) -> Case:
    def inputs() -> tuple:
        hidden = [torch.randn(N, F, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2)]
        weights = torch.rand(N, device="cuda").requires_grad_() if weighted else None
        return *hidden, weights, torch.randn(N, F, device="cuda", dtype=torch.bfloat16)

    def eager(gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        activated = silu(gate) * up
        return activated if weights is None else activated * weights.to(activated.dtype).unsqueeze(-1)

    def liger(gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply(gate, up)

    implementations: dict[str, Implementation] = {
        "triton": swiglu,
        "reference": reference.swiglu,
        "eager bf16": eager,
        "torch.compile": torch.compile(eager),
    }
    if not weighted:  # Liger takes no weights
        implementations["Liger"] = liger
    # Forward gate, up, out; backward g, gate, up, dgate, dup, 2 bytes each; weights twice and their gradient, 4 each.
    floor = Floor(bytes=16 * N * F + (12 * N if weighted else 0))
    shape = {"N": N, "F": F, "weighted": weighted}
    return Case("swiglu", shape, floor, inputs, implementations, target=1.15)
