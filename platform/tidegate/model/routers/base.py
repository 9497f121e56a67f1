"""What every router returns, what every router is built from, and what a router says of itself.

A router maps N rows to a `Routing`. It may look at the row (almost all), at the token id (hash), at other rows of the
micro-batch (Sinkhorn, expert choice), at the clock (annealing, noise, branches). What it needs and does is declared in
its config's `capabilities`, so that a job that cannot work is refused before a worker starts.

Letters: N rows (tokens of all sequences), D width, E experts, K chosen experts, S slots a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import nn

from tidegate.model.clock import STILL, Clock
from tidegate.model.initialisation import Draw
from tidegate.model.layers import Fp32Buffers
from tidegate.model.self_tuning import Tuned
from tidegate_kernels.gated_attention import Documents
from tidegate_kernels.router_logits import router_logits

if TYPE_CHECKING:  # it knows the mixers
    from tidegate.model.sequence import SequencePart

__all__ = [
    "Capabilities",
    "LearnedRouter",
    "Observe",
    "RoutedStep",
    "Router",
    "RouterContext",
    "RouterShape",
    "Routing",
    "RoutingSums",
]


class Capabilities(NamedTuple):
    """What a router needs and does; the defaults are those of top-k softmax."""

    learned: bool = True
    """Has parameters that gradients reach: balance losses act on it."""
    ragged: bool = False
    """Experts a row vary; None of K but the mean is held."""
    normalized: bool = True
    """The weights of a row sum to 1, or to a stated scale."""
    dense_phase: bool = False
    """More than K experts a row early in training: time and memory follow."""
    needs_global_batch: bool = False
    """Decides over the rows at hand: another world size or micro-batch routes otherwise."""
    needs_token_ids: bool = False
    source_layer: Literal["own", "embedding"] = "own"
    """Whose input it reads. `embedding`: one decision for all layers."""
    training_branch: bool = False
    """Routes otherwise in training than in evaluation."""
    double_forward: bool = False
    """Two forward passes a training step."""
    selection_bias: bool = False
    """Selects the K largest of score + bias: bias balancing acts on it."""
    z_loss: bool = True
    """Its logits are a distribution's, so that the z-loss has a meaning."""
    own_balance_weight: bool = False
    """Weighs its balance loss itself, in place of `balance.loss_weight`."""
    causal: bool = True
    """A row's experts depend on no later row."""


class RouterShape(NamedTuple):
    """What a router is built for."""

    width: int
    num_experts: int
    top_k: int
    std: float
    """Initial standard deviation of its matrices."""
    layer: int = 0
    """Which MoE layer it serves: draws differ between layers."""
    vocab_size: int = 0


Observe = Literal["routing", "all"]
"""What telemetry wants of a forward pass: routing, which is nearly free, or attention and the residual stream too."""


class RouterContext(NamedTuple):
    """What a forward pass knows beside the rows."""

    counted_BT: torch.Tensor
    """(B, T) bool, tokens that enter the statistics."""
    tokens_BT: torch.Tensor
    """(B, T) int64 ids."""
    sequences_B: torch.Tensor
    """(B,) int64, place of each sequence in the global batch: draws follow it, whatever rank holds it."""
    clock: Clock = STILL
    documents: Documents | None = None
    """Attention stays inside; None is plain causal."""
    observe: Observe | None = None
    log_experts: torch.Tensor | None = None
    """(E,) or (N, E), logarithm of the factors of unit gates over experts, for the logits; -inf: not there."""
    tuned: Tuned = Tuned()
    """Hyperparameters that the model tunes itself."""
    part: SequencePart | None = None
    """Of the sequences, where other ranks hold the rest."""

    @classmethod
    def alone(cls, counted_BT: torch.Tensor, tokens_BT: torch.Tensor | None = None) -> RouterContext:
        """A batch outside of a model: places counted from 0, no clock; without ids, all tokens are 0."""
        if tokens_BT is None:
            tokens_BT = torch.zeros_like(counted_BT, dtype=torch.int64)
        return cls(counted_BT, tokens_BT, torch.arange(len(counted_BT), device=counted_BT.device))

    @property
    def rows_N(self) -> torch.Tensor:
        """(N,) int64, place of every row in the global batch."""
        begins, length = (0, self.tokens_BT.shape[1]) if self.part is None else (self.part.begins, self.part.length)
        places = begins + torch.arange(self.tokens_BT.shape[1], device=self.tokens_BT.device)
        return (self.sequences_B[:, None] * length + places).flatten()


class RoutingSums(NamedTuple):
    """Sums over the counted tokens of each sequence, as in `RoutingStats`."""

    counts_BE: torch.Tensor
    prob_sums_BE: torch.Tensor
    z_sums_B: torch.Tensor
    signals_B3: torch.Tensor | None


class Routing(NamedTuple):
    """One layer's decision for N rows, all maths in fp32."""

    experts_NS: torch.Tensor
    """(N, S) int64, distinct experts of each row; S is K unless the router is ragged, then E."""
    weights_NS: torch.Tensor
    """(N, S) fp32, the factor of each expert's output; carries gradient."""
    probs_NE: torch.Tensor | None
    """(N, E) fp32, the P of the balance loss; carries gradient. Rows sum to 1, except for ReLU routing. None with
    `sums`."""
    logits_NE: torch.Tensor
    """(N, E) fp32, before the score function: what the z-loss sees; carries gradient."""
    chosen_NS: torch.Tensor | None = None
    """(N, S) bool, the slots in use; None: all."""
    penalty_N: torch.Tensor | None = None
    """(N,) fp32, the router's own weighted regulariser of each row; carries gradient."""
    observed: torch.Tensor | None = None
    """fp32 sums over counted rows that `Router.update` wants, any shape; no gradient."""
    balance_weight: torch.Tensor | None = None
    """() fp32, replaces `balance.loss_weight` for this layer."""
    sums: RoutingSums | None = None
    """What the statistics want, where one kernel made it together with the choice."""


class RoutedStep(NamedTuple):
    """What one layer routed in an optimizer step, over all ranks and micro-batches."""

    counts_E: torch.Tensor
    """(E,) fp32 assignments of counted tokens."""
    tokens: torch.Tensor
    """() fp32 counted tokens."""
    observed: torch.Tensor | None
    """Sum of `Routing.observed`."""
    clock: Clock


class Router(Fp32Buffers):
    """A router of one layer; its buffers are what controllers move."""

    def __init__(self, shape: RouterShape) -> None:
        super().__init__()
        self.shape = shape
        self.num_experts, self.top_k, self.std = shape.num_experts, shape.top_k, shape.std

    def init_weights(self, draw: Draw) -> None:
        """Fill parameters and buffers."""

    def fit_tokens(self, frequencies_V: torch.Tensor) -> None:
        """Learn how often training reads each token, (V,) that sums to 1; called once, before the first step."""

    @property
    def has_controllers(self) -> bool:
        """Whether `update` wants to be called."""
        return type(self).update is not Router.update

    def update(self, routed: RoutedStep) -> None:
        """Move the router's controllers after an optimizer step; sees the same on every rank."""

    def forward(self, x_ND: torch.Tensor, context: RouterContext) -> Routing:
        raise TypeError(f"{type(self).__name__} does not say how to route")  # pragma: no cover

    def _equal_routing(self, experts_NK: torch.Tensor) -> Routing:
        """The `Routing` of experts that no score chose: weights 1/K, probabilities even, nothing to learn."""
        even_NE = torch.full((experts_NK.shape[0], self.num_experts), 1 / self.num_experts, device=experts_NK.device)
        weights_NK = torch.full(experts_NK.shape, 1 / experts_NK.shape[1], device=experts_NK.device)
        return Routing(experts_NK, weights_NK, even_NE, torch.zeros_like(even_NE))

    def _best_of(self, gate_NE: torch.Tensor, probs_NE: torch.Tensor, logits_NE: torch.Tensor) -> Routing:
        """The `Routing` of the K largest gates, weighted by their share of the K."""
        weights_NK, experts_NK = gate_NE.topk(self.top_k, dim=-1)
        return Routing(experts_NK, weights_NK / weights_NK.sum(dim=-1, keepdim=True), probs_NE, logits_NE)

    def _open_routing(
        self, weights_NE: torch.Tensor, chosen_NE: torch.Tensor, probs_NE: torch.Tensor, logits_NE: torch.Tensor
    ) -> Routing:
        """A ragged `Routing`: a slot for every expert, those that are not chosen closed."""
        experts_NE = torch.arange(self.num_experts, device=chosen_NE.device).expand_as(chosen_NE)
        return Routing(experts_NE, weights_NE * chosen_NE, probs_NE, logits_NE, chosen_NE)


class LearnedRouter(Router):
    """A router with a routing matrix (E, D), N(0, std^2)."""

    def __init__(self, shape: RouterShape) -> None:
        super().__init__(shape)
        self.weight = nn.Parameter(torch.empty(shape.num_experts, shape.width))

    def init_weights(self, draw: Draw) -> None:
        draw.normal_(self.weight, self.std, "weight")

    def logits(self, x_ND: torch.Tensor) -> torch.Tensor:
        """(N, E) fp32."""
        return router_logits(x_ND, self.weight)
