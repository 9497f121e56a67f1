"""What a node's host and GPUs do: against what this process does, and against a driver's own structures."""

from __future__ import annotations

import ctypes
import math
import os
import struct
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch

from tidegate.parallel import collectives
from tidegate.train import machines as module
from tidegate.train.machines import Machines
from tidegate.train.nvml import Gpu

CPU = torch.device("cpu")


class Driver:
    """NVML of a machine with two GPUs, by its C interface: what nvml.h says it writes, and where."""

    def __init__(self, name: str) -> None:
        if name != "libnvidia-ml.so.1":
            raise OSError(name)
        self.uuids = [b"GPU-3a", b"GPU-7c"]
        # By GPU: percent, bytes in use, milliwatts, degrees, millijoules; None is NVML_ERROR_NOT_SUPPORTED.
        self.counters: list[list[Any]] = [[37, 5 * 2**30, 250_500, 61, 7_000], [63, 70 * 2**30, 649_500, 83, 9_000]]

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        if uuid not in self.uuids:
            return 6
        ctypes.memmove(handle, struct.pack("N", 1 + self.uuids.index(uuid)), 8)
        return 0

    def _write(self, handle: ctypes.c_void_p, counter: int, layout: str, into: Any, *before: int) -> int:
        value = self.counters[(handle.value or 0) - 1][counter]
        if value is None:
            return 3
        packed = struct.pack(layout, *before, value)
        ctypes.memmove(into, packed, len(packed))
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle: Any, into: Any) -> int:
        return self._write(handle, 0, "I", into)

    def nvmlDeviceGetMemoryInfo(self, handle: Any, into: Any) -> int:
        return self._write(handle, 1, "QQQ", into, 80 * 2**30, 2**30)  # total, free, used

    def nvmlDeviceGetPowerUsage(self, handle: Any, into: Any) -> int:
        return self._write(handle, 2, "I", into)

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int, into: Any) -> int:
        assert sensor == 0
        return self._write(handle, 3, "I", into)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, into: Any) -> int:
        return self._write(handle, 4, "Q", into)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    installed = Driver("libnvidia-ml.so.1")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: installed)
    return installed


def test_a_gpus_counters_are_read_in_their_units(driver: Driver) -> None:
    gpu = Gpu("3a")
    assert gpu.busy() == pytest.approx(0.37)
    assert gpu.memory_bytes() == 5 * 2**30
    assert gpu.power_w() == pytest.approx(250.5)
    assert gpu.temperature_c() == 61
    assert gpu.energy_j() == pytest.approx(7.0)
    assert Gpu("GPU-7c").temperature_c() == 83
    with pytest.raises(RuntimeError, match="nvmlDeviceGetHandleByUUID returned 6"):
        Gpu("ff")


def test_a_node_has_the_mean_the_fullest_the_sum_and_the_hottest_of_its_gpus(driver: Driver) -> None:
    both = [Gpu("3a"), Gpu("7c")]
    assert module._gpus(both) == pytest.approx([0.5, 70.0, 900.0, 83.0])
    driver.counters[0][0] = driver.counters[1][3] = None  # a part of a GPU, a card without a sensor
    busy, *others, hottest = module._gpus(both)
    assert math.isnan(busy)
    assert math.isnan(hottest)
    assert others == pytest.approx([70.0, 900.0])


def test_without_a_driver_there_are_no_gpus() -> None:
    with pytest.raises(OSError, match="libnvidia-ml"):
        Gpu("3a")
    assert module._reachable(["3a", None]) == []


def test_an_old_driver_lacks_a_counter_and_not_the_others(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Driver, "nvmlDeviceGetPowerUsage")
    _, fullest, power, hottest = module._gpus([Gpu("7c")])
    assert (fullest, hottest) == (70.0, 83.0)
    assert math.isnan(power)


def watched() -> list[dict[str, float]]:
    """Records of a rank that works, then sleeps, on one of as many nodes as the group has pairs of ranks."""
    os.environ["LOCAL_RANK"] = str(collectives.rank() % 2)
    records = []
    with Machines(CPU) as machines:
        for work in (True, False):
            if work:
                until = time.process_time() + 0.3
                while time.process_time() < until:
                    pass
            vector = machines.vector()
            collectives.all_reduce(vector)
            records.append(machines.metrics(vector))
            time.sleep(0.05)
    return records


def test_every_node_is_seen_once_and_by_every_rank(on_ranks: Callable[..., Any]) -> None:
    """Three ranks, of which the first and the third lead a node."""
    found = on_ranks(3, watched)
    assert found[0] == found[1] == found[2]
    total_gib = psutil.virtual_memory().total / 2**30
    names = {"cpu_busy", "memory_gib", "disk_read_mb_per_s", "disk_write_mb_per_s", "network_received_mb_per_s"}
    names |= {"network_sent_mb_per_s"}
    for record in found[0]:
        assert set(record) == {f"system/{node}/{name}" for node in (0, 1) for name in names}, "no GPU, no series"
        for node in (0, 1):
            assert 0.1 < record[f"system/{node}/memory_gib"] < total_gib
            assert 0 <= record[f"system/{node}/cpu_busy"] <= 1
    assert found[0][0]["system/0/cpu_busy"] > 0.1, "three ranks worked"
    assert found[0][0] == found[0][1], "nothing new within a second"


def test_a_record_is_the_mean_of_what_came_since_the_last(on_ranks: Callable[..., Any]) -> None:
    on_ranks(1, means)


def means() -> None:
    machines = Machines(CPU)
    filler = [1.0] * (len(module._Sample._fields) - 1)
    for busy in (0.25, 0.5, 0.75):
        machines._samples.append(module._Sample(busy, *filler))
    assert machines.metrics(machines.vector())["system/0/cpu_busy"] == 0.5
    machines._samples.append(module._Sample(1.0, *filler))
    assert machines.metrics(machines.vector())["system/0/cpu_busy"] == 1.0


def test_rates_are_differences_over_the_time_between() -> None:
    before = module._Counts(time_s=10.0, cpu_s=100.0, idle_s=80.0, disk=(0, 5_000_000), network=(7, 0))
    now = module._Counts(time_s=12.0, cpu_s=104.0, idle_s=81.0, disk=(4_000_000, 5_000_000), network=(7, 1_000_000))
    busy, memory_gib, *rates = module._host(before, now)
    assert busy == pytest.approx(0.75)
    assert rates == pytest.approx([2.0, 0.0, 0.0, 0.5])
    used = psutil.virtual_memory()
    assert memory_gib == pytest.approx((used.total - used.available) / 2**30, rel=0.2)
