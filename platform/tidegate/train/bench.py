"""What `tidegate bench` times: a job's own optimizer step, on random tokens that come through the job's own loader.

Three series of steps, each from the same model:

1. Plain steps, one after another as the loop takes them: the host may run ahead of the device. Speed, phases, memory
   and energy are of these.
2. Steps that are observed for telemetry, and read, alternating with plain ones, each with a device sync after it.
3. Two steps under the profiler; the second is the trace.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

from tidegate.data.loader import TrainLoader
from tidegate.data.shards import TokenDataset
from tidegate.model.clock import Clock
from tidegate.parallel import collectives
from tidegate.train.instruments import EnergyMeter, Memory, Split, Trace, record_trace, synchronize, time_phases
from tidegate.train.job import Job
from tidegate.train.loop import build_balancer, build_engine, build_loader, build_observer, fit_routers
from tidegate.train.step import outcome_share, train_step, update_routers, update_units
from tidegate.train.telemetry import Observer
from tidegate.train.throughput import peak_flops

__all__ = ["WARM_UP", "Measured", "measure"]

WARM_UP = 3
"""Steps before the first that counts: kernels are compiled, the allocator finds its blocks."""


class Measured(NamedTuple):
    """What one rank measured."""

    device: str
    peak_flops: float | None
    """Dense bf16 peak of the device, FLOP/s, if it is known."""
    steps_s: tuple[float, ...]
    """Of the plain steps, in order, without warm-up."""
    split: Split
    observed_over_plain: float
    """Median time of an observed step over that of a plain one."""
    data_s: float
    """Host time to make a batch, median; the loader does it in a thread, one step ahead."""
    trace: Trace | None
    """None on a CPU, and on every rank but the first."""
    memory: Memory | None
    energy_j: float | None
    """Of the plain steps."""
    energy_missing: str | None
    losses: tuple[float, ...]
    """Of the warm-up and the plain steps, nats a token, over all ranks; not finite where training blew up."""


class _Training:
    """A job's training, taken step by step as `loop.py` takes it, without saving and evaluating."""

    def __init__(self, job: Job, dataset: TokenDataset) -> None:
        self.job = job
        self.loader = build_loader(job, dataset)
        self.engine, self.balancer = build_engine(job), build_balancer(job)
        fit_routers(job, self.engine, dataset)
        self.steps = 0
        self.losses: list[torch.Tensor] = []
        """() each, this rank's share."""

    def step(self, observer: Observer | None = None) -> None:
        job, engine = self.job, self.engine
        batch = next(self.loader)
        self.steps += 1
        tokens = self.steps * job.train.batch_tokens
        engine.set_learning_rate(job.optimizer.schedule.at(tokens, job.train.tokens))
        clock = Clock(self.steps, tokens, job.train.seed)
        result = train_step(
            engine,
            self.balancer,
            batch,
            clock,
            isolate=job.data.documents == "isolate",
            last=outcome_share(self.losses[-1], engine) if self.losses else None,
            observer=observer,
        )
        self.losses.append(result.losses.nll)
        if self.balancer is not None:
            update_routers(engine.model, self.balancer, clock, job.balance.bias_rate)
        update_units(engine.model, result.losses, clock)
        result.before.tensor()  # as in the loop: waits for the beginning of this step, not for its end


def measure(job: Job, tokens: Path, steps: int) -> Measured:
    """Time the job's step; every rank of the process group calls this.

    Args:
        job: whose `resources.workers` is the size of the group.
        tokens: a prepared dataset of the job's domains.
        steps: how many plain steps count, at least 1; as many are observed.
    """
    dataset = TokenDataset.open(tokens, verify=False)
    training = _Training(job, dataset)
    device = training.engine.device
    timer = time_phases(training.engine)
    for _ in range(WARM_UP):
        training.step()

    synchronize(device)
    Memory.restart(device)
    meter = EnergyMeter(device)
    before_j = meter.read_j()
    for _ in range(steps):
        timer.begin_step()
        training.step()
    phases = timer.read()
    energy_j = meter.read_j() - before_j if meter.missing is None else None
    memory = Memory.peak(device)
    losses = torch.stack(training.losses)
    collectives.all_reduce(losses)

    observed_over_plain = _observed_over_plain(training, dataset, steps)
    trace = None
    if device.type == "cuda":
        if collectives.rank() == 0:
            trace = record_trace(training.step, device)
        else:  # the first rank's two steps need everyone
            training.step()
            training.step()
    data_s = _data_s(training.loader)
    training.loader.close()
    return Measured(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        peak_flops=peak_flops(device),
        steps_s=tuple(sum(step.values()) for step in phases),
        split=Split.median(phases),
        observed_over_plain=observed_over_plain,
        data_s=data_s,
        trace=trace,
        memory=memory,
        energy_j=energy_j,
        energy_missing=meter.missing,
        losses=tuple(losses.tolist()),
    )


def _observed_over_plain(training: _Training, dataset: TokenDataset, steps: int) -> float:
    seconds: dict[bool, list[float]] = {True: [], False: []}
    synchronize(training.engine.device)
    for number in range(2 * (steps + 1)):
        began = time.perf_counter()
        observer = build_observer(training.job, dataset) if number % 2 == 0 else None
        training.step(observer)
        if observer is not None:
            vector = observer.vector()
            collectives.all_reduce(vector)
            observer.metrics(vector.cpu())
        synchronize(training.engine.device)
        seconds[observer is not None].append(time.perf_counter() - began)
    # The first pair compiles what observing launches.
    return statistics.median(seconds[True][1:]) / statistics.median(seconds[False][1:])


def _data_s(loader: TrainLoader, batches: int = 5) -> float:
    """The loader makes one batch ahead, so taking one after another takes as long as making them."""
    seconds = []
    next(loader)
    for _ in range(batches):
        began = time.perf_counter()
        next(loader)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
