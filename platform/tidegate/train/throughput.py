"""Tokens and model FLOPs a second."""

from __future__ import annotations

import time

import torch

from tidegate.model.flops import PEAK_BF16_FLOPS, total
from tidegate.train.job import Job

__all__ = ["Throughput", "device_name", "peak_flops"]


class Throughput:
    """Tokens and model FLOPs a second between two readings, leaving out time spent elsewhere.

    Args:
        job: whose model FLOPs count.
        peak: FLOP/s of one device, or None where none is known (a CPU, or fp32): then no MFU.
    """

    def __init__(self, job: Job, peak: float | None) -> None:
        self._flops_per_token = total(job.model, job.data.sequence_length).flops_per_token
        self._devices = job.resources.workers
        self._peak = peak if job.train.precision == "bf16" else None
        self._since = time.monotonic()
        self._tokens = 0

    def count(self, tokens: int) -> None:
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """Rates since the last reading or `restart`."""
        elapsed = max(time.monotonic() - self._since, 1e-9)
        tokens_per_s = self._tokens / elapsed
        flops = tokens_per_s * self._flops_per_token / self._devices
        metrics = {"speed/tokens_per_s": tokens_per_s, "speed/model_tflops_per_device": flops / 1e12}
        if self._peak is not None:
            metrics["speed/mfu"] = flops / self._peak
            metrics["speed/peak_tflops_per_device"] = self._peak / 1e12
        self.restart()
        return metrics

    def restart(self) -> None:
        """Forget the time since the last reading: it went into evaluating."""
        self._since, self._tokens = time.monotonic(), 0


def device_name(device: torch.device) -> str:
    """The kind of GPU as its driver calls it, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of this device by name, FLOP/s; None if it has no data sheet here."""
    name = device_name(device)
    return next((flops for known, flops in PEAK_BF16_FLOPS.items() if name.startswith(known)), None)
