"""`ep_unpack`: rows of an expert-parallel exchange, and what its index costs.

Letters: A rows, D width, R source ranks, e experts of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Case, Floor
from tidegate_kernels.ep_permute import ep_unpack, reference


def cases() -> Iterator[Case]:
    for A, D, R, e in ((131072, 2048, 8, 8), (131072, 2048, 8, 64), (16000, 4096, 2, 64), (65536, 1000, 4, 24)):
        yield _case(A, D, R, e)


def _case(A: int, D: int, R: int, e: int) -> Case:
    def inputs() -> tuple[torch.Tensor, ...]:
        rows, g = (torch.randn(A, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        counts = torch.randint(R * e, (A,), device="cuda").bincount(minlength=R * e).view(R, e)
        order = reference.ep_unpack(torch.arange(A, device="cuda")[:, None], counts).squeeze(1)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(A, device="cuda"))
        return rows.requires_grad_(), counts, order, inverse, g

    def ours(rows: torch.Tensor, counts: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        return ep_unpack(rows, counts)

    def plain(rows: torch.Tensor, counts: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        return reference.ep_unpack(rows, counts)

    def indexed(rows: torch.Tensor, counts: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        return _Permute.apply(rows, order, inverse)

    def sorted_(rows: torch.Tensor, counts: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        expert = torch.arange(e, device="cuda").repeat(R).repeat_interleave(counts.flatten(), output_size=A)
        order = expert.argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(A, device="cuda"))
        return _Permute.apply(rows, order, inverse)

    # Forward and backward each read and write every row once, 2 bytes an element.
    floor = Floor(bytes=2 * 2 * 2 * A * D)
    return Case(
        "ep_permute",
        {"A": A, "D": D, "R": R, "e": e},
        floor,
        inputs,
        {
            "triton": ours,
            "reference": plain,
            "index given": indexed,
            "sort and index": sorted_,
            "torch.compile": torch.compile(plain),
        },
        target=1.2,
    )


class _Permute(torch.autograd.Function):
    """Rows by an index, their gradients by its inverse."""

    @staticmethod
    def forward(ctx, rows, order, inverse):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        (inverse,) = ctx.saved_tensors
        return g.index_select(0, inverse), None, None
