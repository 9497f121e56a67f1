"""Norms of the residual stream: RMSNorm, and two that give it what outliers are otherwise grown for.

Residual sinks are a few dimensions of huge activations that act through the norm: they rescale all the others. A gate
after the norm, or a learned scale before it, does the same in the open.
Source: "A Unified View of Attention and Residual Sinks" 2026 (arXiv 2601.22966).

Letters: D width, r rank.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from tidegate.config import Variant
from tidegate.model.initialisation import Draw
from tidegate.model.layers import Linear, RMSNorm
from tidegate_kernels.gated_output import gated_output
from tidegate_kernels.rms_norm import AddedNorm

__all__ = ["GatedNorm", "GatedNormConfig", "NormConfig", "PreAffineNorm", "PreAffineNormConfig", "RMSNormConfig"]


class RMSNormConfig(Variant):
    kind: Literal["rms"] = "rms"
    summary: ClassVar[str] = "norm of the residual stream: RMSNorm, the default"
    source: ClassVar[str] = "Zhang & Sennrich 2019, arXiv 1910.07467"

    def build(self, width: int, eps: float, std: float) -> RMSNorm:
        return RMSNorm(width, eps)


class GatedNormConfig(Variant):
    kind: Literal["gated"] = "gated"
    summary: ClassVar[str] = "RMSNorm with a low-rank sigmoid gate behind it"
    source: ClassVar[str] = "arXiv 2601.22966"
    rank: int = Field(default=16, ge=1)
    """Of the gate's two matrices."""

    def build(self, width: int, eps: float, std: float) -> RMSNorm:
        return GatedNorm(width, eps, self.rank, std)


class PreAffineNormConfig(Variant):
    kind: Literal["pre_affine"] = "pre_affine"
    summary: ClassVar[str] = "RMSNorm with a learned scale of every dimension before it"
    source: ClassVar[str] = "arXiv 2601.22966"

    def build(self, width: int, eps: float, std: float) -> RMSNorm:
        return PreAffineNorm(width, eps)


NormConfig = Annotated[RMSNormConfig | GatedNormConfig | PreAffineNormConfig, Field(discriminator="kind")]


class GatedNorm(RMSNorm):
    """GatedNorm: `y * sigmoid(W2 silu(W1 y))` with `y = RMSNorm(x)`, a gate of low rank.

    Both matrices start as N(0, std^2), so the gate opens half, as attention gates do, and the output starts at about
    half of RMSNorm's.
    """

    def __init__(self, width: int, eps: float, rank: int, std: float) -> None:
        super().__init__(width, eps)
        self.w1 = Linear(width, rank, std)
        self.w2 = Linear(rank, width, std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._gated(super().forward(x))

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> AddedNorm:
        y, total = super().add(x, residual)
        return AddedNorm(self._gated(y), total)

    def _gated(self, y: torch.Tensor) -> torch.Tensor:
        scores = self.w2(nn.functional.silu(self.w1(y)))
        return gated_output(y, scores, activation="sigmoid", form="multiplicative", shared=False)


class PreAffineNorm(RMSNorm):
    """PreAffine: `RMSNorm(scale * x)`, the scale of every dimension learned and 1 at first: RMSNorm to begin with."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)
        self.scale = nn.Parameter(torch.empty(width))

    def init_weights(self, draw: Draw) -> None:
        super().init_weights(draw)
        nn.init.ones_(self.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.scale)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> AddedNorm:
        total = residual + x
        return AddedNorm(self(total), total)
