"""A GPU's own counters, through the driver's management library (NVML), without another package.

Source: NVIDIA's NVML API reference, https://docs.nvidia.com/deploy/nvml-api.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

__all__ = ["Gpu", "GpuState", "gpus"]

_TEMPERATURE_GPU = 0
_CLOCK_SM = 1
_UNCORRECTED, _SINCE_BOOT = 1, 0
_NAME_CHARS = 96
_SLOWED_BY = {
    0x08: "hardware slowdown",
    0x20: "heat, by the driver",
    0x40: "heat, by the hardware",
    0x80: "power brake",
}
"""Reasons for a lower clock that a healthy GPU has not; idle (0x01) and the power cap (0x04) are everyday."""
_IDLE = 0x01


class GpuState(NamedTuple):
    """Whether a GPU is healthy; None is what it does not count."""

    name: str
    driver: str
    clock_mhz: int | None
    max_clock_mhz: int | None
    idle: bool
    slowed_by: tuple[str, ...]
    uncorrected_errors: int | None
    """Of its memory, since the machine started."""


class _Utilization(ctypes.Structure):
    """`nvmlUtilization_t`, percent of the driver's last sample, of 1/6 s to 1 s."""

    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class _Memory(ctypes.Structure):
    """`nvmlMemory_t`, bytes."""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class Gpu:
    """One GPU; every reading raises RuntimeError where it lacks that counter.

    Args:
        which: its UUID as PyTorch gives it, or its number among all of the machine's.

    Raises:
        OSError: there is no driver here.
        RuntimeError: it does not know this GPU.
    """

    def __init__(self, which: str | int) -> None:
        self._nvml = _driver()
        self._handle = ctypes.c_void_p()
        if isinstance(which, int):
            self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(which), ctypes.byref(self._handle))
        else:
            name = f"GPU-{which.removeprefix('GPU-')}".encode()
            self._call("nvmlDeviceGetHandleByUUID", name, ctypes.byref(self._handle))

    def energy_j(self) -> float:
        """Since the driver was loaded."""
        return self._read("TotalEnergyConsumption", ctypes.c_ulonglong()).value / 1e3

    def busy(self) -> float:
        """Share of the last moment in which a kernel ran."""
        return self._read("UtilizationRates", _Utilization()).gpu / 100

    def memory_bytes(self) -> int:
        """In use, by all processes."""
        return int(self._read("MemoryInfo", _Memory()).used)

    def power_w(self) -> float:
        return self._read("PowerUsage", ctypes.c_uint()).value / 1e3

    def temperature_c(self) -> float:
        return float(self._read("Temperature", ctypes.c_uint(), _TEMPERATURE_GPU).value)

    def state(self) -> GpuState:
        """Its clock, what slows it and its errors."""
        reasons = self._number("CurrentClocksThrottleReasons", ctypes.c_ulonglong()) or 0
        name, driver = (ctypes.create_string_buffer(_NAME_CHARS) for _ in range(2))
        self._call("nvmlDeviceGetName", self._handle, name, ctypes.c_uint(_NAME_CHARS))
        self._call("nvmlSystemGetDriverVersion", driver, ctypes.c_uint(_NAME_CHARS))
        return GpuState(
            name.value.decode(),
            driver.value.decode(),
            self._number("ClockInfo", ctypes.c_uint(), _CLOCK_SM),
            self._number("MaxClockInfo", ctypes.c_uint(), _CLOCK_SM),
            bool(reasons & _IDLE),
            tuple(reason for bit, reason in _SLOWED_BY.items() if reasons & bit),
            self._number("TotalEccErrors", ctypes.c_ulonglong(), _UNCORRECTED, _SINCE_BOOT),
        )

    def _number(self, counter: str, into: Any, *which: int) -> int | None:
        try:
            return int(self._read(counter, into, *which).value)
        except RuntimeError:
            return None

    def _read(self, counter: str, into: Any, *which: int) -> Any:
        self._call(f"nvmlDeviceGet{counter}", self._handle, *which, ctypes.byref(into))
        return into

    def _call(self, function: str, *args: Any) -> None:
        _call(self._nvml, function, *args)


def gpus() -> list[Gpu]:
    """All of this machine, also those that this process may not use.

    Raises:
        OSError: there is no driver here.
        RuntimeError: it does not answer.
    """
    count = ctypes.c_uint()
    _call(_driver(), "nvmlDeviceGetCount_v2", ctypes.byref(count))
    return [Gpu(index) for index in range(count.value)]


def _driver() -> Any:
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    _call(nvml, "nvmlInit_v2")
    return nvml


def _call(nvml: Any, function: str, *args: Any) -> None:
    try:
        status = getattr(nvml, function)(*args)
    except AttributeError as error:
        raise RuntimeError(f"this driver's NVML has no {function}") from error
    if status != 0:
        raise RuntimeError(f"{function} returned {status}")
