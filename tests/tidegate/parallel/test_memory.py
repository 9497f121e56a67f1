"""Training state and a rank's share of a pass are predicted to the byte that real engines hold, in real processes."""

from __future__ import annotations

import gc
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pytest
import torch

from tidegate.model.decoder import ModelConfig
from tidegate.model.memory import LiveBytes, model_on_meta, pass_memory
from tidegate.parallel import collectives
from tidegate.parallel.config import ParallelConfig
from tidegate.parallel.memory import MoEShare, StateMemory, state_memory
from tidegate_kernels.choice import chosen

if TYPE_CHECKING:
    from tidegate.parallel.engine import Engine

B, T = 2, 24
SIZES: dict[str, Any] = {
    "vocab_size": 600,
    "width": 64,
    "num_layers": 2,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
    "ffn": {"kind": "moe", "num_experts": 6, "top_k": 2, "expert_dim": 96, "router": {"kind": "round_robin"}},
}
MODEL = ModelConfig.model_validate(SIZES)


class OnTheHost(LiveBytes):
    """DeepSpeed keeps shapes as tensors on meta, which take no memory."""

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type != "meta":
            super()._see(storage)


def batch() -> tuple[torch.Tensor, ...]:
    tokens = torch.arange(B * (T + 1)).view(B, T + 1) % 600
    return tokens[:, :-1], tokens[:, 1:], torch.ones(B, T, dtype=torch.bool)


def engine_of(
    parallel: ParallelConfig, precision: Literal["fp32", "bf16"], optimizer_state: Literal["fp32", "bf16"] = "fp32"
) -> Engine:
    from tidegate.parallel.engine import Engine

    adam = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "gradient_clip": 1.0}
    rest = {"seed": 0, "micro_batch": B, "accumulation": 2, "recompute": False, "optimizer_state": optimizer_state}
    return Engine(MODEL, parallel, precision=precision, **adam, **rest)


class Held(NamedTuple):
    """Bytes in the second step, without activations where they are not the most."""

    between: int
    """Its two micro-batches."""
    reducing: int
    """Most in the last backward pass."""
    stepping: int
    """Most in the optimizer."""
    predicted: StateMemory


def held_by_an_engine(
    parallel: ParallelConfig, precision: Literal["fp32", "bf16"], optimizer_state: Literal["fp32", "bf16"]
) -> Held:
    live = OnTheHost()
    with live:
        engine = engine_of(parallel, precision, optimizer_state)
        engine.set_learning_rate(1e-3)
        for _ in range(4):
            torch.distributed.barrier()  # gloo's threads hold tensors a little longer
            gc.collect()  # DeepSpeed leaves cycles
            between, live.peak = live.now, 0
            engine.backward(engine.forward(*batch()).nll)
            reducing, live.peak = live.peak, live.now
            engine.step()
    model = model_on_meta(MODEL, torch.float32, moe=partial(MoEShare, expert_size=parallel.expert))
    predicted = state_memory(model, parallel, collectives.world_size(), precision, optimizer_state)
    return Held(between, reducing, live.peak, predicted)


LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    *[(precision, {"zero_stage": stage}) for precision in ("bf16", "fp32") for stage in (0, 1, 2)],
    *[(precision, {"zero_stage": stage, "offload": "optimizer"}) for precision in ("bf16", "fp32") for stage in (1, 2)],
    ("bf16", {"zero_stage": 1, "offload": "experts"}),
    ("bf16", {"zero_stage": 1, "gradients_at_once": 2}),
]
WITH_BF16_MOMENTS = [("bf16", {"zero_stage": 1}), ("bf16", {"zero_stage": 1, "offload": "experts"})]
CASES = [(*case, "fp32") for case in LAYOUTS] + [(*case, "bf16") for case in WITH_BF16_MOMENTS]


def held_by_engines(expert: int) -> list[Held]:
    return [
        held_by_an_engine(ParallelConfig(expert=expert, **layout), precision, moments)
        for precision, layout, moments in CASES
    ]


def on_the_host(layout: dict[str, Any], precision: str, moments: str, world_size: int, expert: int) -> int:
    """Bytes of an offloaded optimizer: fp32 weights, gradients and moments, a copy in the dtype of the weights in use,
    and two buffers for one parameter (one of them on the GPU). Sums of fp32 gradients at stage 2 are whole."""
    if "offload" not in layout:
        return 0
    size = 2 if precision == "bf16" else 4
    model = model_on_meta(MODEL, torch.bfloat16, moe=partial(MoEShare, expert_size=expert))
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    dense = sum(p.numel() for p in model.parameters()) - experts
    if layout["offload"] == "experts":  # weights and sums, and a part of master weights and moments
        return 6 * experts + (12 if moments == "fp32" else 8) * experts // (world_size // expert)
    part = dense // world_size + experts // (world_size // expert)
    sums = 4 * part if (precision, layout["zero_stage"]) == ("fp32", 2) else 0
    return (16 + size) * part + sums + 2 * size * max(p.numel() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "expert"), [(1, 1), (2, 1), (2, 2)])
def test_state_is_what_engines_hold(world_size, expert, on_ranks):
    for rank in on_ranks(world_size, held_by_engines, expert):
        for case, (between, reducing, stepping, predicted) in zip(CASES, rank, strict=True):
            precision, layout, moments = case
            held = sum(predicted[:5]) + on_the_host(layout, precision, moments, world_size, expert)
            # DeepSpeed's bucket stays between micro-batches at stage 1 only.
            bucket = predicted.bucket if layout["zero_stage"] == 1 else 0
            assert between - bucket == pytest.approx(held, rel=0.02), case
            if world_size > 1:  # gloo makes copies that NCCL does not
                continue
            if case == ("bf16", {"zero_stage": 2}, "fp32"):
                assert reducing - predicted.bucket == pytest.approx(held + predicted.step - predicted.bucket, rel=0.02)
            if (precision, layout) not in [
                ("bf16", {"zero_stage": 1}),
                *LAYOUTS[-2:],
            ]:  # AdamW is made of many operations on a CPU
                assert stepping < 1.01 * held + predicted.step, case


def pass_of_a_rank() -> tuple[int, int, int]:
    """`PassMemory` of a real expert-parallel rank, on plain PyTorch."""
    model = engine_of(ParallelConfig(expert=2, zero_stage=0), "bf16").model
    given = batch()
    live = LiveBytes([*model.parameters(), *model.buffers(), *given])
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with chosen("reference"), live:
        output = model(*given)
        saved, forward = live.now, live.peak
        live.peak = live.now
        (output.nll + output.stats.prob_sums_BE.sum()).backward()
    return saved, forward, live.peak


@pytest.mark.slow
def test_a_rank_of_two_holds_what_its_share_of_the_experts_does(on_ranks):
    """With equal loads: the round-robin router sends as many rows to every expert."""
    share = model_on_meta(MODEL, torch.bfloat16, moe=partial(MoEShare, expert_size=2, skew=1.0))
    predicted = pass_memory(share, micro_batch=B, sequence_length=T, isolate=False, kernels="reference")
    for found in on_ranks(2, pass_of_a_rank):
        assert [*predicted] == pytest.approx([*found], rel=0.1)
