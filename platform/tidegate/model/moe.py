"""Dropless mixture of experts: route, sort rows by expert, run the experts, put the rows back.

Letters: B sequences, T tokens, N = B T rows, D width, E experts, K chosen experts, F expert width.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from tidegate.config import Config
from tidegate.model.initialisation import Draw
from tidegate.model.layers import FeedForward, Linear
from tidegate.model.routers import RouterConfig, Routing, SoftmaxTopKConfig
from tidegate_kernels.grouped_mm import grouped_mm

__all__ = ["Experts", "MoE", "MoEConfig", "Permute", "RoutingStats", "SharedExpertsConfig", "inverse_permutation"]


class SharedExpertsConfig(Config):
    num: int = Field(default=0, ge=0)
    """How many experts every token uses, as one feed-forward of `num * expert_dim`."""
    gate: bool = False
    """Scale their output by a learned sigmoid of the token (Qwen2-MoE)."""


class MoEConfig(Config):
    kind: Literal["moe"] = "moe"
    num_experts: int = Field(ge=1)
    top_k: int = Field(ge=1)
    expert_dim: int = Field(ge=8, multiple_of=8)
    """The grouped matrix product wants rows of whole 16 bytes, 8 numbers in bf16; so for the model's width."""
    router: RouterConfig = SoftmaxTopKConfig()
    shared: SharedExpertsConfig = SharedExpertsConfig()

    @model_validator(mode="after")
    def _enough_experts(self) -> MoEConfig:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} is more than num_experts={self.num_experts}; choose top_k <= num_experts"
            )
        return self


class RoutingStats(NamedTuple):
    """What one layer's routing did, per sequence, over the tokens that count (padding and masked ones do not)."""

    counts_BE: torch.Tensor
    """(B, E) fp32, assignments of each sequence to each expert; no gradient."""
    prob_sums_BE: torch.Tensor
    """(B, E) fp32, router probabilities summed over the sequence's tokens; carries gradient."""
    z_sums_B: torch.Tensor
    """(B,) fp32, squared log-partition of the logits summed over tokens (ST-MoE, arXiv 2202.08906, Eq. 5)."""


class Experts(nn.Module):
    """SwiGLU experts `first .. first + num`, each `w2 (silu(w1 x) * w3 x)`."""

    def __init__(self, num: int, width: int, expert_dim: int, std: float, out_std: float, first: int = 0) -> None:
        super().__init__()
        self.num_experts, self.first = num, first
        self.std, self.out_std = std, out_std
        self.w1 = nn.Parameter(torch.empty(num, expert_dim, width))
        self.w2 = nn.Parameter(torch.empty(num, width, expert_dim))
        self.w3 = nn.Parameter(torch.empty(num, expert_dim, width))

    def init_weights(self, draw: Draw) -> None:
        for name, weight, std in (("w1", self.w1, self.std), ("w2", self.w2, self.out_std), ("w3", self.w3, self.std)):
            for local in range(self.num_experts):
                draw.normal_(weight[local], std, name, row=self.first + local)

    def forward(self, rows_ND: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """Run rows that are sorted by local expert; (N, D) in and out."""
        gate_NF = grouped_mm(rows_ND, self.w1.transpose(1, 2), counts_E)
        up_NF = grouped_mm(rows_ND, self.w3.transpose(1, 2), counts_E)
        return grouped_mm(F.silu(gate_NF) * up_NF, self.w2.transpose(1, 2), counts_E)


class MoE(nn.Module):
    """Routed experts plus optional shared ones. All experts are local; `parallel/` subclasses it to spread them.

    Args:
        config: experts and router.
        width: D.
        std, out_std: initial standard deviations, of inner weights and of those that write to the residual stream.
    """

    def __init__(self, config: MoEConfig, width: int, std: float, out_std: float) -> None:
        # Not super(): the expert-parallel subclass also derives from a DeepSpeed layer whose constructor does surgery.
        nn.Module.__init__(self)
        self.config = config
        self.top_k = config.top_k
        self.router = config.router.build(width, config.num_experts, config.top_k, std)
        self.experts = self.build_experts(width, std, out_std)
        self.shared_experts: FeedForward | None = None
        self.shared_experts_gate: Linear | None = None
        if config.shared.num:
            self.shared_experts = FeedForward(width, config.shared.num * config.expert_dim, std, out_std)
            self.shared_experts_gate = Linear(width, 1, std) if config.shared.gate else None

    def build_experts(self, width: int, std: float, out_std: float) -> Experts:
        return Experts(self.config.num_experts, width, self.config.expert_dim, std, out_std)

    def apply_experts(self, rows_ND: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """Run rows sorted by expert (0..E-1) through their experts; same order out."""
        return self.experts(rows_ND, counts_E)

    def forward(self, x_BTD: torch.Tensor, counted_BT: torch.Tensor) -> tuple[torch.Tensor, RoutingStats]:
        """Mix experts.

        Args:
            x_BTD: (B, T, D), normalised.
            counted_BT: (B, T) bool, tokens that enter the statistics.

        Returns:
            (B, T, D) to be added to the residual stream, and the routing statistics.
        """
        x_ND = x_BTD.flatten(0, 1)
        routing: Routing = self.router(x_ND)
        assignments = routing.experts_NK.flatten()
        order = assignments.argsort(stable=True)
        inverse = inverse_permutation(order)
        counts_E = assignments.new_zeros(self.config.num_experts).scatter_add_(
            0, assignments, torch.ones_like(assignments)
        )
        rows = _FanOut.apply(x_ND, order, inverse, self.top_k)
        outputs = Permute.apply(self.apply_experts(rows, counts_E), inverse, order)
        per_choice_NKD = outputs.unflatten(0, (-1, self.top_k))
        mixed_ND = (per_choice_NKD.float() * routing.weights_NK.unsqueeze(-1)).sum(dim=1).to(x_ND.dtype)
        if self.shared_experts is not None:
            shared_ND = self.shared_experts(x_ND)
            if self.shared_experts_gate is not None:
                shared_ND = shared_ND * torch.sigmoid(self.shared_experts_gate(x_ND).float()).to(x_ND.dtype)
            mixed_ND = mixed_ND + shared_ND
        return mixed_ND.view_as(x_BTD), routing_stats(routing, counted_BT)


def routing_stats(routing: Routing, counted_BT: torch.Tensor) -> RoutingStats:
    """Sum a layer's routing over each sequence, leaving out the tokens that do not count."""
    B, T = counted_BT.shape
    E, K = routing.probs_NE.shape[1], routing.experts_NK.shape[1]
    counted = counted_BT.float()
    counts_BE = counted.new_zeros(B, E).scatter_add_(
        1, routing.experts_NK.view(B, T * K), counted.repeat_interleave(K, dim=1)
    )
    prob_sums_BE = (routing.probs_NE.view(B, T, E) * counted.unsqueeze(-1)).sum(dim=1)
    z_BT = routing.logits_NE.logsumexp(dim=-1).square().view(B, T)
    return RoutingStats(counts_BE, prob_sums_BE, (z_BT * counted).sum(dim=1))


def inverse_permutation(order: torch.Tensor) -> torch.Tensor:
    """`inverse[order[i]] = i`, without a second sort."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


class _FanOut(torch.autograd.Function):
    """`rows[i] = x[order[i] // K]`; the backward gathers and sums over K instead of scattering with atomics."""

    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return x_ND.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        per_choice = grad.index_select(0, inverse).unflatten(0, (-1, ctx.top_k))
        return per_choice.sum(dim=1), None, None, None


class Permute(torch.autograd.Function):
    """`y[i] = x[index[i]]` for a permutation, with the inverse permutation as its backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None
