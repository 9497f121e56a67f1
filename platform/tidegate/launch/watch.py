"""`tidegate watch RUN`: a run on a terminal, from its store alone; for people on ssh."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tidegate.config import ConfigError
from tidegate.launch.alerts import DEAD_EXPERTS, MAX_VIOLATION
from tidegate.launch.report import SHADES
from tidegate.launch.state import StateDir
from tidegate.metric_path import parse_metric
from tidegate.quantities import cost_shown
from tidegate.track import RunData, TrackConfig, find_run, resolve_tracking_uri

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["watch"]

_PAGE_WIDTH = 120
_CURVE = 40  # characters
_BAR = 12
_EVENTS = 8
_QUIET_S = 300.0
"""Without a record for so long, a run that says it is running may have crashed."""
_COUNTED = {
    "train/loss_spikes": "loss spike",
    "guards/nonfinite_steps": "step that was not finite",
    "guards/rollbacks": "back to a checkpoint",
}
_READ = ("train/loss", "val/loss", "speed/tokens_per_s", *_COUNTED)
"""Histories that are shown; of other metrics the last value is."""


class _Seen(NamedTuple):
    """A run as its store had it at one moment."""

    run: RunData
    history: pd.DataFrame
    quiet_s: float | None
    """Since its last record; None before the first."""


def watch(name: str, state: StateDir, store: str | None, *, once: bool, every_s: float) -> None:
    """Show a run until it ends, or until Ctrl-C.

    Args:
        name: of the run, or its MLflow id.
        state: whose runs and store are looked at if `store` is None.
        store: URI of another one.
        once: print one frame.
        every_s: seconds between two looks.

    Raises:
        ConfigError: there is no such run, or at the beginning its store does not answer.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PAGE_WIDTH
    seen = _look(name, state, store)
    if once or seen.run.status != "RUNNING":
        console.print(_frame(seen))
        return
    with Live(_frame(seen), console=console, auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
        while seen.run.status == "RUNNING":
            time.sleep(every_s)
            problem = ""
            try:
                seen = _look(name, state, store)
            except ConfigError as error:  # a server that restarts
                problem = str(error)
            live.update(Group(_frame(seen), Text(problem, style="red")), refresh=True)


def _look(name: str, state: StateDir, store: str | None) -> _Seen:
    run = _find(name, state, store)
    records = run.points_of({"tokens"})
    quiet_s = None
    if len(records):  # by this machine's clock, which may be behind the run's
        quiet_s = max(0.0, time.time() - float(records["time_ms"].max()) / 1000)
    return _Seen(run, run.history(_READ), quiet_s)


def _find(name: str, state: StateDir, store: str | None) -> RunData:
    """In `store`, or where a run of this state directory was recorded, or in the store that runs here would use."""
    if store is None and name in state.runs():
        handle = state.run(name).handle()
        return find_run(handle.uri, handle.run_id)
    return find_run(resolve_tracking_uri(TrackConfig(tracking_uri=store), state.root), name)


def _frame(seen: _Seen) -> RenderableType:
    run, metrics = seen.run, seen.run.metrics
    parts: list[RenderableType] = [_header(seen)]
    if seen.quiet_s is None:
        return Group(*parts, Text("no record yet" if run.status == "RUNNING" else "it ended before its first record"))
    table = Table.grid(padding=(0, 2))
    for row in _rows(seen):
        table.add_row(*row)
    parts.append(table)
    layers = _of_each("moe/<layer>/maxvio", metrics)
    if layers:
        dead = _of_each("moe/<layer>/dead_experts", metrics)
        scale = max(2 * MAX_VIOLATION, *layers.values())
        parts.append(Text(f"MaxVio by layer, bars to {scale:.1f}; in red above {MAX_VIOLATION:g} or with dead experts"))
        parts.append(
            Columns([_layer(layer, value, dead[layer], scale) for layer, value in layers.items()], padding=(0, 3))
        )
    events = list(_events(seen.history))[-_EVENTS:]
    parts += [Text(f"events, the last {_EVENTS}")] if events else []
    parts += [Text(f"  step {step:,}  {what}") for step, what in events]
    return Group(*parts)


def _header(seen: _Seen) -> Text:
    run = seen.run
    text = Text.assemble(
        (run.name, "bold"), f"  {run.status}  experiment {run.experiment}  begun {run.start:%F %H:%M} UTC"
    )
    if resumed := run.tags.get("tidegate.resumed"):
        text.append(f"  resumed {resumed} times")
    if stopped_by := run.tags.get("tidegate.stopped_by"):
        text.append(f"  stopped by {stopped_by}")
    if run.end is not None:
        text.append(f"  ended {run.end:%F %H:%M} UTC")
    elif seen.quiet_s is not None:
        quiet = seen.quiet_s > _QUIET_S
        text.append(f"  last record {_span(seen.quiet_s)} ago", "red" if quiet else "")
        text.append("; it may have crashed" if quiet else "", "red")
    return text


def _rows(seen: _Seen) -> Iterator[Sequence[RenderableType]]:
    """Rows of a name, a value, and a curve or more."""
    run, metrics, history = seen.run, seen.run.metrics, seen.history
    tokens, wanted = metrics["tokens"], float(run.params.get("train.tokens", math.nan))
    speed = metrics.get("speed/tokens_per_s", math.nan)
    share = tokens / wanted
    left = f", {_span((wanted - tokens) / speed)} to go" if run.status == "RUNNING" and tokens < wanted else ""
    done = "" if math.isnan(share) else f"{_bar(share, 2 * _BAR)} {share:.0%}{left}"
    yield "tokens", f"{tokens:,.0f}", f"{done}  step {history.index[-1]:,}"
    if "train/loss" in history:  # what a resume left behind is among the last values, not in the history
        yield "loss", f"{metrics['train/loss']:.4f}", _curve(history["train/loss"])
    if "val/loss" in history:
        domains = _of_each("val/<domain>/ppl", metrics)
        of_each = "  ".join(f"{domain} {value:.1f}" for domain, value in domains.items())
        yield "held-out", f"{metrics['val/loss']:.4f}", _curve(history["val/loss"])
        yield "perplexity", "", of_each
    if "speed/tokens_per_s" in history:
        yield "tokens/s", f"{speed:,.0f}", _curve(history["speed/tokens_per_s"])
    if "speed/mfu" in metrics:
        peak = f"of {metrics['speed/peak_tflops_per_device']:.0f} TFLOP/s a device"
        yield "MFU", f"{metrics['speed/mfu']:.1%}", peak
    if "cost/gpu_hours" in metrics:
        yield "cost", cost_shown(metrics, run.params.get("resources.gpu") == "true"), ""
    if "checkpoint/age_s" in metrics:
        assert seen.quiet_s is not None
        age_s = metrics["checkpoint/age_s"] + (seen.quiet_s if run.status == "RUNNING" else 0)
        at_end = "" if run.status == "RUNNING" else " before the last record"
        yield "checkpoint", f"{_span(age_s)} old", f"took {metrics['checkpoint/write_s']:.1f} s{at_end}"


def _layer(layer: str, violation: float, dead: float, scale: float) -> Text:
    text = f"{layer:>3} {_bar(violation / scale, _BAR)} {violation:6.2f}" + (f"  {dead:.0%} dead" if dead else "")
    return Text(text, style="red" if violation > MAX_VIOLATION or dead > DEAD_EXPERTS else "")


def _events(history: pd.DataFrame) -> Iterator[tuple[int, str]]:
    """What happened, by step: what is counted and went up, and held-out losses that no earlier one was below."""
    found: list[tuple[int, str]] = []
    for name, what in _COUNTED.items():
        if name in history:
            counts = history[name].dropna()
            risen = counts.diff().fillna(counts)
            found += [(int(step), f"{what} ({counts[step]:.0f} so far)") for step in risen.index[risen > 0]]
    if "val/loss" in history:
        losses = history["val/loss"].dropna()
        best = losses[losses < losses.cummin().shift(fill_value=math.inf)]
        found += [(int(step), f"best held-out loss so far, {loss:.4f}") for step, loss in best.items()]
    return iter(sorted(found))


def _of_each(pattern: str, metrics: dict[str, float]) -> dict[str, float]:
    """Last values of a pattern's metrics by layer or domain, layers in order."""
    found = {}
    for name, value in metrics.items():
        path = parse_metric(name)
        if path.pattern == pattern:
            ((_, place),) = path.place.items()
            found[place] = value
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0]))) if "<layer>" in pattern else found


def _bar(share: float, width: int) -> str:
    filled = round(min(max(share, 0.0), 1.0) * width) if math.isfinite(share) else 0
    return SHADES[-1] * filled + SHADES[1] * (width - filled)


def _curve(values: pd.Series) -> str:
    """Its course, a character for each of `_CURVE` equal parts; gaps where nothing is finite."""
    import numpy as np

    finite = values[np.isfinite(values)].to_numpy()
    if not len(finite):
        return ""
    means = [part.mean() for part in np.array_split(finite, min(_CURVE, len(finite)))]
    low, high = min(means), max(means)
    return "".join(SHADES[1 + round(7 * (mean - low) / (high - low or 1))] for mean in means)


def _span(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    return str(timedelta(seconds=round(seconds)))
