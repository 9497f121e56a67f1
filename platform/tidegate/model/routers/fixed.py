"""Routers that learn nothing: hash of the token id, random draws, round-robin. Baselines that learned ones must beat.

Weights are 1/K, probabilities even; balance losses are constants.

Letters: N rows, E experts, K chosen experts, V vocabulary, B sequences, T tokens.
"""

from __future__ import annotations

import heapq
from typing import ClassVar, Literal

import torch
from pydantic import Field

from tidegate.config import Variant
from tidegate.model.clock import derive_key, uniform
from tidegate.model.initialisation import Draw
from tidegate.model.routers.base import Capabilities, Router, RouterContext, RouterShape, Routing

__all__ = [
    "HashConfig",
    "HashRouter",
    "RandomConfig",
    "RandomRouter",
    "RoundRobinConfig",
    "RoundRobinRouter",
    "ThorConfig",
]

_ROWS = 2**32  # `uniform` tells rows apart modulo this


class HashConfig(Variant):
    kind: Literal["hash"] = "hash"
    summary: ClassVar[str] = "the token id picks the experts, for ever"
    source: ClassVar[str] = "hash layers, Roller et al. 2021, arXiv 2106.04426"
    capabilities: ClassVar[Capabilities] = Capabilities(learned=False, needs_token_ids=True, z_loss=False)

    by: Literal["random", "balanced", "bigram"] = "balanced"
    """`random`: any experts for an id. `balanced`: ids are packed by their frequency in the training text, most
    frequent first, onto the emptiest experts; the busiest expert then has within 1 % of max(1, E p_max / K) times the
    mean load, p_max the share of the most frequent id.
    `bigram`: by the id and the one before, which splits very frequent ids over experts."""

    def build(self, shape: RouterShape) -> HashRouter:
        return HashRouter(self, shape)


class RandomConfig(Variant):
    kind: Literal["random"] = "random"
    summary: ClassVar[str] = "experts drawn at random: the null hypothesis of every learned router"
    source: ClassVar[str] = "arXiv 2110.04260 without its consistency loss; Duo-LLM, arXiv 2410.10846, trains with it"
    capabilities: ClassVar[Capabilities] = Capabilities(learned=False, z_loss=False)

    per: Literal["token", "sequence"] = "token"
    """What shares a draw."""

    def build(self, shape: RouterShape) -> RandomRouter:
        return RandomRouter(self, shape)


class ThorConfig(Variant):
    kind: Literal["thor"] = "thor"
    summary: ClassVar[str] = "random experts, two passes a step, and a loss that makes their predictions agree"
    source: ClassVar[str] = "THOR, Zuo et al., ICLR 2022, arXiv 2110.04260"
    capabilities: ClassVar[Capabilities] = Capabilities(learned=False, double_forward=True, z_loss=False)

    per: Literal["token", "sequence"] = "token"
    """What shares a draw. The paper draws one expert for a micro-batch; under expert parallelism that is one rank."""
    consistency: float = Field(default=5.0, ge=0)
    """alpha: weight of the symmetric KL divergence, nats a token, between the predictions of the two passes."""

    def build(self, shape: RouterShape) -> RandomRouter:
        return RandomRouter(self, shape)


class RoundRobinConfig(Variant):
    kind: Literal["round_robin"] = "round_robin"
    summary: ClassVar[str] = "row n takes the next k experts: perfect balance, for benchmarks"
    source: ClassVar[str] = "forced balance, as peers benchmark"
    capabilities: ClassVar[Capabilities] = Capabilities(learned=False, z_loss=False)

    def build(self, shape: RouterShape) -> RoundRobinRouter:
        return RoundRobinRouter(shape)


class HashRouter(Router):
    """A (V, K) table, or a hash of two ids, that do not depend on the run's seed: on layer, sizes and, if balanced, on
    the training text."""

    table_VK: torch.Tensor

    def __init__(self, config: HashConfig, shape: RouterShape) -> None:
        super().__init__(shape)
        self.config = config
        self._key = derive_key("hash router", shape.layer)
        rows = 0 if config.by == "bigram" else shape.vocab_size
        self.register_buffer("table_VK", torch.empty(rows, shape.top_k, dtype=torch.int64))

    def init_weights(self, draw: Draw) -> None:
        rows = torch.arange(self.table_VK.shape[0], device=self.table_VK.device)
        if rows.numel():
            self.table_VK.copy_(self._hashed(rows))

    def fit_tokens(self, frequencies_V: torch.Tensor) -> None:
        if self.config.by == "balanced":
            packed_VK = balanced_table(frequencies_V, self.num_experts, self.top_k)
            table_VK = (packed_VK + self.shape.layer) % self.num_experts  # layers differ in what they group
            self.table_VK[: len(table_VK)] = table_VK.to(self.table_VK.device)  # the model may have ids to spare

    def forward(self, x_ND: torch.Tensor, context: RouterContext) -> Routing:
        tokens_BT = context.tokens_BT
        if self.config.by != "bigram":
            return self._equal_routing(self.table_VK[tokens_BT.flatten()])
        before_BT = tokens_BT.roll(1, dims=1)
        before_BT[:, 0] = self.shape.vocab_size  # no id: the sequence begins
        if context.documents is not None:  # nor where a document does
            begins_BT = context.documents.first_BT == torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
            before_BT = before_BT.masked_fill(begins_BT, self.shape.vocab_size)
        pairs_N = (before_BT * 0x9E3779B1 + tokens_BT).flatten() % _ROWS
        return self._equal_routing(self._hashed(pairs_N))

    def _hashed(self, rows_N: torch.Tensor) -> torch.Tensor:
        """(N, K) distinct experts of hashed rows."""
        return uniform(rows_N, self.num_experts, self._key).topk(self.top_k, dim=-1).indices


def balanced_table(frequencies_V: torch.Tensor, num_experts: int, top_k: int) -> torch.Tensor:
    """(V, K) experts of every id: most frequent first, each onto the K experts with the least load so far."""
    loads = [(0.0, expert) for expert in range(num_experts)]
    table_VK = torch.empty(len(frequencies_V), top_k, dtype=torch.int64)
    frequencies = frequencies_V.tolist()
    rare = max(sum(frequencies), 1.0) * 1e-9  # ids that were never seen count a little, or all would go to one expert
    for token in sorted(range(len(frequencies)), key=lambda token: -frequencies[token]):
        taken = [heapq.heappop(loads) for _ in range(top_k)]
        table_VK[token] = torch.tensor([expert for _, expert in taken])
        for load, expert in taken:
            heapq.heappush(loads, (load + max(frequencies[token], rare), expert))
    return table_VK


class RandomRouter(Router):
    """Draws hang on (seed, step, layer, place), and on nothing a rank could differ in."""

    def __init__(self, config: RandomConfig | ThorConfig, shape: RouterShape) -> None:
        super().__init__(shape)
        self.config = config
        self._key = derive_key("random router", shape.layer)

    def forward(self, x_ND: torch.Tensor, context: RouterContext) -> Routing:
        rows_N = context.rows_N
        if self.config.per == "sequence":
            rows_N = context.sequences_B.repeat_interleave(context.tokens_BT.shape[1])
        draws_NE = uniform(rows_N, self.num_experts, context.clock.key ^ self._key)
        return self._equal_routing(draws_NE.topk(self.top_k, dim=-1).indices)


class RoundRobinRouter(Router):
    def forward(self, x_ND: torch.Tensor, context: RouterContext) -> Routing:
        choices_K = torch.arange(self.top_k, device=x_ND.device)
        return self._equal_routing((context.rows_N[:, None] * self.top_k + choices_K) % self.num_experts)
