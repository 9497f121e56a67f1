"""Gated Associative Memory: a convolution over three tokens and a bank that is the same for all of them, a control.

A token reads two tokens before it and nothing else, so it cannot recall what stood further back, whatever the bank
holds. What a linear mixer is credited with has to beat it.

Letters: B batch, T tokens, D width, N slots of the bank, W taps of the convolution.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from tidegate.config import Variant
from tidegate.model.initialisation import Draw
from tidegate.model.layers import Linear
from tidegate.model.mixers.linear import MixerOutput, MixerState, Place
from tidegate.model.mixers.short_conv import ShortConvolution
from tidegate_kernels.gated_attention import Documents

__all__ = ["GAM", "GAMConfig"]

_TAPS = 3


class GAMConfig(Variant):
    kind: Literal["gam"] = "gam"
    summary: ClassVar[str] = "Gated Associative Memory, a control: three tokens and a learned bank, recalls nothing"
    source: ClassVar[str] = "arXiv 2509.00605"
    example: ClassVar[str] = "slots: 128"
    slots: int = Field(ge=1)
    """Of the bank; the paper has as many as the width."""

    def state_bytes(self, width: int) -> int:
        """Of a sequence and layer: the convolution's inputs in bf16."""
        return 2 * (_TAPS - 1) * width

    def build(self, place: Place) -> GAM:
        return GAM(self, place)


class GAM(nn.Module):
    """`sigmoid(g1) conv(x) + sigmoid(g2) softmax(x M^T) M` with `[g1, g2] = W x` (arXiv 2509.00605, section 3), without
    biases.

    Args:
        config: slots.
        place: width and initial values.
    """

    def __init__(self, config: GAMConfig, place: Place) -> None:
        super().__init__()
        self.config = config
        self.conv = ShortConvolution(place.width, _TAPS, silu=False)
        self.bank = nn.Parameter(torch.empty(config.slots, place.width))
        self.w_gate = Linear(place.width, 2 * place.width, place.std)

    def init_weights(self, draw: Draw) -> None:
        draw.normal_(self.bank, (2 / sum(self.bank.shape)) ** 0.5, "bank")  # the variance of the paper's Xavier values

    def empty_state(self, x_BTD: torch.Tensor) -> MixerState:
        """What a sequence begins with, for inputs of a batch."""
        return MixerState(None, x_BTD.new_zeros(len(x_BTD), _TAPS - 1, x_BTD.shape[-1]))

    def forward(
        self, x_BTD: torch.Tensor, documents: Documents | None = None, state: MixerState | None = None
    ) -> MixerOutput:
        """Mix.

        Args:
            x_BTD: (B, T, D), normalised.
            documents: no token reads across their borders.
            state: what the first document of each sequence goes on from.
        """
        local_BTD, last_BWD = self.conv(x_BTD, documents, None if state is None else state.last_BWC)
        shares_BTN = (x_BTD @ self.bank.T).softmax(dim=-1)
        local_gate_BTD, bank_gate_BTD = torch.sigmoid(self.w_gate(x_BTD)).chunk(2, dim=-1)
        y_BTD = local_gate_BTD * local_BTD + bank_gate_BTD * (shares_BTN @ self.bank)
        return MixerOutput(y_BTD, MixerState(None, last_BWD), None)
