"""Dropless mixture of experts: route, sort rows by expert, run the experts, put the rows back.

Letters: B sequences, T tokens, N = B T rows, D width, E experts, K chosen experts, S slots, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import nn

from tidegate.config import Config
from tidegate.model.activations import (
    NUM_COEFFICIENTS,
    ActivationName,
    activate,
    has_coefficients,
    init_coefficients,
    is_gated,
)
from tidegate.model.dispatch import Dispatch, plan
from tidegate.model.initialisation import Draw
from tidegate.model.layers import FeedForward, Linear
from tidegate.model.routers import Router, RouterConfig, RouterContext, RouterShape, Routing, SoftmaxTopKConfig
from tidegate.model.routers.base import Capabilities, RoutingSums
from tidegate.model.routers.top_k import TopKConfig
from tidegate.model.unit_gates.units import NO_MASKS, LayerMasks
from tidegate_kernels.grouped_mm import grouped_mm
from tidegate_kernels.moe_dispatch import combine, fan_out
from tidegate_kernels.moe_experts import moe_experts
from tidegate_kernels.router_topk import router_signals

__all__ = [
    "ExpertSize",
    "Experts",
    "Meanwhile",
    "MoE",
    "MoEConfig",
    "RoutingStats",
    "SharedExpertsConfig",
    "nothing",
    "routing_stats",
]

Meanwhile = Callable[[], None]
"""Computes what does not hang on the experts."""


def nothing() -> None:
    """To do meanwhile."""


class SharedExpertsConfig(Config):
    num: int = Field(default=0, ge=0)
    """How many experts every token uses, as one feed-forward of `num * expert_dim`."""
    gate: bool = False
    """Scale their output by a learned sigmoid of the token (Qwen2-MoE)."""


class ExpertSize(Config):
    """Some experts of one width in an uneven mixture."""

    num: int = Field(ge=1)
    times: int = Field(ge=0)
    """Width in units of `expert_dim`; 0 is the identity: a token that chooses it skips the feed-forward."""


class MoEConfig(Config):
    kind: Literal["moe"] = "moe"
    num_experts: int = Field(ge=1)
    top_k: int = Field(ge=1)
    """Experts a token; for ragged routers the mean that they hold."""
    expert_dim: int = Field(ge=8, multiple_of=8)
    """The grouped matrix product wants rows of whole 16 bytes, 8 numbers in bf16; so for the model's width."""
    sizes: tuple[ExpertSize, ...] = ()
    """Uneven experts (Duo-LLM, arXiv 2410.10846), in order; empty: all `num_experts` are one `expert_dim` wide."""
    activation: ActivationName = "swiglu"
    """Of routed and shared experts."""
    router: RouterConfig = SoftmaxTopKConfig()
    shared: SharedExpertsConfig = SharedExpertsConfig()

    @property
    def slices(self) -> tuple[int, ...]:
        """Width of each expert in units of `expert_dim`."""
        return tuple(size.times for size in self.sizes for _ in range(size.num)) or (1,) * self.num_experts

    @property
    def num_slices(self) -> int:
        """Feed-forwards of width `expert_dim` that are stored, and spread over ranks."""
        return sum(self.slices)

    @property
    def uneven(self) -> bool:
        """Whether experts differ in cost."""
        return len(set(self.slices)) > 1

    @property
    def capabilities(self) -> Capabilities:
        return self.router.capabilities

    @property
    def weighs_by_one(self) -> bool:
        """Whether the one expert of a token has weight 1 whatever the router says: no gradient reaches it."""
        if self.top_k > 1 or self.num_experts == 1 or not self.capabilities.learned:
            return False
        if isinstance(self.router, TopKConfig):
            return self.router.renormalize
        return self.router.kind in ("sinkhorn", "decoupled", "dense_to_sparse")

    @property
    def weights_sum_to_one(self) -> bool:
        """Whether the weights of every token's experts sum to 1, in training and in evaluation."""
        router = self.router
        if isinstance(router, TopKConfig):
            whole = isinstance(router, SoftmaxTopKConfig) and self.top_k == self.num_experts
            return (router.renormalize or whole) and getattr(router, "scale", 1.0) == 1.0
        return self.capabilities.normalized

    @property
    def reads_previous_block(self) -> bool:
        """Whether a block's experts are picked from the block before it."""
        return isinstance(self.router, TopKConfig) and self.router.reads == "previous_block"

    @model_validator(mode="after")
    def _enough_experts(self) -> MoEConfig:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} is more than num_experts={self.num_experts}; choose top_k <= num_experts"
            )
        return self

    @model_validator(mode="after")
    def _sizes_add_up(self) -> MoEConfig:
        if self.sizes and len(self.slices) != self.num_experts:
            raise ValueError(f"sizes name {len(self.slices)} experts, but num_experts={self.num_experts}")
        if self.activation == "poly_norm" and any(width > 1 for width in self.slices):
            raise ValueError(
                "activation=poly_norm normalises over all hidden units of an expert, which sizes with times > 1 store "
                "in slices; use times <= 1 or another activation"
            )
        if self.sizes and self.num_slices == 0:
            raise ValueError("sizes name only identities (times=0); at least one expert needs times >= 1")
        return self

    @model_validator(mode="after")
    def _router_fits(self) -> MoEConfig:
        router = self.router
        if isinstance(router, TopKConfig):
            problem = router.groups.problem(self.num_experts, self.top_k) if router.groups is not None else None
            if problem:
                raise ValueError(problem)
            if router.quantile is not None and router.groups is not None:
                raise ValueError(
                    "router.quantile balances a free choice of experts, which router.groups limits: loads would stay "
                    "uneven; remove one, or balance groups by balance.bias_rate"
                )
            if router.quantile is not None and self.top_k == self.num_experts:
                raise ValueError(
                    f"router.quantile balances a choice, but top_k={self.top_k} of num_experts={self.num_experts} "
                    "is none; remove one"
                )
        if router.kind in ("comet", "dselect_k") and self.num_experts < 2:
            raise ValueError(f"router.kind={router.kind} needs two experts to choose from, got num_experts=1")
        return self


class RoutingStats(NamedTuple):
    """What one layer's routing did, per sequence, over the tokens that count (padding and masked ones do not)."""

    counts_BE: torch.Tensor
    """(B, E) fp32, assignments of each sequence to each expert; no gradient."""
    prob_sums_BE: torch.Tensor
    """(B, E) fp32, router probabilities summed over the sequence's tokens; carries gradient."""
    z_sums_B: torch.Tensor
    """(B,) fp32, squared log-partition of the logits summed over tokens (ST-MoE, arXiv 2202.08906, Eq. 5)."""
    penalty_sums_B: torch.Tensor
    """(B,) fp32, the router's own weighted regulariser summed over tokens; carries gradient."""
    balance_weight: torch.Tensor | None = None
    """() fp32, the layer's own coefficient of the balance loss."""
    observed: torch.Tensor | None = None
    """Sums that the router's `update` wants; no gradient."""
    signals_B3: torch.Tensor | None = None
    """(B, 3) fp32, for telemetry: sums over tokens of router entropy (nats), logit norm, chosen probability. None if
    nobody observes."""


class Experts(nn.Module):
    """Experts `first .. first + num`, each a feed-forward `w2 act(w1 x)`, or `w2 (act(w1 x) * w3 x)` if gated.

    `w3` is the third tensor, whatever the activation wants: the up projection of a gated one, the coefficients
    (num, 1, 4) of a polynomial, else a buffer without meaning. DeepSpeed's expert checkpoints want these three names.
    """

    w3: torch.Tensor

    def __init__(
        self,
        num: int,
        width: int,
        expert_dim: int,
        std: float,
        out_std: float,
        first: int = 0,
        activation: ActivationName = "swiglu",
    ) -> None:
        super().__init__()
        self.num_experts, self.first = num, first
        self.std, self.out_std = std, out_std
        self.activation = activation
        self.w1 = nn.Parameter(torch.empty(num, expert_dim, width))
        self.w2 = nn.Parameter(torch.empty(num, width, expert_dim))
        if is_gated(activation):
            self.w3 = nn.Parameter(torch.empty(num, expert_dim, width))
        elif has_coefficients(activation):
            self.w3 = nn.Parameter(torch.empty(num, 1, NUM_COEFFICIENTS))
        else:
            self.register_buffer("w3", torch.empty(num, 1, 1))

    @property
    def coefficients(self) -> torch.Tensor | None:
        """(num, 1, 4) of a polynomial activation."""
        return self.w3 if has_coefficients(self.activation) else None

    def init_weights(self, draw: Draw) -> None:
        drawn: list[tuple[str, torch.Tensor, float]] = [("w1", self.w1, self.std), ("w2", self.w2, self.out_std)]
        if is_gated(self.activation):
            drawn.append(("w3", self.w3, self.std))
        elif has_coefficients(self.activation):
            init_coefficients(self.w3)
        else:
            nn.init.zeros_(self.w3)
        for name, weight, std in drawn:
            for local in range(self.num_experts):
                draw.normal_(weight[local], std, name, row=self.first + local)

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set `w1`, `w2` and, where it means something, `w3`: those of this process's experts."""
        for name, tensor in tensors.items():
            getattr(self, name).copy_(tensor)

    def forward(
        self, rows_ND: torch.Tensor, counts_E: torch.Tensor, channels_EF: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run rows that are sorted by local expert; (N, D) in and out. Channel factors are those of all experts."""
        w2_EDF = self.masked_w2(channels_EF)
        hidden_NF = grouped_mm(rows_ND, self.w1.transpose(1, 2), counts_E)
        up_NF = grouped_mm(rows_ND, self.w3.transpose(1, 2), counts_E) if is_gated(self.activation) else None
        coefficients_N4 = None
        if self.coefficients is not None:
            # fp32 before it is spread: the gradient sums over all rows of an expert. A given size spares a host sync.
            each_E4 = self.coefficients.squeeze(1).to(torch.promote_types(rows_ND.dtype, torch.float32))
            coefficients_N4 = each_E4.repeat_interleave(counts_E, dim=0, output_size=rows_ND.shape[0])
        activated_NF = activate(self.activation, hidden_NF, up_NF, coefficients_N4)
        return grouped_mm(activated_NF, w2_EDF.transpose(1, 2), counts_E)

    def masked_w2(self, channels_EF: torch.Tensor | None) -> torch.Tensor:
        """`w2` times the factors of its input channels: there are fewer weights than hidden activations."""
        w2_EDF: torch.Tensor = self.w2
        if channels_EF is None:
            return w2_EDF
        mine_EF = channels_EF[self.first : self.first + self.num_experts]
        return w2_EDF * mine_EF.unsqueeze(1).to(w2_EDF.dtype)


class MoE(nn.Module):
    """Routed experts plus optional shared ones. All experts are local; `parallel/` subclasses it to spread them.

    Args:
        config: experts and router.
        width: D.
        std, out_std: initial standard deviations, of inner weights and of those that write to the residual stream.
        layer: which MoE layer this is.
        vocab_size: of the model, for routers that look at token ids.
        keep_rows: keep rows in expert order for the backward pass instead of spreading them again.
    """

    def __init__(
        self,
        config: MoEConfig,
        width: int,
        std: float,
        out_std: float,
        *,
        layer: int = 0,
        vocab_size: int = 0,
        keep_rows: bool = False,
    ) -> None:
        # Not super(): the expert-parallel subclass also derives from a DeepSpeed layer whose constructor does surgery.
        nn.Module.__init__(self)
        self.config = config
        self.top_k = config.top_k
        self.keep_rows = keep_rows
        self.router: Router | None = None  # None: the decoder has one for all layers
        if config.capabilities.source_layer == "own":
            shape = RouterShape(width, config.num_experts, config.top_k, std, layer, vocab_size)
            self.router = config.router.build(shape)
        self.experts = self.build_experts(width, std, out_std)
        self.shared_experts: FeedForward | None = None
        self.shared_experts_gate: Linear | None = None
        if config.shared.num:
            self.shared_experts = FeedForward(
                width, config.shared.num * config.expert_dim, std, out_std, config.activation
            )
            self.shared_experts_gate = Linear(width, 1, std) if config.shared.gate else None

    def build_experts(self, width: int, std: float, out_std: float) -> Experts:
        config = self.config
        return Experts(config.num_slices, width, config.expert_dim, std, out_std, activation=config.activation)

    def forward(
        self,
        x_BTD: torch.Tensor,
        context: RouterContext,
        routing: Routing | None = None,
        masks: LayerMasks = NO_MASKS,
    ) -> tuple[torch.Tensor, RoutingStats]:
        """Mix experts.

        Args:
            x_BTD: (B, T, D), normalised.
            context: what the router may look at, and which tokens enter the statistics.
            routing: of these rows, if somebody else decides (pre-gating, a router for all layers); else routed by x.
            masks: factors of channels; those of experts are the router's, in the context.

        Returns:
            (B, T, D) to be added to the residual stream, and the routing statistics.
        """
        x_ND = x_BTD.flatten(0, 1)
        if routing is None:
            routing = self.route(x_BTD, context)
        dispatch = plan(routing, self.config.slices)
        shared_ND = None

        def meanwhile() -> None:
            nonlocal shared_ND
            shared_ND = self._mix_shared(x_ND, masks)

        mixed_ND = self.mix(x_ND, dispatch, masks.expert_channels, meanwhile)
        if shared_ND is not None:
            mixed_ND = mixed_ND + shared_ND
        return mixed_ND.view_as(x_BTD), routing_stats(routing, context, self.config.capabilities)

    def mix(
        self, x_ND: torch.Tensor, dispatch: Dispatch, channels_EF: torch.Tensor | None, meanwhile: Meanwhile = nothing
    ) -> torch.Tensor:
        """(N, D) the weighted sum of each row's experts.

        Args:
            x_ND: rows.
            dispatch: of rows to experts.
            channels_EF: factors of the experts' channels.
            meanwhile: called once; where rows travel, while they do.
        """
        experts, slots = self.experts, dispatch.slots()
        if experts.activation == "swiglu":
            w2_EDF = experts.masked_w2(channels_EF)
            mixed_ND = moe_experts(
                x_ND, dispatch.weights_A, slots, experts.w1, experts.w3, w2_EDF, keep_rows=self.keep_rows
            )
        else:
            outputs_AD = experts(fan_out(x_ND, slots), slots.counts_E, channels_EF)
            mixed_ND = combine(outputs_AD, dispatch.weights_A, slots)
        meanwhile()
        return mixed_ND

    def _mix_shared(self, x_ND: torch.Tensor, masks: LayerMasks) -> torch.Tensor | None:
        """(N, D) what the shared experts add, if there are any."""
        if self.shared_experts is None:
            return None
        shared_ND: torch.Tensor = self.shared_experts(x_ND, masks.channels)
        if self.shared_experts_gate is None:
            return shared_ND
        return shared_ND * torch.sigmoid(self.shared_experts_gate(x_ND).float()).to(x_ND.dtype)

    def route(self, x_BTD: torch.Tensor, context: RouterContext) -> Routing:
        """Decide by the (B, T, D) rows that this layer's router reads."""
        assert self.router is not None
        return self.router(x_BTD.flatten(0, 1), context)


def routing_stats(
    routing: Routing, context: RouterContext, capabilities: Capabilities = SoftmaxTopKConfig.capabilities
) -> RoutingStats:
    """Sum a layer's routing over each sequence, leaving out the tokens that do not count."""
    sums = routing.sums or _sums(routing, context, capabilities)
    penalty_sums_B = torch.zeros_like(sums.z_sums_B)
    if routing.penalty_N is not None:
        penalty_sums_B = (routing.penalty_N.view_as(context.counted_BT) * context.counted_BT).sum(dim=1)
    return RoutingStats(
        sums.counts_BE,
        sums.prob_sums_BE,
        sums.z_sums_B,
        penalty_sums_B,
        routing.balance_weight,
        routing.observed,
        sums.signals_B3,
    )


def _sums(routing: Routing, context: RouterContext, capabilities: Capabilities) -> RoutingSums:
    assert routing.probs_NE is not None
    counted_BT = context.counted_BT.float()
    B, T = counted_BT.shape
    E, S = routing.probs_NE.shape[1], routing.experts_NS.shape[1]
    used_BS = counted_BT.repeat_interleave(S, dim=1)
    if routing.chosen_NS is not None:
        used_BS = used_BS * routing.chosen_NS.reshape(B, T * S)
    counts_BE = counted_BT.new_zeros(B, E).scatter_add_(1, routing.experts_NS.reshape(B, T * S), used_BS)
    prob_sums_BE = (routing.probs_NE.view(B, T, E) * counted_BT.unsqueeze(-1)).sum(dim=1)
    z_sums_B = counted_BT.new_zeros(B)
    if capabilities.z_loss:
        z_BT = routing.logits_NE.logsumexp(dim=-1).square().view(B, T)
        z_sums_B = (z_BT * counted_BT).sum(dim=1)
    signals_B3 = _signals(routing, counted_BT, capabilities.normalized) if context.observe else None
    return RoutingSums(counts_BE, prob_sums_BE, z_sums_B, signals_B3)


@torch.no_grad()
def _signals(routing: Routing, counted_BT: torch.Tensor, normalized: bool) -> torch.Tensor:
    """`router_signals` of any router. ReLU routing's gates are normalised first, so that they have an entropy."""
    assert routing.probs_NE is not None
    probs_NE = routing.probs_NE
    if not normalized:
        probs_NE = probs_NE / probs_NE.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    chosen_NS = probs_NE.gather(1, routing.experts_NS)
    if routing.chosen_NS is not None:
        chosen_NS = chosen_NS * routing.chosen_NS
    return router_signals(probs_NE, routing.logits_NE, chosen_NS, counted_BT)
