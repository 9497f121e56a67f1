"""Predicted time and money, from the model FLOP/s that `tidegate bench` measured of the job as it stands.

A step of a candidate is its model FLOPs over that rate: right for candidates that use the device as well as the job
does. Small matrices, other routers and longer sequences do worse. Evaluations, checkpoints and starts come on top.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tidegate.config import ConfigError
from tidegate.launch.bench import BenchResult, read_result
from tidegate.model.flops import total
from tidegate.train.job import Job

__all__ = ["Estimate", "estimate", "refuse_other_measurement", "step_time", "training_time"]


class Estimate(NamedTuple):
    """Of a sweep's training steps."""

    hours: float
    """One trial at a time."""
    worker_hours: float
    """Of `workers_of` a trial."""


def step_time(job: Job) -> float:
    """Seconds a step, predicted; the job names a measurement, which `refuse_other_measurement` has accepted."""
    assert job.search is not None
    assert job.search.measured is not None
    flops = total(job.model, job.data.sequence_length).flops_per_token * job.train.batch_tokens
    rate = _measurement(Path(job.search.measured)).model_tflops_per_device * 1e12
    return flops / (rate * job.resources.workers)


def training_time(job: Job) -> float:
    """Seconds of all steps."""
    return step_time(job) * job.train.tokens / job.train.batch_tokens


def estimate(jobs: Sequence[Job], more: int) -> Estimate:
    """Of these jobs, at least one, and so many more that take as long as these on average."""
    hours = sum(map(training_time, jobs)) / len(jobs) * (len(jobs) + more) / 3600
    return Estimate(hours, hours * workers_of(jobs[0]))


def workers_of(job: Job) -> float:
    """What a trial takes and pays for: GPUs, or a part of one, or processes of a job without GPUs."""
    assert job.search is not None
    return job.resources.workers * (job.search.gpu_share if job.resources.gpu else 1.0)


def refuse_other_measurement(job: Job) -> None:
    """Raise ConfigError if what `search.measured` names is no measurement, or one on another device or precision."""
    assert job.search is not None
    if job.search.measured is None:
        return
    found = _measurement(Path(job.search.measured)).job
    for name, of, here in (
        ("resources.gpu", found["resources"]["gpu"], job.resources.gpu),
        ("train.precision", found["train"]["precision"], job.train.precision),
    ):
        if of != here:
            raise ConfigError(f"search.measured={job.search.measured} has {name}={of}, and the job {name}={here}")


@functools.lru_cache
def _measurement(path: Path) -> BenchResult:
    return read_result(path, "search.measured")
