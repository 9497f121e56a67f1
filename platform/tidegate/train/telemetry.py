"""What gates and routers do, a record a log interval: one reduction over ranks, one host sync.

On a step that is logged, every micro-batch's output carries observations; `Observer` adds them up on the device, in
one flat vector of sums, and turns the reduced vector into metrics. docs/metrics.md has the table of names.

Letters: X domains, L MoE layers, E experts, A blocks, H heads of the gated tensor, B sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from tidegate.model.balance import load_balancing_loss, max_violation
from tidegate.model.decoder import DecoderOutput
from tidegate.model.observations import AttentionObservations

__all__ = ["LossSpikes", "Observer", "Record", "summarise"]

SINK_SHARE = 0.3
"""A head is a sink where its mean attention to the first token is above this (arXiv 2410.10781)."""


class Record(NamedTuple):
    """Metrics of one moment of a run, under MLflow's names."""

    step: int
    tokens: int
    metrics: dict[str, float]


class Observer:
    """Adds up what the micro-batches of one step show.

    Args:
        domains: names of the X domains.
        top_k: K, for the floor of the chosen probability.
        rank, world_size: maxima travel in a place of their own for each rank, so that one sum carries everything.
    """

    def __init__(self, domains: Sequence[str], top_k: int, rank: int, world_size: int) -> None:
        self._domains, self._top_k = tuple(domains), top_k
        self._rank, self._world_size = rank, world_size
        self._sums: dict[str, torch.Tensor] = {}
        self._largest_2A: torch.Tensor | None = None  # of the residual stream, of attention logits
        self._shapes: list[torch.Size] = []  # of the fields of `AttentionObservations`, which are one vector here

    def add(self, output: DecoderOutput, counted_B: torch.Tensor, domains_B: torch.Tensor) -> None:
        """Take in one micro-batch; `counted_B` (B,) tokens that count, `domains_B` (B,) int64."""
        num_domains = len(self._domains)

        def by_domain(values_B: torch.Tensor) -> torch.Tensor:
            total = values_B.new_zeros(num_domains, *values_B.shape[1:])
            return total.index_add_(0, domains_B, values_B)

        if output.stats is not None and output.stats.signals_B3 is not None:
            stats = output.stats
            sums_LE = stats.prob_sums_BE.detach().sum(dim=1)
            tokens = counted_B.sum()
            lbl_L = load_balancing_loss(stats.counts_BE.sum(dim=1), sums_LE, tokens.clamp(min=1))
            assert stats.signals_B3 is not None
            self._add("tokens_X", by_domain(counted_B))
            self._add("counts_XLE", by_domain(stats.counts_BE.transpose(0, 1)))
            self._add("signals_XL3", by_domain(stats.signals_B3.transpose(0, 1)))
            self._add("probs_LE", sums_LE)
            self._add("micro_lbl_L", lbl_L * tokens)
        if output.attention is not None:
            self._shapes = [field.shape for field in output.attention]
            values = torch.cat([field.flatten() for field in output.attention])
            known = values.isfinite()
            self._add("attention", torch.where(known, values, 0.0))
            self._add("known", known.float())
            self._add("sinks", (output.attention.first_token_importance_H > SINK_SHARE).float())
            if output.max_hidden_L is not None:
                largest_2A = torch.stack([output.max_hidden_L, output.attention.max_logit_H.amax(dim=-1)])
                before = largest_2A if self._largest_2A is None else self._largest_2A
                self._largest_2A = torch.maximum(before, largest_2A)

    def vector(self) -> torch.Tensor:
        """(any,) fp32 sums of this rank, to be summed over ranks."""
        parts = [values.flatten().float() for values in self._sums.values()]
        if self._largest_2A is not None:
            places = self._largest_2A.new_zeros(self._world_size, *self._largest_2A.shape)
            places[self._rank] = self._largest_2A
            parts.append(places.flatten())
        return torch.cat(parts)

    def metrics(self, vector: torch.Tensor) -> dict[str, float]:
        """Metrics from the reduced `vector`, on the host."""
        sums, place = {}, 0
        for name, values in self._sums.items():
            sums[name] = vector[place : place + values.numel()].view(values.shape).double()
            place += values.numel()
        metrics = dict(self._routing(sums)) | dict(self._attention(sums))
        if self._largest_2A is not None:
            hidden, logits = vector[place:].view(self._world_size, *self._largest_2A.shape).amax(dim=0).tolist()
            metrics |= {f"hidden/{block}/max": value for block, value in enumerate(hidden)}
            metrics["hidden/max_mean"] = sum(hidden) / len(hidden)
            known = ((block, value) for block, value in enumerate(logits) if math.isfinite(value))
            metrics |= {f"attention/{block}/max_logit": value for block, value in known}
        return metrics

    def _add(self, name: str, values: torch.Tensor) -> None:
        self._sums[name] = self._sums[name] + values if name in self._sums else values

    def _routing(self, sums: dict[str, torch.Tensor]) -> Iterator[tuple[str, float]]:
        if "counts_XLE" not in sums:
            return
        tokens_X, counts_XLE, signals_XL3 = sums["tokens_X"], sums["counts_XLE"], sums["signals_XL3"]
        tokens, counts_LE = tokens_X.sum().clamp(min=1), counts_XLE.sum(dim=0)
        yield "moe/top_k_share_floor", self._top_k / counts_LE.shape[-1]
        pooled = summarise(counts_LE) | _signals(signals_XL3.sum(dim=0) / tokens)
        global_lbl_L = load_balancing_loss(counts_LE, sums["probs_LE"], tokens)
        pooled |= {
            "experts_per_token": counts_LE.sum(dim=-1) / tokens,
            "lbl_covariance": sums["micro_lbl_L"] / tokens - global_lbl_L,
            "domain_information": _mutual_information(counts_XLE),
        }
        for name, values_L in pooled.items():
            for layer, value in enumerate(values_L.tolist()):
                yield f"moe/{layer}/{name}", value
        share_LE = counts_LE / counts_LE.sum(dim=-1, keepdim=True).clamp(min=1)
        for layer, row in enumerate(share_LE.tolist()):
            for expert, share in enumerate(row):
                yield f"moe/{layer}/load/{expert}", share
        by_domain = summarise(counts_XLE) | _signals(signals_XL3 / tokens_X.clamp(min=1)[:, None, None])
        present = (tokens_X > 0).tolist()  # the step may hold no sequence of a domain
        for name, values_XL in by_domain.items():
            for domain, there, values in zip(self._domains, present, values_XL.tolist(), strict=True):
                for layer, value in enumerate(values if there else ()):
                    yield f"moe/{layer}/{domain}/{name}", value

    def _attention(self, sums: dict[str, torch.Tensor]) -> Iterator[tuple[str, float]]:
        if "sinks" not in sums:
            return
        sizes = [shape.numel() for shape in self._shapes]

        def fields(vector: torch.Tensor) -> AttentionObservations:
            parts = zip(vector.split(sizes), self._shapes, strict=True)
            return AttentionObservations(*(part.view(shape) for part, shape in parts))

        # 0 / 0 is the NaN of what was never known; it is left out below.
        mean, known = fields(sums["attention"] / sums["known"]), fields(sums["known"])
        yield "attention/sink_heads", float((sums["sinks"] / known.first_token_importance_H).nanmean())
        per_layer = {
            "gate_mean": mean.gate_mean_H.nanmean(dim=-1),
            "gate_closed": mean.gate_closed_H.nanmean(dim=-1),
            "first_token": mean.first_token_H.nanmean(dim=-1),
            "first_token_uniform": mean.first_token_uniform,
            "entropy": mean.entropy_H.nanmean(dim=-1),
        }
        for name, values_A in per_layer.items():
            for block, value in enumerate(values_A.tolist()):
                if math.isfinite(value):
                    yield f"attention/{block}/{name}", value
        for name, values_AH in (("gate_mean", mean.gate_mean_H), ("gate_closed", mean.gate_closed_H)):
            for block, values in enumerate(values_AH.tolist()):
                for head, value in enumerate(values):
                    if math.isfinite(value):
                        yield f"attention/{block}/head/{head}/{name}", value


def summarise(counts_E: torch.Tensor) -> dict[str, torch.Tensor]:
    """How evenly assignments are spread over experts: of (..., E) counts, each (...)."""
    share_E = counts_E / counts_E.sum(dim=-1, keepdim=True).clamp(min=1)
    return {
        "maxvio": max_violation(counts_E),
        "load_cv": counts_E.std(dim=-1, correction=0) / counts_E.mean(dim=-1).clamp(min=1e-9),
        "dead_experts": (counts_E == 0).double().mean(dim=-1),
        "load_entropy": torch.special.entr(share_E).sum(dim=-1),
    }


def _signals(means_3: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(("router_entropy", "logit_norm", "top_k_share"), means_3.unbind(dim=-1), strict=True))


def _mutual_information(counts_XLE: torch.Tensor) -> torch.Tensor:
    """(L,) nats between the domain of an assignment and its expert, each domain weighing the same.

    The sum over domains and experts of p(x, e) log(p(x, e) / (p(x) p(e))); 0 where all domains route alike, at most
    log X. Domains that a batch holds little of would otherwise drown.
    """
    share_XLE = counts_XLE / counts_XLE.sum(dim=-1, keepdim=True).clamp(min=1)
    present_X = (counts_XLE.sum(dim=(1, 2)) > 0).double()
    joint_XLE = share_XLE * (present_X / present_X.sum().clamp(min=1))[:, None, None]
    mixture_LE = joint_XLE.sum(dim=0)
    conditional_L = (torch.special.entr(share_XLE).sum(dim=-1) * present_X[:, None]).sum(dim=0) / present_X.sum().clamp(
        min=1
    )
    return torch.special.entr(mixture_LE).sum(dim=-1) - conditional_L


class LossSpikes:
    """Counts steps whose loss lies more than 4 deviations above its moving average, on the device.

    The average and the deviation are exponential with a memory of 100 steps and learn nothing from a spike but its
    clipped value. The first 20 steps only teach.
    """

    DEVIATIONS, DECAY, LEARNING_STEPS = 4.0, 0.99, 20

    def __init__(self, device: torch.device) -> None:
        self.state = torch.zeros(4, device=device)
        """Mean, variance, steps seen, spikes; fp32."""

    def see(self, loss: torch.Tensor) -> None:
        """Take in the () global loss of a step; nothing is read on the host."""
        mean, variance, steps, spikes = self.state.unbind()
        limit = mean + self.DEVIATIONS * variance.sqrt()
        spike = (steps >= self.LEARNING_STEPS) & (loss > limit)
        value = torch.where(spike, limit, loss)
        # A mean over fewer steps than the memory is the plain mean of them.
        rate = torch.maximum(1 / (steps + 1), torch.full_like(steps, 1 - self.DECAY))
        difference = value - mean
        self.state = torch.stack(
            [
                mean + rate * difference,
                (1 - rate) * (variance + rate * difference.square()),
                steps + 1,
                spikes + spike,
            ]
        )
