"""What the page's script draws, as plain values: lines, maps over time, and frames with a slider.

Every figure over time has its points at both steps and tokens, so that the page can switch between them. Series are
thinned to what a screen shows, values to 5 digits; NaN and infinities are gaps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from tidegate.track.spool import TOKENS

__all__ = ["Figure", "by_layer", "columns", "frames", "lines", "rounded"]

Figure = dict[str, Any]

MAX_POINTS = 400
MAX_CELLS = 40_000
"""Of a map or of all frames of a figure: 250 kB of JSON."""
MAX_FRAMES = 24
MAX_LINES = 8
"""More layers are a map."""


def columns(history: pd.DataFrame, pattern: str) -> dict[str, str]:
    """Label by name of the metrics that match whole; the label is the pattern's group, numbers in their order."""
    found = {str(name): match[1] for name in history if (match := re.fullmatch(pattern, str(name)))}
    numeric = all(label.isdigit() for label in found.values())
    return dict(sorted(found.items(), key=lambda item: int(item[1]) if numeric else item[1]))


def lines(
    title: str, unit: str, history: pd.DataFrame, series: Mapping[str, str], *, log: bool = False
) -> Figure | None:
    """Lines over time; None without a value.

    Args:
        title: of the figure.
        unit: of the values.
        history: index step, with the column `tokens`.
        series: label by metric.
        log: a logarithmic axis of values.
    """
    table = _logged(history, series)
    if table is None:
        return None
    table = _thinned(table)
    values = [{"name": label, "y": rounded(table[name])} for name, label in series.items() if name in table]
    return {"kind": "lines", "title": title, "unit": unit, "x": _x(table), "series": values, "log": log}


def by_layer(title: str, unit: str, history: pd.DataFrame, pattern: str, what: str) -> Figure | None:
    """A metric of every layer: lines of a few, a map of many; None without a value.

    Args:
        pattern: of the metric's name, with a group for the layer's number.
        what: the layers are called.
    """
    found = columns(history, pattern)
    if len(found) <= MAX_LINES:
        return lines(title, unit, history, {name: f"{what} {label}" for name, label in found.items()})
    table = _logged(history, found)
    if table is None:
        return None
    table = _every(table, min(MAX_POINTS, MAX_CELLS // len(found)))
    rows = [rounded(table[name]) for name in found if name in table]
    labels = [label for name, label in found.items() if name in table]
    return {"kind": "map", "title": title, "unit": unit, "x": _x(table), "y": labels, "y_title": what, "z": rows}


def frames(
    title: str,
    unit: str,
    groups: Mapping[str, Sequence[tuple[int, np.ndarray]]],
    tokens: Mapping[int, float],
    axes: tuple[str, str],
    *,
    middle: float | None = None,
) -> Figure | None:
    """Matrices at some steps, with a slider, and a choice between groups; None without any.

    Args:
        groups: name to (step, (rows, columns) matrix), in order.
        tokens: of the steps, as far as they are known.
        axes: what rows and columns are called.
        middle: value of the neutral colour; None: colours from the least to the largest.
    """
    groups = {name: shown for name, shown in groups.items() if len(shown)}
    if not groups:
        return None
    size = max(matrix.size for shown in groups.values() for _, matrix in shown)
    count = min(MAX_FRAMES, max(MAX_CELLS // (max(size, 1) * len(groups)), 1))
    largest = max(float(np.nanmax(matrix, initial=0.0)) for shown in groups.values() for _, matrix in shown)
    choices = []
    for name, shown in groups.items():
        kept = [shown[index] for index in _spread(len(shown), count)]
        steps = [step for step, _ in kept]
        x = {"steps": steps, "tokens": [_number(tokens.get(step)) for step in steps]}
        z = [[rounded(row, 3) for row in matrix] for _, matrix in kept]
        choices.append({"name": name, "x": x, "z": z})
    return {
        "kind": "frames",
        "title": title,
        "unit": unit,
        "y_title": axes[0],
        "x_title": axes[1],
        "groups": choices,
        "middle": middle,
        "largest": _number(largest),
    }


def rounded(values: Any, digits: int = 5) -> list[float | None]:
    """Values as JSON has them; None where they are not finite."""
    return [_number(value, digits) for value in np.asarray(values, dtype=float).tolist()]


def _number(value: float | None, digits: int = 5) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def _logged(history: pd.DataFrame, series: Mapping[str, str]) -> pd.DataFrame | None:
    """The rows that have a value of the series."""
    names = [name for name in series if name in history]
    table = history[[TOKENS, *names]].dropna(how="all", subset=names) if names else history.iloc[:0]
    return table if len(table) else None


def _thinned(table: pd.DataFrame) -> pd.DataFrame:
    """To about `MAX_POINTS` rows for each group of series that have values in the same rows.

    So what is logged with evaluations only does not go with most rows of training.
    """
    known = table.drop(columns=TOKENS).notna()
    together: dict[bytes, list[str]] = {}
    for name in known:
        together.setdefault(known[name].to_numpy().tobytes(), []).append(name)
    kept: set[int] = set()
    for names in together.values():
        rows = np.flatnonzero(known[names[0]])
        kept |= {*rows[_extremes(table[names].iloc[rows].mean(axis=1).to_numpy())].tolist()}
    return table.iloc[sorted(kept)]


def _extremes(level: np.ndarray) -> list[int]:
    """Indices of the lowest and the highest value of each of equal stretches, so that spikes stay; and both ends."""
    if len(level) <= MAX_POINTS:
        return [*range(len(level))]
    kept = {0, len(level) - 1}
    for begin, end in pairwise(np.linspace(0, len(level), MAX_POINTS // 2 + 1, dtype=int)):
        part = level[begin:end]
        if np.isfinite(part).any():
            kept |= {begin + int(np.nanargmin(part)), begin + int(np.nanargmax(part))}
    return sorted(kept)


def _every(table: pd.DataFrame, count: int) -> pd.DataFrame:
    return table.iloc[_spread(len(table), count)]


def _spread(total: int, count: int) -> list[int]:
    """At most `count` indices of `total`, evenly spread, the last one among them."""
    return sorted({*np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist(), total - 1})


def _x(table: pd.DataFrame) -> dict[str, list]:
    return {"steps": [int(step) for step in table.index], "tokens": rounded(table[TOKENS], 9)}
