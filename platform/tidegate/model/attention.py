"""Causal softmax attention with grouped queries, rotary positions, optional QK-norm and a gate at any position.

Letters: B batch, T tokens, D width, H query heads, G key/value heads, d head width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tidegate.config import Config
from tidegate.model.gates import AttentionGate, Gate, GateConfig, NoGate
from tidegate.model.layers import Linear, RMSNorm

__all__ = ["Attention", "AttentionConfig", "Rotary", "document_mask", "rotary_table", "rotate"]


class AttentionConfig(Config):
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2)
    rope_theta: float = Field(default=10_000.0, gt=0)
    qk_norm: bool = True
    gate: GateConfig = AttentionGate()

    @model_validator(mode="after")
    def _heads_divide(self) -> AttentionConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; "
                f"use a divisor of {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary positions need pairs")
        return self


class Rotary(NamedTuple):
    """cos and sin of the rotary angles, each (T, d/2), fp32."""

    cos_Td: torch.Tensor
    sin_Td: torch.Tensor


@lru_cache(maxsize=8)
def rotary_table(length: int, head_dim: int, theta: float, device: torch.device) -> Rotary:
    """Angles `t theta^(-2i/d)` (Su et al. 2021). Not a buffer, which casting the module to bf16 would spoil."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return Rotary(angle.cos().float().to(device), angle.sin().float().to(device))


def rotate(x_BTHd: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotate the pairs (x_i, x_{i + d/2}) of every head, in fp32; shape and dtype are kept."""
    cos, sin = rotary.cos_Td[:, None, :], rotary.sin_Td[:, None, :]
    first, second = x_BTHd.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTHd.dtype)


def document_mask(documents_BT: torch.Tensor) -> torch.Tensor:
    """Who may attend to whom: earlier or equal positions of the same document.

    Args:
        documents_BT: (B, T) integer document ids.

    Returns:
        (B, 1, T, T) bool, True where query t may see key s.
    """
    length = documents_BT.shape[1]
    same = documents_BT[:, None, :, None] == documents_BT[:, None, None, :]
    return same & torch.ones(length, length, dtype=torch.bool, device=documents_BT.device).tril()


class Attention(nn.Module):
    """Softmax attention with its gate.

    Args:
        config: heads, rotary base, norm and gate.
        width: D.
        norm_eps: of the QK-norm.
        std: of the query, key, value and gate projections.
        out_std: of the output projection, which writes to the residual stream.
    """

    def __init__(self, config: AttentionConfig, width: int, norm_eps: float, std: float, out_std: float) -> None:
        super().__init__()
        self.config = config
        H, G, d = config.num_heads, config.num_kv_heads, config.head_dim
        self.wq = Linear(width, H * d, std)
        self.wk = Linear(width, G * d, std)
        self.wv = Linear(width, G * d, std)
        self.wo = Linear(H * d, width, out_std)
        self.q_norm = RMSNorm(d, norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(d, norm_eps) if config.qk_norm else None
        self.gate: Gate | None = None
        if not isinstance(config.gate, NoGate):
            self.gate = Gate(config.gate, width, *config.gate.gated_shape(width, H, G, d), std)

    def forward(self, x_BTD: torch.Tensor, rotary: Rotary, mask: torch.Tensor | None) -> torch.Tensor:
        """Attend.

        Args:
            x_BTD: (B, T, D), normalised.
            rotary: tables for T positions.
            mask: `document_mask` of the batch, or None for plain causal attention.

        Returns:
            (B, T, D), to be added to the residual stream.
        """
        d = self.config.head_dim
        q = self.wq(x_BTD).unflatten(-1, (-1, d))
        k = self.wk(x_BTD).unflatten(-1, (-1, d))
        v = self._gated("value", self.wv(x_BTD).unflatten(-1, (-1, d)), x_BTD)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        # After QK-norm, not before: the norm would divide a head's scalar gate out again.
        q, k = self._gated("query", q, x_BTD), self._gated("key", k, x_BTD)
        y_BTHd = _attend(rotate(q, rotary), rotate(k, rotary), v, mask)
        y_BTHd = self._gated("sdpa_output", y_BTHd, x_BTD)
        out_BTD = self.wo(y_BTHd.flatten(-2))
        return self._gated("dense_output", out_BTD.unsqueeze(-2), x_BTD).squeeze(-2)

    def _gated(self, position: str, y_BTHd: torch.Tensor, x_BTD: torch.Tensor) -> torch.Tensor:
        if self.gate is None or self.gate.config.kind != position:
            return y_BTHd
        return self.gate(y_BTHd, x_BTD)


_BACKENDS = [  # fastest first on Hopper (docs/measurements.md)
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def _attend(
    q_BTHd: torch.Tensor, k_BTGd: torch.Tensor, v_BTGd: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Scaled dot-product attention on the fastest backend that takes these inputs; (B, T, H, d) out."""
    q, k, v = q_BTHd.transpose(1, 2), k_BTGd.transpose(1, 2), v_BTGd.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(_BACKENDS, set_priority=True):
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return y.transpose(1, 2)
