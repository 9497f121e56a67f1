"""QK-clip: shrink the query and key weights of a head whose attention logits have grown too large.

Source: Kimi K2 (arXiv 2507.20534), MuonClip. For a head h whose largest logit of a step is S_h > tau, logits shrink by
`gamma_h = tau / S_h`: the paper multiplies the query and the key weights of the head by `sqrt(gamma_h)` each.
With grouped queries a key head serves several query heads. Here it takes `sqrt(gamma)` of its most shrunken head, and
each query head what is left of its own factor. So every head's logits shrink by exactly its own gamma_h, heads below
the threshold keep theirs, and with one query head a key head this is the paper's rule.

Letters: B batch, T tokens, H query heads, G key heads, d head width.
"""

from __future__ import annotations

import torch

from tidegate_kernels.gated_attention import Visible

__all__ = ["clip_factors", "max_logits"]

_CHUNK = 512
"""Queries at a time: bounds the memory of the logits."""


@torch.no_grad()
def max_logits(q_BTHd: torch.Tensor, k_BTGd: torch.Tensor, documents: Visible | None) -> torch.Tensor:
    """The largest logit of every head over all visible pairs, (H,) fp32.

    No fused kernel returns it, so this is a second product of queries and keys: half the FLOPs of the attention
    forward pass, but unfused, and slower than forward and backward of the fused kernel together (5 ms against 4 on an
    H100: 32,768 tokens in sequences of 2,048, 16 heads of 64). It runs in the dtype of the inputs; bf16 rounds the
    result to 3 digits.

    Args:
        q_BTHd, k_BTGd: as the softmax sees them, rotated.
        documents: attention stays inside; None for causal attention.
    """
    T, H, d = q_BTHd.shape[1:]
    group = H // k_BTGd.shape[2]
    k_BGdT = k_BTGd.permute(0, 2, 3, 1)
    largest_H = q_BTHd.new_full((H,), -torch.inf, dtype=torch.float32)
    for start in range(0, T, _CHUNK):
        stop = min(start + _CHUNK, T)
        # (B, G, group * queries, d): the heads of a group share their keys.
        q = q_BTHd[:, start:stop].unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4).flatten(2, 3) * d**-0.5
        logits = (q @ k_BGdT[..., :stop]).unflatten(2, (group, -1)).flatten(1, 2)
        if documents is None:
            visible = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).tril(start)
        else:
            visible = documents.mask[:, :, start:stop, :stop]
        chunk_H = logits.masked_fill_(~visible, -torch.inf).amax(dim=(0, 2, 3))
        largest_H = torch.maximum(largest_H, chunk_H.float())
    return largest_H


def clip_factors(largest_H: torch.Tensor, threshold: float, num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What to multiply the weights of query and key heads with.

    Args:
        largest_H: (H,) largest logit of each head in the step, over all ranks and micro-batches.
        threshold: tau.
        num_kv_heads: G.

    Returns:
        (H,) of the query heads and (G,) of the key heads; all 1 where no logit is above the threshold.
    """
    gamma_GH = (threshold / largest_H.clamp(min=threshold)).unflatten(0, (num_kv_heads, -1))
    key_G = gamma_GH.amin(dim=1).sqrt()
    return (gamma_GH / key_G[:, None]).flatten(), key_G
