"""Bytes of training state on one rank: weights, gradients and what the optimizer holds, by precision and ZeRO stage.

What is replicated over ranks is spread by ZeRO: experts over their replicas, everything else over all ranks.

Letters: P numbers of this rank's weights, S of them in its part of the optimizer state; N rows, D width, M rows that
came, E experts, F their width, R ranks of an exchange.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from tidegate.model.decoder import Decoder
from tidegate.model.dispatch import Dispatch
from tidegate.model.moe import Experts, Meanwhile, MoE, nothing
from tidegate.parallel.all_to_all import AllToAll, Way
from tidegate.parallel.config import ParallelConfig
from tidegate.parallel.exchange import Exchange
from tidegate.parallel.expert_store import BUFFERS
from tidegate.parallel.streamed_adamw import CHUNK, SLOTS

__all__ = ["LOAD_SKEW", "MoEShare", "StateMemory", "state_memory"]

LOAD_SKEW = 1.25
"""Assignments that the experts of a rank get, over the mean of the ranks: what a balanced router is taken to leave."""

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
    """Of AdamW."""
    bucket: int
    """Held from a backward pass's first gradient until gradients are reduced."""
    step: int
    """When gradients are reduced, and when the optimizer steps."""
    still_saved: float = 0.0
    """Share of the activations that are there when gradients are first reduced: a bucket that does not hold all of them
    is full in the middle of a backward pass."""
    host: int = 0
    """In the host's memory: what the optimizer keeps there, or experts and all that belongs to them."""
    disk: int = 0
    """In `parallel.offload_folder`."""


def state_memory(
    model: Decoder,
    parallel: ParallelConfig,
    world_size: int,
    precision: Literal["fp32", "bf16"],
    optimizer_state: Literal["fp32", "bf16"] = "fp32",
) -> StateMemory:
    """What DeepSpeed and `FlatGradients` hold; padding of a partition (a few numbers a rank) is left out.

    Args:
        model: of this rank, with its share of the experts; `meta` will do.
        parallel: the layout.
        world_size: ranks.
        precision: of the weights in use.
        optimizer_state: dtype of AdamW's moments.
    """
    of_experts = [module for module in model.modules() if isinstance(module, Experts)]
    experts = sum(p.numel() for module in of_experts for p in module.parameters())
    P = sum(p.numel() for p in model.parameters())
    by_rows = 0 if model.head is None else model.embedding.weight.numel()  # gradients that are added at once
    replicas = world_size // parallel.expert
    S = -(-(P - experts) // world_size) + -(-experts // replicas)
    if parallel.offload == "experts":
        dense = P - experts
        state = _state(dense, dense - by_rows, -(-dense // world_size), 0, parallel, precision)
        layers = [sum(p.numel() for p in module.parameters()) for module in of_experts]
        buffers = min(BUFFERS, len(layers)) * max(layers)
        moment = 2 if optimizer_state == "bf16" else 4
        kept, in_files = (4 + 2 * moment) * -(-experts // replicas), parallel.offload_folder is not None
        return state._replace(
            weights=state.weights + 2 * buffers,
            gradient_sums=state.gradient_sums + 4 * buffers,
            moments=state.moments * moment // 4,
            step=state.step + SLOTS * min(CHUNK, -(-max(layers) // replicas)) * (4 + 2 + 4 + 2 * moment),
            host=(2 + 4) * experts + (0 if in_files else kept),
            disk=kept if in_files else 0,
        )
    state = _state(P, P - by_rows, S, min(max(experts, P - experts), _BUCKET), parallel, precision)
    if optimizer_state == "bf16":
        state = state._replace(moments=state.moments // 2)
    if parallel.offload == "none":
        return state
    # Sums of bf16 gradients stay on the GPU.
    sums = state.gradient_sums if precision == "bf16" else 0
    size = 2 if precision == "bf16" else 4  # of weights in use: there is a copy of them too
    return state._replace(gradient_sums=sums, master_weights=0, moments=0, host=(16 + size) * S)


def _state(
    P: int, held: int, S: int, reduced: int, parallel: ParallelConfig, precision: Literal["fp32", "bf16"]
) -> StateMemory:
    """With all of it on the GPU; `held` numbers wait for other micro-batches, `reduced` are reduced at a time."""
    stage = parallel.zero_stage
    if precision == "bf16":
        if stage == 0:  # FP16_UnfusedOptimizer: gradients are cast when the optimizer steps
            return StateMemory(2 * P, 2 * P, 0, 4 * P, 8 * P, 0, 4 * P)
        if stage == 1 and parallel.offload != "optimizer":
            # FlatGradients: sums are whole on every rank, reduced in place.
            return StateMemory(2 * P, 2 * held * (parallel.gradients_at_once - 1), 4 * P, 4 * S, 8 * S, 0, 0)
        if stage == 1:
            return StateMemory(2 * P, 0, 4 * P, 4 * S, 8 * S, 4 * _BUCKET, 4 * (_BUCKET + reduced + S))
        copies = 6 * reduced  # of what is in the bucket, in bf16 and in fp32
        return StateMemory(2 * P, 0, 4 * S, 4 * S, 8 * S, 2 * _BUCKET, 2 * _BUCKET + copies, max(0, 1 - _BUCKET / P))
    if stage == 0:
        return StateMemory(4 * P, 4 * P, 0, 0, 8 * P, 0, 4 * reduced)
    gradients, sums = (4 * P, 0) if stage == 1 else (0, 4 * S)
    return StateMemory(4 * P, gradients, sums, 4 * S, 8 * S, 4 * _BUCKET, 4 * (_BUCKET + reduced + S))


class MoEShare(MoE):
    """What a rank holds of an expert-parallel layer, and what it does, without other ranks: for `meta`.

    Args:
        arguments: of `MoE`.
        expert_size: ranks of the group.
        skew: assignments that the rank's experts get, over the mean.
        keywords: of `MoE`.
    """

    def __init__(self, *arguments: Any, expert_size: int, skew: float = LOAD_SKEW, **keywords: Any) -> None:
        self._share = expert_size, skew
        super().__init__(*arguments, **keywords)

    def build_experts(self, width: int, std: float, out_std: float) -> Experts:
        config = self.config
        num_local = config.num_slices // self._share[0]
        return Experts(num_local, width, config.expert_dim, std, out_std, activation=config.activation)

    def mix(
        self, x_ND: torch.Tensor, dispatch: Dispatch, channels_EF: torch.Tensor | None, meanwhile: Meanwhile = nothing
    ) -> torch.Tensor:
        expert_size, skew = self._share
        if expert_size == 1:
            return super().mix(x_ND, dispatch, channels_EF, meanwhile)
        exchange = Exchange(dispatch, expert_size, _Imagined(dispatch, skew))
        rows = exchange.send(x_ND)
        meanwhile()
        mixed_MD = super().mix(rows(), exchange.received, channels_EF)
        return exchange.send_back(mixed_MD)


class _Imagined(AllToAll):
    """With ranks that nobody plays, of rows that choose their experts independently of each other."""

    def __init__(self, dispatch: Dispatch, skew: float) -> None:
        super().__init__(None)
        self._rows, self._assignments, self._skew = dispatch.num_rows, dispatch.slice_A.shape[0], skew

    def agree(self, sizes_RQ: torch.Tensor) -> list[Way]:
        R = len(sizes_RQ)
        pairs = self._rows * (1 - (1 - 1 / R) ** (self._assignments / self._rows))
        each, left = divmod(self._assignments, R)
        going = [[round(pairs)] * R, [each + (rank < left) for rank in range(R)]]
        coming = [min(self._rows, round(self._skew * pairs)), round(self._skew * each)]
        return [Way(sent, [came] * R, None) for sent, came in zip(going, coming, strict=True)]
