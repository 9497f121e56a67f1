"""Load balance, exactly: the balance loss at four scopes, the router z-loss, and bias balancing.

Per MoE layer, `LBL = E sum_i f_i P_i`: f_i is the share of assignments that expert i got (sums to 1, so balanced
routing gives 1), P_i its mean router probability; the gradient flows through P only. The scope says over which tokens
f and P are taken. For `global_batch`, over all ranks and all accumulation steps of one optimizer step:
Qiu et al. 2025, "Demons in the Detail" (arXiv 2501.11873), Eq. 4-6.

The trainer averages gradients over N ranks and M accumulation steps, so a rank's loss of one micro-batch is
`E sum_i f_i S_i * N M / T_step`, with S_i its own probability sums and T_step the counted tokens of the whole step.
Summed over everything that is E sum_i f_i P_i of the global batch, whatever N and M are, and also when
micro-batches hold unequal numbers of counted tokens. (Dividing by T_step without N makes it 1/N too small.)

f of the whole step is known only after the last forward pass. `counts: exact` gets it first, by a pass without
gradient when M > 1 (at M = 1 it costs nothing); `counts: running` is the paper's Algorithm 1, which uses what has
been counted so far in the step. Exact is the default: a result then does not depend on how a batch was cut.

Letters: L MoE layers, B sequences, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from pydantic import Field

from tidegate.config import Config
from tidegate.model.moe import RoutingStats

__all__ = ["BalanceConfig", "BalanceLosses", "Balancer", "load_balancing_loss", "max_violation", "updated_bias"]


class BalanceConfig(Config):
    scope: Literal["sequence", "micro_batch", "data_parallel", "global_batch"] = "global_batch"
    loss_weight: float = Field(default=0.01, ge=0)
    """Coefficient of the balance loss of each MoE layer (layers are summed)."""
    counts: Literal["exact", "running"] = "exact"
    """How `global_batch` learns f before the step is over; the other scopes do not ask."""
    z_loss_weight: float = Field(default=1e-3, ge=0)
    """Coefficient of the mean squared log-partition of the router logits (ST-MoE, arXiv 2202.08906)."""
    bias_rate: float = Field(default=0.0, ge=0)
    """u of bias balancing, `b += u sign(mean - count)` once a step (arXiv 2408.15664); 0 is off, 1e-3 is usual."""


class BalanceLosses(NamedTuple):
    """Weighted terms of one micro-batch on one rank, scaled for an average over ranks and accumulation steps."""

    load_balancing: torch.Tensor
    z: torch.Tensor


def load_balancing_loss(
    counts_LE: torch.Tensor, prob_sums_LE: torch.Tensor, tokens: torch.Tensor | float
) -> torch.Tensor:
    """`E sum_i f_i S_i / tokens`, per row.

    Args:
        counts_LE: (..., E) assignments over the tokens of the scope; no gradient is taken through them.
        prob_sums_LE: (..., E) router probabilities summed over tokens.
        tokens: what to divide the sums by; broadcasts with (...).

    Returns:
        (...), in (0, E/K] when sums and tokens cover the same tokens as the counts; 1 when balanced.
    """
    counts = counts_LE.detach()
    fractions = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    return counts.shape[-1] * (fractions * prob_sums_LE).sum(dim=-1) / tokens


def updated_bias(bias_LE: torch.Tensor, counts_LE: torch.Tensor, rate: float) -> torch.Tensor:
    """Bias after one step: underused experts up by `rate`, overused ones down (arXiv 2408.15664, Algorithm 1)."""
    return bias_LE + rate * torch.sign(counts_LE.mean(dim=-1, keepdim=True) - counts_LE)


def max_violation(counts_LE: torch.Tensor) -> torch.Tensor:
    """MaxVio of each layer: the busiest expert's load over the mean load, minus 1 (arXiv 2408.15664, Eq. 4)."""
    return counts_LE.amax(dim=-1) / counts_LE.mean(dim=-1).clamp(min=1e-9) - 1


class Balancer:
    """Turns routing statistics into balance losses, and counts what an optimizer step routed.

    Args:
        config: scope and weights.
        all_reduce: sums a tensor over all ranks in place.
        world_size: N.
        accumulation: M.
    """

    def __init__(
        self, config: BalanceConfig, all_reduce: Callable[[torch.Tensor], None], world_size: int, accumulation: int
    ) -> None:
        self.config = config
        self.all_reduce = all_reduce
        self.world_size = world_size
        self.accumulation = accumulation
        self._known_LE: torch.Tensor | None = None
        self._own_LE: torch.Tensor | None = None
        self._seen_LE: torch.Tensor | None = None

    @property
    def needs_counting_pass(self) -> bool:
        """Whether `begin_step` wants the counts of the whole step beforehand."""
        return self._global and self.config.counts == "exact" and self.accumulation > 1

    @property
    def _global(self) -> bool:
        return self.config.scope == "global_batch" and self.config.loss_weight > 0

    def begin_step(self, counts_LE: torch.Tensor | None = None) -> None:
        """Start an optimizer step.

        Args:
            counts_LE: (L, E) this rank's counts over all its micro-batches, if `needs_counting_pass`.
        """
        self._known_LE = self._own_LE = self._seen_LE = None
        if self.needs_counting_pass:
            assert counts_LE is not None
            self._known_LE = self._reduced(counts_LE)

    def losses(self, stats: RoutingStats, counted_B: torch.Tensor, step_tokens: torch.Tensor) -> BalanceLosses:
        """Losses of one micro-batch; to be called once for each, in order.

        Args:
            stats: fields (L, B, ...) of this rank's micro-batch.
            counted_B: (B,) fp32 counted tokens of each of its sequences.
            step_tokens: scalar fp32, counted tokens of the whole step over all ranks.
        """
        own_LE = stats.counts_BE.sum(dim=1)
        self._own_LE = own_LE if self._own_LE is None else self._own_LE + own_LE
        share = self.world_size * self.accumulation / step_tokens
        z = self.config.z_loss_weight * share * stats.z_sums_B.sum()
        if self.config.loss_weight == 0:
            return BalanceLosses(torch.zeros_like(z), z)
        return BalanceLosses(self.config.loss_weight * self._load_balancing(stats, own_LE, counted_B, share), z)

    def step_counts(self) -> torch.Tensor:
        """(L, E) counts of the finished step over all ranks and micro-batches; every rank must call it."""
        if self._known_LE is not None:
            return self._known_LE
        if self._seen_LE is None:
            assert self._own_LE is not None
            self._seen_LE = self._reduced(self._own_LE)
        return self._seen_LE

    def _load_balancing(
        self, stats: RoutingStats, own_LE: torch.Tensor, counted_B: torch.Tensor, share: torch.Tensor
    ) -> torch.Tensor:
        sums_LE = stats.prob_sums_BE.sum(dim=1)
        match self.config.scope:
            case "sequence":
                return (
                    load_balancing_loss(stats.counts_BE, stats.prob_sums_BE, counted_B.clamp(min=1)).mean(dim=1).sum()
                )
            case "micro_batch":
                return load_balancing_loss(own_LE, sums_LE, counted_B.sum().clamp(min=1)).sum()
            case "data_parallel":
                tokens = self._reduced(counted_B.sum()) / self.world_size
                return load_balancing_loss(self._reduced(own_LE), sums_LE, tokens.clamp(min=1)).sum()
            case "global_batch":
                counts_LE = self._known_LE
                if counts_LE is None:
                    reduced_LE = self._reduced(own_LE)  # one collective for all layers
                    counts_LE = self._seen_LE = reduced_LE if self._seen_LE is None else self._seen_LE + reduced_LE
                return load_balancing_loss(counts_LE, sums_LE, 1 / share).sum()

    def _reduced(self, tensor: torch.Tensor) -> torch.Tensor:
        reduced = tensor.detach().clone()
        self.all_reduce(reduced)
        return reduced
