"""Attention gates: where, how fine, and with which non-linearity attention is modulated.

`Y' = Y * act(X W)` (multiplicative) or `Y' = Y + act(X W)` (additive), with X the pre-normalised hidden state that
the query, key and value projections see. Five positions: after SDPA (G1, the default), after the value (G2), key
(G3) and query (G4) projections, after the output projection (G5).
Source: Qiu et al. 2025, "Gated Attention for Large Language Models" (arXiv 2505.06708), Eq. 5, Tables 1 and 3.

Letters: B batch, T tokens, D width, H heads of the gated tensor, d head width.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from tidegate.config import Config
from tidegate.model.initialisation import Draw
from tidegate.model.layers import Linear
from tidegate_kernels.gated_output import ACTIVATIONS, gated_output

__all__ = ["AttentionGate", "Gate", "GateConfig", "NoGate"]


class NoGate(Config):
    """Plain attention."""

    kind: Literal["none"] = "none"


class AttentionGate(Config):
    """One gate of the gated-attention paper; the defaults are its recommendation (row 5 of Table 1)."""

    kind: Literal["sdpa_output", "value", "key", "query", "dense_output"] = "sdpa_output"
    granularity: Literal["elementwise", "headwise"] = "elementwise"
    heads: Literal["specific", "shared"] = "specific"
    form: Literal["multiplicative", "additive"] = "multiplicative"
    activation: Literal["sigmoid", "silu", "ns_sigmoid", "identity"] = "sigmoid"
    input: Literal["hidden", "constant"] = "hidden"
    """`constant` is the paper's input-independent control: zero-initialised parameters instead of X W."""

    def values(self, scores_BTHs: torch.Tensor) -> torch.Tensor:
        """What a multiplicative gate with these scores multiplies with, fp32; H becomes 1 if the heads share it."""
        values = ACTIVATIONS[self.activation](scores_BTHs.float())
        return values.mean(dim=-2, keepdim=True) if self.heads == "shared" else values

    @property
    def shown_values(self) -> tuple[float, float]:
        """Between which values telemetry's histogram of the gate tells them apart: all of a sigmoid's."""
        return (0.0, 1.0) if self.activation in ("sigmoid", "ns_sigmoid") else (-2.0, 2.0)

    @property
    def multiplies_output(self) -> bool:
        """Whether every head of the attention output is multiplied by its own gate: what is fused with attention."""
        return (self.kind, self.heads, self.form) == ("sdpa_output", "specific", "multiplicative")

    @model_validator(mode="after")
    def _dense_output_has_no_heads(self) -> AttentionGate:
        if self.kind == "dense_output" and (self.granularity, self.heads) != ("elementwise", "specific"):
            raise ValueError(
                f"granularity={self.granularity} heads={self.heads} does not fit kind=dense_output: heads are mixed "
                "after the output projection; use granularity=elementwise heads=specific"
            )
        return self


GateConfig = Annotated[NoGate | AttentionGate, Field(discriminator="kind")]


class Gate(nn.Module):
    """Modulates one tensor of attention by a function of the hidden state.

    Args:
        config: which gate.
        width: D.
        num_heads: H of the gated tensor (query heads, or its own heads for `key` and `value`, 1 for `dense_output`).
        head_dim: d of the gated tensor (D for `dense_output`).
        std: standard deviation of the projection's initial values (the gate opens half: sigmoid of about 0).
    """

    def __init__(self, config: AttentionGate, width: int, num_heads: int, head_dim: int, std: float) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.score_dim = head_dim if config.granularity == "elementwise" else 1
        out_dim = num_heads * self.score_dim
        self.projection = Linear(width, out_dim, std) if config.input == "hidden" else None
        self.constant = nn.Parameter(torch.empty(out_dim)) if config.input == "constant" else None

    def init_weights(self, draw: Draw) -> None:
        if self.constant is not None:
            nn.init.zeros_(self.constant)

    def forward(self, y_BTHd: torch.Tensor, scores_BTHs: torch.Tensor) -> torch.Tensor:
        """Gate `y_BTHd` (B, T, H, d) by its `scores`; same shape and dtype as `y_BTHd`."""
        shared = self.config.heads == "shared"
        return gated_output(
            y_BTHd, scores_BTHs, activation=self.config.activation, form=self.config.form, shared=shared
        )

    def scores(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T, H, d or 1) by the hidden state (B, T, D), before the activation."""
        if self.projection is not None:
            return self.by_head(self.projection(x_BTD))
        assert self.constant is not None
        return self.by_head(self.constant).expand(*x_BTD.shape[:-1], -1, -1)

    def by_head(self, scores: torch.Tensor) -> torch.Tensor:
        """What the projection returns, (..., H s) as (..., H, s)."""
        return scores.unflatten(-1, (self.num_heads, self.score_dim))
