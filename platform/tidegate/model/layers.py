"""Leaf layers: `__init__` allocates (also on `meta`), `init_weights` fills.

Letters: B batch, T tokens, D width, F hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tidegate.model.activations import (
    NUM_COEFFICIENTS,
    ActivationName,
    activate,
    has_coefficients,
    init_coefficients,
    is_gated,
)
from tidegate.model.initialisation import Draw
from tidegate_kernels.rms_norm import AddedNorm, add_rms_norm, rms_norm

__all__ = ["Embedding", "FeedForward", "Fp32Buffers", "Linear", "RMSNorm"]


class Fp32Buffers(nn.Module):
    """A module whose buffers are state that is moved in small steps: casting the model leaves them in fp32."""

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # Not even there and back: a step of 1e-3 vanishes beside a bf16 value near 1.
        uncast = dict(self._buffers)
        module = super()._apply(fn, recurse)
        for name, before in uncast.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return module


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
    """Token embedding, initialised N(0, std^2).

    Its gradient is dense, unless an engine that can take the rows of a micro-batch's tokens alone says so.
    """

    def __init__(self, vocab_size: int, width: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.sparse_gradient = False
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def init_weights(self, draw: Draw) -> None:
        draw.normal_(self.weight, self.std, "weight")

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens_BT, self.weight, sparse=self.sparse_gradient)


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last axis (Zhang & Sennrich 2019), in fp32 inside."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def init_weights(self, draw: Draw) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> AddedNorm:
        """Add to the residual stream and normalise the sum, in one pass."""
        return add_rms_norm(x, residual, self.weight, self.eps)


class FeedForward(nn.Module):
    """Feed-forward: `W2 act(W1 x)`, or `W2 (act(W1 x) * W3 x)` with a gated activation.

    Args:
        width: D.
        hidden_dim: F.
        std: of W1 and W3.
        out_std: of W2, which writes to the residual stream.
        activation: see `activations.py`.
    """

    def __init__(
        self, width: int, hidden_dim: int, std: float, out_std: float, activation: ActivationName = "swiglu"
    ) -> None:
        super().__init__()
        self.activation = activation
        self.w1 = Linear(width, hidden_dim, std)
        self.w3 = Linear(width, hidden_dim, std) if is_gated(activation) else None
        self.w2 = Linear(hidden_dim, width, out_std)
        self.coefficients = nn.Parameter(torch.empty(NUM_COEFFICIENTS)) if has_coefficients(activation) else None

    def init_weights(self, draw: Draw) -> None:
        if self.coefficients is not None:
            init_coefficients(self.coefficients)

    def forward(self, x: torch.Tensor, channels: torch.Tensor | None = None) -> torch.Tensor:
        """(..., D) in and out; `channels` (..., F) are factors of the hidden channels."""
        up = None if self.w3 is None else self.w3(x)
        hidden = activate(self.activation, self.w1(x), up, self.coefficients)
        return self.w2(hidden if channels is None else hidden * channels.to(hidden.dtype))
