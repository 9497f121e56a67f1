"""What a run has cost so far, and the `limits:` section of a job: what it may cost."""

from __future__ import annotations

from pydantic import Field

from tidegate.config import Config

__all__ = ["LimitsConfig", "Spent"]


class Spent(Config):
    """What a run has cost over all its starts, with workers that were lost; the metrics `cost/`."""

    hours: float = Field(default=0.0, ge=0)
    """With workers: the time between a stop and the next start does not count."""
    gpu_hours: float = Field(default=0.0, ge=0)
    """Of all workers: a GPU each, or a process each on a job without GPUs."""
    money: float | None = Field(default=None, ge=0)
    """At the price of the time; hours without a price cost none, and None says that no hour had one."""

    def __add__(self, other: Spent) -> Spent:
        money = None if self.money is None and other.money is None else (self.money or 0.0) + (other.money or 0.0)
        return Spent(hours=self.hours + other.hours, gpu_hours=self.gpu_hours + other.gpu_hours, money=money)

    def metrics(self) -> dict[str, float]:
        """Under the names of docs/metrics.md."""
        return {f"cost/{name}": value for name, value in self if value is not None}


class LimitsConfig(Config):
    """Where a run stops after a step, saved, to be resumed with higher limits; each counts all starts of the run."""

    max_hours: float | None = Field(default=None, gt=0)
    max_gpu_hours: float | None = Field(default=None, gt=0)
    max_money: float | None = Field(default=None, gt=0)
    """At `resources.price_per_hour`."""

    def reached(self, spent: Spent) -> str:
        """Which limit is reached, such as `limits.max_hours=2`; empty if none is."""
        for name, value in spent:
            most = getattr(self, f"max_{name}")
            if most is not None and value is not None and value >= most:
                return f"limits.max_{name}={most:g}"
        return ""
