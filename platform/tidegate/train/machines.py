"""What the hosts and GPUs of a run do: CPU, memory, disk, network, and what NVML counts.

One thread a node samples them. A record takes the mean of the samples since the last one, in the reduction that it
makes anyway: every node has a row of its own in the vector, and all other ranks add zeros to it. docs/metrics.md has
the names.

Letters: N nodes, M metrics, G GPUs of the run on a node, S samples.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple

import numpy as np
import psutil
import torch

from tidegate.parallel import collectives
from tidegate.train.nvml import Gpu

__all__ = ["Machines"]

EVERY_S = 1.0
GIB = 2.0**30


class _Sample(NamedTuple):
    """One row of a record; NaN is what the node does not have, and is not recorded."""

    cpu_busy: float
    memory_gib: float
    disk_read_mb_per_s: float
    disk_write_mb_per_s: float
    network_received_mb_per_s: float
    network_sent_mb_per_s: float
    gpu_busy: float
    gpu_memory_gib: float
    gpu_power_w: float
    gpu_temperature_c: float


class _Counts(NamedTuple):
    """What the host counts since it was started."""

    time_s: float
    cpu_s: float
    """All of its cores' time."""
    idle_s: float
    disk: tuple[int, int]
    """Bytes read and written."""
    network: tuple[int, int]
    """Bytes received and sent, without those that stay in the machine."""


class Machines:
    """Watches this rank's node if it is the first of the node; a context. Every rank must make one: they gather.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        uuid = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
        ranks = collectives.gather((collectives.local_rank(), uuid))
        nodes = np.cumsum([local_rank == 0 for local_rank, _ in ranks]) - 1  # the ranks of a node follow each other
        self._num_nodes = int(nodes[-1]) + 1
        self._node = int(nodes[collectives.rank()])
        self._leads = collectives.local_rank() == 0
        here = [uuid for node, (_, uuid) in zip(nodes, ranks, strict=True) if node == self._node]
        self._gpus = _reachable(here) if self._leads else []
        self._lock = threading.Lock()  # of the samples
        self._samples: list[_Sample] = []
        self._mean_M = np.full(len(_Sample._fields), np.nan)
        self._counts = _count()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="machines", daemon=True)

    def __enter__(self) -> Machines:
        if self._leads:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        if self._leads:
            self._thread.join()

    def vector(self) -> torch.Tensor:
        """(N * M,) fp32 on the host, to be summed over ranks; means since the last call, or as then if that was just
        now."""
        rows_NM = torch.zeros(self._num_nodes, len(_Sample._fields))
        if self._leads:
            with self._lock:
                if not self._samples and np.isnan(self._mean_M).all():
                    self._sample()  # the run is younger than the first sample
                if self._samples:
                    self._mean_M, self._samples = np.mean(self._samples, axis=0), []
            rows_NM[self._node] = torch.from_numpy(self._mean_M)
        return rows_NM.flatten()

    def metrics(self, vector: torch.Tensor) -> dict[str, float]:
        """Metrics from the reduced `vector`, on the host."""
        rows_NM = vector.view(self._num_nodes, -1).tolist()
        named = (
            (f"system/{node}/{name}", value)
            for node, row in enumerate(rows_NM)
            for name, value in zip(_Sample._fields, row, strict=True)
        )
        return {name: value for name, value in named if math.isfinite(value)}

    def _watch(self) -> None:
        while not self._ending.wait(EVERY_S):
            with self._lock:
                self._sample()

    def _sample(self) -> None:
        before, self._counts = self._counts, _count()
        self._samples.append(_Sample(*_host(before, self._counts), *_gpus(self._gpus)))


def _count() -> _Counts:
    times = psutil.cpu_times()
    # Linux counts guests' time twice, and waiting for a disk is idle too.
    total_s = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    idle_s = times.idle + getattr(times, "iowait", 0.0)
    disk = psutil.disk_io_counters()
    cards = [card for name, card in psutil.net_io_counters(pernic=True).items() if not name.startswith("lo")]
    return _Counts(
        time.monotonic(),
        total_s,
        idle_s,
        (0, 0) if disk is None else (disk.read_bytes, disk.write_bytes),
        (sum(card.bytes_recv for card in cards), sum(card.bytes_sent for card in cards)),
    )


def _host(before: _Counts, now: _Counts) -> list[float]:
    """The fields of a sample that are not of GPUs."""
    elapsed_s, cpu_s = now.time_s - before.time_s, now.cpu_s - before.cpu_s
    busy = 1 - (now.idle_s - before.idle_s) / cpu_s if cpu_s > 0 else math.nan  # the kernel counts in 1/100 s
    memory = psutil.virtual_memory()
    transferred = [*zip(before.disk, now.disk, strict=True), *zip(before.network, now.network, strict=True)]
    rates = [(after - earlier) / 1e6 / elapsed_s for earlier, after in transferred]
    return [min(max(busy, 0.0), 1.0), (memory.total - memory.available) / GIB, *rates]


def _gpus(gpus_G: Sequence[Gpu]) -> list[float]:
    """The fields of a sample that are of GPUs: the mean, the fullest, the sum, the hottest."""
    busy = [_known(gpu.busy) for gpu in gpus_G]
    memory = [_known(gpu.memory_bytes) / GIB for gpu in gpus_G]
    power = [_known(gpu.power_w) for gpu in gpus_G]
    temperature = [_known(gpu.temperature_c) for gpu in gpus_G]
    if not gpus_G:
        return [math.nan] * 4
    return [float(np.mean(busy)), float(np.max(memory)), float(np.sum(power)), float(np.max(temperature))]


def _known(read: Callable[[], float]) -> float:
    try:
        return read()
    except RuntimeError:  # a part of a GPU (MIG) has no load of its own, a passively cooled one no sensor
        return math.nan


def _reachable(uuids: Sequence[str | None]) -> list[Gpu]:
    """Those of the GPUs that NVML knows; none without a driver."""
    found = []
    for uuid in uuids:
        try:
            found += [] if uuid is None else [Gpu(uuid)]
        except (OSError, RuntimeError):
            return []
    return found
