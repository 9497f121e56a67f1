"""`linear_cross_entropy`: language-model head and loss, in two chunks of rows and in one.

Letters: N rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, Floor
from tidegate_kernels.linear_cross_entropy import linear_cross_entropy, reference

OPTIONS = {"z_loss": 0.0, "soft_cap": None, "ignore_index": -100}


def cases() -> Iterator[Case]:
    for N, D, V in ((16384, 2048, 50304), (8192, 4096, 32000), (16000, 1536, 50257)):
        yield _case(N, D, V)


def _case(N: int, D: int, V: int) -> Case:
    def inputs() -> tuple[torch.Tensor, ...]:
        x = torch.randn(N, D, device="cuda", dtype=torch.bfloat16)
        w = (torch.randn(V, D, device="cuda") * D**-0.5).bfloat16()
        labels = torch.randint(V, (N,), device="cuda")
        upstream = torch.full((), 1 / N, device="cuda")
        return x.requires_grad_(), w.requires_grad_(), labels, torch.ones(N, device="cuda"), upstream

    def within(max_bytes: int) -> Callable[..., object]:
        def ours(x: torch.Tensor, w: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> object:
            return linear_cross_entropy(x, w, labels, weights, max_bytes=max_bytes, **OPTIONS)

        return ours

    def plain(x: torch.Tensor, w: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> object:
        return reference.linear_cross_entropy(x, w, labels, weights, **OPTIONS)

    def eager(x: torch.Tensor, w: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(x, w), labels, reduction="sum").float()

    def liger(x: torch.Tensor, w: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss(reduction="sum")(w, x, labels)

    # Three products of 2 N V D; x and w are read, their gradients written, 2 bytes each.
    floor = Floor(bytes=2 * 2 * (N * D + V * D), flops=6 * N * V * D)
    return Case(
        "linear_cross_entropy",
        {"N": N, "D": D, "V": V},
        floor,
        inputs,
        {
            "triton": within(1 << 30),
            "triton, 2 GiB of logits": within(1 << 31),
            "reference": plain,
            "eager bf16": eager,
            "torch.compile": torch.compile(eager),
            "Liger": liger,
        },
        target=1.15,
    )
