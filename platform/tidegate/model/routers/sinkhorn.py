"""Selective Sinkhorn routing: on few training steps, route by a balanced transport plan instead of by the scores.

With C the gate scores, the plan maximises <Pi, C> - xi <Pi, log Pi> under row sums 1 and equal column sums. On a step
drawn with probability p a token takes the K largest entries of its row of the plan, renormalised; on all others, and
in evaluation, plain softmax top-k (in training with Gaussian noise on the scores, as the paper's best variant).
Source: arXiv 2511.08972, Eq. 3-6 and Algorithm 2. Whether the gradient flows through the plan is not said there; here
it does unless `grad_through_plan` is off. The draw hangs on (seed, step, layer), so all ranks take the same branch,
also after a resume.

Letters: N rows, E experts, K chosen experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field

from tidegate.config import Variant
from tidegate.model.clock import derive_key, uniform
from tidegate.model.routers.base import Capabilities, LearnedRouter, RouterContext, RouterShape, Routing

__all__ = ["GatherRows", "Sinkhorn", "SinkhornConfig", "transport_plan"]

GatherRows = Callable[[torch.Tensor], torch.Tensor]
"""(N, ...) of this rank to (R, N, ...) of all R ranks of a group, differentiable."""

_CHECK_EVERY = 10  # iterations between two looks at the residual, each a host sync


class SinkhornConfig(Variant):
    kind: Literal["sinkhorn"] = "sinkhorn"
    summary: ClassVar[str] = "top-k softmax that on few steps routes by a balanced transport plan"
    source: ClassVar[str] = "selective Sinkhorn routing, arXiv 2511.08972"
    capabilities: ClassVar[Capabilities] = Capabilities(needs_global_batch=True, training_branch=True)

    probability: float = Field(default=0.01, ge=0, le=1)
    """p: share of the training steps, drawn for each layer, that route by the plan (0.001-0.01 in the paper). The plan
    cancels what an expert's logits have in common, so near 1 nothing unlearns an imbalance that evaluation shows."""
    cost: Literal["logits", "softmax"] = "logits"
    """What C is; xi 0.5-1 goes with logits, 0.05 with softmax."""
    xi: float = Field(default=0.5, gt=0)
    """Entropy weight: small is near the hard assignment and slow to converge."""
    tolerance: float = Field(default=1e-4, gt=0)
    """Largest deviation of a column sum from its share, relative."""
    max_iterations: int = Field(default=100, ge=1)
    noise: float = Field(default=0.1, ge=0)
    """Deviation of the Gaussian noise on the logits of training steps without the plan."""
    grad_through_plan: bool = True
    """Our toy did not recover a collapsed router without it."""
    plan_over: Literal["rank", "expert_group"] = "rank"
    """Which rows a plan balances: this rank's micro-batch, or those of all ranks that share the experts."""

    def build(self, shape: RouterShape) -> Sinkhorn:
        return Sinkhorn(self, shape)


def transport_plan(
    cost_NE: torch.Tensor, counted_N: torch.Tensor, *, xi: float, tolerance: float, max_iterations: int
) -> torch.Tensor:
    """Entropic optimal transport by Sinkhorn's iteration in the log domain.

    Args:
        cost_NE: (N, E) fp32 gate scores, larger is better.
        counted_N: (N,) bool, rows that take part in the balance; the others follow its column prices.
        xi: weight of the entropy.
        tolerance: stop when every column sum is within this of its share, relative.
        max_iterations: stop in any case.

    Returns:
        (N, E); rows sum to 1, columns over counted rows to (counted rows) / E within `tolerance`.
    """
    log_kernel_NE = cost_NE / xi
    num_experts = cost_NE.shape[1]
    log_share = counted_N.sum().clamp(min=1).log() - math.log(num_experts)
    counted_N1 = counted_N.unsqueeze(1)
    log_column_1E = torch.zeros_like(log_kernel_NE[:1])
    for iteration in range(1, max_iterations + 1):
        log_plan_NE = (log_kernel_NE + log_column_1E).log_softmax(dim=1)
        log_sums_1E = log_plan_NE.masked_fill(~counted_N1, -torch.inf).logsumexp(dim=0, keepdim=True)
        if iteration % _CHECK_EVERY == 0 and float((log_sums_1E - log_share).detach().abs().max()) < tolerance:
            break
        # A kernel that underflows, or no counted row at all, has nothing to balance in that column.
        step_1E = (log_share - log_sums_1E).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        log_column_1E = log_column_1E + step_1E
    return (log_kernel_NE + log_column_1E).softmax(dim=1)


class Sinkhorn(LearnedRouter):
    """The expert-parallel layer sets `gather_rows` and `rank_in_group` for `plan_over: expert_group`."""

    def __init__(self, config: SinkhornConfig, shape: RouterShape) -> None:
        super().__init__(shape)
        self.config = config
        self._noise_key = derive_key("sinkhorn noise", shape.layer)
        self.gather_rows: GatherRows | None = None
        self.rank_in_group = 0

    def by_plan(self, context: RouterContext) -> bool:
        """Whether this step's draw chose the plan; the same on every rank."""
        drawn = context.clock.draw("sinkhorn", self.shape.layer)
        return self.training and context.clock.step > 0 and drawn < self.config.probability

    def forward(self, x_ND: torch.Tensor, context: RouterContext) -> Routing:
        logits_NE = self.logits(x_ND)
        probs_NE = logits_NE.softmax(dim=-1)
        if self.by_plan(context):
            counted_N = context.counted_BT.flatten()
            gate_NE = torch.where(counted_N.unsqueeze(1), self._plan(logits_NE, counted_N), probs_NE)
        elif self.training and context.clock.step > 0 and self.config.noise > 0:
            gate_NE = (logits_NE + self._noise(context)).softmax(dim=-1)
        else:
            gate_NE = probs_NE
        return self._best_of(gate_NE, probs_NE, logits_NE)

    def _plan(self, logits_NE: torch.Tensor, counted_N: torch.Tensor) -> torch.Tensor:
        """(N, E) this rank's rows of the plan."""
        config, rows = self.config, logits_NE.shape[0]
        cost_NE = logits_NE if config.cost == "logits" else logits_NE.softmax(dim=-1)
        own, everyone = 0, cost_NE
        if self.gather_rows is not None:
            gathered_RNE = self.gather_rows(cost_NE)
            own = self.rank_in_group * rows
            everyone = gathered_RNE.flatten(0, 1)
            counted_N = self.gather_rows(counted_N).flatten()
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.grad_through_plan):
            plan = transport_plan(
                everyone, counted_N, xi=config.xi, tolerance=config.tolerance, max_iterations=config.max_iterations
            )
        return plan[own : own + rows]

    def _noise(self, context: RouterContext) -> torch.Tensor:
        """(N, E) Gaussian, by Box and Muller's transform of two uniform draws."""
        draws = uniform(context.rows_N, 2 * self.num_experts, context.clock.key ^ self._noise_key)
        first_NE, second_NE = draws.chunk(2, dim=1)
        normal_NE = (-2 * first_NE.log()).sqrt() * (2 * math.pi * second_NE).cos()
        return self.config.noise * normal_NE
