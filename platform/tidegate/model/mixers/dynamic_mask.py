"""Trainable dynamic mask attention: a key's value says how much it is worth, and a query sees the best keys alone.

A learned bias is added to every logit of a key, and each query keeps the `keep` keys of highest bias among those it may
see: of its own document, not later. The published code selects once for all queries, over the whole row, so that later
tokens push keys out of earlier queries' sight; here they cannot. The bias hangs on the key alone, so a key that has
been pushed out stays out, and at inference the kept ones are all that has to be kept.

Plain PyTorch: all logits of a chunk of queries at a time, forward and backward. For small sizes.
Source: arXiv 2508.02124; the bias is that of the authors' code, `a softplus(v W)`, the paper's is exp of it.

Letters: B batch, T tokens, D width, H query heads, G key heads, V value heads, d head width, c queries of a chunk, S
keys up to its last query.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn
from torch.utils.checkpoint import checkpoint

from tidegate.config import Variant
from tidegate.model.attention import Attention, AttentionConfig
from tidegate.model.initialisation import Draw
from tidegate.model.layers import Linear
from tidegate.model.observations import MAX_SEQUENCES, AttentionSample, sampled_positions
from tidegate_kernels.gated_attention import Visible

__all__ = ["DynamicMaskAttention", "DynamicMaskConfig", "ranks", "selected"]

_CHUNK = 512
"""Queries at a time: bounds the memory of the logits."""


class DynamicMaskConfig(Variant):
    """`model.attention` with a selection: the same heads, norms, sink and gate."""

    kind: Literal["dynamic_mask"] = "dynamic_mask"
    summary: ClassVar[str] = "model.attention that sees the keys of highest learned bias alone; no kernel, small sizes"
    source: ClassVar[str] = "arXiv 2508.02124"
    example: ClassVar[str] = "keep: 128"
    keep: int = Field(ge=1)
    """Keys that a query sees at most (w)."""


class DynamicMaskAttention(Attention):
    """Args:
    keep: w.
    others: of `Attention`, but its window.
    """

    def __init__(
        self, config: AttentionConfig, width: int, norm_eps: float, std: float, out_std: float, keep: int
    ) -> None:
        super().__init__(config, width, norm_eps, std, out_std)
        V, d = config.value_heads, config.head_dim
        self.keep = keep
        self.w_bias = Linear(V * d, V, std)
        self.bias_scale = nn.Parameter(torch.empty(V))

    def init_weights(self, draw: Draw) -> None:
        super().init_weights(draw)
        nn.init.ones_(self.bias_scale)

    def _bias(self, v_BTVd: torch.Tensor) -> torch.Tensor:
        """(B, T, V) fp32 or wider: bf16 has too few digits to tell keys apart."""
        wide = torch.promote_types(v_BTVd.dtype, torch.float32)
        scores_BTV = F.linear(v_BTVd.flatten(-2).to(wide), self.w_bias.weight.to(wide))
        return self.bias_scale.to(wide) * F.softplus(scores_BTV)

    def _attend(
        self,
        q_BTHd: torch.Tensor,
        k_BTGd: torch.Tensor,
        v_BTVd: torch.Tensor,
        scores_BTHs: torch.Tensor | None,
        documents: Visible | None,
        sink_H: torch.Tensor | None,
    ) -> torch.Tensor:
        bias_BTV, first_BT = self._bias(v_BTVd), None if documents is None else documents.first_BT
        ranks_BTV = ranks(bias_BTV)
        parts = []
        for start in range(0, q_BTHd.shape[1], _CHUNK):
            at, until = slice(start, start + _CHUNK), slice(start + _CHUNK)
            keys = k_BTGd[:, until], v_BTVd[:, until], bias_BTV[:, until], ranks_BTV[:, until]
            first_Bc = None if first_BT is None else first_BT[:, at]
            # Logits are computed again in the backward pass: those of one chunk are held at a time.
            given = q_BTHd[:, at], *keys, first_Bc, self.keep, sink_H
            parts.append(checkpoint(_attend, *given, use_reentrant=False, preserve_rng_state=False))
        return self._gated("sdpa_output", torch.cat(parts, dim=1), scores_BTHs)

    @torch.no_grad()
    def _sample(
        self,
        q_BTHd: torch.Tensor,
        k_BTGd: torch.Tensor,
        v_BTVd: torch.Tensor,
        scores_BTHs: torch.Tensor | None,
        documents: Visible | None,
        sink_H: torch.Tensor | None,
    ) -> AttentionSample:
        sample = super()._sample(q_BTHd, k_BTGd, v_BTVd, scores_BTHs, documents, sink_H)
        bias_bTV = self._bias(v_BTVd[:MAX_SEQUENCES])
        place_T = torch.arange(q_BTHd.shape[1], device=q_BTHd.device)
        first_bT = place_T.new_zeros(bias_bTV.shape[:2]) if documents is None else documents.first_BT[:MAX_SEQUENCES]
        at_S = sampled_positions(len(place_T))
        hidden_bVST = ~selected(ranks(bias_bTV), place_T[at_S], first_bT[:, at_S], self.keep)
        return sample._replace(bias_BGST=bias_bTV.mT.unsqueeze(2).masked_fill(hidden_bVST, -torch.inf))


def ranks(bias_BTV: torch.Tensor) -> torch.Tensor:
    """(B, T, V) places of the keys by falling bias, from 0; of equal ones (a token that repeats) the later is before.

    No two are alike, so that what is kept is the same in every chunk, packing and dtype.
    """
    return bias_BTV.detach().flip(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1).flip(1)


def selected(ranks_BSV: torch.Tensor, at_c: torch.Tensor, first_Bc: torch.Tensor | None, keep: int) -> torch.Tensor:
    """(B, V, c, S) bool, the `keep` keys of lowest rank among those that each query may see; all if there are fewer.

    Args:
        ranks_BSV: see `ranks`.
        at_c: places of the queries.
        first_Bc: the first key that each may see; None for 0.
        keep: w.
    """
    place_S = torch.arange(ranks_BSV.shape[1], device=at_c.device)
    visible_BcS = (place_S <= at_c[:, None]).unsqueeze(0)
    if first_Bc is not None:
        visible_BcS = visible_BcS & (place_S >= first_Bc.unsqueeze(-1))
    beyond = torch.iinfo(ranks_BSV.dtype).max
    ranks_BVcS = ranks_BSV.mT.unsqueeze(2).masked_fill(~visible_BcS.unsqueeze(1), beyond)
    last_BVc1 = ranks_BVcS.topk(min(keep, len(place_S)), largest=False).values.amax(dim=-1, keepdim=True)
    return (ranks_BVcS <= last_BVc1) & (ranks_BVcS < beyond)


def _attend(
    q_BcHd: torch.Tensor,
    k_BSGd: torch.Tensor,
    v_BSVd: torch.Tensor,
    bias_BSV: torch.Tensor,
    ranks_BSV: torch.Tensor,
    first_Bc: torch.Tensor | None,
    keep: int,
    sink_H: torch.Tensor | None,
) -> torch.Tensor:
    """(B, c, H, d), of the last c places."""
    c, H, d = q_BcHd.shape[1:]
    at_c = torch.arange(k_BSGd.shape[1], device=q_BcHd.device)[-c:]
    kept_BVcS = selected(ranks_BSV, at_c, first_Bc, keep)
    bias_BVcS = bias_BSV.mT.unsqueeze(2).masked_fill(~kept_BVcS, -torch.inf)
    k_BHSd, v_BHSd = (x.repeat_interleave(H // x.shape[2], dim=2).transpose(1, 2) for x in (k_BSGd, v_BSVd))
    logits_BHcS = (q_BcHd.transpose(1, 2) * d**-0.5) @ k_BHSd.mT
    logits_BHcS = logits_BHcS + bias_BVcS.repeat_interleave(H // bias_BVcS.shape[1], dim=1)
    if sink_H is not None:
        sink = sink_H.to(logits_BHcS.dtype)[:, None, None].expand(*logits_BHcS.shape[:3], 1)
        logits_BHcS = torch.cat([logits_BHcS, sink], dim=-1)
    shares_BHcS = logits_BHcS.softmax(dim=-1)[..., : k_BSGd.shape[1]]
    return (shares_BHcS.to(v_BHSd.dtype) @ v_BHSd).transpose(1, 2)
