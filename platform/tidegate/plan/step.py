"""Seconds of one optimizer step on one rank, by kind of work; docs/plan.md has the equations in the same letters.

Letters: N rows of a micro-batch, D width, L layers, F expert width, K experts a token, H query and G key heads of d, A
assignments, P parameters on a rank, S of them in its part of the optimizer state, M micro-batches a step.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from tidegate.config import ConfigError
from tidegate.model.activations import is_gated, num_matrices
from tidegate.model.decoder import ModelConfig
from tidegate.model.flops import costs
from tidegate.model.gates import NoGate
from tidegate.model.moe import MoEConfig
from tidegate.plan.communication import all_to_all, dense_group, expert_group, pairs, replica_group, ring
from tidegate.plan.efficiency import Efficiency
from tidegate.plan.hardware import Gpu
from tidegate.train.job import Job

__all__ = ["ModelCosts", "StepTime", "model_costs", "step_time"]

_BF16 = 2
_COLLECTIVES = 5  # of an exchange beside the rows: sizes, lengths, slices and weights, and the sizes' way to the host


class ModelCosts(NamedTuple):
    """Training FLOPs a token by class of kernel, and parameters of the whole model."""

    experts: float
    attention: float
    head: float
    projections: float
    expert_params: int
    dense_params: int
    by_rows: int
    """Of the dense ones, an untied embedding's, whose gradient is rows."""

    @property
    def flops(self) -> float:
        return self.experts + self.attention + self.head + self.projections

    @property
    def params(self) -> int:
        return self.expert_params + self.dense_params


class StepTime(NamedTuple):
    """Seconds on the device, one after the other, as measured: nothing overlaps (docs/plan.md)."""

    experts: float
    """Grouped products, and rows on their way to and from expert order."""
    projections: float
    attention: float
    head: float
    elementwise: float
    """Norms, rotary positions, gates."""
    gradient_sums: float
    optimizer: float
    all_to_all: float
    gradients_and_weights: float
    """Reduce-scatter and all-gather."""
    unlisted: float
    """Kernels that are not reckoned one by one, and gaps between kernels."""
    waiting_for_host: float
    """What launching kernels takes longer than running them."""

    @property
    def total(self) -> float:
        return sum(self)

    @property
    def busy(self) -> float:
        """Share of the step with work on the device."""
        return 1 - self.waiting_for_host / self.total


@lru_cache(maxsize=64)
def model_costs(model: ModelConfig, sequence_length: int) -> ModelCosts:
    """From `model/flops.py`, by class.

    Raises:
        ConfigError: how fast a part of the model is has not been measured.
    """
    if model.mixers:
        raise ConfigError(
            f"model.layers={model.layers!r}: how fast its mixers are has not been measured, so no step is predicted"
        )
    flops = {"experts": 0.0, "attention": 0.0, "head": 0.0, "projections": 0.0}
    classes = {
        "ffn.num_experts, top_k": "experts",
        "attention (scores)": "attention",
        "tie_embeddings (head)": "head",
    }
    expert_params = params = 0
    for row in costs(model, sequence_length):
        kind = classes.get(row.field, "projections")
        flops[kind] += row.flops_per_token
        params += row.params
        expert_params += row.params if kind == "experts" else 0
    by_rows = 0 if model.tie_embeddings else model.vocab_size * model.width
    return ModelCosts(**flops, expert_params=expert_params, dense_params=params - expert_params, by_rows=by_rows)


def step_time(job: Job, gpu: Gpu, efficiency: Efficiency) -> StepTime:
    """Predict it from the job alone, in bf16 with Triton kernels and nothing on the host.

    Args:
        job: with its layout; one GPU a worker.
        gpu: what it runs on.
        efficiency: shares of what that has.
    """
    cost = model_costs(job.model, job.data.sequence_length)
    tokens = job.train.batch_tokens / job.resources.workers
    bandwidth = gpu.memory_tb_per_s * 1e12 * efficiency.memory
    # The forward pass is a third: once more where it is recomputed, and where choices are counted first.
    passes = 1 + (job.train.recompute + job.counts_first) / 3

    def products(flops_per_token: float, share: float, times: float) -> float:
        return times * tokens * flops_per_token / (share * gpu.peak)

    d = job.model.attention.head_dim
    widths = efficiency.attention if job.data.documents == "join" else efficiency.attention_isolated
    near = min(widths, key=lambda width: abs(width - d))
    host = passes * job.model.num_layers * job.accumulation * efficiency.host_s_per_layer
    sums, optimizer = _state_bytes(job, cost, efficiency)
    device = StepTime(
        experts=passes * _experts(job, cost, gpu, efficiency, bandwidth),
        projections=products(cost.projections, efficiency.projections, passes),
        attention=products(cost.attention, widths[near], passes),
        head=products(cost.head, efficiency.head, 1),
        elementwise=passes * tokens * _elementwise_bytes(job.model) / bandwidth,
        gradient_sums=sums / bandwidth,
        optimizer=optimizer / bandwidth,
        all_to_all=0.0,
        gradients_and_weights=0.0,
        unlisted=0.0,
        waiting_for_host=0.0,
    )
    device = device._replace(
        unlisted=efficiency.unlisted * device.total,
        all_to_all=_exchange(job, gpu, efficiency),
        gradients_and_weights=_reduction(job, cost, gpu, efficiency),
    )
    return device._replace(waiting_for_host=max(0.0, host - device.total))


def _experts(job: Job, cost: ModelCosts, gpu: Gpu, efficiency: Efficiency, bandwidth: float) -> float:
    ffn = job.model.ffn
    if not isinstance(ffn, MoEConfig):
        return 0.0
    skew = efficiency.load_skew if job.parallel.expert > 1 else 1.0
    tokens = job.train.batch_tokens / job.resources.workers
    products = skew * tokens * cost.experts / (efficiency.experts * gpu.peak)
    # A row is read, spread, written back and summed, forward and backward; products write and read hidden units.
    row_bytes = _BF16 * (8 * job.model.width + 4 * num_matrices(ffn.activation) * ffn.expert_dim)
    A = job.model.num_layers * tokens * ffn.top_k * ffn.num_slices / ffn.num_experts
    # Weights are read in both passes, and their gradients written.
    weights = 3 * _BF16 * job.accumulation * cost.expert_params / job.parallel.expert
    moved = skew * A * row_bytes + weights
    if job.parallel.expert > 1:  # rows are packed for each rank and summed when they are back, forward and backward
        moved += (
            8 * _BF16 * job.model.num_layers * job.accumulation * _pairs(job) * job.parallel.expert * job.model.width
        )
    return products + moved / bandwidth


def _elementwise_bytes(model: ModelConfig) -> float:
    """A token of all layers, forward and backward, as the kernels' benchmarks count."""
    D, attention = model.width, model.attention
    H, G, d = attention.num_heads, attention.num_kv_heads, attention.head_dim
    numbers = 2 * 8 * D + (5 if attention.qk_norm else 4) * (H + G) * d
    numbers += 8 * (attention.augmented_query or 0)
    if not isinstance(attention.gate, NoGate):
        heads, dim = attention.gated_shape(D)
        numbers += (8 if attention.gate.granularity == "elementwise" else 5) * heads * dim
    if not isinstance(model.ffn, MoEConfig):
        numbers += (8 if is_gated(model.ffn.activation) else 5) * model.ffn.hidden_dim
    elif model.ffn.shared.num:
        numbers += (8 if is_gated(model.ffn.activation) else 5) * model.ffn.shared.num * model.ffn.expert_dim
    return _BF16 * model.num_layers * numbers


def _on_rank(job: Job, cost: ModelCosts) -> tuple[float, float]:
    """P and S."""
    world, expert = job.resources.workers, job.parallel.expert
    P = cost.dense_params + cost.expert_params / expert
    return P, cost.dense_params / world + cost.expert_params * (1 / expert) / (world / expert)


def _state_bytes(job: Job, cost: ModelCosts, efficiency: Efficiency) -> tuple[float, float]:
    """Moved by sums of gradients, and by the optimizer with the norm."""
    (P, S), M, stage = _on_rank(job, cost), job.accumulation, job.parallel.zero_stage
    if stage == 1:
        # Each pass reads the gradients of so many micro-batches, and reads and writes the fp32 sum; the first writes.
        passes = -(-M // job.parallel.gradients_at_once)
        sums = (P - cost.by_rows) * (2 * M + 8 * passes - 4)
        moment = 2 if job.optimizer.state == "bf16" else 4
        return sums, S * (4 + 4 + 8 + 4 * moment + 2)  # norm, sum, weight both ways, two moments both ways, bf16 weight
    sums = P * (6 * (M - 1) + 2) if stage == 0 else P * M * efficiency.zero2_bytes
    return sums, S * (4 + 4 + 8 + 16 + 6) + (10 * P if stage == 0 else 0)  # and casts of their own


def _pairs(job: Job) -> float:
    ffn = job.model.ffn
    assert isinstance(ffn, MoEConfig)
    return pairs(job.train.micro_batch * job.data.sequence_length, ffn.top_k, job.parallel.expert)


def _exchange(job: Job, gpu: Gpu, efficiency: Efficiency) -> float:
    """Rows there and back, forward and backward, for each layer and micro-batch."""
    if job.parallel.expert == 1:
        return 0.0
    group, hierarchical = expert_group(job.parallel.expert, gpu), job.parallel.all_to_all == "hierarchical"
    size = _BF16 * job.model.width * _pairs(job)
    rows = all_to_all(size, group, gpu, efficiency, hierarchical=hierarchical)
    small = all_to_all(0.0, group, gpu, efficiency, hierarchical=hierarchical)
    forwards = 1 + job.train.recompute + job.counts_first
    times = job.model.num_layers * job.accumulation
    return times * (forwards * (2 * rows + _COLLECTIVES * small) + 2 * rows + small)


def _reduction(job: Job, cost: ModelCosts, gpu: Gpu, efficiency: Efficiency) -> float:
    """Gradients to the ranks that own them, and moved weights back."""
    world, expert, stage = job.resources.workers, job.parallel.expert, job.parallel.zero_stage
    shares = [
        (cost.dense_params, dense_group(world, gpu)),
        (cost.expert_params / expert, replica_group(world, expert, gpu)),
    ]
    # Stage 0 all-reduces bf16, stage 1 reduce-scatters fp32 sums once, stage 2 fp32 gradients of every micro-batch.
    reduced = {0: 2 * _BF16, 1: 4 + _BF16, 2: 4 * job.accumulation + _BF16}[stage]
    return sum(ring(reduced * params, group, gpu, efficiency) for params, group in shares if params)
