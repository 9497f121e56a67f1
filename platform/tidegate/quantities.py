"""Counts as people write them: 300M parameters, 1T tokens; and what a run has cost."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tidegate.config import ConfigError

__all__ = ["PREFIXES", "cost_shown", "count_shown", "parse_count"]

PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_SHOWN = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
_COUNT = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_count(text: str, what: str) -> int:
    """A whole number of at least 1: `131072`, `300M`, `1.5T`, `2e9`.

    Args:
        text: as it was written.
        what: for the error, such as `--tokens`.

    Raises:
        ConfigError: it is not of this form, or less than 1.
    """
    match = _COUNT.fullmatch(text)
    if match is None or match[2] not in PREFIXES:
        raise ConfigError(f"{what} {text!r} is not a count such as 300M or 1T; prefixes are k, M, G or B, and T")
    count = round(float(match[1]) * PREFIXES[match[2]]) if float(match[1]) < 1e30 else 0
    if count < 1:
        raise ConfigError(f"{what} {text!r} is not at least 1, or larger than anyone counts")
    return count


def count_shown(value: float) -> str:
    """For people, three digits and a prefix."""
    unit, size = next(((unit, size) for unit, size in _SHOWN.items() if value >= size), ("", 1.0))
    return f"{value / size:.3g}{unit}"


def cost_shown(metrics: Mapping[str, float], gpu: bool) -> str:
    """The metrics `cost/` for people.

    Args:
        gpu: whether a worker has one.
    """
    money = f", {metrics['cost/money']:.3g} in money" if "cost/money" in metrics else ""
    return f"{metrics['cost/gpu_hours']:.3g} {'GPU' if gpu else 'worker'}-hours{money}"
