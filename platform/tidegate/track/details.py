"""Metrics of single experts, heads, bins and domains of a layer: nine in ten of a run's names.

MLflow's page of a run makes a card for each metric, so these are artifacts beside them: of each record that has any, a
file `details/<step>-<time in ms>.json` of name to value, NaN and infinities as Python's json writes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tidegate.metric_path import parse_metric
from tidegate.track.spool import Record

__all__ = ["FOLDER", "Point", "details_of", "file_of", "points_in"]

FOLDER = "details"

Point = tuple[str, int, int, float]
"""Name, step, time in ms since 1970, value."""


def details_of(record: Record) -> dict[str, float]:
    """What of a record goes into its file."""
    return {name: value for name, value in record.metrics.items() if parse_metric(name).is_detail}


def file_of(record: Record) -> str:
    """Path among the run's artifacts; the same however often the record is sent."""
    return f"{FOLDER}/{record.step:08d}-{record.timestamp_ms}.json"


def points_in(files: Iterable[Path], steps: Iterable[int] | None = None) -> Iterator[Point]:
    """Of the records at some steps, or of all; a file that is not whole is passed over: it is being written."""
    wanted = None if steps is None else set(steps)
    for path in sorted(files):
        place = re.fullmatch(r"(\d+)-(\d+)\.json", path.name)
        if place is None or (wanted is not None and int(place[1]) not in wanted):
            continue
        try:
            values = json.loads(path.read_bytes())
        except ValueError:
            continue
        yield from ((name, int(place[1]), int(place[2]), value) for name, value in values.items())
