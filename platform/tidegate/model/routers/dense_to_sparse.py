"""Dense-to-sparse routing: begin with every expert, end with K, by cooling a Gumbel softmax.

In training y = softmax((l + Gumbel noise) / tau) with tau falling from `tau_start` to `tau_end`. Until the annealing
is over a token uses every expert with y above a cutoff, and at least K; after it, and in evaluation, exactly the K
largest.
Source: Nie et al. 2021 (EvoMoE, arXiv 2112.14397). The activation variant puts a non-linearity between the linear map
and the temperature: Nguyen, Akbarian & Ho, ICML 2024 (arXiv 2401.13875), whose rates it changes from 1/log n to
n^(-1/2). The temperature is a function of the tokens seen, so there is nothing to restore.

Letters: N rows, E experts, K chosen experts.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

from tidegate.config import Variant
from tidegate.model.clock import Clock, derive_key, uniform
from tidegate.model.routers.base import Capabilities, LearnedRouter, RouterContext, RouterShape, Routing

__all__ = ["DenseToSparse", "DenseToSparseConfig"]

_ACTIVATIONS = {"none": lambda logits: logits, "tanh": torch.tanh, "gelu": F.gelu, "sigmoid": torch.sigmoid}


class DenseToSparseConfig(Variant):
    kind: Literal["dense_to_sparse"] = "dense_to_sparse"
    summary: ClassVar[str] = (
        "from all experts to k by a cooling Gumbel softmax; with activation: its well-behaved variant"
    )
    source: ClassVar[str] = "EvoMoE, arXiv 2112.14397; activation variant: arXiv 2401.13875"
    example: ClassVar[str] = "anneal_tokens: 400000"
    capabilities: ClassVar[Capabilities] = Capabilities(ragged=True, dense_phase=True, training_branch=True)

    anneal_tokens: int = Field(ge=1)
    """Tokens over which the temperature falls; from then on exactly K experts a token."""
    tau_start: float = Field(default=2.0, gt=0)
    tau_end: float = Field(default=0.3, gt=0)
    schedule: Literal["exponential", "linear"] = "exponential"
    cutoff: float = Field(default=1e-3, gt=0, lt=1)
    """Experts with a smaller share are not used while annealing."""
    noise: float = Field(default=1.0, ge=0)
    """Factor of the Gumbel noise; 0 anneals a plain softmax."""
    activation: Literal["none", "tanh", "gelu", "sigmoid"] = "none"

    @model_validator(mode="after")
    def _cools(self) -> DenseToSparseConfig:
        if self.tau_end >= self.tau_start:
            raise ValueError(f"tau_end={self.tau_end} is not below tau_start={self.tau_start}")
        return self

    def temperature(self, tokens: int) -> float:
        """tau after that many tokens."""
        progress = min(1.0, tokens / self.anneal_tokens)
        if self.schedule == "linear":
            return self.tau_start + (self.tau_end - self.tau_start) * progress
        return self.tau_start * (self.tau_end / self.tau_start) ** progress

    def build(self, shape: RouterShape) -> DenseToSparse:
        return DenseToSparse(self, shape)


class DenseToSparse(LearnedRouter):
    def __init__(self, config: DenseToSparseConfig, shape: RouterShape) -> None:
        super().__init__(shape)
        self.config = config
        self._noise_key = derive_key("gumbel", shape.layer)

    def annealing(self, clock: Clock) -> bool:
        return self.training and clock.step > 0 and clock.tokens < self.config.anneal_tokens

    def forward(self, x_ND: torch.Tensor, context: RouterContext) -> Routing:
        config, clock = self.config, context.clock
        logits_NE = _ACTIVATIONS[config.activation](self.logits(x_ND))
        annealing = self.annealing(clock)
        tau = config.temperature(clock.tokens) if annealing else config.tau_end
        probs_NE = (logits_NE / tau).softmax(dim=-1)
        if not annealing:
            return self._best_of(probs_NE, probs_NE, logits_NE)
        gate_NE = probs_NE
        if config.noise > 0:
            draws_NE = uniform(context.rows_N, self.num_experts, clock.key ^ self._noise_key)
            gate_NE = ((logits_NE - config.noise * (-draws_NE.log()).log()) / tau).softmax(dim=-1)
        best_NK = gate_NE.topk(self.top_k, dim=-1).indices
        chosen_NE = (gate_NE > config.cutoff).scatter(1, best_NK, True)
        kept_NE = gate_NE * chosen_NE
        return self._open_routing(kept_NE / kept_NE.sum(dim=-1, keepdim=True), chosen_NE, probs_NE, logits_NE)
