"""The loop in this process: no Ray, one worker; for debugging."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch

from tidegate.launch.cost import Ledger
from tidegate.launch.ended import Ended
from tidegate.parallel import collectives
from tidegate.track import MetricLogger
from tidegate.train.checkpoint import Tracker
from tidegate.train.job import Job
from tidegate.train.loop import World, train
from tidegate.train.telemetry import Record
from tidegate.train.throughput import device_name

__all__ = ["run_local"]


def run_local(
    job: Job,
    dataset: Path,
    checkpoints: str,
    logger: MetricLogger,
    show: Callable[[Record], bool],
    notice: Callable[[str], None],
    ledger: Ledger,
) -> Ended:
    """Train here until the end, a signal, a limit, or `show` says so; continues from the run's newest checkpoint."""
    if "OMP_NUM_THREADS" not in os.environ:  # as a worker of Ray: sums of another number of threads differ
        torch.set_num_threads(job.resources.cpus_per_worker)
    made = collectives.start(alone=True)
    assert made
    logger.tag("gpu", device_name(collectives.default_device()))
    stop, meter = _StopOnSignal(), ledger.meter()

    def record(record: Record) -> None:
        record = meter.mark(record)
        if show(record):
            stop.request()
        logger.log(record.metrics, step=record.step, tokens=record.tokens)

    def should_stop() -> bool:
        return stop.requested() or ledger.take(meter.read())

    tracker = Tracker(logger.unsent, logger.adopt)
    world = World(dataset, checkpoints, record, notice, should_stop, tracker)
    meter.set_workers(1)
    try:
        with stop:
            outcome = train(job, world)
    finally:
        ledger.take(meter.read())
        delivery = logger.close()
        collectives.stop()
    return Ended(outcome, delivery)


class _StopOnSignal:
    """SIGTERM and Ctrl-C ask the loop to end after its step; a second one ends the process."""

    def __init__(self) -> None:
        self._requested = False

    def requested(self) -> bool:
        return self._requested

    def request(self) -> None:
        self._requested = True

    def __enter__(self) -> None:
        # In a thread, as in a trial of a sweep, signals are somebody else's.
        numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
