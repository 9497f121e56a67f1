"""`linear_attention` by addition with one decay a head, beside other linear and softmax attention of its shape.

The floor is what one pass each way moves: q, k, v and y, and again with their gradients; or, if that takes longer, the
products with a state of K x V and inside chunks of C = 128. The reference is the quadratic form in products of the
inputs' dtype; where that is too large it is our chunks in plain PyTorch.
Letters: B batch, T tokens, H heads, D width of keys and of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.harness import Case, Floor
from tidegate_kernels.gated_attention import sdpa
from tidegate_kernels.linear_attention import chunked, fla, linear_attention

_LONGEST_SQUARE = 4096
_CHUNK = 128
_TUNED = 128
"""Width at which fla's kernels run here: they are tuned for minutes at each."""


def cases() -> Iterator[Case]:
    for B, T in ((4, 2048), (4, 4096), (2, 8192), (1, 16384), (1, 65536)):
        yield _case(B, T, 16, 128)
    yield _case(4, 4096, 32, 64)
    yield _case(4, 4000, 20, 96)


def _case(B: int, T: int, H: int, D: int) -> Case:
    def inputs(sequences: int = B, length: int = T) -> tuple[torch.Tensor, ...]:
        q, k, v, g = (torch.randn(sequences, length, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(4))
        decay = -0.1 * torch.rand(sequences, length, H, 1, device="cuda")
        return *(x.requires_grad_() for x in (q, k, v, decay)), g

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        return linear_attention(q, k, v, decay).y_BTHV

    def quadratic(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        if q.shape[1] > _LONGEST_SQUARE:
            return chunks(q, k, v, decay)
        sums_BHT = decay.squeeze(-1).transpose(1, 2).cumsum(dim=-1)
        later = torch.ones(2 * [q.shape[1]], dtype=torch.bool, device=q.device).triu(1)
        between = (sums_BHT.unsqueeze(-1) - sums_BHT.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return ((q @ k.mT * between * D**-0.5).to(v.dtype) @ v).transpose(1, 2)

    def chunks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        return chunked.linear_attention(q, k, v, decay).y_BTHV

    def by_fla(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        return fla.linear_attention("gla", q, k, v, decay).y_BTHV

    def kda(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        # Keys as long as they come, about sqrt(D): beta of 1 / D keeps the state bounded.
        beta = torch.full(q.shape[:3], 1 / D, device=q.device, dtype=q.dtype)
        return fla.linear_attention("kda", q, k, v, decay, beta).y_BTHV

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        return sdpa.attend(q, k, v, None)

    numbers = B * T * H
    floor = Floor(bytes=11 * 2 * numbers * D, flops=3 * numbers * (4 * D * D + 2 * _CHUNK * D))
    shape: dict[str, Any] = {"B": B, "T": T, "H": H, "D": D}
    implementations: dict[str, Callable[..., Any]] = {
        "triton": ours,
        "reference": quadratic,
        "chunks, PyTorch": chunks,
        "softmax, cuDNN": attention,
    }
    if D == _TUNED:
        implementations |= {"fla GLA, equal decays": by_fla, "fla KDA": kda}
    return Case("linear_attention", shape, floor, inputs, implementations, check_inputs=lambda: inputs(1, min(T, 1500)))
