"""What a layer's attention does, for telemetry: sinks, entropy and gate openings, on a bounded part of the batch.

Attention probabilities are formed explicitly in fp32 for at most 2 sequences and 32 evenly spaced queries of each, and
so are gate values (docs/measurements.md has what it costs). It costs nothing unless asked for.

Letters: B sequences, T tokens, H query heads, G key/value heads, d head width, S sampled queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tidegate.model.gates import Gate

__all__ = ["AttentionObservations", "observe_gate", "observe_softmax", "sampled_positions"]

MAX_SEQUENCES, MAX_QUERIES = 2, 32
CLOSED = 0.1
"""A gate value below it counts as closed."""


class AttentionObservations(NamedTuple):
    """One layer's, detached and fp32. NaN: does not apply, or was not asked for."""

    gate_mean_H: torch.Tensor
    """Mean value of a multiplicative gate; H of the gated tensor (1 if it is shared or has no heads)."""
    gate_closed_H: torch.Tensor
    """Share of the gate's values below 0.1."""
    first_token_H: torch.Tensor
    """(H,) F-Attn: attention to token 0 of a sequence, mean over the later queries of token 0's document. NaN if no
    sampled query is one."""
    first_token_uniform: torch.Tensor
    """() the same for uniform attention, 1 / (number of visible tokens) a query: the floor under `first_token_H`."""
    first_token_importance_H: torch.Tensor
    """(H,) mean attention to token 0 over all queries of its document, its own (of about 1) too: a head is a sink where
    this is above eps = 0.3 (Gu et al. 2024, arXiv 2410.10781, at T = 64)."""
    entropy_H: torch.Tensor
    """(H,) nats, of the attention of a query, mean over queries. A softmax sink is one more outcome."""
    max_logit_H: torch.Tensor
    """(H,) largest logit over the whole batch. Only with `qk_clip`, in training, and then also when nothing else is
    observed."""


def sampled_positions(length: int, device: torch.device) -> torch.Tensor:
    """At most 32 evenly spaced positions, the first and the last among them."""
    if length <= MAX_QUERIES:
        return torch.arange(length, device=device)
    return torch.linspace(0, length - 1, MAX_QUERIES, device=device, dtype=torch.float64).long()


class SoftmaxObservations(NamedTuple):
    """The fields of `AttentionObservations` that come from attention probabilities."""

    first_token_H: torch.Tensor
    first_token_uniform: torch.Tensor
    first_token_importance_H: torch.Tensor
    entropy_H: torch.Tensor


@torch.no_grad()
def observe_softmax(
    q_BTHd: torch.Tensor, k_BTGd: torch.Tensor, mask: torch.Tensor | None, sink_H: torch.Tensor | None
) -> SoftmaxObservations:
    """Observe the softmax of these queries and keys.

    Args:
        q_BTHd, k_BTGd: as the softmax sees them.
        mask: (B, 1, T, T) bool, or None for causal attention.
        sink_H: (H,) logit of the sink, or None.
    """
    T, d = q_BTHd.shape[1], q_BTHd.shape[-1]
    at_S = sampled_positions(T, q_BTHd.device)
    q = q_BTHd[:MAX_SEQUENCES, at_S].float().unflatten(2, (k_BTGd.shape[2], -1)) * d**-0.5
    logits_BHST = torch.einsum("bsgnd,btgd->bgnst", q, k_BTGd[:MAX_SEQUENCES].float()).flatten(1, 2)
    if mask is None:
        visible = (at_S[:, None] >= torch.arange(T, device=at_S.device)).expand(q.shape[0], 1, -1, -1)
    else:
        visible = mask[:MAX_SEQUENCES, :, at_S]
    logits_BHST = logits_BHST.masked_fill(~visible, -torch.inf)
    if sink_H is not None:
        sink = sink_H.float()[:, None, None].expand(*logits_BHST.shape[:3], 1)
        logits_BHST = torch.cat([logits_BHST, sink], dim=-1)
    log_p = logits_BHST.log_softmax(dim=-1)
    p = log_p.exp()
    entropy_H = -(p * log_p.masked_fill(p == 0, 0.0)).sum(dim=-1).mean(dim=(0, 2))

    first_BHS = p[..., 0]
    same_BS = visible[:, 0, :, 0]  # queries of token 0's document: they may see it
    later_BS = (same_BS & (at_S > 0)).float()
    num_later = later_BS.sum()  # 0 / 0 is the NaN that is wanted
    first_token_H = (first_BHS * later_BS[:, None]).sum(dim=(0, 2)) / num_later
    uniform = (later_BS / visible[:, 0].sum(dim=-1)).sum() / num_later
    # The own query of token 0 is one of the document's, however few of the others were sampled.
    own_H = first_BHS[..., 0].mean(dim=0)
    own = q.shape[0] / (q.shape[0] + _later_queries(mask, q.shape[0], T, at_S.device))
    importance_H = own * own_H + (1 - own) * first_token_H
    return SoftmaxObservations(first_token_H, uniform, importance_H, entropy_H)


def _later_queries(mask: torch.Tensor | None, sequences: int, length: int, device: torch.device) -> torch.Tensor:
    """How many queries after the first may see their sequence's token 0."""
    if mask is None:
        return torch.tensor(float(sequences * (length - 1)), device=device)
    return mask[:sequences, 0, 1:, 0].float().sum()


@torch.no_grad()
def observe_gate(gate: Gate, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and closed share of a multiplicative gate's values a head, both (H,), for the sampled tokens."""
    at_S = sampled_positions(x_BTD.shape[1], x_BTD.device)
    values = gate.values(x_BTD.detach()[:MAX_SEQUENCES, at_S])
    return values.mean(dim=(0, 1, 3)), (values < CLOSED).float().mean(dim=(0, 1, 3))
