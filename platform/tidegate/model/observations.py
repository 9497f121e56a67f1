"""What attention does, for telemetry: sinks, entropy and gate openings, on a bounded part of the batch.

Attention probabilities are formed explicitly in fp32 for at most 2 sequences and 32 evenly spaced queries of each, and
so are gate values (docs/measurements.md has what it costs). It costs nothing unless asked for. A layer only takes a
sample; the rest is done for many layers at once, since GPU kernels of this size cost their launch.

Letters: A layers, B sequences, b observed sequences, T tokens, D width, H query heads (of a gate: heads of the gated
tensor), G key/value heads, d head width, S sampled queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tidegate.model.gates import AttentionGate, GateConfig
from tidegate_kernels.gated_attention import Documents

__all__ = ["AttentionObservations", "AttentionSample", "AttentionWatch", "sample_attention", "sampled_positions"]

MAX_SEQUENCES, MAX_QUERIES = 2, 32
MAX_LOGIT_BYTES = 64 * 2**20
"""Of the fp32 logits of the layers that are observed at once; a single layer may have more. Up to four times as much is
held for a moment: probabilities and their entropies are of the same size."""
CLOSED = 0.1
"""A gate value below it counts as closed."""


class AttentionObservations(NamedTuple):
    """One layer's, or stacked over layers; detached and fp32. NaN: does not apply, or was not asked for."""

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

    @classmethod
    def of_logits_alone(cls, max_logit_AH: torch.Tensor) -> AttentionObservations:
        """Nothing but the largest logits."""
        nan_AH = torch.full_like(max_logit_AH, torch.nan)
        return cls(nan_AH, nan_AH, nan_AH, nan_AH[..., 0], nan_AH, nan_AH, max_logit_AH)


class AttentionSample(NamedTuple):
    """What one layer shows of a batch; detached, in the layer's dtype."""

    q_bSHd: torch.Tensor
    k_bTGd: torch.Tensor
    """As the softmax sees them."""
    sink_H: torch.Tensor | None
    """Logit of the sink."""
    scores_bSHd: torch.Tensor | None
    """Of a multiplicative gate, before the activation; d is 1 for one score a head."""


@lru_cache(maxsize=8)
def sampled_positions(length: int, device: torch.device) -> torch.Tensor:
    """At most 32 evenly spaced positions, the first and the last among them."""
    if length <= MAX_QUERIES:
        return torch.arange(length, device=device)
    return torch.linspace(0, length - 1, MAX_QUERIES, device=device, dtype=torch.float64).long()


@torch.no_grad()
def sample_attention(
    q_BTHd: torch.Tensor,
    k_BTGd: torch.Tensor,
    sink_H: torch.Tensor | None,
    scores_BTHd: torch.Tensor | None,
    gate: GateConfig,
) -> AttentionSample:
    """Take a layer's sample.

    Args:
        q_BTHd, k_BTGd: as the softmax sees them.
        sink_H: (H,) logit of the sink, or None.
        scores_BTHd: of the gate, or None; d is 1 for one score a head.
        gate: of the layer.
    """
    at_S = sampled_positions(q_BTHd.shape[1], q_BTHd.device)
    scores_bSHd = None
    if scores_BTHd is not None and isinstance(gate, AttentionGate) and gate.form == "multiplicative":
        scores_bSHd = scores_BTHd.detach()[:MAX_SEQUENCES, at_S]
    return AttentionSample(
        q_BTHd.detach()[:MAX_SEQUENCES, at_S],
        k_BTGd.detach()[:MAX_SEQUENCES].clone(),  # a view would keep the keys of the whole batch
        None if sink_H is None else sink_H.detach(),
        scores_bSHd,
    )


class AttentionWatch:
    """Observes the layers of one forward pass, as many at once as `MAX_LOGIT_BYTES` lets; nothing syncs the host.

    Args:
        gate: of every layer.
        tokens_BT: of the batch, for its shape and device.
        documents: of the batch, or None for causal attention.
    """

    def __init__(self, gate: GateConfig, tokens_BT: torch.Tensor, documents: Documents | None) -> None:
        self._gate = gate
        self._queries = _queries(tokens_BT[:MAX_SEQUENCES], documents)
        self._pending: list[AttentionSample] = []
        self._seen: list[AttentionObservations] = []

    def see(self, sample: AttentionSample) -> None:
        """Take in the next layer."""
        if self._pending and not self._joins(sample):
            self._flush()
        self._pending.append(sample)

    def read(self, max_logit_AH: torch.Tensor | None = None) -> AttentionObservations:
        """All layers stacked, (A, ...); NaN fills up layers that have fewer heads than others.

        Args:
            max_logit_AH: largest logits, with `qk_clip`.
        """
        self._flush()
        seen = AttentionObservations(*map(_joined, zip(*self._seen, strict=True)))
        return seen if max_logit_AH is None else seen._replace(max_logit_H=max_logit_AH)

    def _joins(self, sample: AttentionSample) -> bool:
        """Whether it fits to the pending ones: export leaves layers with different numbers of heads."""
        num_logits = sample.q_bSHd[..., 0].numel() * sample.k_bTGd.shape[1]
        fits = 4 * num_logits * (len(self._pending) + 1) <= MAX_LOGIT_BYTES
        return fits and _shapes(sample) == _shapes(self._pending[0])

    def _flush(self) -> None:
        if self._pending:
            self._seen.append(_observe(self._pending, self._queries, self._gate))
        self._pending = []


class _Queries(NamedTuple):
    """The sampled queries of a batch, alike for all layers."""

    hidden_bST: torch.Tensor
    """bool, the keys that a query does not see."""
    weights_3bS: torch.Tensor
    """fp32, what each query counts for in `first_token_H`, `first_token_importance_H` and `entropy_H`."""
    uniform: torch.Tensor
    """() `first_token_uniform`."""


def _queries(tokens_bT: torch.Tensor, documents: Documents | None) -> _Queries:
    (sequences, length), device = tokens_bT.shape, tokens_bT.device
    at_S = sampled_positions(length, device)
    num_later: torch.Tensor | int  # of all queries after the first, those that see their sequence's token 0
    place_T = torch.arange(length, device=device)
    visible_bST = (place_T <= at_S[:, None]).expand(sequences, -1, -1)
    if documents is None:
        num_later = sequences * (length - 1)
    else:
        first_bT = documents.first_BT[:sequences]
        visible_bST = visible_bST & (place_T >= first_bT[:, at_S, None])
        num_later = (first_bT[:, 1:] == 0).sum()
    later_bS = (visible_bST[..., 0] & (at_S > 0)).float()  # queries of token 0's document: they may see it
    later_bS = later_bS / later_bS.sum()  # 0 / 0 is the NaN that is wanted
    # The own query of token 0 is one of the document's, however few of the others were sampled.
    own = sequences / (sequences + num_later)
    document_bS = (1 - own) * later_bS
    document_bS[:, 0] += own / sequences
    even_bS = torch.full_like(later_bS, 1 / later_bS.numel())
    uniform = (later_bS / visible_bST.sum(dim=-1)).sum()
    return _Queries(~visible_bST, torch.stack([later_bS, document_bS, even_bS]), uniform)


@torch.no_grad()
def _observe(samples: Sequence[AttentionSample], queries: _Queries, gate: GateConfig) -> AttentionObservations:
    """Observe layers of equal shapes; fields are (A, ...)."""
    q_AbSHd, k_AbTGd = (torch.stack(layers).float() for layers in zip(*(s[:2] for s in samples), strict=True))
    d, G = q_AbSHd.shape[-1], k_AbTGd.shape[3]
    q_AbSGnd = (q_AbSHd * d**-0.5).unflatten(3, (G, -1))
    logits_AbHST = torch.einsum("absgnd,abtgd->abgnst", q_AbSGnd, k_AbTGd).flatten(2, 3)
    logits_AbHST.masked_fill_(queries.hidden_bST[:, None], -torch.inf)
    sinks = [s.sink_H for s in samples if s.sink_H is not None]
    if sinks:
        sink = torch.stack(sinks).float()[:, None, :, None, None].expand(*logits_AbHST.shape[:4], 1)
        logits_AbHST = torch.cat([logits_AbHST, sink], dim=-1)
    p_AbHST = logits_AbHST.softmax(dim=-1)
    first_AbHS, entropy_AbHS = p_AbHST[..., 0], torch.special.entr(p_AbHST).sum(dim=-1)
    shown_3AbHS = torch.stack([first_AbHS, first_AbHS, entropy_AbHS])
    first_AH, importance_AH, entropy_AH = (shown_3AbHS * queries.weights_3bS[:, None, :, None]).sum(dim=(2, 4))
    gate_mean_AH = gate_closed_AH = nan_AH = torch.full_like(first_AH, torch.nan)
    scores = [s.scores_bSHd for s in samples if s.scores_bSHd is not None]
    if scores:
        assert isinstance(gate, AttentionGate)
        values = gate.values(torch.stack(scores))
        # Two reductions over neighbouring dimensions, which is faster than one over dimensions apart.
        both_2AbSH = torch.stack([values, (values < CLOSED).float()]).mean(dim=-1)
        gate_mean_AH, gate_closed_AH = both_2AbSH.mean(dim=(2, 3))
    uniform_A = queries.uniform.expand(len(samples))
    return AttentionObservations(gate_mean_AH, gate_closed_AH, first_AH, uniform_A, importance_AH, entropy_AH, nan_AH)


def _shapes(sample: AttentionSample) -> list[torch.Size | None]:
    return [None if part is None else part.shape for part in sample]


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """(A, ...) from (a, ...) of each chunk."""
    if len(parts) == 1:
        return parts[0]
    heads = max(part.shape[-1] for part in parts)
    if parts[0].ndim == 2:
        parts = [F.pad(part, (0, heads - part.shape[-1]), value=torch.nan) for part in parts]
    return torch.cat(list(parts))
