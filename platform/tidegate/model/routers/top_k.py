"""Top-k routers: scores of every expert, selection of the K largest, weights from the chosen scores.

What differs is the score function. All of them can restrict selection to groups of experts, and all of them can have
their selection bias set by quantile balancing.

Letters: N rows, D width, E experts, K chosen experts, G groups, H histogram bins.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from tidegate.config import Config, Variant
from tidegate.model.clock import derive_key, uniform
from tidegate.model.initialisation import Draw
from tidegate.model.routers.base import (
    Capabilities,
    LearnedRouter,
    RoutedStep,
    RouterContext,
    RouterShape,
    Routing,
    RoutingSums,
)
from tidegate.model.routers.quantile import histogram, quantile
from tidegate_kernels.choice import takes_triton
from tidegate_kernels.router_topk import SCORES, router_topk
from tidegate_kernels.router_topk.reference import TINY

__all__ = [
    "GroupsConfig",
    "QuantileBalancing",
    "SigmoidTopKConfig",
    "SoftmaxTopKConfig",
    "SqrtSoftplusTopKConfig",
    "TopKConfig",
    "TopKRouter",
]

_SHARP = 1000.0  # bins of margins are even below 1/1000 (1024 of them: 1.5e-5 wide) and grow with the margin above


class GroupsConfig(Config):
    """Group-limited selection: experts of few groups (nodes) only (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""

    num: int = Field(ge=2)
    """G; divides the number of experts. Consecutive experts are a group, as expert parallelism places them."""
    keep: int = Field(ge=1)
    """Groups a token may use: those whose two best biased scores sum highest."""

    def problem(self, num_experts: int, top_k: int) -> str | None:
        """Why these groups cannot be cut, or None."""
        if num_experts % self.num:
            return f"router.groups.num={self.num} does not divide num_experts={num_experts}"
        if self.keep > self.num:
            return f"router.groups.keep={self.keep} is more than router.groups.num={self.num}"
        room = self.keep * (num_experts // self.num)
        if room < top_k:
            return f"router.groups.keep={self.keep} groups hold {room} experts, fewer than top_k={top_k}"
        return None


class QuantileBalancing(Config):
    """Set the selection bias to the quantile that balances it, once a step, instead of stepping towards balance.

    Alternating dual ascent of the balanced assignment problem: with a token's threshold a_n = its (K+1)-th largest
    biased score, expert e's bias is minus the (1 - K/E) quantile of its margin score_ne - a_n, so that it wins K/E of
    the tokens. The margins of the whole global batch are counted in a histogram, so the result does not depend on how
    the batch was cut. Bins are narrow where margins are small: softmax scores of 256 experts differ by less than an
    even bin of 1/512. Source: quantile balancing (Su 2026; also in Megatron-Core).
    """

    bins: int = Field(default=1024, ge=16)
    """Of the margins' histogram over [-1, 1]."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Share of the old bias that is kept."""


class TopKConfig(Variant):
    """What all top-k routers can do."""

    capabilities: ClassVar[Capabilities] = Capabilities(selection_bias=True)

    reads: Literal["own", "previous_block"] = "own"
    """Whose normalised feed-forward input decides. `previous_block`: pre-gated routing (Hwang et al., ISCA 2024): the
    experts of a block are known before the block begins, so that they can be fetched; the first block reads its own."""
    renormalize: bool = True
    """Divide the chosen scores by their sum, so that the weights of a token sum to 1. With one expert a token the
    weight would be 1 whatever the router says, and nothing learned from the loss."""
    groups: GroupsConfig | None = None
    quantile: QuantileBalancing | None = None


class SoftmaxTopKConfig(TopKConfig):
    kind: Literal["softmax_top_k"] = "softmax_top_k"
    summary: ClassVar[str] = "softmax over all experts, then the k largest"
    source: ClassVar[str] = "Shazeer et al. 2017, arXiv 1701.06538; statistics: arXiv 2309.13850"

    def build(self, shape: RouterShape) -> TopKRouter:
        return TopKRouter(self, shape, "softmax")


class SigmoidTopKConfig(TopKConfig):
    kind: Literal["sigmoid_top_k"] = "sigmoid_top_k"
    summary: ClassVar[str] = "independent sigmoid scores, the k largest, normalised to sum to one"
    source: ClassVar[str] = "DeepSeek-V3, arXiv 2412.19437, Eq. 12-16; arXiv 2405.13997"
    scale: float = Field(default=1.0, gt=0)
    """Factor of the normalised weights (routed scaling; 2.5 in DeepSeek-V3)."""

    def build(self, shape: RouterShape) -> TopKRouter:
        return TopKRouter(self, shape, "sigmoid", scale=self.scale)


class SqrtSoftplusTopKConfig(TopKConfig):
    kind: Literal["sqrt_softplus_top_k"] = "sqrt_softplus_top_k"
    summary: ClassVar[str] = "sqrt(softplus(logit)) scores, the k largest, normalised to sum to one"
    source: ClassVar[str] = "DeepSeek-V4"
    scale: float = Field(default=1.0, gt=0)
    """Factor of the normalised weights (2.5 in DeepSeek-V4)."""

    def build(self, shape: RouterShape) -> TopKRouter:
        return TopKRouter(self, shape, "sqrt_softplus", scale=self.scale)


class TopKRouter(LearnedRouter):
    """Select the K largest of `score + expert_bias`; weigh by the unbiased scores.

    `expert_bias` takes part in *selection only* (Wang et al. 2024, arXiv 2408.15664). It is a buffer: checkpointed,
    identical on every rank, moved by bias balancing or quantile balancing, not trained.

    Args:
        config: groups and quantile balancing.
        shape: what it is built for.
        score: a key of `SCORES`.
        scale: factor of the weights.
    """

    expert_bias: torch.Tensor

    def __init__(
        self,
        config: TopKConfig,
        shape: RouterShape,
        score: str,
        scale: float = 1.0,
    ) -> None:
        super().__init__(shape)
        self.config, self.score, self.scale = config, score, scale
        self._noise_key = derive_key("router noise", shape.layer)
        self.register_buffer("expert_bias", torch.empty(shape.num_experts, dtype=torch.float32))

    def init_weights(self, draw: Draw) -> None:
        super().init_weights(draw)
        nn.init.zeros_(self.expert_bias)

    def forward(self, x_ND: torch.Tensor, context: RouterContext) -> Routing:
        logits_NE = self._tuned(self.logits(x_ND), context)
        if context.log_experts is not None:
            logits_NE = logits_NE + context.log_experts
        elif self.config.groups is None and self.config.quantile is None and takes_triton(logits_NE):
            return self._in_one_pass(logits_NE, context)
        scores_NE = SCORES[self.score](logits_NE)
        experts_NK = self.select(scores_NE, context.log_experts)
        weights_NK = scores_NE.gather(1, experts_NK)
        if self.config.renormalize:
            weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + TINY)
        routing = Routing(experts_NK, self.scale * weights_NK, self._probs(scores_NE), logits_NE)
        if self.config.quantile is not None and self.training:
            return routing._replace(observed=self._margins(scores_NE, context.counted_BT.flatten()))
        return routing

    def _tuned(self, logits_NE: torch.Tensor, context: RouterContext) -> torch.Tensor:
        """At the temperature and, in training, with the noise that the model tunes itself."""
        tuned, clock = context.tuned, context.clock
        if tuned.temperature is not None:
            logits_NE = logits_NE / tuned.temperature
        if tuned.noise is not None and self.training and clock.step > 0:
            draws_NE = uniform(context.rows_N, self.num_experts, clock.key ^ self._noise_key)
            logits_NE = logits_NE + tuned.noise * torch.special.ndtri(draws_NE)
        return logits_NE

    def _in_one_pass(self, logits_NE: torch.Tensor, context: RouterContext) -> Routing:
        """The same with its statistics, and without the scores."""
        routed = router_topk(
            logits_NE,
            self.expert_bias,
            context.counted_BT,
            top_k=self.top_k,
            score=self.score,
            renormalize=self.config.renormalize,
            scale=self.scale,
            signals=context.observe is not None,
        )
        sums = RoutingSums(routed.counts_BE, routed.prob_sums_BE, routed.z_sums_B, routed.signals_B3)
        return Routing(routed.experts_NK, routed.weights_NK, None, logits_NE, sums=sums)

    def _probs(self, scores_NE: torch.Tensor) -> torch.Tensor:
        """The balance loss wants a distribution; without this division it hardly balances independent scores.

        A softmax is one already; dividing it by its sum again would change its last bits.
        """
        return scores_NE if self.score == "softmax" else scores_NE / (scores_NE.sum(dim=-1, keepdim=True) + TINY)

    def select(self, scores_NE: torch.Tensor, log_experts: torch.Tensor | None = None) -> torch.Tensor:
        """(N, K) experts with the largest biased scores."""
        biased_NE = scores_NE.detach() + self.expert_bias
        if log_experts is not None:  # a bias must not bring back an expert that is not there
            biased_NE = biased_NE.masked_fill(log_experts == -torch.inf, -torch.inf)
        if self.config.groups is not None:
            biased_NE = self._limited(biased_NE, self.config.groups)
        return biased_NE.topk(self.top_k, dim=-1).indices

    def _limited(self, biased_NE: torch.Tensor, groups: GroupsConfig) -> torch.Tensor:
        """Minus infinity outside of each row's best groups."""
        by_group_NGe = biased_NE.unflatten(1, (groups.num, -1))
        best_two = min(2, by_group_NGe.shape[2])
        group_scores_NG = by_group_NGe.topk(best_two, dim=-1).values.sum(dim=-1)
        kept = group_scores_NG.topk(groups.keep, dim=-1).indices
        open_NG = torch.zeros_like(group_scores_NG, dtype=torch.bool).scatter(1, kept, True)
        return by_group_NGe.masked_fill(~open_NG.unsqueeze(-1), -torch.inf).flatten(1)

    def _margins(self, scores_NE: torch.Tensor, counted_N: torch.Tensor) -> torch.Tensor:
        """(E, H) histogram of score minus the row's threshold, over counted rows."""
        assert self.config.quantile is not None
        scores_NE = scores_NE.detach()
        threshold_N1 = (scores_NE + self.expert_bias).topk(self.top_k + 1, dim=-1).values[:, -1:]
        spread_NE = torch.asinh(_SHARP * (scores_NE - threshold_N1)) / math.asinh(_SHARP)
        return histogram(spread_NE, counted_N, self.config.quantile.bins, low=-1.0, high=1.0)

    @property
    def has_controllers(self) -> bool:
        return self.config.quantile is not None

    def update(self, routed: RoutedStep) -> None:
        if self.config.quantile is None:
            return
        assert routed.observed is not None
        share = self.top_k / self.num_experts
        spread_E = quantile(routed.observed, 1 - share, low=-1.0, high=1.0)
        target_E = -torch.sinh(spread_E * math.asinh(_SHARP)) / _SHARP
        target_E -= target_E.mean()  # a constant changes no selection, but would drift
        self.expert_bias.lerp_(target_E, 1 - self.config.quantile.ema)
