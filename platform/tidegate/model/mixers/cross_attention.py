"""Attention to the keys and values of an attention block below: queries of its own, no keys, no values, no cache.

Source: YOCO (arXiv 2405.05254), section 2.2; as the cross-decoder of a hybrid in SambaY (arXiv 2507.06607).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from tidegate.config import Variant
from tidegate.model.attention import Attention, AttentionConfig, KeysValues, Rotary, Seen
from tidegate_kernels.qk_norm_rope import qk_norm_rope

__all__ = ["CrossAttention", "CrossAttentionConfig"]


class CrossAttentionConfig(Variant):
    """`model.attention` without keys and values: those of the nearest block before it that has `model.attention`."""

    kind: Literal["cross_attention"] = "cross_attention"
    summary: ClassVar[str] = "queries alone: reads keys and values of the nearest model.attention below"
    source: ClassVar[str] = "YOCO, arXiv 2405.05254; SambaY, arXiv 2507.06607"


class CrossAttention(Attention):
    """Arguments are those of `Attention`, but its window."""

    def __init__(self, config: AttentionConfig, width: int, norm_eps: float, std: float, out_std: float) -> None:
        super().__init__(config, width, norm_eps, std, out_std)
        del self.wk, self.wv, self.k_norm

    def _seen(self, x_BTD: torch.Tensor, rotary: Rotary, below: KeysValues | None) -> Seen:
        assert below is not None  # the config has seen to it
        (q,), scores = self._projected(x_BTD, self.wq)
        weight = None if self.q_norm is None else self.q_norm.weight
        if self.q_norm is not None and self.config.gate.kind == "query":
            q, weight = self.q_norm(q), None
        q = self._gated("query", q, scores)
        # The kernel wants keys too: a head, of which nobody reads the result.
        q = qk_norm_rope(q, q[:, :, :1], weight, weight, *rotary, self.norm_eps).q_BTHd
        return Seen(q, below, scores)
