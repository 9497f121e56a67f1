"""`swiglu`: of two tensors, or of the halves of one product, with and without a weight of the row.

Letters: N rows, F hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import silu

from benchmarks.harness import Case, Floor, Implementation
from tidegate_kernels.swiglu import reference, swiglu, swiglu_packed


def cases() -> Iterator[Case]:
    yield _case(131072, 1024, packed=False, weighted=False)
    yield _case(131072, 1024, packed=True, weighted=False)
    yield _case(131072, 1024, packed=True, weighted=True)
    yield _case(131072, 768, packed=True, weighted=True)
    yield _case(16384, 5632, packed=False, weighted=False)


def _case(N: int, F: int, packed: bool, weighted: bool) -> Case:
    def inputs() -> tuple:
        shapes = [(N, 2 * F)] if packed else [(N, F), (N, F)]
        hidden = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
        weights = torch.rand(N, device="cuda").requires_grad_() if weighted else None
        return *hidden, weights, torch.randn(N, F, device="cuda", dtype=torch.bfloat16)

    def eager(*hidden: torch.Tensor) -> torch.Tensor:
        *hidden, weights = hidden
        gate, up = hidden[0].chunk(2, dim=-1) if packed else hidden
        activated = silu(gate) * up
        return activated if weights is None else activated * weights.to(activated.dtype).unsqueeze(-1)

    def liger(*hidden: torch.Tensor) -> torch.Tensor:
        from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction, LigerSiLUMulFunction

        return LigerFusedGateUpSiLUMulFunction.apply(hidden[0]) if packed else LigerSiLUMulFunction.apply(*hidden[:2])

    implementations: dict[str, Implementation] = {
        "triton": swiglu_packed if packed else swiglu,
        "reference": reference.swiglu_packed if packed else reference.swiglu,
        "eager bf16": eager,
        "torch.compile": torch.compile(eager),
    }
    if not weighted:  # Liger takes no weights
        implementations["Liger"] = liger
    # Forward gate, up, out; backward g, gate, up, dgate, dup, 2 bytes each; weights twice and their gradient, 4 each.
    floor = Floor(bytes=16 * N * F + (12 * N if weighted else 0))
    shape = {"N": N, "F": F, "packed": packed, "weighted": weighted}
    return Case("swiglu", shape, floor, inputs, implementations, target=1.1)
