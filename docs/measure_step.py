"""Time a job's optimizer step in one process, without Ray or data: `python docs/measure_step.py JOB [a.b=c ...]`.

Random tokens in documents of 300; the median of four steps after two, on the host clock around a device sync.
"""

from __future__ import annotations

import statistics
import sys

import torch

from tidegate.config import load
from tidegate.data.loader import StepBatch
from tidegate.parallel import collectives
from tidegate.train.job import Job
from tidegate.train.loop import build_balancer, build_engine
from tidegate.train.step import train_step
from tidegate.train.telemetry import Throughput, peak_flops


def main(path: str, overrides: list[str]) -> None:
    job: Job = load(path, Job, overrides).config
    collectives.start(alone=True)
    engine, balancer = build_engine(job), build_balancer(job)
    engine.set_learning_rate(1e-4)
    shape = (job.accumulation, job.train.micro_batch, job.data.sequence_length)
    documents = torch.arange(shape[-1], dtype=torch.int32).div(300, rounding_mode="floor").expand(shape)
    tokens = torch.randint(0, job.model.vocab_size, (*shape[:-1], shape[-1] + 1))
    batch = StepBatch(
        tokens, documents, torch.ones(shape, dtype=torch.bool), torch.zeros(shape[:-1], dtype=torch.int64)
    )
    rates = []
    for _ in range(6):
        throughput = Throughput(job, peak_flops(engine.device))
        train_step(engine, balancer, batch, isolate=job.data.documents == "isolate")
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        throughput.count(job.train.batch_tokens)
        rates.append(throughput.read())
    median = {name: statistics.median(rate[name] for rate in rates[2:]) for name in rates[0]}
    print(f"{1e3 * job.train.batch_tokens / median['speed/tokens_per_s']:.0f} ms a step", median)
    collectives.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
