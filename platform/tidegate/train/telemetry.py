"""What gates and routers do, a record a log interval: one reduction over ranks, one host sync.

On a step that is logged, every micro-batch's output carries observations; `Observer` adds them up on the device, in
one flat vector of sums, and turns the reduced vector into metrics. docs/metrics.md has the table of names.

Letters: X domains, L MoE layers, E experts, A blocks, H heads of the gated tensor, B sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from tidegate.model.balance import load_balancing_loss, max_violation
from tidegate.model.decoder import DecoderOutput
from tidegate.model.observations import AttentionObservations

__all__ = ["LossSpikes", "Observer", "Record", "load_summary"]

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
        self._largest_A: torch.Tensor | None = None

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
            for name, values in output.attention._asdict().items():
                known = values.isfinite()
                self._add(f"attention.{name}", torch.where(known, values, 0.0))
                self._add(f"known.{name}", known.float())
            sinks = output.attention.first_token_importance_H > SINK_SHARE
            self._add("sinks", sinks.float())
        if output.max_hidden_L is not None:
            largest = output.max_hidden_L
            self._largest_A = largest if self._largest_A is None else torch.maximum(self._largest_A, largest)

    def vector(self) -> torch.Tensor:
        """(any,) fp32 sums of this rank, to be summed over ranks."""
        parts = [values.flatten().float() for values in self._sums.values()]
        if self._largest_A is not None:
            places = self._largest_A.new_zeros(self._world_size, len(self._largest_A))
            places[self._rank] = self._largest_A
            parts.append(places.flatten())
        return torch.cat(parts)

    def metrics(self, vector: torch.Tensor) -> dict[str, float]:
        """Metrics from the reduced `vector`, on the host."""
        sums, place = {}, 0
        for name, values in self._sums.items():
            sums[name] = vector[place : place + values.numel()].view(values.shape).double()
            place += values.numel()
        metrics = dict(self._routing(sums)) | dict(self._attention(sums))
        if self._largest_A is not None:
            largest_A = vector[place:].view(self._world_size, -1).amax(dim=0)
            metrics |= {f"hidden/{block}/max": value for block, value in enumerate(largest_A.tolist())}
            metrics["hidden/max_mean"] = float(largest_A.mean())
        return metrics

    def _add(self, name: str, values: torch.Tensor) -> None:
        self._sums[name] = self._sums[name] + values if name in self._sums else values

    def _routing(self, sums: dict[str, torch.Tensor]) -> Iterator[tuple[str, float]]:
        if "counts_XLE" not in sums:
            return
        counts_XLE, tokens_X, signals_XL3 = sums["counts_XLE"], sums["tokens_X"], sums["signals_XL3"]
        tokens = tokens_X.sum().clamp(min=1)
        counts_LE = counts_XLE.sum(dim=0)
        global_lbl_L = load_balancing_loss(counts_LE, sums["probs_LE"], tokens)
        covariance_L = sums["micro_lbl_L"] / tokens - global_lbl_L
        information_L = _mutual_information(counts_XLE)
        used_L = counts_LE.sum(dim=-1) / tokens
        yield "moe/top_k_share_floor", self._top_k / counts_LE.shape[-1]
        for layer in range(len(counts_LE)):
            prefix = f"moe/{layer}"
            for name, value in load_summary(counts_LE[layer]).items():
                yield f"{prefix}/{name}", value
            for name, value in _signals(signals_XL3[:, layer].sum(dim=0) / tokens):
                yield f"{prefix}/{name}", value
            yield f"{prefix}/experts_per_token", float(used_L[layer])
            yield f"{prefix}/lbl_covariance", float(covariance_L[layer])
            yield f"{prefix}/domain_information", float(information_L[layer])
            for expert, share in enumerate((counts_LE[layer] / counts_LE[layer].sum().clamp(min=1)).tolist()):
                yield f"{prefix}/load/{expert}", share
            for index, domain in enumerate(self._domains):
                if tokens_X[index] == 0:  # the step held no sequence of this domain
                    continue
                for name, value in load_summary(counts_XLE[index, layer]).items():
                    yield f"{prefix}/{domain}/{name}", value
                for name, value in _signals(signals_XL3[index, layer] / tokens_X[index]):
                    yield f"{prefix}/{domain}/{name}", value

    def _attention(self, sums: dict[str, torch.Tensor]) -> Iterator[tuple[str, float]]:
        if "sinks" not in sums:
            return
        mean = {
            name: sums[f"attention.{name}"] / sums[f"known.{name}"] for name in AttentionObservations._fields
        }  # 0 / 0 where nothing was known: left out below
        yield "attention/sink_heads", float((sums["sinks"] / sums["known.first_token_importance_H"]).nanmean())
        per_layer: dict[str, Callable[[int], float]] = {
            "gate_mean": lambda layer: float(mean["gate_mean_H"][layer].nanmean()),
            "gate_closed": lambda layer: float(mean["gate_closed_H"][layer].nanmean()),
            "first_token": lambda layer: float(mean["first_token_H"][layer].nanmean()),
            "first_token_uniform": lambda layer: float(mean["first_token_uniform"][layer]),
            "entropy": lambda layer: float(mean["entropy_H"][layer].nanmean()),
            "max_logit": lambda layer: float(mean["max_logit_H"][layer].nan_to_num(-math.inf).max()),
        }
        for layer in range(len(mean["gate_mean_H"])):
            for name, value in per_layer.items():
                if math.isfinite(number := value(layer)):
                    yield f"attention/{layer}/{name}", number
            for name in ("gate_mean", "gate_closed"):
                for head, number in enumerate(mean[f"{name}_H"][layer].tolist()):
                    if math.isfinite(number):
                        yield f"attention/{layer}/head/{head}/{name}", number


def load_summary(counts_E: torch.Tensor) -> dict[str, float]:
    """How evenly these assignments are spread over experts."""
    share_E = counts_E / counts_E.sum().clamp(min=1)
    return {
        "maxvio": float(max_violation(counts_E)),
        "load_cv": float(counts_E.std(correction=0) / counts_E.mean().clamp(min=1e-9)),
        "dead_experts": float((counts_E == 0).double().mean()),
        "load_entropy": float(torch.special.entr(share_E).sum()),
    }


def _signals(means_3: torch.Tensor) -> Iterator[tuple[str, float]]:
    yield from zip(("router_entropy", "logit_norm", "top_k_share"), means_3.tolist(), strict=True)


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
