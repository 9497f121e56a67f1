"""COMET: k decision trees over the experts whose smooth splits harden, so that a token ends at no more than k leaves.

Each tree has E - 1 splits z = S(w x + b), S the smooth step; a leaf's probability is the product of z or 1 - z along
its path. With a linear score a per leaf, the gate is the softmax over all k E leaves of a + log P, summed over trees;
a leaf with P = 0 is out. An entropy term hardens the splits. A permutation of the experts, learned at the start of
training by Sinkhorn's iteration at a temperature near zero and then fixed by linear assignment, moves experts that
work together under one split. Source: Ibrahim et al., KDD 2023 (arXiv 2306.02824). The published trees need E a power
of two; here a node splits any number of leaves in halves.

Letters: N rows, D width, E experts and leaves, K trees, J splits of a tree, d its depth.
"""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from tidegate.config import Variant
from tidegate.model.initialisation import Draw
from tidegate.model.routers.base import (
    Capabilities,
    RoutedStep,
    Router,
    RouterContext,
    RouterShape,
    Routing,
)
from tidegate.model.routers.permutation import PermutationSearch, PermutationSearchConfig
from tidegate.model.routers.smooth import dense_start_std, entropy, smooth_step

__all__ = ["Comet", "CometConfig", "tree_paths"]


class CometConfig(Variant):
    kind: Literal["comet"] = "comet"
    summary: ClassVar[str] = "k smooth decision trees over the experts, with a learned order of the leaves"
    source: ClassVar[str] = "COMET, Ibrahim et al., KDD 2023, arXiv 2306.02824"
    capabilities: ClassVar[Capabilities] = Capabilities(ragged=True, dense_phase=True, z_loss=False)

    gamma: float = Field(default=1.0, gt=0)
    """Width of the smooth step: small hardens early."""
    entropy_weight: float = Field(default=0.1, ge=0)
    """Weight of the entropy of the leaves, nats a token, mean over trees."""
    search: PermutationSearchConfig | None = None
    """Learn the order of the leaves over the first tokens of training."""

    def build(self, shape: RouterShape) -> Comet:
        return Comet(self, shape)


@lru_cache(maxsize=8)
def tree_paths(num_leaves: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A balanced binary tree over any number of leaves, its J = E - 1 splits numbered from the root.

    Returns:
        (E, d) int64 splits on the way to each leaf, and (E, d) whether it turns left there; a shorter way ends with
        split J, which is none.
    """
    ways: list[list[tuple[int, bool]]] = [[] for _ in range(num_leaves)]
    pending = [(0, num_leaves)]
    for split in range(num_leaves - 1):
        first, last = pending.pop(0)
        middle = first + (last - first + 1) // 2
        for leaf in range(first, last):
            ways[leaf].append((split, leaf < middle))
        pending += [part for part in ((first, middle), (middle, last)) if part[1] - part[0] > 1]
    depth = max(len(way) for way in ways)
    padded = torch.tensor([way + [(num_leaves - 1, True)] * (depth - len(way)) for way in ways], device=device)
    return padded[..., 0], padded[..., 1].bool()


class Comet(Router):
    def __init__(self, config: CometConfig, shape: RouterShape) -> None:
        super().__init__(shape)
        self.config = config
        trees, leaves = shape.top_k, shape.num_experts
        self.splits = nn.Parameter(torch.empty(trees * (leaves - 1), shape.width))
        self.split_bias = nn.Parameter(torch.empty(trees * (leaves - 1)))
        self.scores = nn.Parameter(torch.empty(trees * leaves, shape.width))
        self.search = PermutationSearch(config.search, leaves) if config.search is not None else None

    def init_weights(self, draw: Draw) -> None:
        draw.normal_(self.splits, dense_start_std(self.config.gamma, self.shape.width), "splits")
        nn.init.zeros_(self.split_bias)
        draw.normal_(self.scores, self.std, "scores")

    def leaves(self, x_ND: torch.Tensor) -> torch.Tensor:
        """(N, K, E) fp32 probability of each leaf of each tree; rows sum to 1."""
        t_NKJ = F.linear(x_ND.float(), self.splits.float(), self.split_bias.float()).unflatten(1, (self.top_k, -1))
        left_NKJ = F.pad(smooth_step(t_NKJ, self.config.gamma), (0, 1), value=1.0)  # the split that is none
        splits_Ed, left_Ed = tree_paths(self.num_experts, x_ND.device)
        left_NKEd = left_NKJ[..., splits_Ed]
        return torch.where(left_Ed, left_NKEd, 1 - left_NKEd).prod(dim=-1)

    def forward(self, x_ND: torch.Tensor, context: RouterContext) -> Routing:
        leaves_NKE = self.leaves(x_ND)
        scores_NKE = F.linear(x_ND.float(), self.scores.float()).unflatten(1, (self.top_k, -1))
        reached_NKE = leaves_NKE > 0
        log_leaves_NKE = leaves_NKE.masked_fill(~reached_NKE, 1.0).log()
        logits_NKE = (scores_NKE + log_leaves_NKE).masked_fill(~reached_NKE, -torch.inf)
        gate_NE = logits_NKE.flatten(1).softmax(dim=-1).unflatten(1, (self.top_k, -1)).sum(dim=1)
        if self.search is not None:
            gate_NE = self.search(gate_NE, context.clock if self.training else None)
        penalty_N = self.config.entropy_weight * entropy(leaves_NKE).mean(dim=-1)
        routing = self._open_routing(gate_NE, gate_NE > 0, gate_NE, (gate_NE + 1e-6).log())
        return routing._replace(penalty_N=penalty_N)

    def update(self, routed: RoutedStep) -> None:
        if self.search is not None:
            self.search.update(routed.clock)
