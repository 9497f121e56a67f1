"""`qk_norm_rope`: RMSNorm of query and key heads and their rotation, and the rotation alone.

Letters: B batch, T tokens, H query heads, G key heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, Floor
from tidegate_kernels.qk_norm_rope import qk_norm_rope, reference

EPS = 1e-6


def cases() -> Iterator[Case]:
    yield _case(4, 4096, 16, 4, 128, norm=True)
    yield _case(4, 4096, 16, 4, 128, norm=False)
    yield _case(16, 2048, 16, 16, 64, norm=True)
    yield _case(4, 4000, 20, 5, 96, norm=True)


def _case(B: int, T: int, H: int, G: int, d: int, norm: bool) -> Case:
    angle = torch.outer(torch.arange(T), 10_000 ** (-torch.arange(0, d, 2) / d)).cuda()
    cos, sin = angle.cos(), angle.sin()

    def inputs() -> tuple:
        q, gq = (torch.randn(B, T, H, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        k, gk = (torch.randn(B, T, G, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        weights = [torch.randn(d, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2 * norm)]
        return q.requires_grad_(), k.requires_grad_(), *(weights or (None, None)), cos, sin, (gq, gk)

    def ours(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return qk_norm_rope(*tensors, EPS)

    def plain(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return reference.qk_norm_rope(*tensors, EPS)

    def eager(
        q: torch.Tensor,
        k: torch.Tensor,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if norm:
            q, k = F.rms_norm(q, (d,), q_weight, EPS), F.rms_norm(k, (d,), k_weight, EPS)
        cos, sin = (torch.cat([t, t], dim=-1).to(q.dtype)[:, None] for t in (cos, sin))
        return q * cos + _turned(q) * sin, k * cos + _turned(k) * sin

    # Forward x, out; backward g, x (the rotation alone does without), dx.
    floor = Floor(bytes=2 * (5 if norm else 4) * B * T * (H + G) * d)
    shape = {"B": B, "T": T, "H": H, "G": G, "d": d, "norm": norm}
    return Case(
        "qk_norm_rope",
        shape,
        floor,
        inputs,
        {"triton": ours, "reference": plain, "eager bf16": eager, "torch.compile": torch.compile(eager)},
        target=1.15,
    )


def _turned(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
