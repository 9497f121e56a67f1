"""A causal convolution over the last few tokens of a document, a filter of its own for every channel.

Letters: B batch, T tokens, C channels, W taps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tidegate.model.initialisation import Draw
from tidegate_kernels.gated_attention import Documents

__all__ = ["Convolved", "ShortConvolution"]


class Convolved(NamedTuple):
    y_BTC: torch.Tensor
    last_BWC: torch.Tensor
    """(B, W - 1, C) inputs of the last document of each sequence that the next token reads, zeros before its begin."""


class ShortConvolution(nn.Module):
    """`silu(sum_i w_i x_{t - i})`: what binds a key to the value behind it in mixers that have no positions.

    Args:
        channels: C.
        taps: W.
        silu: of the sum; False returns the sum.
    """

    def __init__(self, channels: int, taps: int, silu: bool = True) -> None:
        super().__init__()
        self.taps, self.silu = taps, silu
        self.weight = nn.Parameter(torch.empty(channels, taps))

    def init_weights(self, draw: Draw) -> None:
        draw.normal_(self.weight, (3 * self.taps) ** -0.5, "weight")  # the variance of torch's own convolutions

    def forward(
        self, x_BTC: torch.Tensor, documents: Documents | None = None, last_BWC: torch.Tensor | None = None
    ) -> Convolved:
        """Convolve.

        Args:
            x_BTC: (B, T, C).
            documents: nothing is read across their borders.
            last_BWC: (B, W - 1, C) what the first document of each sequence goes on from; None for nothing.
        """
        before, T = self.taps - 1, x_BTC.shape[1]
        if last_BWC is None:
            last_BWC = x_BTC.new_zeros(x_BTC.shape[0], before, x_BTC.shape[2])
        all_BSC = torch.cat([last_BWC.to(x_BTC.dtype), x_BTC], dim=1)
        y_BTC = x_BTC * self.weight[:, 0]
        # How many tokens of the own document are before each; the first one's began before this call.
        if documents is not None:
            first_BT = documents.first_BT.long()
            age_BT = torch.arange(T, device=x_BTC.device) - first_BT + before * (first_BT == 0)
        for tap in range(1, self.taps):
            shifted_BTC = all_BSC[:, before - tap : before - tap + T]
            if documents is not None:
                shifted_BTC = shifted_BTC * (age_BT >= tap).unsqueeze(-1)
            y_BTC = y_BTC + shifted_BTC * self.weight[:, tap]
        last_BWC = all_BSC[:, T:]
        if documents is not None:
            reach_W = torch.arange(before, 0, -1, device=x_BTC.device)  # of the next token to each of them
            last_BWC = last_BWC * (age_BT[:, -1:] + 1 >= reach_W).unsqueeze(-1)
        return Convolved(F.silu(y_BTC) if self.silu else y_BTC, last_BWC)
