"""A run as the page reads it: its history, what happened when, and its artifacts."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from tidegate.track.page.figures import MAX_POINTS
from tidegate.track.read import RunData

__all__ = [
    "EVENTS_FILE",
    "LOADS_FILE",
    "SAMPLES_FILE",
    "Event",
    "EventKind",
    "Loads",
    "Recording",
    "read_loads",
    "read_samples",
    "record_of",
]

EVENTS_FILE = "events.jsonl"
"""Artifact: a line of JSON a notice of the run, with `time_ms`, `step` (the last recorded one) and `text`."""
LOADS_FILE = "expert_load.npz"
"""Artifact: `steps` (S,), `domains` (D,), `load_SDLE` shares of each domain's held-out assignments."""

SAMPLES_FILE = "samples.jsonl"
"""Artifact: a line of JSON a continuation of held-out text, with `step`, `tokens`, and the fields of `Sample`."""

EventKind = Literal["checkpoint", "resume", "spike", "nonfinite", "rollback", "notice"]

_COUNTERS: dict[str, tuple[EventKind, str]] = {
    "train/loss_spikes": ("spike", "loss spikes"),
    "guards/nonfinite_steps": ("nonfinite", "steps that are not finite"),
    "guards/rollbacks": ("rollback", "rollbacks"),
}


class Event(NamedTuple):
    """Something that happened in a run."""

    step: int
    kind: EventKind
    text: str


class Loads(NamedTuple):
    """Which experts held-out text used, S evaluations."""

    steps: list[int]
    domains: list[str]
    load_SDLE: np.ndarray


class Recording(NamedTuple):
    """All that the page is made of."""

    run: RunData
    history: pd.DataFrame
    """As `RunData.history` gives it."""
    records: pd.DataFrame
    """All records, those left behind included, in the order of time: index `time_ms`, columns `step` and metrics."""
    events: list[Event]
    loads: Loads | None
    samples: list[dict[str, Any]]
    """As `SAMPLES_FILE` has them."""
    job: dict[str, Any] | None
    changes: dict[str, Any] | None
    last_checkpoint: int | None
    """Its step, as far as it is known."""


def record_of(run: RunData) -> Recording:
    """Read all of it.

    Raises:
        ConfigError: the store does not answer.
    """
    run = run.sampled(MAX_POINTS)
    points = run.points
    points = points[points["key"].isin(["tokens", "speed/tokens_per_s", "checkpoint/stall_s", *_COUNTERS])]
    # A record has a time of its own, and `tokens` in it; foreign runs need not.
    points = points.drop_duplicates(["time_ms", "key"], keep="last")
    records = points.pivot(index="time_ms", columns="key", values="value").rename_axis(columns=None)
    records = records.reindex(columns=["tokens", "speed/tokens_per_s", "checkpoint/stall_s", *_COUNTERS])
    records.insert(0, "step", points.groupby("time_ms")["step"].first())
    events = sorted({*_counted(records), *_checkpoints(records), *_resumes(run, records), *_notices(run)})
    saved = [event.step for event in events if event.kind == "checkpoint"]
    final = _json(run.artifact("checkpoint.json")).get("step")
    if isinstance(final, int):
        saved.append(final)
    return Recording(
        run,
        run.history(),
        records,
        events,
        _loads(run),
        read_samples(run.artifact(SAMPLES_FILE) or b""),
        run.job(),
        run.changes(),
        max(saved, default=None),
    )


def _counted(records: pd.DataFrame) -> Iterator[Event]:
    for name, (kind, what) in _COUNTERS.items():
        counts = records[name].dropna()
        more = counts.diff().fillna(counts)  # a resumed process goes on counting
        for time_ms, number in more[more > 0].items():
            yield Event(int(records.loc[time_ms, "step"]), kind, f"{number:.0f} {what} since the record before")


def _checkpoints(records: pd.DataFrame) -> Iterator[Event]:
    """A save comes after its step's record, so the next one that stood still tells of it."""
    stalls = records[["step", "checkpoint/stall_s"]].dropna()
    stalls["before"] = stalls["step"].shift()
    for _, stall in stalls[stalls["checkpoint/stall_s"] > 0].dropna().iterrows():
        text = f"checkpoint; training stood still for {stall['checkpoint/stall_s']:.2f} s"
        yield Event(int(stall["before"]), "checkpoint", text)


def _resumes(run: RunData, records: pd.DataFrame) -> Iterator[Event]:
    for path in run.artifacts("job"):
        if not re.fullmatch(r"job/resumed-\d+\.json", path):
            continue
        note = _json(run.artifact(path))
        begun = pd.to_datetime(note.get("time"), utc=True, errors="coerce")
        if pd.isna(begun):
            continue
        later = records["step"][records.index >= begun.timestamp() * 1000]
        differs = ", ".join(f"{key}={value}" for key, value in (note.get("differs") or {}).items())
        step = int(later.iloc[0]) if len(later) else int(records["step"].max()) if len(records) else 0
        yield Event(step, "resume", "resumed" + (f" with {differs}" if differs else ""))


def _notices(run: RunData) -> Iterator[Event]:
    for entry in _lines(run.artifact(EVENTS_FILE) or b""):
        if isinstance(entry.get("step"), int):
            yield Event(entry["step"], "notice", str(entry.get("text", "")))


def _loads(run: RunData) -> Loads | None:
    data = run.artifact(LOADS_FILE)
    return None if data is None else read_loads(data)


def read_loads(data: bytes) -> Loads | None:
    """What such a file holds; None if it is torn or of another version."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            loads = Loads(arrays["steps"].tolist(), arrays["domains"].tolist(), arrays["load_SDLE"])
    except (OSError, EOFError, ValueError, KeyError, BadZipFile):
        return None
    return loads if loads.load_SDLE.ndim == 4 else None


def read_samples(data: bytes) -> list[dict[str, Any]]:
    """What such a file holds, without lines that are torn."""
    return [entry for entry in _lines(data) if isinstance(entry.get("step"), int)]


def _lines(data: bytes) -> list[dict[str, Any]]:
    return [_json(line) for line in data.splitlines()]


def _json(text: bytes | None) -> dict[str, Any]:
    try:
        document = json.loads(text or b"{}")
    except ValueError:  # torn while it was written
        return {}
    return document if isinstance(document, dict) else {}
