"""Is a run healthy? One finding a question, green, amber or red, each with a sentence and its section of the page."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Iterator
from itertools import groupby
from typing import Literal, NamedTuple

import pandas as pd

from tidegate.track.page.figures import columns
from tidegate.track.page.recording import EventKind, Recording

__all__ = ["Finding", "Level", "find", "job_number"]

Level = Literal["green", "amber", "red"]

RECENT = 5
"""Records that count as now."""
SILENT_S = 600.0
"""A run whose last record is older than this and than ten usual intervals is taken for dead."""
MAXVIO_AMBER, MAXVIO_RED = 1.0, 3.0
DEAD_RED = 0.1
MAX_NAMED = 12
"""Dead experts; of more, the number."""
SINK_AMBER = 0.1
MASSIVE = 1000.0
"""Residual streams of models with massive activations reach this (arXiv 2402.17762)."""
SLOWER = 0.8


class Finding(NamedTuple):
    """The answer to one question."""

    level: Level
    subject: str
    sentence: str
    section: str
    """Where on the page to look."""


def find(recording: Recording, now_s: float | None = None) -> list[Finding]:
    """All findings that the run's records allow, in the order of questions.

    Args:
        now_s: seconds since 1970; None: the clock's.
    """
    now_s = time.time() if now_s is None else now_s
    found = [_progress(recording, now_s), _loss(recording.history)]
    questions: tuple[Callable[[Recording], Finding | None], ...] = (
        _spikes,
        _nonfinite,
        _rollbacks,
        _dead_experts,
        _maxvio,
        _sink,
        _activations,
        _checkpoint,
        _speed,
    )
    found += [finding for question in questions if (finding := question(recording)) is not None]
    return found


def _progress(recording: Recording, now_s: float) -> Finding:
    run, records = recording.run, recording.records
    where = f"after step {int(recording.history.index[-1])}" if len(recording.history) else "before its first record"
    if run.status == "FAILED":
        return Finding("red", "State", f"The run failed {where}.", "events")
    if run.status == "KILLED":
        return Finding("amber", "State", f"The run was stopped {where}; `tidegate train --resume` goes on.", "events")
    if run.status == "FINISHED":
        return Finding("green", "State", f"The run has finished, {where}.", "events")
    last_s = float(records.index[-1]) / 1000 if len(records) else run.start.timestamp()
    usual_s = float(records.index.to_series().diff().median()) / 1000 if len(records) > 2 else 0.0
    silent_s = now_s - last_s
    if silent_s > max(SILENT_S, 10 * usual_s):
        return Finding("red", "State", f"No record for {silent_s / 60:.0f} minutes {where}: probably dead.", "events")
    return Finding("green", "State", f"The run is training, {where}.", "events")


def _loss(history: pd.DataFrame) -> Finding:
    losses = _column(history, "train/loss", keep_nan=True)
    logged = losses if len(losses) else pd.Series(dtype=float)
    finite = logged[logged.map(math.isfinite)]
    if len(logged) and len(finite) < 10:
        return Finding("amber", "Loss", f"Only {len(finite)} finite losses so far: too early to say.", "loss")
    if not len(finite):
        return Finding("amber", "Loss", "No loss was recorded.", "loss")
    if not math.isfinite(logged.iloc[-1]):
        return Finding("red", "Loss", f"The last loss, at step {logged.index[-1]}, is not finite.", "loss")
    window = max(len(finite) // 5, RECENT)
    now, before = float(finite[-window:].mean()), float(finite[-2 * window : -window].mean())
    # Of the difference of two means, from successive differences, so that a trend is no noise.
    noise = float(finite[-2 * window :].diff().std()) / math.sqrt(window)
    change = f"from {before:.3f} to {now:.3f} over the last {2 * window} records"
    if now - before > max(2 * noise, 0.01 * before):
        return Finding("red", "Loss", f"The training loss rises, {change}.", "loss")
    if before - now <= 2 * noise:
        return Finding("amber", "Loss", f"The training loss stands still within its noise, {change}.", "loss")
    return Finding("green", "Loss", f"The training loss falls, {change}.", "loss")


def _spikes(recording: Recording) -> Finding | None:
    return _count(recording, "train/loss_spikes", "spike", "Spikes", "loss spikes")


def _nonfinite(recording: Recording) -> Finding | None:
    what = "steps whose loss or gradient was not finite"
    return _count(recording, "guards/nonfinite_steps", "nonfinite", "Finite", what)


def _rollbacks(recording: Recording) -> Finding | None:
    return _count(recording, "guards/rollbacks", "rollback", "Rollbacks", "rollbacks to a checkpoint")


def _count(recording: Recording, name: str, kind: EventKind, subject: str, what: str) -> Finding | None:
    counts = recording.records[name].dropna()
    if not len(counts):
        return None
    total = int(counts.max())
    if total == 0:
        return Finding("green", subject, f"No {what}.", "events")
    steps = [event.step for event in recording.events if event.kind == kind]
    last = f"; the last is seen at step {max(steps)}" if steps else ""
    return Finding("amber", subject, f"{total} {what} so far{last}.", "events")


def _dead_experts(recording: Recording) -> Finding | None:
    # Of a small batch an expert may see no token by chance; in several records in a row hardly.
    lowest = {layer: float(values[-RECENT:].min()) for layer, values in _layers(recording.history, "dead_experts")}
    if not lowest:
        return None
    dead = {layer: share for layer, share in lowest.items() if share > 0}
    if not dead:
        return Finding("green", "Experts", "No layer lacks tokens for an expert in all of the last records.", "load")
    worst = max(dead, key=lambda layer: dead[layer])
    sentence = (
        f"{len(dead)} of {len(lowest)} layers have experts without a token in each of the last {RECENT} records; "
        f"layer {worst} the most, {100 * dead[worst]:.1f} % of its experts."
        f"{_named(recording.history, dead)}"
    )
    return Finding("red" if dead[worst] >= DEAD_RED else "amber", "Experts", sentence, "load")


def _named(history: pd.DataFrame, layers: Collection[int]) -> str:
    """Experts of these layers that had no token in any of the last records with a load of each."""
    found = [
        (layer, expert)
        for layer in layers
        for name, expert in columns(history, rf"moe/{layer}/load/(\d+)").items()
        if history[name].dropna()[-RECENT:].max() == 0
    ]
    if not found:
        return ""
    by_layer = groupby(found[:MAX_NAMED], key=lambda place: place[0])
    named = [f"{', '.join(expert for _, expert in group)} of layer {layer}" for layer, group in by_layer]
    more = f"; and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return f" Experts without one in the last recorded loads: {'; '.join(named)}{more}."


def _maxvio(recording: Recording) -> Finding | None:
    medians = {layer: float(values[-RECENT:].median()) for layer, values in _layers(recording.history, "maxvio")}
    if not medians:
        return None
    worst = max(medians, key=lambda layer: medians[layer])
    level: Level = "green" if medians[worst] < MAXVIO_AMBER else "amber" if medians[worst] < MAXVIO_RED else "red"
    sentence = (
        f"The busiest expert gets {1 + medians[worst]:.2f} times the mean load (MaxVio {medians[worst]:.2f}), "
        f"in layer {worst}."
    )
    return Finding(level, "Balance", sentence, "balance")


def _sink(recording: Recording) -> Finding | None:
    shares = _column(recording.history, "attention/sink_heads")
    if not len(shares):
        return None
    now = float(shares[-RECENT:].median())
    if now <= SINK_AMBER:
        return Finding("green", "Sink", f"{100 * now:.0f} % of heads attend mostly to the first token.", "attention")
    sentence = f"Attention has a sink: {100 * now:.0f} % of heads give the first token more than 0.3 of it."
    return Finding("amber", "Sink", sentence, "attention")


def _activations(recording: Recording) -> Finding | None:
    largest = {block: float(values.iloc[-1]) for block, values in _layers(recording.history, "max", "hidden")}
    if not largest:
        return None
    worst = max(largest, key=lambda block: largest[block])
    sentence = f"The residual stream reaches {largest[worst]:.4g}, after block {worst}."
    level: Level = "amber" if largest[worst] >= MASSIVE else "green"
    return Finding(level, "Activations", "Massive: " * (level == "amber") + sentence, "activations")


def _checkpoint(recording: Recording) -> Finding | None:
    if not len(recording.history):
        return None
    step, saved = int(recording.history.index[-1]), recording.last_checkpoint
    every = job_number(recording.job, "checkpoint", "every")
    if every is None:
        return None
    behind = step - (saved or 0)
    if saved is None and behind < 2 * every:
        return Finding("green", "Checkpoint", f"None yet; one is due every {every:.0f} steps.", "events")
    if behind >= 2 * every:
        what = "No checkpoint is known" if saved is None else f"The last known checkpoint is of step {saved}"
        return Finding("red", "Checkpoint", f"{what}, {behind} steps ago; one is due every {every:.0f}.", "events")
    return Finding("green", "Checkpoint", f"The last one is of step {saved}, {behind} steps ago.", "events")


def _speed(recording: Recording) -> Finding | None:
    rates = _column(recording.history, "speed/tokens_per_s")
    if not len(rates):
        return None
    now, usual = float(rates[-RECENT:].median()), float(rates.median())
    mfu = _column(recording.history, "speed/mfu")
    used = f" MFU is {100 * mfu.iloc[-1]:.1f} %." if len(mfu) else ""
    sentence = f"{now:,.0f} tokens/s, {usual:,.0f} in the median of the run.{used}"
    return Finding("amber" if now < SLOWER * usual else "green", "Speed", sentence, "speed")


def job_number(job: dict | None, section: str, field: str) -> float | None:
    """A number in the resolved job; None if it is not there."""
    value = ((job or {}).get(section) or {}).get(field)
    return value if isinstance(value, (int, float)) else None


def _column(history: pd.DataFrame, name: str, keep_nan: bool = False) -> pd.Series:
    if name not in history:
        return pd.Series(dtype=float)
    if keep_nan:  # a NaN loss is a gap in the table like a record without one, which has no gradient norm either
        others = [other for other in ("train/learning_rate", "train/gradient_norm") if other in history]
        return history[name][history[[name, *others]].notna().any(axis=1)]
    return history[name].dropna()


def _layers(history: pd.DataFrame, metric: str, family: str = "moe") -> Iterator[tuple[int, pd.Series]]:
    """Index and values of each layer that has the metric."""
    for name in history:
        match = re.fullmatch(rf"{family}/(\d+)/{metric}", str(name))
        if match and len(values := history[name].dropna()):
            yield int(match[1]), values
