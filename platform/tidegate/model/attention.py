"""Causal softmax attention with grouped queries, rotary positions, optional QK-norm, softmax sinks and a gate anywhere.

Letters: B batch, T tokens, D width, H query heads, G key heads, V value heads (as many, but if
the config says otherwise), d head width.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from tidegate.config import Config
from tidegate.model.gates import AttentionGate, Gate, GateConfig, NoGate
from tidegate.model.initialisation import Draw
from tidegate.model.layers import FeedForward, Linear, RMSNorm
from tidegate.model.observations import AttentionSample
from tidegate.model.qk_clip import max_logits
from tidegate_kernels.gated_attention import Documents, Visible, gated_attention, nearest
from tidegate_kernels.qk_norm_rope import Rotated, qk_norm_rope

if TYPE_CHECKING:  # it knows the mixers, one of which is a kind of attention
    from tidegate.model.sequence import SequencePart

__all__ = [
    "Attention",
    "AttentionConfig",
    "AttentionOutput",
    "KeysValues",
    "Rotary",
    "Seen",
    "YarnConfig",
    "rotary_table",
]

_MOST_ROTATIONS, _FEWEST_ROTATIONS = 32, 1
"""Within the trained length: pairs that turn more often are left as they are, those that turn less are interpolated."""


class YarnConfig(Config):
    """Positions beyond the trained length. Source: YaRN, arXiv 2309.00071."""

    factor: float = Field(gt=1)
    """By which the context grows."""
    trained_length: int = Field(ge=1)
    """Tokens of the sequences that the weights were trained on before."""


class AttentionConfig(Config):
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    num_value_heads: int | None = Field(default=None, ge=1)
    """None for `num_kv_heads`; else that is the number of key heads alone (DiffQKV, arXiv 2501.13629)."""
    augmented_query: int | None = Field(default=None, ge=1)
    """Hidden width of a SwiGLU from all query heads to all query heads (augmented Q, arXiv 2501.13629, appendix E: 1.5
    times the model's). Queries are not cached, so it costs nothing a token of context."""
    head_dim: int = Field(ge=2)
    rope_theta: float = Field(default=10_000.0, gt=1)
    yarn: YarnConfig | None = None
    """Stretches the rotary positions of a model that was trained on shorter sequences (docs/long_context.md)."""
    qk_norm: bool = True
    qk_clip: float | None = Field(default=None, gt=0)
    """Largest attention logit (tau; Kimi K2 uses 100). After a step, a head that went above it has its query and key
    weights scaled down (`qk_clip.py`). Costs a second product of queries and keys in every training pass,
    recomputed ones too."""
    softmax: Literal["plain", "off_by_one", "learnable_sink"] = "plain"
    """`off_by_one` adds 1 to the denominator, `learnable_sink` exp(s) with a learned s a head, 0 at first."""
    gate: GateConfig = AttentionGate()

    @property
    def value_heads(self) -> int:
        """V."""
        return self.num_value_heads or self.num_kv_heads

    def gated_shape(self, width: int) -> tuple[int, int]:
        """(heads, dim) of the tensor that the gate gates."""
        assert not isinstance(self.gate, NoGate)
        heads = {"key": self.num_kv_heads, "value": self.value_heads}.get(self.gate.kind, self.num_heads)
        return (1, width) if self.gate.kind == "dense_output" else (heads, self.head_dim)

    @model_validator(mode="after")
    def _heads_divide(self) -> AttentionConfig:
        for name, number in (("num_kv_heads", self.num_kv_heads), ("num_value_heads", self.value_heads)):
            if self.num_heads % number:
                raise ValueError(
                    f"{name}={number} does not divide num_heads={self.num_heads}; use a divisor of {self.num_heads}"
                )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary positions need pairs")
        return self

    @model_validator(mode="after")
    def _clip_acts(self) -> AttentionConfig:
        if self.qk_clip is None:
            return self
        if self.qk_norm:
            raise ValueError(
                f"qk_clip={self.qk_clip:g} with qk_norm=true: the norm bounds logits by sqrt(head_dim) = "
                f"{self.head_dim**0.5:.1f} times its weights and takes any scaling out; set qk_norm=false or no qk_clip"
            )
        if not isinstance(self.gate, NoGate) and self.gate.kind in ("query", "key") and self.gate.form == "additive":
            raise ValueError(
                f"qk_clip={self.qk_clip:g} with gate.kind={self.gate.kind} gate.form=additive: what the gate adds does "
                "not shrink with the weights; use gate.form=multiplicative"
            )
        return self


class Rotary(NamedTuple):
    """cos and sin of the rotary angles, each (T, d/2), fp32."""

    cos_Td: torch.Tensor
    sin_Td: torch.Tensor


@lru_cache(maxsize=8)
def rotary_table(
    length: int, head_dim: int, theta: float, device: torch.device, yarn: YarnConfig | None = None
) -> Rotary:
    """Angles `t theta^(-2i/d)` (Su et al. 2021). Not a buffer, which casting the module to bf16 would spoil.

    With `yarn`, pair i turns by `1 / factor` of that where it turns less than once within the trained length, by all of
    it where more than 32 times, and by a mean that is linear in i between, as the authors' code has it; the paper's is
    linear in the number of turns. cos and sin are multiplied by `0.1 ln(factor) + 1`, logits so by its square.
    Source: YaRN, arXiv 2309.00071, section 3.
    """
    pair = torch.arange(head_dim // 2, dtype=torch.float64)
    frequency, scale = theta ** (-2 * pair / head_dim), 1.0
    if yarn is not None:
        scale = 0.1 * math.log(yarn.factor) + 1
        first, last = (
            head_dim * math.log(yarn.trained_length / (2 * math.pi * turns)) / (2 * math.log(theta))
            for turns in (_MOST_ROTATIONS, _FEWEST_ROTATIONS)
        )
        low, high = max(math.floor(first), 0), min(math.ceil(last), head_dim - 1)
        stretched = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
        frequency = frequency * (1 - stretched + stretched / yarn.factor)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return Rotary((angle.cos() * scale).float().to(device), (angle.sin() * scale).float().to(device))


class KeysValues(NamedTuple):
    """Normalised, gated and with their positions, as the softmax sees them."""

    k_BTGd: torch.Tensor
    v_BTVd: torch.Tensor


class Seen(NamedTuple):
    """What a block attends with."""

    q_BTHd: torch.Tensor
    """As the softmax sees them."""
    keys: KeysValues
    scores_BTHs: torch.Tensor | None
    """Of the gate, H of the tensor that it gates."""


class AttentionOutput(NamedTuple):
    y_BTD: torch.Tensor
    """To be added to the residual stream."""
    sample: AttentionSample | None
    """If observed."""
    max_logit_H: torch.Tensor | None
    """(H,) fp32, largest logits of the batch: of every training pass with `qk_clip`, else None."""
    keys: KeysValues
    """For later blocks of cross attention."""


class Attention(nn.Module):
    """Softmax attention with its gate.

    Args:
        config: heads, rotary base, norm and gate.
        width: D.
        norm_eps: of the QK-norm.
        std: of the query, key, value and gate projections.
        out_std: of the output projection, which writes to the residual stream.
        window: tokens that a token sees, its own among them; None for all of its document.
    """

    def __init__(
        self,
        config: AttentionConfig,
        width: int,
        norm_eps: float,
        std: float,
        out_std: float,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.config, self.norm_eps, self.window = config, norm_eps, window
        H, G, V, d = config.num_heads, config.num_kv_heads, config.value_heads, config.head_dim
        self.wq = Linear(width, H * d, std)
        self.augment = None if config.augmented_query is None else FeedForward(H * d, config.augmented_query, std, std)
        self.wk = Linear(width, G * d, std)
        self.wv = Linear(width, V * d, std)
        self.wo = Linear(H * d, width, out_std)
        self.q_norm = RMSNorm(d, norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(d, norm_eps) if config.qk_norm else None
        self.key_of_head: torch.Tensor | None = None
        self.value_of_head: torch.Tensor | None = None
        """(H,) the key and the value head of each query head where they are not equal groups: after export."""
        self.sink = nn.Parameter(torch.empty(H)) if config.softmax == "learnable_sink" else None
        self.gate: Gate | None = None
        if not isinstance(config.gate, NoGate):
            self.gate = Gate(config.gate, width, *config.gated_shape(width), std)

    @property
    def makes_queries(self) -> Linear:
        """What has a row for each number of a query: the last product before norm and positions."""
        return self.wq if self.augment is None else self.augment.w2

    def init_weights(self, draw: Draw) -> None:
        if self.sink is not None:
            nn.init.zeros_(self.sink)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotary: Rotary,
        documents: Documents | None,
        observe: bool = False,
        heads: torch.Tensor | None = None,
        below: KeysValues | None = None,
        part: SequencePart | None = None,
    ) -> AttentionOutput:
        """Attend.

        Args:
            x_BTD: (B, T, D), normalised.
            rotary: tables for T positions.
            documents: attention stays inside; None for plain causal attention.
            observe: return what telemetry looks at.
            heads: (..., H) factors of the heads, or None.
            below: of the block that `CrossAttention` reads; others have their own.
            part: of the sequences, where other ranks hold the rest; not with `observe` or `qk_clip`.
        """
        q, keys, scores = self._seen(x_BTD, rotary, below)
        k, v = keys
        if self.key_of_head is not None and self.value_of_head is not None:
            k, v = k[:, :, self.key_of_head], v[:, :, self.value_of_head]
        sink_H = self._sink(q)
        visible = self._visible(x_BTD, documents, part)
        if part is None:
            y_BTHd = self._attend(q, k, v, scores, visible, sink_H)
        else:
            own_sink = None if sink_H is None else part.ranks.own(sink_H, 0)
            attention = partial(gated_attention, scores_BTHs=None, documents=visible, sink_H=own_sink)
            y_BTHd = self._gated("sdpa_output", part.ranks.attend(attention, q, *_alike(k, v)), scores)
        if heads is not None:
            y_BTHd = y_BTHd * heads.unsqueeze(-1).to(y_BTHd.dtype)
        out_BTD = self.wo(y_BTHd.flatten(-2))
        out_BTD = self._gated("dense_output", out_BTD.unsqueeze(-2), scores).squeeze(-2)
        clips = self.config.qk_clip is not None and self.training and torch.is_grad_enabled()
        max_logit_H = max_logits(q.detach(), k.detach(), visible) if clips else None
        sample = self._sample(q, k, v, scores, visible, sink_H) if observe else None
        return AttentionOutput(out_BTD, sample, max_logit_H, keys)

    def _seen(self, x_BTD: torch.Tensor, rotary: Rotary, below: KeysValues | None) -> Seen:
        (q, k, v), scores = self._projected(x_BTD, self.wq, self.wk, self.wv)
        v = self._gated("value", v, scores)
        q, k = self._positioned(q, k, scores, rotary)
        return Seen(q, KeysValues(k, v), scores)

    def _visible(self, x_BTD: torch.Tensor, documents: Documents | None, part: SequencePart | None) -> Visible | None:
        documents, length = (documents, x_BTD.shape[1]) if part is None else (part.documents, part.length)
        if self.window is None:
            return documents
        if documents is not None:
            return documents.nearest(self.window)
        return nearest(len(x_BTD), length, self.window, x_BTD.device)

    def _projected(self, x_BTD: torch.Tensor, *own: Linear) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Heads of each matrix, the first of which is the queries', and the gate's scores.

        One product for all: its gradient by x is one product too, not a sum of four.
        """
        gate, linears = self.gate, [*own]
        if gate is not None and gate.projection is not None:
            linears.append(gate.projection)
        weights: list[torch.Tensor] = [linear.weight for linear in linears]
        parts = F.linear(x_BTD, torch.cat(weights)).split([len(weight) for weight in weights], dim=-1)
        scores = None
        if gate is not None:
            scores = gate.scores(x_BTD) if gate.projection is None else gate.by_head(parts[-1])
        if self.augment is not None:
            parts = (self.augment(parts[0]), *parts[1:])
        return [part.unflatten(-1, (-1, self.config.head_dim)) for part in parts[: len(own)]], scores

    def _attend(
        self,
        q_BTHd: torch.Tensor,
        k_BTGd: torch.Tensor,
        v_BTVd: torch.Tensor,
        scores_BTHs: torch.Tensor | None,
        documents: Visible | None,
        sink_H: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention and the gate behind it, together where one kernel does both."""
        gate = self.config.gate
        k_BTGd, v_BTVd = _alike(k_BTGd, v_BTVd)
        if isinstance(gate, NoGate) or not gate.multiplies_output:
            y_BTHd = gated_attention(
                q_BTHd, k_BTGd, v_BTVd, None, activation="identity", documents=documents, sink_H=sink_H
            )
            return self._gated("sdpa_output", y_BTHd, scores_BTHs)
        return gated_attention(
            q_BTHd, k_BTGd, v_BTVd, scores_BTHs, activation=gate.activation, documents=documents, sink_H=sink_H
        )

    def _sample(
        self,
        q_BTHd: torch.Tensor,
        k_BTGd: torch.Tensor,
        v_BTVd: torch.Tensor,
        scores_BTHs: torch.Tensor | None,
        documents: Visible | None,
        sink_H: torch.Tensor | None,
    ) -> AttentionSample:
        """What telemetry looks at."""
        return AttentionSample(q_BTHd, k_BTGd, sink_H, scores_BTHs, window=self.window)

    def _positioned(
        self, q_BTHd: torch.Tensor, k_BTGd: torch.Tensor, scores_BTHs: torch.Tensor | None, rotary: Rotary
    ) -> Rotated:
        """Queries and keys normalised, gated and rotated; without a gate of theirs in one pass."""
        q, k = q_BTHd, k_BTGd
        q_weight = k_weight = None
        if self.q_norm is not None and self.k_norm is not None:
            if self.gate is not None and self.gate.config.kind in ("query", "key"):
                q, k = self.q_norm(q), self.k_norm(k)
            else:
                q_weight, k_weight = self.q_norm.weight, self.k_norm.weight
        # After QK-norm, not before: the norm would divide a head's scalar gate out again.
        q, k = self._gated("query", q, scores_BTHs), self._gated("key", k, scores_BTHs)
        return qk_norm_rope(q, k, q_weight, k_weight, *rotary, self.norm_eps)

    def _sink(self, q_BTHd: torch.Tensor) -> torch.Tensor | None:
        if self.config.softmax == "off_by_one":
            return q_BTHd.new_zeros(q_BTHd.shape[2])
        return self.sink

    def _gated(self, position: str, y_BTHd: torch.Tensor, scores_BTHs: torch.Tensor | None) -> torch.Tensor:
        if self.gate is None or self.gate.config.kind != position:
            return y_BTHd
        return self.gate(y_BTHd, scores_BTHs)


def _alike(k_BTGd: torch.Tensor, v_BTVd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values repeated to as many heads, which kernels want; as they are if they are as many."""
    heads = math.lcm(k_BTGd.shape[2], v_BTVd.shape[2])
    k, v = (x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k_BTGd, v_BTVd))
    return k, v
