"""Bytes of training state on one rank: weights, gradients and what the optimizer holds, by precision and ZeRO stage.

What is replicated over ranks is spread by ZeRO: experts over their replicas, everything else over all ranks.

Letters: P numbers of this rank's weights, S of them in its part of the optimizer state.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from tidegate.model.decoder import Decoder
from tidegate.model.dispatch import Dispatch
from tidegate.model.moe import Experts, MoE
from tidegate.parallel.config import ParallelConfig
from tidegate_kernels.ep_permute import ep_pack, ep_unpack

__all__ = ["LOAD_SKEW", "MoEShare", "StateMemory", "state_memory"]

LOAD_SKEW = 1.25
"""Rows that the experts of a rank get, over the mean of the ranks: what a balanced router is taken to leave."""

_BUCKET = 500_000_000  # numbers that DeepSpeed reduces at a time, its default


class StateMemory(NamedTuple):
    """Bytes on one rank."""

    weights: int
    """In use."""
    gradients: int
    """That stay between micro-batches, in the dtype of the weights."""
    gradient_sums: int
    """fp32 sums over micro-batches."""
    master_weights: int
    """The fp32 truth behind bf16 weights, or a rank's part of fp32 ones."""
    moments: int
    """Of AdamW, fp32."""
    bucket: int
    """Held from a step's first gradient until gradients are reduced."""
    step: int
    """When gradients are reduced after a backward pass, and when the optimizer steps, in place of activations."""


def state_memory(
    model: Decoder, parallel: ParallelConfig, world_size: int, precision: Literal["fp32", "bf16"]
) -> StateMemory:
    """What DeepSpeed and `FlatGradients` hold; padding of a partition (a few numbers a rank) is left out.

    Args:
        model: of this rank, with its share of the experts; `meta` will do.
        parallel: the layout.
        world_size: ranks.
        precision: of the weights in use.
    """
    of_experts = [module for module in model.modules() if isinstance(module, Experts)]
    experts = sum(p.numel() for module in of_experts for p in module.parameters())
    P = sum(p.numel() for p in model.parameters())
    S = -(-(P - experts) // world_size) + -(-experts // (world_size // parallel.expert))
    reduced = min(max(experts, P - experts), _BUCKET)  # at a time
    if precision == "bf16":
        if parallel.zero_stage == 0:  # FP16_UnfusedOptimizer: gradients are cast when the optimizer steps
            return StateMemory(2 * P, 2 * P, 0, 4 * P, 8 * P, 0, 4 * P)
        if parallel.zero_stage == 1:  # FlatGradients: sums are whole on every rank and reduced in place
            return StateMemory(2 * P, 0, 4 * P, 4 * S, 8 * S, 0, 0)
        copies = 6 * reduced  # of what is in the bucket, in bf16 and in fp32
        bucket = 2 * _BUCKET + (copies if P > _BUCKET else 0)  # it is full in the middle of a backward pass
        return StateMemory(2 * P, 0, 4 * S, 4 * S, 8 * S, bucket, 2 * _BUCKET + copies)
    if parallel.zero_stage == 0:
        return StateMemory(4 * P, 4 * P, 0, 0, 8 * P, 0, 4 * reduced)
    gradients, sums = (4 * P, 0) if parallel.zero_stage == 1 else (0, 4 * S)
    return StateMemory(4 * P, gradients, sums, 4 * S, 8 * S, 4 * _BUCKET, 4 * (_BUCKET + reduced + S))


class MoEShare(MoE):
    """What a rank holds of an expert-parallel layer, and what it does, without other ranks: for `meta`.

    Args:
        arguments: of `MoE`.
        expert_size: ranks of the group.
        skew: rows that the rank's experts get, over the mean.
        keywords: of `MoE`.
    """

    def __init__(self, *arguments: Any, expert_size: int, skew: float = LOAD_SKEW, **keywords: Any) -> None:
        self._share = expert_size, skew
        super().__init__(*arguments, **keywords)

    def build_experts(self, width: int, std: float, out_std: float) -> Experts:
        config = self.config
        num_local = config.num_slices // self._share[0]
        return Experts(num_local, width, config.expert_dim, std, out_std, activation=config.activation)

    def mix(self, x_ND: torch.Tensor, dispatch: Dispatch, channels_EF: torch.Tensor | None) -> torch.Tensor:
        if self._share[0] == 1:
            return super().mix(x_ND, dispatch, channels_EF)
        return self.mix_in_steps(x_ND, dispatch, channels_EF)

    def apply_experts(
        self, rows_AD: torch.Tensor, counts_E: torch.Tensor, channels_EF: torch.Tensor | None
    ) -> torch.Tensor:
        expert_size, skew = self._share
        if expert_size == 1:
            return self.experts(rows_AD, counts_E, channels_EF)
        counts_Re = counts_E.view(expert_size, -1)
        received = _Exchange.apply(rows_AD, round(skew * len(rows_AD)))
        outputs = self.experts(ep_unpack(received, counts_Re), counts_Re.sum(dim=0), channels_EF)
        return _Exchange.apply(ep_pack(outputs, counts_Re), len(rows_AD))


class _Exchange(torch.autograd.Function):
    """The tensors of an exchange of rows."""

    @staticmethod
    def forward(ctx: Any, rows_AD: torch.Tensor, rows: int) -> torch.Tensor:
        ctx.rows = len(rows_AD)
        return rows_AD.new_empty(rows, rows_AD.shape[1])

    @staticmethod
    def backward(ctx: Any, g_AD: torch.Tensor) -> tuple[torch.Tensor, None]:
        return g_AD.new_empty(ctx.rows, g_AD.shape[1]), None
