"""Time a job's optimizer step in one process, without Ray or data: `python docs/measure_step.py JOB [a.b=c ...]`.

Random tokens in documents of 300; medians of eight steps after two, on the host clock around a device sync. Steps that
are observed for telemetry, and read, alternate with steps that are not.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch

from tidegate.config import load
from tidegate.data.loader import StepBatch
from tidegate.model.clock import Clock
from tidegate.model.flops import total
from tidegate.model.moe import MoEConfig
from tidegate.parallel import collectives
from tidegate.train.job import Job
from tidegate.train.loop import build_balancer, build_engine
from tidegate.train.step import train_step, update_routers, update_units
from tidegate.train.telemetry import Observer
from tidegate.train.throughput import peak_flops

DOMAINS = ("a", "b", "c", "d")


def main(path: str, overrides: list[str]) -> None:
    job: Job = load(path, Job, overrides).config
    collectives.start(alone=True)
    engine, balancer = build_engine(job), build_balancer(job)
    engine.set_learning_rate(1e-4)
    shape = (job.accumulation, job.train.micro_batch, job.data.sequence_length)
    documents = torch.arange(shape[-1], dtype=torch.int32).div(300, rounding_mode="floor").expand(shape).contiguous()
    batch = StepBatch(
        tokens_MBT1=torch.randint(0, job.model.vocab_size, (*shape[:-1], shape[-1] + 1)),
        documents_MBT=documents,
        loss_mask_MBT=torch.ones(shape, dtype=torch.bool),
        domains_MB=torch.arange(job.global_batch).view(shape[:-1]) % len(DOMAINS),
        sequences_MB=torch.arange(job.global_batch).view(shape[:-1]),
    )
    top_k = job.model.ffn.top_k if isinstance(job.model.ffn, MoEConfig) else 0
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for step in range(1, 21):
        observer = Observer(DOMAINS, top_k, 0, 1) if step % 2 else None
        began = time.perf_counter()
        clock = Clock(step, step * job.train.batch_tokens, 0)
        result = train_step(engine, balancer, batch, clock, isolate=job.data.documents == "isolate", observer=observer)
        if balancer is not None:
            update_routers(engine.model, balancer, clock, job.balance.bias_rate)
        update_units(engine.model, result.losses, clock)
        if observer is not None:
            observer.metrics(observer.vector().cpu())
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[observer is not None].append(time.perf_counter() - began)
    plain, observed = (statistics.median(seconds[kind][2:]) for kind in (False, True))
    flops = total(job.model, job.data.sequence_length).flops_per_token * job.train.batch_tokens / plain
    peak = peak_flops(engine.device)
    report = {
        "job": [path, *overrides],
        "ms_a_step": 1e3 * plain,
        "tokens_per_s": job.train.batch_tokens / plain,
        "model_tflops": flops / 1e12,
        "mfu": flops / peak if peak is not None and job.train.precision == "bf16" else None,
        "observed_over_plain": observed / plain,
    }
    print(json.dumps(report))
    collectives.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
