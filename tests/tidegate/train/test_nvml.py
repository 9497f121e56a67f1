"""What is read from NVIDIA's management library, with a stand-in for a driver that this machine has not."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from tidegate.train.nvml import GpuState, gpus


class Driver:
    """NVML of two GPUs; the second counts no ECC errors."""

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        handle._obj.value = 1 + index.value
        return 0

    def nvmlDeviceGetName(self, handle: Any, name: Any, size: Any) -> int:
        name.value = f"GPU of {handle.value}".encode()
        return 0

    def nvmlSystemGetDriverVersion(self, version: Any, size: Any) -> int:
        version.value = b"570.1"
        return 0

    def nvmlDeviceGetClockInfo(self, handle: Any, clock: int, into: Any) -> int:
        into._obj.value = 1000 * handle.value if clock == 1 else 5
        return 0

    def nvmlDeviceGetMaxClockInfo(self, handle: Any, clock: int, into: Any) -> int:
        into._obj.value = 1980 if clock == 1 else 5
        return 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any, into: Any) -> int:
        into._obj.value = {1: 0x40 | 0x04 | 0x80, 2: 0x01}[handle.value]
        return 0

    def nvmlDeviceGetTotalEccErrors(self, handle: Any, kind: int, since: int, into: Any) -> int:
        if handle.value == 2:
            return 3  # not supported
        into._obj.value = 2**40 if (kind, since) == (1, 0) else 5
        return 0


def test_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert [gpu.state() for gpu in gpus()] == [
        GpuState("GPU of 1", "570.1", 1000, 1980, False, ("heat, by the hardware", "power brake"), 2**40),
        GpuState("GPU of 2", "570.1", 2000, 1980, True, (), None),
    ]
