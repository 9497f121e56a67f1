"""Linear token mixers: a state of fixed size in the place of keys and values of all tokens.

All project, convolve, write and read a state, normalise each head and gate it; they differ in their `Rule`.

Letters: B batch, T tokens, D width, H heads, K key width, V value width, C channels, W taps of the convolution.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from tidegate.config import Variant
from tidegate.model.layers import Linear, RMSNorm
from tidegate.model.mixers.rules import DeltaRule, GLARule, HGRN2Rule, Rule, ScalarRule
from tidegate.model.mixers.short_conv import ShortConvolution
from tidegate_kernels.gated_attention import Documents
from tidegate_kernels.gated_output import gated_output
from tidegate_kernels.linear_attention import linear_attention

__all__ = [
    "GLAConfig",
    "GatedDeltaNetConfig",
    "HGRN2Config",
    "KDAConfig",
    "LinearMixer",
    "LinearMixerConfig",
    "MixerOutput",
    "MixerState",
    "Place",
    "ScalarGatedConfig",
]


class Place(NamedTuple):
    """Where a mixer is built."""

    width: int
    norm_eps: float
    std: float
    """Of its matrices."""
    out_std: float
    """Of the one that writes to the residual stream."""
    layer: int = 0
    num_layers: int = 1


class MixerState(NamedTuple):
    """What the last document of each sequence goes on from."""

    memory_BHKV: torch.Tensor | None
    """fp32; None of a mixer without one."""
    last_BWC: torch.Tensor | None
    """(B, W - 1, C) inputs of the convolution."""


class MixerOutput(NamedTuple):
    y_BTD: torch.Tensor
    state: MixerState
    memory_BTC: torch.Tensor | None
    """(B, T, H V), what was read from the state, before norm and gate; None of a mixer without one."""


class _Heads(Variant):
    example: ClassVar[str] = "num_heads: 4, key_dim: 64, value_dim: 64"
    num_heads: int = Field(ge=1)
    key_dim: int = Field(ge=1)
    """Of a head."""
    value_dim: int = Field(ge=1)
    """Of a head."""
    conv: int = Field(default=4, ge=0)
    """Taps of the convolution of queries, keys and values; 0 for none, and then two layers do not learn to recall."""
    gate: ClassVar[Literal["sigmoid", "silu"] | None] = None
    """Of the output; None for no gate."""
    has_keys: ClassVar[bool] = True

    @abstractmethod
    def rule(self, place: Place) -> Rule:
        """What it writes and forgets."""

    @property
    def channels(self) -> int:
        """C, that are convolved: of queries, keys and values."""
        return self.num_heads * ((1 + self.has_keys) * self.key_dim + self.value_dim)

    def state_bytes(self) -> int:
        """Of a sequence and layer, whatever its length; the convolution's inputs in bf16."""
        return 4 * self.num_heads * self.key_dim * self.value_dim + 2 * max(self.conv - 1, 0) * self.channels

    def state_flops(self) -> float:
        """Training FLOPs a token of writing and reading the state, beside those of matrices.

        Source: arXiv 2312.06635, section 4; arXiv 2510.26692, Eq. 13. Products inside chunks are not counted.
        """
        products = 3 if isinstance(self, _Delta) else 2
        return 3.0 * products * 2 * self.num_heads * self.key_dim * self.value_dim

    def build(self, place: Place) -> LinearMixer:
        return LinearMixer(self, place)


class _Delta(_Heads):
    pass


class GLAConfig(_Heads):
    kind: Literal["gla"] = "gla"
    summary: ClassVar[str] = "gated linear attention: a decay a channel"
    source: ClassVar[str] = "arXiv 2312.06635"
    gate: ClassVar[Literal["sigmoid", "silu"] | None] = "silu"
    rank: int = Field(default=16, ge=1)
    """Of the decays' projection."""

    def rule(self, place: Place) -> Rule:
        return GLARule(place.width, self.num_heads, self.key_dim, self.rank, place.std)


class HGRN2Config(_Heads):
    kind: Literal["hgrn2"] = "hgrn2"
    summary: ClassVar[str] = "linear attention whose keys are what its forget gates let go"
    source: ClassVar[str] = "arXiv 2404.07904"
    has_keys: ClassVar[bool] = False

    def rule(self, place: Place) -> Rule:
        return HGRN2Rule(place.width, self.num_heads, self.key_dim, place.layer, place.num_layers, place.std)


class ScalarGatedConfig(_Heads):
    kind: Literal["scalar_gated"] = "scalar_gated"
    summary: ClassVar[str] = "linear attention with a decay a head: mLSTM with sigmoid gates, Mamba-2's class, RetNet"
    source: ClassVar[str] = "arXiv 2503.14376, arXiv 2307.08621"
    gate: ClassVar[Literal["sigmoid", "silu"] | None] = "sigmoid"
    decay: Literal["learned", "fixed"] = "learned"
    """`fixed` is RetNet's."""
    input_gate: bool = False
    """mLSTM's: how much of a key is written."""

    def rule(self, place: Place) -> Rule:
        return ScalarRule(place.width, self.num_heads, self.decay == "fixed", self.input_gate, place.std)


class GatedDeltaNetConfig(_Delta):
    kind: Literal["gated_delta_net"] = "gated_delta_net"
    summary: ClassVar[str] = "the delta rule with a decay a head"
    source: ClassVar[str] = "arXiv 2412.06464"
    gate: ClassVar[Literal["sigmoid", "silu"] | None] = "silu"

    def rule(self, place: Place) -> Rule:
        return DeltaRule(place.width, self.num_heads, self.key_dim, None, None, place.std)


class KDAConfig(_Delta):
    kind: Literal["kda"] = "kda"
    summary: ClassVar[str] = "Kimi Delta Attention: the delta rule with a decay a channel, the default linear mixer"
    source: ClassVar[str] = "arXiv 2510.26692"
    gate: ClassVar[Literal["sigmoid", "silu"] | None] = "sigmoid"
    bound: float | None = Field(default=-5.0, lt=0)
    """No token forgets more than exp of it; None for no bound."""

    def rule(self, place: Place) -> Rule:
        return DeltaRule(place.width, self.num_heads, self.key_dim, self.key_dim, self.bound, place.std)


LinearMixerConfig = KDAConfig | GatedDeltaNetConfig | GLAConfig | HGRN2Config | ScalarGatedConfig


class LinearMixer(nn.Module):
    """Projections, a short convolution, a state that is written and read, a norm and a gate of each head.

    Args:
        config: heads and rule.
        place: width and initial values.
    """

    def __init__(self, config: _Heads, place: Place) -> None:
        super().__init__()
        self.config = config
        H, V = config.num_heads, config.value_dim
        self.w_in = Linear(place.width, config.channels, place.std)
        """Queries, keys if there are any, values."""
        self.conv = ShortConvolution(config.channels, config.conv) if config.conv else None
        self.rule = config.rule(place)
        self.norm = RMSNorm(V, place.norm_eps)
        self.w_gate = Linear(place.width, H * V, place.std) if config.gate is not None else None
        self.w_out = Linear(H * V, place.width, place.out_std)

    def empty_state(self, x_BTD: torch.Tensor) -> MixerState:
        """What a sequence begins with, for inputs of a batch."""
        B, config = len(x_BTD), self.config
        memory = x_BTD.new_zeros(B, config.num_heads, config.key_dim, config.value_dim, dtype=torch.float32)
        last = None if self.conv is None else x_BTD.new_zeros(B, config.conv - 1, config.channels)
        return MixerState(memory, last)

    def forward(
        self, x_BTD: torch.Tensor, documents: Documents | None = None, state: MixerState | None = None
    ) -> MixerOutput:
        """Mix.

        Args:
            x_BTD: (B, T, D), normalised.
            documents: each begins with an empty state, and no token reads across their borders.
            state: what the first document of each sequence goes on from.
        """
        config, last_BWC = self.config, None
        H, K, V = config.num_heads, config.key_dim, config.value_dim
        mixed_BTC = self.w_in(x_BTD)
        if self.conv is not None:
            mixed_BTC, last_BWC = self.conv(mixed_BTC, documents, None if state is None else state.last_BWC)
        widths = [H * K] * (1 + config.has_keys) + [H * V]
        q, *keys, v = (part.unflatten(-1, (H, -1)) for part in mixed_BTC.split(widths, dim=-1))
        if self.conv is None and not config.has_keys:
            q = F.silu(q)
        q, k, log_decay, beta = self.rule(x_BTD, q, keys[0] if keys else q)
        memory_BHKV = None if state is None else state.memory_BHKV
        y_BTHV, memory_BHKV = linear_attention(q, k, v, log_decay, beta, documents, memory_BHKV)
        memory_BTC = y_BTHV.flatten(-2)
        y_BTHV = self.norm(y_BTHV)
        if self.w_gate is not None and config.gate is not None:
            scores = self.w_gate(x_BTD).view_as(y_BTHV)
            y_BTHV = gated_output(y_BTHV, scores, activation=config.gate, form="multiplicative", shared=False)
        return MixerOutput(self.w_out(y_BTHV.flatten(-2)), MixerState(memory_BHKV, last_BWC), memory_BTC)
