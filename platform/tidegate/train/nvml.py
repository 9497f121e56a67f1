"""A GPU's own counters, through the driver's management library (NVML), without another package.

Source: NVIDIA's NVML API reference, https://docs.nvidia.com/deploy/nvml-api.
"""

from __future__ import annotations

import ctypes
from typing import Any

__all__ = ["Gpu"]

_TEMPERATURE_GPU = 0


class _Utilization(ctypes.Structure):
    """`nvmlUtilization_t`, percent of the driver's last sample, of 1/6 s to 1 s."""

    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class _Memory(ctypes.Structure):
    """`nvmlMemory_t`, bytes."""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class Gpu:
    """One GPU; every reading raises RuntimeError where it lacks that counter.

    Args:
        uuid: as PyTorch gives it.

    Raises:
        OSError: there is no driver here.
        RuntimeError: it does not know this GPU.
    """

    def __init__(self, uuid: str) -> None:
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self._handle = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        name = f"GPU-{uuid.removeprefix('GPU-')}".encode()
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

    def _read(self, counter: str, into: Any, *which: int) -> Any:
        self._call(f"nvmlDeviceGet{counter}", self._handle, *which, ctypes.byref(into))
        return into

    def _call(self, function: str, *args: Any) -> None:
        try:
            status = getattr(self._nvml, function)(*args)
        except AttributeError as error:
            raise RuntimeError(f"this driver's NVML has no {function}") from error
        if status != 0:
            raise RuntimeError(f"{function} returned {status}")
