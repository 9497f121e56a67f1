"""Local search over the order of experts: a permutation relaxed by Sinkhorn's iteration, then fixed for good.

A gate g over leaves becomes g R over experts, R a doubly stochastic matrix near a permutation: exp(L / tau) with its
rows and columns normalised in turn, tau falling log-linearly. When the search is over, R is the permutation that
maximises the sum of L, by linear assignment. Source: Ibrahim et al., KDD 2023 (arXiv 2306.02824), section 4.

Letters: N rows, E experts and leaves.
"""

from __future__ import annotations

import torch
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import nn

from tidegate.config import Config
from tidegate.model.clock import Clock
from tidegate.model.initialisation import Draw

__all__ = ["PermutationSearch", "PermutationSearchConfig"]


class PermutationSearchConfig(Config):
    tokens: int = Field(ge=1)
    """Length of the search; 1-10 % of training in the paper."""
    tau_start: float = Field(default=0.1, gt=0)
    tau_end: float = Field(default=1e-3, gt=0)
    """The paper ends at 1e-7, where fp32 has no gradient left; the fixed permutation is the same."""
    iterations: int = Field(default=20, ge=1)
    """Of Sinkhorn's normalisation."""


class PermutationSearch(nn.Module):
    """Permutes the columns of a gate; starts near the identity."""

    order_E: torch.Tensor
    fixed: torch.Tensor

    def __init__(self, config: PermutationSearchConfig, num_experts: int) -> None:
        super().__init__()
        self.config = config
        # 1-D, so that weight decay, which would pull every permutation to the same, does not apply.
        self.logits = nn.Parameter(torch.empty(num_experts * num_experts))
        self.register_buffer("order_E", torch.empty(num_experts, dtype=torch.int64))
        self._known_fixed = False
        self.register_buffer("fixed", torch.empty((), dtype=torch.bool))

    def init_weights(self, draw: Draw) -> None:
        num_experts = len(self.order_E)
        with torch.no_grad():
            draw.normal_(self.logits, 0.01, "logits")
            self.logits.view(num_experts, num_experts).diagonal().add_(0.1)
        self.order_E.copy_(torch.arange(num_experts))
        self.fixed.fill_(False)

    def temperature(self, tokens: int) -> float:
        progress = min(1.0, tokens / self.config.tokens)
        return self.config.tau_start * (self.config.tau_end / self.config.tau_start) ** progress

    def matrix(self, tau: float) -> torch.Tensor:
        """(E, E) fp32, doubly stochastic up to the iteration's residual; rows sum to 1."""
        num_experts = len(self.order_E)
        log_EE = self.logits.float().view(num_experts, num_experts) / tau
        for _ in range(self.config.iterations):
            log_EE = log_EE.log_softmax(dim=0).log_softmax(dim=1)
        return log_EE.exp()

    def forward(self, gate_NE: torch.Tensor, clock: Clock | None) -> torch.Tensor:
        """`g R`; R is soft while a training clock is inside the search, else the best permutation."""
        if clock is not None and clock.step > 0 and clock.tokens < self.config.tokens:
            return gate_NE @ self.matrix(self.temperature(clock.tokens))
        return gate_NE.index_select(1, self.order_E)

    def update(self, clock: Clock) -> None:
        """Follow the logits until the search ends, by a small assignment problem a step, on the host.

        Every rank has the same logits, so the same order.
        """
        searching = clock.tokens < self.config.tokens
        if self._known_fixed and not searching:
            return
        self._known_fixed = not searching and bool(self.fixed)  # read from the device once, not every step
        if not self._known_fixed:
            num_experts = len(self.order_E)
            matrix = self.logits.detach().double().view(num_experts, num_experts).cpu().numpy()
            leaf, expert = linear_sum_assignment(matrix, maximize=True)
            self.order_E[torch.as_tensor(expert)] = torch.as_tensor(leaf).to(self.order_E.device)
            self.fixed.fill_(not searching)
