"""One optimizer step: the exact gradient of the global batch, however it is cut into ranks and micro-batches.

The engine averages gradients over N ranks and M micro-batches. Every loss here is therefore a sum over this
micro-batch's tokens times N M / (counted tokens of the whole step), so that the average is the mean over the step's
counted tokens, also when micro-batches hold unequal numbers of them.

Everything random or annealed in the model hangs on the step's clock and on each sequence's place in the global batch,
so the counting pass routes as the training pass does.

Letters: M micro-batches, B sequences, T tokens, L layers, E experts, H query heads, G key heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tidegate.data.loader import StepBatch
from tidegate.model.attention import Attention
from tidegate.model.balance import Balancer, updated_bias
from tidegate.model.clock import Clock
from tidegate.model.decoder import Decoder, DecoderOutput
from tidegate.model.qk_clip import clip_factors
from tidegate.model.routers import Observe
from tidegate.model.routers.top_k import TopKRouter
from tidegate.parallel import collectives
from tidegate.parallel.engine import Engine
from tidegate.train.telemetry import Observer

__all__ = [
    "StepLosses",
    "StepResult",
    "clip_attention_logits",
    "outcome_share",
    "train_step",
    "tune_step",
    "update_routers",
    "update_units",
]


class StepLosses(NamedTuple):
    """This rank's share of the step's losses, on the device; summed over ranks they are the step's."""

    nll: torch.Tensor
    """Nats a counted token."""
    load_balancing: torch.Tensor
    """Weighted balance loss, summed over layers."""
    z: torch.Tensor
    """Weighted z-loss, summed over layers."""
    router: torch.Tensor
    """The routers' own weighted regularisers, summed over layers."""
    budget: torch.Tensor
    """Weighted loss of the budget on uneven experts."""
    units: torch.Tensor
    """Penalty of the unit gates."""
    lbl: torch.Tensor
    """The balance loss without its weight, mean over layers."""


class StepResult(NamedTuple):
    losses: StepLosses
    before: collectives.HostCopy
    """(4,) fp64, known when the step begins: counted tokens of the step, how many ranks had been asked to stop, and
    `last` summed over ranks."""


class _MicroBatch(NamedTuple):
    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    counted_BT: torch.Tensor
    documents_BT: torch.Tensor | None
    """Of whole sequences, also where other ranks hold parts of them."""
    sequences_B: torch.Tensor
    domains_B: torch.Tensor


def train_step(
    engine: Engine,
    balancer: Balancer | None,
    batch: StepBatch,
    clock: Clock,
    *,
    isolate: bool,
    stop: bool = False,
    last: torch.Tensor | None = None,
    observer: Observer | None = None,
) -> StepResult:
    """Forward and backward of every micro-batch, then the optimizer.

    Args:
        engine: set to the step's learning rate.
        balancer: of the job; counts what this step routes. None for a dense model.
        batch: this rank's part, on the host.
        clock: of this step.
        isolate: keep attention inside documents.
        stop: whether this rank was asked to stop; it shares the step's first collective.
        last: (2,) this rank's shares of the last step's loss and gradient norm, to be summed in the same collective.
        observer: takes in what the micro-batches show; None if nobody looks.

    Returns:
        Losses on the device, so that reading them is the caller's host sync, and who wants to stop.
    """
    micro_batches = _to_device(batch, engine, isolate)
    own_tokens = torch.stack([mb.counted_BT.sum() for mb in micro_batches]).sum().double()
    shares = own_tokens.new_zeros(2) if last is None else last.double()
    shared = torch.cat([torch.stack([own_tokens, torch.full_like(own_tokens, stop)]), shares])
    collectives.all_reduce(shared)
    before = collectives.HostCopy(shared)
    step_tokens = shared[0].clamp(min=1).float()
    if balancer is not None:
        balancer.begin_step(_count(engine, micro_batches, clock) if balancer.needs_counting_pass else None)
    copies = collectives.world_size() * len(micro_batches)
    total = torch.zeros(len(StepLosses._fields), device=engine.device)
    threshold, largest_logits = engine.model.config.attention.qk_clip, []
    for index, mb in enumerate(micro_batches):
        counted_B = mb.counted_BT.sum(dim=1, dtype=torch.float32)
        observe: Observe | None = None
        if observer is not None:  # routing is nearly free; a sample of the rest is enough
            observe = "all" if index == 0 else "routing"
        output = _forward(engine, mb, clock, observe)
        if output.max_logit_AH is not None:
            largest_logits.append(output.max_logit_AH)
        if observer is not None:
            observer.add(output, counted_B, mb.domains_B)
        loss = output.nll * (copies / step_tokens)
        terms = {"nll": loss}
        if balancer is not None and output.stats is not None:
            balance = balancer.losses(output.stats, counted_B, step_tokens, output.tuned.balance_scale)
            loss = loss + balance.total
            terms |= balance._asdict()
        if output.unit_penalty is not None:  # not a sum over tokens: the average over copies is already the penalty
            loss = loss + output.unit_penalty
            terms["units"] = output.unit_penalty
        engine.backward(loss)
        engine.step()
        for place, name in enumerate(StepLosses._fields):
            if name in terms:
                total[place] += terms[name].detach() / copies
    if threshold is not None and largest_logits:
        clip_attention_logits(engine, torch.stack(largest_logits).amax(dim=0), threshold)
    return StepResult(StepLosses(*total), before)


def tune_step(engine: Engine, batch: StepBatch, clock: Clock, *, isolate: bool) -> None:
    """Move the model's own hyperparameters by the loss of held-out text; weights stay. Every rank must call it.

    Args:
        engine: of a model with self-tuning.
        batch: this rank's part, of text that is neither trained on nor reported on.
        clock: of the training step before; perturbations are other ones.
        isolate: keep attention inside documents.
    """
    tuning = engine.model.self_tuning
    assert tuning is not None
    micro_batches = _to_device(batch, engine, isolate)
    tokens = torch.stack([mb.counted_BT.sum() for mb in micro_batches]).sum().float()
    collectives.all_reduce(tokens)
    engine.train(False)
    with tuning.listening() as heard:
        total_2H = torch.zeros(2, len(heard[0]), device=engine.device)
        for mb in micro_batches:
            # Not through the engine and not by `backward`: no weight gets a gradient.
            output = engine.model(
                mb.tokens_BT,
                mb.labels_BT,
                mb.counted_BT,
                mb.documents_BT,
                sequences_B=mb.sequences_B,
                clock=clock.other("held-out step"),
            )
            total_2H += torch.stack(torch.autograd.grad(output.nll / tokens.clamp(min=1), heard))
    engine.train()
    collectives.all_reduce(total_2H)
    tuning.move(total_2H.unbind())


def outcome_share(nll: torch.Tensor, engine: Engine) -> torch.Tensor:
    """(2,) fp64 on the device: this rank's shares of a step's loss and gradient norm; summed they are the step's."""
    return torch.stack([nll.double(), engine.gradient_norm().double() / collectives.world_size()])


def update_routers(model: Decoder, balancer: Balancer, clock: Clock, bias_rate: float) -> None:
    """Move every router's controllers, and its selection bias, by the step's global counts; the same on every rank.

    Args:
        bias_rate: u of bias balancing; 0 leaves the biases alone.
    """
    routers = model.routers()
    if bias_rate == 0 and not any(router.has_controllers for router in routers):
        return
    layers = balancer.routed_layers(clock)
    if len(routers) < len(layers):  # one router decides for all: its loads are those of any layer
        layers = layers[: len(routers)]
    for router, routed in zip(routers, layers, strict=True):
        router.update(routed)
        if bias_rate > 0:
            assert isinstance(router, TopKRouter)
            router.expert_bias.copy_(updated_bias(router.expert_bias, routed.counts_E, bias_rate))


def clip_attention_logits(engine: Engine, largest_LH: torch.Tensor, threshold: float) -> None:
    """QK-clip: after the optimizer, scale down the heads whose logits were above the threshold in this step.

    Args:
        engine: has just stepped.
        largest_LH: this rank's largest logits, layer by layer.
        threshold: tau.
    """
    collectives.all_reduce_max(largest_LH)
    # Not every `Attention` of the model: a router may have its own.
    layers = [module for block in engine.model.blocks for module in block.children() if isinstance(module, Attention)]
    # One host sync a step, so that layers below the threshold, all of them most of the time, move no weights.
    above_L = (largest_LH > threshold).any(dim=1).tolist()
    for layer, largest_H, above in zip(layers, largest_LH, above_L, strict=True):
        if above:
            query_H, key_G = clip_factors(largest_H, threshold, layer.config.num_kv_heads)
            engine.scale_rows(layer.makes_queries.weight, query_H.repeat_interleave(layer.config.head_dim))
            engine.scale_rows(layer.wk.weight, key_G.repeat_interleave(layer.config.head_dim))


def update_units(model: Decoder, losses: StepLosses, clock: Clock) -> None:
    """Let the unit gates learn what the optimizer does not move; every rank must call it after each step."""
    if model.units is not None:
        model.units.update(model, clock, losses.nll, collectives.all_reduce)


def _to_device(batch: StepBatch, engine: Engine, isolate: bool) -> list[_MicroBatch]:
    device = engine.device
    pinned = device.type == "cuda"
    tokens, documents, counted, sequences, domains = (
        (t.pin_memory() if pinned else t).to(device, non_blocking=True)
        for t in (batch.tokens_MBT1, batch.documents_MBT, batch.loss_mask_MBT, batch.sequences_MB, batch.domains_MB)
    )
    return [
        _MicroBatch(
            engine.own_tokens(tokens[m, :, :-1]),
            engine.own_tokens(tokens[m, :, 1:]),
            engine.own_tokens(counted[m]),
            documents[m] if isolate else None,
            sequences[m],
            domains[m],
        )
        for m in range(tokens.shape[0])
    ]


def _forward(engine: Engine, mb: _MicroBatch, clock: Clock, observe: Observe | None = None) -> DecoderOutput:
    return engine.forward(
        mb.tokens_BT,
        mb.labels_BT,
        mb.counted_BT,
        mb.documents_BT,
        sequences_B=mb.sequences_B,
        clock=clock,
        observe=observe,
    )


def _count(engine: Engine, micro_batches: list[_MicroBatch], clock: Clock) -> torch.Tensor:
    """(L, E) this rank's routing counts over the whole step, by a pass without gradient."""
    with torch.no_grad():
        counts = [_forward(engine, mb, clock).stats for mb in micro_batches]
    return torch.stack([stats.counts_BE.sum(dim=1) for stats in counts if stats is not None]).sum(dim=0)
