"""Steps that were measured: what the plan was fitted to, checked against, and beyond which it extrapolates."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import Field

from tidegate.config import Config, load

__all__ = ["Measurement", "measurements"]


class Measurement(Config):
    job: str
    """In `jobs/bench`."""
    set: tuple[str, ...] = ()
    """Overrides."""
    gpus: str
    """As `--gpus` has them."""
    step_s: float = Field(gt=0)
    """Median."""
    peak_gib: float | None = None
    """Allocated on one GPU."""
    communication_s: float | None = None
    """That an NCCL kernel ran in a step."""
    fit: str | None = None
    """What of `Efficiency` the row was fitted for; None: held out."""


class _Table(Config):
    rows: tuple[Measurement, ...]


@cache
def measurements() -> tuple[Measurement, ...]:
    """All that are shipped."""
    table: _Table = load(Path(__file__).with_name("measured.yaml"), _Table).config
    return table.rows
