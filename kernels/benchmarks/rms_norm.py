"""`rms_norm` and `add_rms_norm`, of the residual stream.

Letters: N rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, Floor, Implementation
from tidegate_kernels.rms_norm import add_rms_norm, reference, rms_norm

EPS = 1e-6


def cases() -> Iterator[Case]:
    for N, D in ((16384, 2048), (16384, 4096), (16384, 2560), (65536, 1024)):
        yield _case(N, D, adds=False)
        yield _case(N, D, adds=True)


def _case(N: int, D: int, adds: bool) -> Case:
    def inputs() -> tuple:
        x, residual, g, g_total = (torch.randn(N, D, device="cuda", dtype=torch.bfloat16) for _ in range(4))
        weight = torch.randn(D, device="cuda", dtype=torch.bfloat16).requires_grad_()
        if adds:
            return x.requires_grad_(), residual.requires_grad_(), weight, (g, g_total)
        return x.requires_grad_(), weight, g

    def eager(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (D,), weight, EPS)

    def eager_add(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        return F.rms_norm(total, (D,), weight, EPS), total

    def liger(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)

    def liger_add(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)

    alone: dict[str, Implementation] = {
        "triton": lambda x, weight: rms_norm(x, weight, EPS),
        "reference": lambda x, weight: reference.rms_norm(x, weight, EPS),
        "eager bf16": eager,
        "torch.compile": torch.compile(eager),
        "Liger": liger,
    }
    added: dict[str, Implementation] = {
        "triton": lambda x, residual, weight: add_rms_norm(x, residual, weight, EPS),
        "reference": lambda x, residual, weight: reference.add_rms_norm(x, residual, weight, EPS),
        "eager bf16": eager_add,
        "torch.compile": torch.compile(eager_add),
        "Liger": liger_add,
    }
    # Forward x, out; backward g, x, dx. With the sum: x, residual, out, sum; g, the sum's gradient, sum, dx.
    floor = Floor(bytes=2 * (8 if adds else 5) * N * D)
    shape = {"N": N, "D": D, "adds": adds}
    return Case("rms_norm", shape, floor, inputs, added if adds else alone, target=1.15)
