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

A budget on uneven experts works the same way: what the global batch's choices cost is a number without gradient, the
expected cost of the probabilities carries it.

Letters: L MoE layers, B sequences, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from pydantic import Field

from tidegate.config import Config
from tidegate.model.clock import Clock
from tidegate.model.moe import MoEConfig, RoutingStats
from tidegate.model.routers import RoutedStep, TopKConfig

__all__ = [
    "BalanceConfig",
    "BalanceLosses",
    "Balancer",
    "BudgetConfig",
    "balance_problem",
    "load_balancing_loss",
    "max_violation",
    "updated_bias",
]


class BudgetConfig(Config):
    """Hold what uneven experts cost: `weight (c - target)^2`, c the mean cost of an assignment over all layers.

    The cost of an expert is its width over that of the widest, so all-big is 1 and all-identity 0. The mean is over
    layers too: which layers get the compute is left to learning (Duo-LLM, arXiv 2410.10846).
    """

    target: float = Field(ge=0, le=1)
    weight: float = Field(default=1.0, gt=0)


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
    budget: BudgetConfig | None = None
    """For `model.ffn.sizes`."""


class BalanceLosses(NamedTuple):
    """Terms of one micro-batch on one rank, scaled for an average over ranks and accumulation steps."""

    load_balancing: torch.Tensor
    """Weighted, summed over layers."""
    z: torch.Tensor
    """Weighted, summed over layers."""
    router: torch.Tensor
    """The routers' own weighted regularisers, summed over layers."""
    budget: torch.Tensor
    """Weighted."""
    lbl: torch.Tensor
    """Not part of the loss: the balance loss without weight, mean over layers."""

    @property
    def total(self) -> torch.Tensor:
        return self.load_balancing + self.z + self.router + self.budget


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
        moe: what is balanced; None stands for even experts under a plain router.
    """

    def __init__(
        self,
        config: BalanceConfig,
        all_reduce: Callable[[torch.Tensor], None],
        world_size: int,
        accumulation: int,
        moe: MoEConfig | None = None,
    ) -> None:
        self.config = config
        self.all_reduce = all_reduce
        self.world_size = world_size
        self.accumulation = accumulation
        self._balances = config.loss_weight > 0
        if moe is not None:  # a router that learns nothing has nothing to balance
            self._balances = moe.capabilities.own_balance_weight or (self._balances and moe.capabilities.learned)
        self._costs: tuple[float, ...] = relative_costs(moe) if moe is not None else ()
        self._known_LE: torch.Tensor | None = None
        self._own_LE: torch.Tensor | None = None
        self._seen_LE: torch.Tensor | None = None
        self._observed: torch.Tensor | None = None
        self._step_tokens: torch.Tensor | None = None

    @property
    def needs_counting_pass(self) -> bool:
        """Whether `begin_step` wants the counts of the whole step beforehand."""
        return self._global and self.config.counts == "exact" and self.accumulation > 1

    @property
    def _global(self) -> bool:
        return (self._balances and self.config.scope == "global_batch") or self.config.budget is not None

    def begin_step(self, counts_LE: torch.Tensor | None = None) -> None:
        """Start an optimizer step.

        Args:
            counts_LE: (L, E) this rank's counts over all its micro-batches, if `needs_counting_pass`.
        """
        self._known_LE = self._own_LE = self._seen_LE = self._observed = None
        if self.needs_counting_pass:
            assert counts_LE is not None
            self._known_LE = self._reduced(counts_LE)

    def losses(
        self,
        stats: RoutingStats,
        counted_B: torch.Tensor,
        step_tokens: torch.Tensor,
        scale: torch.Tensor | float | None = None,
    ) -> BalanceLosses:
        """Losses of one micro-batch; to be called once for each, in order.

        Args:
            stats: fields (L, B, ...) of this rank's micro-batch.
            counted_B: (B,) fp32 counted tokens of each of its sequences.
            step_tokens: scalar fp32, counted tokens of the whole step over all ranks.
            scale: factor of `loss_weight`; None is 1.
        """
        own_LE = stats.counts_BE.sum(dim=1)
        self._own_LE = own_LE if self._own_LE is None else self._own_LE + own_LE
        if stats.observed is not None:
            self._observed = stats.observed if self._observed is None else self._observed + stats.observed
        self._step_tokens = step_tokens
        share = self.world_size * self.accumulation / step_tokens
        z = self.config.z_loss_weight * share * stats.z_sums_B.sum()
        router = share * stats.penalty_sums_B.sum()
        counts_LE = self._global_counts(own_LE) if self._global else own_LE
        load_balancing = budget = lbl = torch.zeros_like(z)
        if self._balances:
            lbl_L = self._load_balancing(stats, own_LE, counts_LE, counted_B, share)
            weight_L = self.config.loss_weight if stats.balance_weight is None else stats.balance_weight
            if scale is not None:
                weight_L = weight_L * scale
            load_balancing, lbl = (weight_L * lbl_L).sum(), lbl_L.detach().mean()
        if self.config.budget is not None:
            budget = self._budget(self.config.budget, counts_LE, share * stats.prob_sums_BE.sum(dim=1))
        return BalanceLosses(load_balancing, z, router, budget, lbl)

    def step_counts(self) -> torch.Tensor:
        """(L, E) counts of the finished step over all ranks and micro-batches; every rank must call it."""
        if self._known_LE is not None:
            return self._known_LE
        if self._seen_LE is None:
            assert self._own_LE is not None
            self._seen_LE = self._reduced(self._own_LE)
        return self._seen_LE

    def routed_layers(self, clock: Clock) -> list[RoutedStep]:
        """What each layer routed in the finished step, for `Router.update`; every rank must call it."""
        counts_LE = self.step_counts()
        assert self._step_tokens is not None
        if self._observed is None:
            return [RoutedStep(counts_E, self._step_tokens, None, clock) for counts_E in counts_LE]
        observed = self._reduced(self._observed)
        layers = zip(counts_LE, observed, strict=True)
        return [RoutedStep(counts_E, self._step_tokens, sums, clock) for counts_E, sums in layers]

    def _global_counts(self, own_LE: torch.Tensor) -> torch.Tensor:
        """(L, E) counts of the global batch, or of what the step has seen of it."""
        if self._known_LE is not None:
            return self._known_LE
        reduced_LE = self._reduced(own_LE)  # one collective for all layers
        self._seen_LE = reduced_LE if self._seen_LE is None else self._seen_LE + reduced_LE
        return self._seen_LE

    def _load_balancing(
        self,
        stats: RoutingStats,
        own_LE: torch.Tensor,
        counts_LE: torch.Tensor,
        counted_B: torch.Tensor,
        share: torch.Tensor,
    ) -> torch.Tensor:
        """(L,) balance loss of each layer."""
        sums_LE = stats.prob_sums_BE.sum(dim=1)
        match self.config.scope:
            case "sequence":
                return load_balancing_loss(stats.counts_BE, stats.prob_sums_BE, counted_B.clamp(min=1)).mean(dim=1)
            case "micro_batch":
                return load_balancing_loss(own_LE, sums_LE, counted_B.sum().clamp(min=1))
            case "data_parallel":
                tokens = self._reduced(counted_B.sum()) / self.world_size
                return load_balancing_loss(self._reduced(own_LE), sums_LE, tokens.clamp(min=1))
            case "global_batch":
                return load_balancing_loss(counts_LE, sums_LE, 1 / share)

    def _budget(self, budget: BudgetConfig, counts_LE: torch.Tensor, mean_probs_LE: torch.Tensor) -> torch.Tensor:
        """`weight (c - target)^2`, its gradient through the expected cost of the probabilities."""
        costs_E = counts_LE.new_tensor(self._costs)
        realised = (counts_LE @ costs_E).sum() / counts_LE.sum().clamp(min=1)
        expected = (mean_probs_LE @ costs_E).mean()
        excess = realised - budget.target
        return budget.weight * (excess.square() + 2 * excess * (expected - expected.detach()))

    def _reduced(self, tensor: torch.Tensor) -> torch.Tensor:
        reduced = tensor.detach().clone()
        self.all_reduce(reduced)
        return reduced


def relative_costs(moe: MoEConfig) -> tuple[float, ...]:
    """Cost of each expert: its width over the widest one's."""
    return tuple(width / max(moe.slices) for width in moe.slices)


def balance_problem(balance: BalanceConfig, moe: MoEConfig | None) -> str | None:
    """Why this balance cannot act on these experts, or None; fields are named as in a job."""
    rate, budget = balance.bias_rate, balance.budget
    if moe is None:
        if rate > 0:
            return f"balance.bias_rate={rate} needs experts, but model.ffn.kind=dense"
        if budget is not None:
            return f"balance.budget.target={budget.target} needs experts, but model.ffn.kind=dense"
        return None
    kind = moe.router.kind
    if rate > 0 and not moe.capabilities.selection_bias:
        return (
            f"balance.bias_rate={rate} moves a selection bias, which model.ffn.router.kind={kind} does not have; "
            "use a top-k router, or balance.bias_rate=0"
        )
    if rate > 0 and isinstance(moe.router, TopKConfig) and moe.router.quantile is not None:
        return f"balance.bias_rate={rate} and model.ffn.router.quantile would both set the selection bias; use one"
    if moe.capabilities.own_balance_weight and balance.scope != "global_batch":
        return (
            f"balance.scope={balance.scope} does not fit model.ffn.router.kind={kind}, which steers by the global "
            "batch; use balance.scope=global_batch"
        )
    if budget is None:
        return None
    if not moe.uneven:
        return (
            f"balance.budget.target={budget.target} needs experts of several widths, but model.ffn.sizes makes all "
            "equal; set model.ffn.sizes"
        )
    if not moe.capabilities.learned:
        return f"balance.budget.target={budget.target} cannot act: model.ffn.router.kind={kind} learns nothing"
    if moe.capabilities.own_balance_weight:
        return (
            f"balance.budget.target={budget.target} and model.ffn.router.kind={kind} would both steer the cost; use one"
        )
    costs = sorted(relative_costs(moe))
    low, high = (sum(part) / moe.top_k for part in (costs[: moe.top_k], costs[-moe.top_k :]))
    if not low <= budget.target <= high:
        return (
            f"balance.budget.target={budget.target} is out of reach: with model.ffn.top_k={moe.top_k} of these "
            f"model.ffn.sizes an assignment costs between {low:.3g} and {high:.3g} of the widest expert"
        )
    return None
