"""Leaf layers: `__init__` allocates (also on `meta`), `init_weights` fills.

Letters: B batch, T tokens, D width, F hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tidegate.model.initialisation import Draw

__all__ = ["Embedding", "FeedForward", "Linear", "RMSNorm"]


class Linear(nn.Module):
    """A matrix without bias, `y = x W^T`, initialised N(0, std^2)."""

    def __init__(self, in_dim: int, out_dim: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))

    def init_weights(self, draw: Draw) -> None:
        draw.normal_(self.weight, self.std, "weight")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class Embedding(nn.Module):
    """Token embedding, initialised N(0, std^2)."""

    def __init__(self, vocab_size: int, width: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def init_weights(self, draw: Draw) -> None:
        draw.normal_(self.weight, self.std, "weight")

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens_BT, self.weight)


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last axis (Zhang & Sennrich 2019), in fp32 inside."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def init_weights(self, draw: Draw) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class FeedForward(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020): `W2 (silu(W1 x) * W3 x)`.

    Args:
        width: D.
        hidden_dim: F.
        std: of W1 and W3.
        out_std: of W2, which writes to the residual stream.
    """

    def __init__(self, width: int, hidden_dim: int, std: float, out_std: float) -> None:
        super().__init__()
        self.w1 = Linear(width, hidden_dim, std)
        self.w3 = Linear(width, hidden_dim, std)
        self.w2 = Linear(hidden_dim, width, out_std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))
