"""The prediction of a job against a real training step of it, in a real process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tidegate.config import ConfigError, load
from tidegate.train.job import Job
from tidegate.train.memory import MemoryPrediction, out_of_memory_explained, predict

H100 = Path(__file__).resolve().parents[3] / "jobs" / "bench" / "h100.yaml"


def peak_of_training(path: Path, overrides: list[str]) -> int:
    """Bytes at the largest moment of the second step."""
    from tidegate.data.loader import StepBatch
    from tidegate.model.clock import Clock
    from tidegate.model.memory import LiveBytes
    from tidegate.train.loop import build_balancer, build_engine
    from tidegate.train.step import train_step

    class OnTheHost(LiveBytes):
        def _see(self, storage: torch.UntypedStorage) -> None:
            if storage.device.type != "meta":  # DeepSpeed keeps shapes as tensors there
                super()._see(storage)

    job: Job = load(path, Job, overrides).config
    shape = (job.accumulation, job.train.micro_batch, job.data.sequence_length)
    batch = StepBatch(
        tokens_MBT1=torch.randint(0, job.model.vocab_size, (*shape[:-1], shape[-1] + 1)),
        documents_MBT=torch.zeros(shape, dtype=torch.int32),
        loss_mask_MBT=torch.ones(shape, dtype=torch.bool),
        domains_MB=torch.zeros(shape[:-1], dtype=torch.int64),
        sequences_MB=torch.arange(job.global_batch).view(shape[:-1]),
    )
    live = OnTheHost()
    with live:
        engine, balancer = build_engine(job), build_balancer(job)
        engine.set_learning_rate(1e-3)
        for step in (1, 2):
            live.peak = live.now
            train_step(engine, balancer, batch, Clock(step, step, 0), isolate=True)
    return live.peak


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.recompute=true"],
        ["parallel.zero_stage=0"],
        ["parallel.offload=experts", "model.num_layers=4", "model.ffn.expert_dim=256"],
    ],
)
def test_a_training_step_takes_what_is_predicted(overrides, tiny_job, on_ranks):
    path = tiny_job(train={"precision": "bf16", "micro_batch": 4, "batch_tokens": 512})
    prediction = predict(load(path, Job, overrides).config)
    (found,) = on_ranks(1, peak_of_training, path, overrides)
    assert prediction.total - prediction.margin + prediction.host == pytest.approx(found, rel=0.1)


def test_parts_add_up_and_the_larger_moment_counts():
    given = MemoryPrediction(*(10**part for part in range(1, 6)), activations=3, working=4, step=6, margin=1)
    assert given.total == sum(given.parts.values()) == 111110 + 8
    assert [*given._replace(step=9).parts] == [*given._fields[:5], "step", "margin"]


def test_layouts_shift_what_a_rank_holds():
    def of(*overrides: str) -> MemoryPrediction:
        return predict(load(H100, Job, ["optimizer.state=fp32", *overrides]).config)

    one, two, spread = of(), of("resources.workers=2"), of("resources.workers=2", "parallel.expert=2")
    assert two.moments == pytest.approx(one.moments / 2, rel=1e-6)
    assert two.gradient_sums == one.gradient_sums
    assert spread.moments == two.moments, "experts are halved by one, and by replicas by the other"
    assert spread.weights < 0.6 * one.weights
    assert spread.activations > one.activations, "rows that came from the other rank are kept too"
    assert one.margin == pytest.approx(0.02 * (one.total - one.margin), rel=1e-6)
    alone, recomputed = of("parallel.gradients_at_once=1"), of("train.recompute=true")
    embedding = 2 * 50304 * 2048
    assert one.gradients == 3 * (one.weights - embedding), "three wait for the fourth; the embedding's are rows"
    assert alone.gradients == 0
    assert recomputed.activations < 0.2 * one.activations
    partitioned = of("resources.workers=2", "parallel.zero_stage=2", "parallel.gradients_at_once=1")
    assert partitioned.gradient_sums == two.gradient_sums / 2
    host = of("parallel.zero_stage=2", "parallel.gradients_at_once=1", "parallel.offload=optimizer")
    assert (host.master_weights, host.moments, host.gradient_sums) == (0, 0, one.gradient_sums)
    weights = one.weights // 2
    assert (one.host, host.host) == (0, 18 * weights)


def test_ranks_that_do_not_divide_the_assignments_are_predicted() -> None:
    """16,384 rows of 8 experts on 3 ranks, next to 2 and 4."""

    def peak(expert: int) -> int:
        sets = [f"parallel.expert={expert}", f"resources.workers={expert}", "train.batch_tokens=1572864"]
        job: Job = load(H100, Job, ["model.ffn.num_experts=60", *sets]).config
        return predict(job).total

    assert peak(4) < peak(3) < peak(2)


def test_experts_on_the_host_take_two_layers_of_the_gpu():
    def of(*overrides: str) -> MemoryPrediction:
        fixed = ["parallel.gradients_at_once=1", "optimizer.state=fp32"]
        return predict(load(H100, Job, [*fixed, *overrides]).config)

    on, off = of(), of("parallel.offload=experts")
    experts, layer = 4 * 64 * 3 * 2048 * 1024, 64 * 3 * 2048 * 1024
    assert on.weights - off.weights == 2 * (experts - 2 * layer)
    assert on.gradient_sums - off.gradient_sums == 4 * (experts - 2 * layer)
    assert on.moments - off.moments == 8 * experts
    assert (off.host, off.disk) == (18 * experts, 0)
    assert off.total == sum(off.parts.values()), "the host is not the GPU"
    in_files = of("parallel.offload=experts", "parallel.offload_folder=/disk")
    assert (in_files.host, in_files.disk) == (6 * experts, 12 * experts)
    deep = [of("parallel.offload=experts", f"model.num_layers={layers}") for layers in (4, 12)]
    dense = deep[1].weights - deep[0].weights
    assert dense < 0.1 * on.weights, "more layers take their dense weights only"
    spread = of("parallel.offload=experts", "resources.workers=4", "parallel.expert=2")
    assert spread.host == (6 + 12 // 2) * experts // 2


def test_memory_that_is_not_there_is_explained_by_the_job(tiny_job: Callable[..., Path]) -> None:
    job = load(tiny_job(), Job).config
    message = r"^out of memory, train.micro_batch=2 is too much here; .* DefaultCPUAllocator: can't allocate memory"
    with pytest.raises(ConfigError, match=message), out_of_memory_explained(job):
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="not of memory"), out_of_memory_explained(job):
        raise RuntimeError("not of memory")
