"""The truth of `gated_attention`: an explicit softmax in fp32 or wider.

Letters: B batch, T tokens, H query heads, G key/value heads, d head width.
"""

from __future__ import annotations

import torch

from tidegate_kernels.gated_attention.documents import Documents
from tidegate_kernels.gated_output.reference import ACTIVATIONS

__all__ = ["gated_attention"]


def gated_attention(
    q_BTHd: torch.Tensor,
    k_BTGd: torch.Tensor,
    v_BTGd: torch.Tensor,
    scores_BTHs: torch.Tensor | None,
    *,
    activation: str = "sigmoid",
    documents: Documents | None = None,
    sink_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `tidegate_kernels.gated_attention.gated_attention`."""
    wide = torch.promote_types(q_BTHd.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q_BTHd, k_BTGd, v_BTGd))
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    logits_BHTT = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    T = q.shape[1]
    mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril() if documents is None else documents.mask
    logits_BHTT = logits_BHTT.masked_fill(~mask, -torch.inf)
    if sink_H is not None:
        sink = sink_H.to(wide)[:, None, None].expand(*logits_BHTT.shape[:3], 1)
        logits_BHTT = torch.cat([logits_BHTT, sink], dim=-1)
    y = torch.einsum("bhts,bshd->bthd", logits_BHTT.softmax(dim=-1)[..., :T], v)
    if scores_BTHs is not None:
        y = y * ACTIVATIONS[activation](scores_BTHs.to(wide))
    return y.to(q_BTHd.dtype)
