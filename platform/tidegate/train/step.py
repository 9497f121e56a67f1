"""One optimizer step: the exact gradient of the global batch, however it is cut into ranks and micro-batches.

The engine averages gradients over N ranks and M micro-batches. Every loss here is therefore a sum over this
micro-batch's tokens times N M / (counted tokens of the whole step), so that the average is the mean over the step's
counted tokens, also when micro-batches hold unequal numbers of them.

Letters: M micro-batches, B sequences, T tokens, L MoE layers, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tidegate.data.loader import StepBatch
from tidegate.model.balance import Balancer, updated_bias
from tidegate.model.decoder import Decoder, DecoderOutput
from tidegate.model.moe import MoE
from tidegate.parallel import collectives
from tidegate.parallel.engine import Engine

__all__ = ["StepLosses", "StepResult", "train_step", "update_biases"]


class StepLosses(NamedTuple):
    """This rank's share of the step's losses, on the device; summed over ranks they are the step's."""

    nll: torch.Tensor
    """Nats a counted token."""
    load_balancing: torch.Tensor
    """Weighted balance loss, summed over layers."""
    z: torch.Tensor
    """Weighted z-loss, summed over layers."""


class StepResult(NamedTuple):
    losses: StepLosses
    stops: collectives.HostCopy
    """How many ranks had been asked to stop when the step began."""


class _MicroBatch(NamedTuple):
    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    counted_BT: torch.Tensor
    documents_BT: torch.Tensor | None


def train_step(
    engine: Engine, balancer: Balancer | None, batch: StepBatch, *, isolate: bool, stop: bool = False
) -> StepResult:
    """Forward and backward of every micro-batch, then the optimizer.

    Args:
        engine: set to the step's learning rate.
        balancer: of the job; counts what this step routes. None for a dense model.
        batch: this rank's part, on the host.
        isolate: keep attention inside documents.
        stop: whether this rank was asked to stop; it shares the step's first collective.

    Returns:
        Losses on the device, so that reading them is the caller's host sync, and who wants to stop.
    """
    micro_batches = _to_device(batch, engine.device, isolate)
    own_tokens = torch.stack([mb.counted_BT.sum() for mb in micro_batches]).sum().double()
    shared = torch.stack([own_tokens, torch.full_like(own_tokens, stop)])
    collectives.all_reduce(shared)
    stops = collectives.HostCopy(shared[1])
    step_tokens = shared[0].clamp(min=1).float()
    if balancer is not None:
        balancer.begin_step(_count(engine, micro_batches) if balancer.needs_counting_pass else None)
    copies = collectives.world_size() * len(micro_batches)
    total = torch.zeros(3, device=engine.device)
    for mb in micro_batches:
        output = _forward(engine, mb)
        losses = [output.nll_B.sum() * (copies / step_tokens)]
        if balancer is not None and output.stats is not None:
            losses += balancer.losses(output.stats, mb.counted_BT.float().sum(dim=1), step_tokens)
        engine.backward(sum(losses[1:], losses[0]))
        total[: len(losses)] += torch.stack([loss.detach() for loss in losses]) / copies
    return StepResult(StepLosses(*total), stops)


def update_biases(model: Decoder, counts_LE: torch.Tensor, rate: float) -> None:
    """Move every layer's selection bias by the step's global counts; the same on every rank."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    for layer, counts_E in zip(layers, counts_LE, strict=True):
        layer.router.expert_bias.copy_(updated_bias(layer.router.expert_bias, counts_E, rate))


def _to_device(batch: StepBatch, device: torch.device, isolate: bool) -> list[_MicroBatch]:
    pinned = device.type == "cuda"
    tokens, documents, counted = (
        (t.pin_memory() if pinned else t).to(device, non_blocking=True)
        for t in (batch.tokens_MBT1, batch.documents_MBT, batch.loss_mask_MBT)
    )
    return [
        _MicroBatch(tokens[m, :, :-1], tokens[m, :, 1:], counted[m], documents[m] if isolate else None)
        for m in range(tokens.shape[0])
    ]


def _forward(engine: Engine, mb: _MicroBatch) -> DecoderOutput:
    return engine.forward(mb.tokens_BT, mb.labels_BT, mb.counted_BT, mb.documents_BT)


def _count(engine: Engine, micro_batches: list[_MicroBatch]) -> torch.Tensor:
    """(L, E) this rank's routing counts over the whole step, by a pass without gradient."""
    with torch.no_grad():
        counts = [_forward(engine, mb).stats for mb in micro_batches]
    return torch.stack([stats.counts_BE.sum(dim=1) for stats in counts if stats is not None]).sum(dim=0)
