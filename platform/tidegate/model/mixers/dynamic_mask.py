"""Trainable dynamic mask attention: a key's value says how much it is worth, and a query sees the best keys alone.

A learned bias is added to every logit of a key, and each query keeps the `keep` keys of highest bias among those it may
see: of its own document, not later. The published code selects once for all queries, over the whole row, so that later
tokens push keys out of earlier queries' sight; here they cannot. The bias hangs on the key alone, so a key that has
been pushed out stays out, and at inference the kept ones are all that has to be kept.

Plain PyTorch: all logits of a chunk of queries at a time, forward and backward. For small sizes.
Source: arXiv 2508.02124; the bias is that of the authors' code, `a softplus(v W)`, the paper's is exp of it.

Letters: B batch, T tokens, D width, H query heads, G key/value heads, d head width, c queries of a chunk, S keys up to
its last query.
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
        G, d = config.num_kv_heads, config.head_dim
        self.keep = keep
        self.w_bias = Linear(G * d, G, std)
        self.bias_scale = nn.Parameter(torch.empty(G))

    def init_weights(self, draw: Draw) -> None:
        super().init_weights(draw)
        nn.init.ones_(self.bias_scale)

    def _bias(self, v_BTGd: torch.Tensor) -> torch.Tensor:
        """(B, T, G) fp32 or wider: bf16 has too few digits to tell keys apart."""
        wide = torch.promote_types(v_BTGd.dtype, torch.float32)
        scores_BTG = F.linear(v_BTGd.flatten(-2).to(wide), self.w_bias.weight.to(wide))
        return self.bias_scale.to(wide) * F.softplus(scores_BTG)

    def _attend(
        self,
        q_BTHd: torch.Tensor,
        k_BTGd: torch.Tensor,
        v_BTGd: torch.Tensor,
        scores_BTHs: torch.Tensor | None,
        documents: Visible | None,
        sink_H: torch.Tensor | None,
    ) -> torch.Tensor:
        bias_BTG, first_BT = self._bias(v_BTGd), None if documents is None else documents.first_BT
        ranks_BTG = ranks(bias_BTG)
        parts = []
        for start in range(0, q_BTHd.shape[1], _CHUNK):
            at, until = slice(start, start + _CHUNK), slice(start + _CHUNK)
            keys = k_BTGd[:, until], v_BTGd[:, until], bias_BTG[:, until], ranks_BTG[:, until]
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
        v_BTGd: torch.Tensor,
        scores_BTHs: torch.Tensor | None,
        documents: Visible | None,
        sink_H: torch.Tensor | None,
    ) -> AttentionSample:
        sample = super()._sample(q_BTHd, k_BTGd, v_BTGd, scores_BTHs, documents, sink_H)
        bias_bTG = self._bias(v_BTGd[:MAX_SEQUENCES])
        place_T = torch.arange(q_BTHd.shape[1], device=q_BTHd.device)
        first_bT = place_T.new_zeros(bias_bTG.shape[:2]) if documents is None else documents.first_BT[:MAX_SEQUENCES]
        at_S = sampled_positions(len(place_T))
        hidden_bGST = ~selected(ranks(bias_bTG), place_T[at_S], first_bT[:, at_S], self.keep)
        return sample._replace(bias_BGST=bias_bTG.mT.unsqueeze(2).masked_fill(hidden_bGST, -torch.inf))


def ranks(bias_BTG: torch.Tensor) -> torch.Tensor:
    """(B, T, G) places of the keys by falling bias, from 0; of equal ones (a token that repeats) the later is before.

    No two are alike, so that what is kept is the same in every chunk, packing and dtype.
    """
    return bias_BTG.detach().flip(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1).flip(1)


def selected(ranks_BSG: torch.Tensor, at_c: torch.Tensor, first_Bc: torch.Tensor | None, keep: int) -> torch.Tensor:
    """(B, G, c, S) bool, the `keep` keys of lowest rank among those that each query may see; all if there are fewer.

    Args:
        ranks_BSG: see `ranks`.
        at_c: places of the queries.
        first_Bc: the first key that each may see; None for 0.
        keep: w.
    """
    place_S = torch.arange(ranks_BSG.shape[1], device=at_c.device)
    visible_BcS = (place_S <= at_c[:, None]).unsqueeze(0)
    if first_Bc is not None:
        visible_BcS = visible_BcS & (place_S >= first_Bc.unsqueeze(-1))
    beyond = torch.iinfo(ranks_BSG.dtype).max
    ranks_BGcS = ranks_BSG.mT.unsqueeze(2).masked_fill(~visible_BcS.unsqueeze(1), beyond)
    last_BGc1 = ranks_BGcS.topk(min(keep, len(place_S)), largest=False).values.amax(dim=-1, keepdim=True)
    return (ranks_BGcS <= last_BGc1) & (ranks_BGcS < beyond)


def _attend(
    q_BcHd: torch.Tensor,
    k_BSGd: torch.Tensor,
    v_BSGd: torch.Tensor,
    bias_BSG: torch.Tensor,
    ranks_BSG: torch.Tensor,
    first_Bc: torch.Tensor | None,
    keep: int,
    sink_H: torch.Tensor | None,
) -> torch.Tensor:
    """(B, c, H, d), of the last c places."""
    c, H, d = q_BcHd.shape[1:]
    at_c = torch.arange(k_BSGd.shape[1], device=q_BcHd.device)[-c:]
    kept_BGcS = selected(ranks_BSG, at_c, first_Bc, keep)
    bias_BGcS = bias_BSG.mT.unsqueeze(2).masked_fill(~kept_BGcS, -torch.inf)
    k_BHSd, v_BHSd = (x.repeat_interleave(H // x.shape[2], dim=2).transpose(1, 2) for x in (k_BSGd, v_BSGd))
    logits_BHcS = (q_BcHd.transpose(1, 2) * d**-0.5) @ k_BHSd.mT
    logits_BHcS = logits_BHcS + bias_BGcS.repeat_interleave(H // bias_BGcS.shape[1], dim=1)
    if sink_H is not None:
        sink = sink_H.to(logits_BHcS.dtype)[:, None, None].expand(*logits_BHcS.shape[:3], 1)
        logits_BHcS = torch.cat([logits_BHcS, sink], dim=-1)
    shares_BHcS = logits_BHcS.softmax(dim=-1)[..., : k_BSGd.shape[1]]
    return (shares_BHcS.to(v_BHSd.dtype) @ v_BHSd).transpose(1, 2)
