"""What gates and routers do, a record a log interval: one reduction over ranks, one host sync.

On a step that is logged, every micro-batch shows its routing, and the first one its attention and its residual stream
too; `Observer` adds them up on the device, in one flat vector of sums, and turns the reduced vector into metrics.
docs/metrics.md has the table of names.

Letters: X domains, Y all domains together and then each that is there, L MoE layers, E experts, A blocks, H heads of
the gated tensor, B sequences, W ranks, F sums of a layer side by side (counts of E experts, their probabilities, 3
signals, tokens), M micro-batches or metrics of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain, compress
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import entr

from tidegate.model.balance import load_balancing_loss, max_violation
from tidegate.model.decoder import DecoderOutput
from tidegate.model.observations import AttentionObservations

if TYPE_CHECKING:
    from tidegate.train.evaluate import Evaluation

__all__ = ["Observer", "Record", "summarise"]

SINK_SHARE = 0.3
"""A head is a sink where its mean attention to the first token is above this (arXiv 2410.10781)."""

Array = NDArray[np.float64]


class Record(NamedTuple):
    """Metrics of one moment of a run, under MLflow's names."""

    step: int
    tokens: int
    metrics: dict[str, float]
    evaluation: Evaluation | None = None
    """Whose metrics these are."""


class Observer:
    """Adds up what the micro-batches of one step show.

    Args:
        domains: names of the X domains.
        top_k: K, for the floor of the chosen probability.
        attending: the blocks that have attention.
        rank, world_size: maxima travel in a place of their own for each rank, so that one sum carries everything.
    """

    def __init__(
        self, domains: Sequence[str], top_k: int, attending: Sequence[int], rank: int, world_size: int
    ) -> None:
        self._domains, self._top_k, self._attending = tuple(domains), top_k, tuple(attending)
        self._rank, self._world_size = rank, world_size
        self._rows_LBF: list[torch.Tensor] = []  # of each micro-batch
        self._domains_B: list[torch.Tensor] = []
        self._attention: AttentionObservations | None = None
        self._hidden_A: torch.Tensor | None = None
        self._logits_AH: list[torch.Tensor] = []
        self._shapes: dict[str, torch.Size] = {}  # of the vector's parts, in order

    @torch.no_grad()
    def add(self, output: DecoderOutput, counted_B: torch.Tensor, domains_B: torch.Tensor) -> None:
        """Take in one micro-batch; `counted_B` (B,) tokens that count, `domains_B` (B,) int64.

        Attention and the residual stream are those of the one micro-batch that observes them.
        """
        # As little as can be for each micro-batch: on a GPU small operations cost their launch.
        stats = output.stats
        if stats is not None and stats.signals_B3 is not None:
            tokens_LB1 = counted_B.expand(len(stats.counts_BE), -1).unsqueeze(-1)
            rows_LBF = [stats.counts_BE, stats.prob_sums_BE, stats.signals_B3, tokens_LB1]
            self._rows_LBF.append(torch.cat(rows_LBF, dim=-1))
            self._domains_B.append(domains_B)
        if output.max_hidden_A is not None:
            self._attention, self._hidden_A = output.attention, output.max_hidden_A
        if output.max_logit_AH is not None:
            self._logits_AH.append(output.max_logit_AH)

    def vector(self) -> torch.Tensor:
        """(any,) fp32 sums of this rank, to be summed over ranks."""
        parts: dict[str, torch.Tensor] = {}
        if self._rows_LBF:
            parts |= self._routing_parts(torch.stack(self._rows_LBF, dim=1), torch.cat(self._domains_B))
        if self._attention is not None:
            parts |= {name: field for name, field in self._attention._asdict().items() if field is not None}
        largest = {} if self._hidden_A is None else {"hidden_WA": self._hidden_A}
        if self._logits_AH:
            largest["logits_WA"] = torch.stack(self._logits_AH).amax(dim=(0, 2))
        for name, largest_A in largest.items():
            parts[name] = largest_A.new_zeros(self._world_size, len(largest_A))
            parts[name][self._rank] = largest_A
        self._shapes = {name: part.shape for name, part in parts.items()}
        return torch.cat([part.flatten() for part in parts.values()])

    def _routing_parts(self, rows_LMBF: torch.Tensor, domains_N: torch.Tensor) -> dict[str, torch.Tensor]:
        num_layers, *_, num_sums = rows_LMBF.shape
        sums_LXF = rows_LMBF.new_zeros(num_layers, len(self._domains), num_sums)
        counts_LME, probs_LME = rows_LMBF[..., :-4].sum(dim=2).chunk(2, dim=-1)
        # Not divided by tokens: they are the weight of a micro-batch in the step's mean.
        micro_lbl_L = load_balancing_loss(counts_LME, probs_LME, 1.0).sum(dim=1)
        return {"routing_LXF": sums_LXF.index_add_(1, domains_N, rows_LMBF.flatten(1, 2)), "micro_lbl_L": micro_lbl_L}

    def metrics(self, vector: torch.Tensor) -> dict[str, float]:
        """Metrics from the reduced `vector`, on the host."""
        # NumPy: these are a hundred operations on small arrays, and PyTorch's take several times as long each.
        host, place = vector.numpy().astype(np.float64), 0
        parts: dict[str, Array] = {}
        for name, shape in self._shapes.items():
            parts[name] = host[place : place + shape.numel()].reshape(shape)
            place += shape.numel()
        metrics: dict[str, float] = {}
        if "routing_LXF" in parts:
            metrics.update(self._routing(parts["routing_LXF"], parts["micro_lbl_L"]))
        if self._attention is not None:
            sums = (parts.get(name) for name in AttentionObservations._fields)
            means = (None if values is None else torch.as_tensor(values / self._world_size) for values in sums)
            metrics.update(_attention(AttentionObservations._make(means), self._attending))
        if "hidden_WA" in parts:
            hidden = parts["hidden_WA"].max(axis=0).tolist()
            metrics |= {f"hidden/{block}/max": value for block, value in enumerate(hidden)}
            metrics["hidden/max_mean"] = sum(hidden) / len(hidden)
        if "logits_WA" in parts:
            logits = parts["logits_WA"].max(axis=0).tolist()
            named = zip(self._attending, logits, strict=True)
            metrics |= {f"attention/{block}/max_logit": value for block, value in named}
        return metrics

    def _routing(self, sums_LXF: Array, micro_lbl_L: Array) -> Iterable[tuple[str, float]]:
        num_layers, num_experts = len(sums_LXF), (sums_LXF.shape[-1] - 4) // 2
        present = np.flatnonzero(sums_LXF[0, :, -1])  # the step may hold no sequence of a domain
        sums_LYF = np.concatenate([sums_LXF.sum(axis=1, keepdims=True), sums_LXF[:, present]], axis=1)
        counts_LYE, signals_LY3 = sums_LYF[..., :num_experts], sums_LYF[..., -4:-1]
        tokens_LY1 = np.maximum(sums_LYF[..., -1:], 1)
        of_each = summarise(counts_LYE) | _signals(signals_LY3 / tokens_LY1)
        counts_LE, tokens_L = counts_LYE[:, 0], tokens_LY1[:, 0, 0]
        assigned_L = counts_LE.sum(axis=-1)
        lbl_L = load_balancing_loss(*map(torch.from_numpy, (counts_LE, sums_LYF[:, 0, num_experts:-4], tokens_L)))
        of_all = {
            "experts_per_token": assigned_L / tokens_L,
            "lbl_covariance": micro_lbl_L / tokens_L - lbl_L.numpy(),
            "domain_information": _mutual_information(counts_LYE[:, 1:]),
        }
        share_LE = counts_LE / np.maximum(assigned_L, 1)[:, None]
        values_LM = np.concatenate([*of_each.values(), np.stack([*of_all.values()], axis=1), share_LE], axis=1)
        groups = ("", *(f"{self._domains[domain]}/" for domain in present))
        names = _routing_names(num_layers, groups, tuple(of_each), tuple(of_all), num_experts)
        of_layers = [(f"moe/{name}_mean", float(of_each[name][:, 0].mean())) for name in ("maxvio", "dead_experts")]
        of_layers.append(("moe/top_k_share_floor", self._top_k / num_experts))
        return chain(of_layers, zip(names, values_LM.ravel().tolist(), strict=True))


def _attention(seen: AttentionObservations, blocks: tuple[int, ...]) -> Iterable[tuple[str, float]]:
    importance_N = seen.first_token_importance_AH.numpy().ravel()
    sink_heads = float(_mean_of_known(np.where(np.isnan(importance_N), np.nan, importance_N > SINK_SHARE)))
    gates = {"gate_mean": seen.gate_mean_AH, "gate_closed": seen.gate_closed_AH}
    of_head = {name: values_AH.numpy() for name, values_AH in gates.items() if values_AH is not None}
    of_block = {name: _mean_of_known(values_AH) for name, values_AH in of_head.items()}
    of_block["first_token"] = _mean_of_known(seen.first_token_AH.numpy())
    of_block["first_token_uniform"] = seen.first_token_uniform_A.numpy()
    of_block["entropy"] = _mean_of_known(seen.entropy_AH.numpy())
    bins = [] if seen.gate_bins_AN is None else [seen.gate_bins_AN.numpy()]
    values_AM = np.concatenate([np.stack([*of_block.values()], axis=1), *of_head.values(), *bins], axis=1)
    num_heads, num_bins = (parts[0].shape[1] if parts else 0 for parts in ([*of_head.values()], bins))
    names = _attention_names(blocks, tuple(of_block), tuple(of_head), num_heads, num_bins)
    values_N = np.append(values_AM.ravel(), sink_heads)
    pairs = zip([*names, "attention/sink_heads"], values_N.tolist(), strict=True)
    # Short documents may leave no later query in the sample, and export layers with fewer heads than others.
    return compress(pairs, np.isfinite(values_N).tolist())


# A run has the same names at every record, and to format them takes longer than to compute what they name.
@lru_cache(maxsize=8)
def _routing_names(
    num_layers: int, groups: tuple[str, ...], of_each: tuple[str, ...], of_all: tuple[str, ...], num_experts: int
) -> list[str]:
    each = [f"{group}{name}" for name in of_each for group in groups]
    names = [*each, *of_all, *(f"load/{expert}" for expert in range(num_experts))]
    return [f"moe/{layer}/{name}" for layer in range(num_layers) for name in names]


@lru_cache(maxsize=8)
def _attention_names(
    blocks: tuple[int, ...], of_block: tuple[str, ...], of_head: tuple[str, ...], num_heads: int, num_bins: int
) -> list[str]:
    names = [*of_block, *(f"head/{head}/{name}" for name in of_head for head in range(num_heads))]
    names += [f"gate/{bin}" for bin in range(num_bins)]
    return [f"attention/{block}/{name}" for block in blocks for name in names]


def summarise(counts_E: Array) -> dict[str, Array]:
    """How evenly assignments are spread over experts: of (..., E) counts, each (...)."""
    num_experts = counts_E.shape[-1]
    total_1 = counts_E.sum(axis=-1, keepdims=True)
    mean_1 = total_1 / num_experts
    deviation = np.sqrt(np.square(counts_E - mean_1).sum(axis=-1) / num_experts)
    return {
        "maxvio": max_violation(torch.from_numpy(counts_E)).numpy(),
        "load_cv": deviation / np.maximum(mean_1[..., 0], 1e-9),
        "dead_experts": (counts_E == 0).sum(axis=-1) / num_experts,
        "load_entropy": entr(counts_E / np.maximum(total_1, 1)).sum(axis=-1),
    }


def _signals(means_3: Array) -> dict[str, Array]:
    return {name: means_3[..., index] for index, name in enumerate(("router_entropy", "logit_norm", "top_k_share"))}


def _mean_of_known(values_H: Array) -> Array:
    """Mean over the last dimension of what is not NaN; NaN if nothing is known."""
    known_H = ~np.isnan(values_H)
    with np.errstate(invalid="ignore"):
        return np.where(known_H, values_H, 0.0).sum(axis=-1) / known_H.sum(axis=-1)


def _mutual_information(counts_LXE: Array) -> Array:
    """(L,) nats between the domain of an assignment and its expert, each domain weighing the same.

    The sum over domains and experts of p(x, e) log(p(x, e) / (p(x) p(e))); 0 where all domains route alike, at most
    log X. Domains that a batch holds little of would otherwise drown.
    """
    assigned_LX1 = counts_LXE.sum(axis=-1, keepdims=True)
    share_LXE = counts_LXE / np.maximum(assigned_LX1, 1)
    present_X = assigned_LX1.any(axis=(0, 2))
    num_present = max(present_X.sum(), 1)
    mixture_LE = share_LXE[:, present_X].sum(axis=1) / num_present
    conditional_L = entr(share_LXE).sum(axis=(1, 2)) / num_present
    return entr(mixture_LE).sum(axis=-1) - conditional_L
