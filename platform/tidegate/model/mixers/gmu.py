"""Gated Memory Unit: a block that reads what a linear mixer below it has read from its state, and keeps none itself.

Source: SambaY (arXiv 2507.06607), section 2: `y = norm(M * silu(x W1)) W2`, the form with a norm behind the product,
which is for memories that are not normalised (Gated DeltaNet, Mamba-2).

Letters: B batch, T tokens, D width, C channels of the memory.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from tidegate.config import Variant
from tidegate.model.layers import Linear, RMSNorm
from tidegate.model.mixers.linear import Place

__all__ = ["GMU", "GMUConfig"]


class GMUConfig(Variant):
    """Its memory is that of the nearest block before it with a linear mixer."""

    kind: Literal["gmu"] = "gmu"
    summary: ClassVar[str] = "Gated Memory Unit: gates what a linear mixer below has read, without a state of its own"
    source: ClassVar[str] = "SambaY, arXiv 2507.06607"

    def build(self, place: Place, channels: int) -> GMU:
        return GMU(place, channels)


class GMU(nn.Module):
    """Args:
    place: width and initial values.
    channels: of the memory.
    """

    def __init__(self, place: Place, channels: int) -> None:
        super().__init__()
        self.w_gate = Linear(place.width, channels, place.std)
        self.norm = RMSNorm(channels, place.norm_eps)
        self.w_out = Linear(channels, place.width, place.out_std)

    def forward(self, x_BTD: torch.Tensor, memory_BTC: torch.Tensor) -> torch.Tensor:
        """Mix.

        Args:
            x_BTD: (B, T, D), normalised.
            memory_BTC: what the mixer below has read for the same tokens, before its norm and gate.

        Returns:
            (B, T, D).
        """
        return self.w_out(self.norm(memory_BTC * F.silu(self.w_gate(x_BTD))))
