"""What attention does, for telemetry: sinks, entropy and gate openings, on a bounded part of the batch.

Attention probabilities are formed explicitly in fp32 for at most 2 sequences and 32 evenly spaced queries of each, and
so are gate values (docs/measurements.md has what it costs). It costs nothing unless asked for. A layer only shows its
tensors; the rest is done for many layers at once, since on a GPU operations of this size cost their launch.

Letters: A layers, B sequences, b observed sequences, T tokens, D width, H query heads (of a gate: heads of the gated
tensor), G key/value heads, d head width, S sampled queries, V gate values, N bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tidegate.model.gates import AttentionGate, GateConfig
from tidegate_kernels.gated_attention import Documents

__all__ = ["GATE_BINS", "AttentionObservations", "AttentionSample", "AttentionWatch", "sampled_positions"]

MAX_SEQUENCES, MAX_QUERIES = 2, 32
MAX_LOGIT_BYTES = 64 * 2**20
"""Of the fp32 logits of the layers that are observed at once; a single layer may have more. Up to four times as much is
held for a moment: probabilities and their entropies are of the same size."""
CLOSED = 0.1
"""A gate value below it counts as closed."""
GATE_BINS = 20
"""Of equal width, between the gate's `shown_values`; the first and the last hold what is beyond too."""
_ALL = slice(None)


class AttentionObservations(NamedTuple):
    """Of all layers of a micro-batch; detached and fp32. A layer with fewer heads than others has NaN for the rest.

    The means of two ranks' numbers are the numbers of both ranks' sequences, if they observe equally many.
    """

    entropy_AH: torch.Tensor
    """Nats, of the attention of a query, mean over queries. A softmax sink is one more outcome."""
    own_AH: torch.Tensor
    """Attention of token 0 of a sequence to itself, mean over sequences."""
    later_AH: torch.Tensor
    """Attention to token 0, summed over the sampled later queries of token 0's document."""
    later_uniform_A: torch.Tensor
    """The same sum for uniform attention, 1 / (number of visible tokens) a query."""
    num_sampled: torch.Tensor
    """() how many these queries are."""
    num_later: torch.Tensor
    """() how many later queries the documents of token 0 have, sampled or not."""
    num_sequences: torch.Tensor
    """() b."""
    gate_mean_AH: torch.Tensor | None
    """Mean value of a multiplicative gate; H of the gated tensor (1 if it is shared or has no heads)."""
    gate_closed_AH: torch.Tensor | None
    """Share of the gate's values below 0.1."""
    gate_bins_AN: torch.Tensor | None
    """Share of the gate's values in each bin."""

    @property
    def first_token_AH(self) -> torch.Tensor:
        """F-Attn: attention to token 0 of a sequence, mean over the later queries of its document; NaN if there are
        none among the sampled."""
        return self.later_AH / self.num_sampled

    @property
    def first_token_uniform_A(self) -> torch.Tensor:
        """The same for uniform attention: the floor under `first_token_AH`."""
        return self.later_uniform_A / self.num_sampled

    @property
    def first_token_importance_AH(self) -> torch.Tensor:
        """Mean attention to token 0 over all queries of its document, its own (of about 1) too: a head is a sink where
        this is above eps = 0.3 (Gu et al. 2024, arXiv 2410.10781, at T = 64)."""
        # The own query of token 0 is one of the document's, however few of the others were sampled.
        both_AH = self.num_sequences * self.own_AH + self.num_later * self.first_token_AH
        return both_AH / (self.num_sequences + self.num_later)


class AttentionSample(NamedTuple):
    """What one layer shows: tensors of its forward pass, not copies; the watch keeps parts of them."""

    q_BTHd: torch.Tensor
    k_BTGd: torch.Tensor
    """As the softmax sees them."""
    sink_H: torch.Tensor | None
    """Logit of the sink."""
    scores_BTHd: torch.Tensor | None
    """Of the gate, before the activation; d is 1 for one score a head."""
    bias_BGST: torch.Tensor | None = None
    """fp32, of the sampled sequences and queries: added to their logits, -inf at keys that are not selected. G divides
    H, and is not that of the keys."""
    window: int | None = None
    """Tokens that a query sees, its own among them; None for all of its document."""


def sampled_positions(length: int) -> slice:
    """At most 32 evenly spaced positions, from the first on."""
    return slice(None, None, -(-length // MAX_QUERIES))


class AttentionWatch:
    """Observes the layers of one forward pass, as many at once as `MAX_LOGIT_BYTES` lets; nothing syncs the host.

    Args:
        gate: of every layer.
        tokens_BT: of the batch, for its shape and device.
        documents: of the batch, or None for causal attention.
        copies: keep copies, not views. A view costs nothing where the backward pass needs the whole tensor anyway, and
            holds on to it where it would be freed.
    """

    def __init__(self, gate: GateConfig, tokens_BT: torch.Tensor, documents: Documents | None, *, copies: bool) -> None:
        self._gate = gate if isinstance(gate, AttentionGate) and gate.form == "multiplicative" else None
        self._queries: dict[int | None, _Queries] = {None: _queries(tokens_BT[:MAX_SEQUENCES], documents)}
        self._copies = copies
        self._pending: list[AttentionSample] = []
        self._seen: list[_OfLayers] = []

    @torch.no_grad()
    def see(self, sample: AttentionSample) -> None:
        """Take in the next layer."""
        at_S = sampled_positions(sample.q_BTHd.shape[1])
        scores = None if self._gate is None or sample.scores_BTHd is None else self._part(sample.scores_BTHd, at_S)
        q, k = self._part(sample.q_BTHd, at_S), self._part(sample.k_BTGd)
        sample = sample._replace(q_BTHd=q, k_BTGd=k, scores_BTHd=scores)
        if self._pending and not self._joins(sample):
            self._flush()
        self._pending.append(sample)

    @torch.no_grad()
    def read(self) -> AttentionObservations:
        """All layers."""
        self._flush()
        fields = map(_joined, zip(*self._seen, strict=True))
        layers = _OfLayers(*fields)  # type: ignore[arg-type]  # fields are None in every chunk or in none
        counts = self._queries[None]
        numbers = counts.num_sampled, counts.num_later, counts.num_sequences
        return AttentionObservations(*layers[:3], layers.later_uniform_A1[:, 0], *numbers, *layers[4:])

    def _part(self, x_BTHd: torch.Tensor, positions: slice = _ALL) -> torch.Tensor:
        view = x_BTHd[:MAX_SEQUENCES, positions]
        return view.clone() if self._copies else view

    def _joins(self, sample: AttentionSample) -> bool:
        """Whether it fits to the pending ones: export leaves different numbers of heads, and windows differ."""
        num_logits = sample.q_BTHd[..., 0].numel() * sample.k_BTGd.shape[1]
        fits = 4 * num_logits * (len(self._pending) + 1) <= MAX_LOGIT_BYTES
        first = self._pending[0]
        return fits and sample.window == first.window and _shapes(sample) == _shapes(first)

    def _flush(self) -> None:
        if self._pending:
            window = self._pending[0].window
            if window is not None and window not in self._queries:
                self._queries[window] = self._queries[None].within(window)
            self._seen.append(_observe(self._pending, self._queries[window], self._gate))
        self._pending = []


class _Queries(NamedTuple):
    """The sampled queries of a batch, alike for all layers that see as far."""

    hidden_bST: torch.Tensor
    """bool, the keys that a query does not see."""
    first_bS: torch.Tensor
    """int, the first key that it sees."""
    later_bS: torch.Tensor
    """fp32, 1 for the later queries of the documents of token 0, else 0."""
    later_uniform: torch.Tensor
    num_sampled: torch.Tensor
    num_later: torch.Tensor
    num_sequences: torch.Tensor

    def within(self, window: int) -> _Queries:
        """The same where a query sees so many tokens at most."""
        places = _places(len(self.first_bS), self.hidden_bST.shape[-1], self.first_bS.device)
        nearest_S = places.num_visible_S - window
        first_bS = torch.maximum(self.first_bS, nearest_S)
        uniform_bS = self.later_bS * (first_bS == 0) / (places.num_visible_S - first_bS)
        hidden_bST = self.hidden_bST | (places.place_T < nearest_S[:, None])
        return self._replace(hidden_bST=hidden_bST, first_bS=first_bS, later_uniform=uniform_bS.sum())


class _Places(NamedTuple):
    """What sampled queries have in common in all batches of one shape."""

    place_T: torch.Tensor
    hidden_ST: torch.Tensor
    """bool, keys behind the query."""
    later_S: torch.Tensor
    """fp32, 1 for queries after the first."""
    num_visible_S: torch.Tensor
    """int64, without documents."""
    num_sequences: torch.Tensor


@lru_cache(maxsize=8)
def _places(sequences: int, length: int, device: torch.device) -> _Places:
    place_T = torch.arange(length, device=device)
    at_S = place_T[sampled_positions(length)]
    num_sequences = torch.full((), float(sequences), device=device)
    return _Places(place_T, place_T > at_S[:, None], (at_S > 0).float(), at_S + 1, num_sequences)


def _queries(tokens_bT: torch.Tensor, documents: Documents | None) -> _Queries:
    sequences, length = tokens_bT.shape
    places = _places(sequences, length, tokens_bT.device)
    first_bT = torch.zeros_like(tokens_bT) if documents is None else documents.first_BT[:sequences]
    first_bS = first_bT[:, sampled_positions(length)]
    hidden_bST = places.hidden_ST | (places.place_T < first_bS[..., None])
    later_bS = (first_bS == 0) * places.later_S
    uniform_bS = later_bS / (places.num_visible_S - first_bS)
    num_later = (first_bT[:, 1:] == 0).sum(dtype=torch.float32)
    counts = uniform_bS.sum(), later_bS.sum(), num_later, places.num_sequences
    return _Queries(hidden_bST, first_bS, later_bS, *counts)


class _OfLayers(NamedTuple):
    """The fields (A, ...) of `AttentionObservations`."""

    entropy_AH: torch.Tensor
    own_AH: torch.Tensor
    later_AH: torch.Tensor
    later_uniform_A1: torch.Tensor
    gate_mean_AH: torch.Tensor | None
    gate_closed_AH: torch.Tensor | None
    gate_bins_AN: torch.Tensor | None


def _observe(samples: Sequence[AttentionSample], queries: _Queries, gate: AttentionGate | None) -> _OfLayers:
    """Observe layers of equal shapes."""
    q_AbHSd = torch.stack([s.q_BTHd.transpose(1, 2) for s in samples]).float()
    k_AbGTd = torch.stack([s.k_BTGd.transpose(1, 2) for s in samples]).float()
    d, T = k_AbGTd.shape[4], k_AbGTd.shape[3]
    k_NTd = k_AbGTd.flatten(0, 2)
    # The query heads of a key/value head follow each other.
    logits = torch.bmm((q_AbHSd * d**-0.5).view(len(k_NTd), -1, d), k_NTd.mT)
    logits_AbHST = logits.view(*q_AbHSd.shape[:4], T).masked_fill_(queries.hidden_bST[:, None], -torch.inf)
    biases = [s.bias_BGST for s in samples if s.bias_BGST is not None]
    if biases:
        bias_AbGST = torch.stack(biases).float()
        logits_AbHST = logits_AbHST + bias_AbGST.repeat_interleave(q_AbHSd.shape[2] // bias_AbGST.shape[2], dim=2)
    sinks = [s.sink_H for s in samples if s.sink_H is not None]
    if sinks:
        sink = torch.stack(sinks).float()[:, None, :, None, None].expand(*logits_AbHST.shape[:4], 1)
        logits_AbHST = torch.cat([logits_AbHST, sink], dim=-1)
    p_AbHST = logits_AbHST.softmax(dim=-1)
    first_AbHS = p_AbHST[..., 0]
    entropy_AH = torch.special.entr(p_AbHST).sum(dim=-1).mean(dim=(1, 3))
    later_AH = (first_AbHS * queries.later_bS[:, None]).sum(dim=(1, 3))
    gate_mean_AH = gate_closed_AH = gate_bins_AN = None
    if gate is not None:
        values = gate.values(torch.stack([s.scores_BTHd for s in samples if s.scores_BTHd is not None]))
        gate_mean_AH = values.mean(dim=(1, 2, 4))
        gate_closed_AH = (values < CLOSED).mean(dim=(1, 2, 4), dtype=torch.float32)
        gate_bins_AN = _shares_of_bins(values.flatten(1), *gate.shown_values)
    own_AH = first_AbHS[..., 0].mean(dim=1)
    later_uniform_A1 = queries.later_uniform.expand(len(samples), 1)
    return _OfLayers(entropy_AH, own_AH, later_AH, later_uniform_A1, gate_mean_AH, gate_closed_AH, gate_bins_AN)


def _shares_of_bins(values_AV: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """(A, N); on a GPU `histc` and `bincount` would wait."""
    # NaN is in the last one, not outside.
    bin_AV = torch.bucketize(values_AV, _edges(low, high, values_AV.device), right=True)
    ones_AV = values_AV.new_ones(1, 1).expand_as(bin_AV)
    counts_AN = values_AV.new_zeros(len(values_AV), GATE_BINS).scatter_add_(1, bin_AV, ones_AV)
    return counts_AN / values_AV.shape[1]


@lru_cache(maxsize=8)
def _edges(low: float, high: float, device: torch.device) -> torch.Tensor:
    """(N - 1,) between bins."""
    width = (high - low) / GATE_BINS
    return torch.arange(1, GATE_BINS, device=device) * width + low  # `linspace` would miss 0 by a little


def _shapes(sample: AttentionSample) -> list[torch.Size | None]:
    return [None if part is None else part.shape for part in sample[:5]]


def _joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """(A, H) or (A, N) from the chunks."""
    known = [part for part in parts if part is not None]
    if len(known) < 2:
        return parts[0]
    heads = max(part.shape[1] for part in known)
    return torch.cat([F.pad(part, (0, heads - part.shape[1]), value=torch.nan) for part in known])
