"""The page as one HTML file: values as JSON, a script that draws them, plotly once, and no network.

All text reaches the page through `textContent` or escaped, so names of runs, domains and jobs are only text. A content
security policy forbids the page to load anything.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from tidegate.quantities import cost_shown
from tidegate.track.page.figures import rounded
from tidegate.track.page.health import Finding, find, job_number
from tidegate.track.page.recording import Recording, record_of
from tidegate.track.page.sections import sections
from tidegate.track.read import RunData

__all__ = ["page_values", "run_page"]

MAX_EVENTS = 300
MAX_SAMPLES = 200


def run_page(run: RunData) -> str:
    """The HTML of a run's page, whatever state the run is in.

    Raises:
        ConfigError: the store does not answer.
    """
    from plotly.offline import get_plotlyjs

    # `<` cannot end the script element when it is written as JSON may write it.
    values = json.dumps(page_values(record_of(run)), allow_nan=False).replace("<", "\\u003c")
    template = Path(__file__).with_name("template.html").read_text(encoding="utf-8")
    parts = {"TITLE": html.escape(f"{run.name} - Tidegate"), "VALUES": values, "PLOTLY": get_plotlyjs()}
    head, *rest = template.split("@@")  # not replaced one after the other: a value may hold another's mark
    return head + "".join(parts.get(part, part) for part in rest)


def page_values(recording: Recording) -> dict[str, Any]:
    """All that the page shows, as JSON values."""
    run, history = recording.run, recording.history
    tokens = history["tokens"].dropna()
    findings = find(recording)
    events = recording.events[-MAX_EVENTS:]
    return {
        "name": run.name,
        "status": run.status,
        "facts": list(_facts(recording)),
        "findings": [finding._asdict() for finding in findings],
        "advice": _advice(findings),
        "sections": [section._asdict() for section in sections(recording)],
        "samples": _samples(recording.samples),
        "events": [event._asdict() | {"tokens": _tokens_at(tokens, event.step)} for event in events],
        "job": "" if recording.job is None else yaml.safe_dump(recording.job, sort_keys=False),
        "changes": [[path, json.dumps(value)] for path, value in sorted((recording.changes or {}).items())],
    }


def _samples(samples: list[dict[str, Any]]) -> list[list[Any]]:
    """Rows of the page's table, the newest evaluation first."""
    newest = sorted(samples, key=lambda sample: -sample["step"])[:MAX_SAMPLES]
    fields = ("step", "domain", "prompt", "greedy", "drawn", "text")
    return [[sample.get(field, "") for field in fields] for sample in newest]


def _facts(recording: Recording) -> Iterator[tuple[str, str]]:
    run, history, job = recording.run, recording.history, recording.job
    yield "job", run.tags.get("tidegate.job", "?")
    size = _size(job)
    if size:
        yield "model", size
    step = int(history.index[-1]) if len(history) else 0
    tokens = history["tokens"].dropna()
    seen = int(tokens.iloc[-1]) if len(tokens) else 0
    total = job_number(job, "train", "tokens")
    share = f" of {total:,.0f} ({100 * seen / total:.0f} %)" if total else ""
    yield "tokens", f"{seen:,}{share}, step {step:,}"
    val = history.get("val/loss", pd.Series(dtype=float)).dropna()
    if len(val):
        yield "held-out loss", f"{val.iloc[-1]:.4f} at step {val.index[-1]}"
    yield "began", f"{run.start:%Y-%m-%d %H:%M} UTC{_lasted(recording)}"
    if "cost/gpu_hours" in run.metrics:
        yield "cost", cost_shown(run.metrics, _on_gpu(job))
    if stopped_by := run.tags.get("tidegate.stopped_by"):
        yield "stopped by", stopped_by
    yield "hardware", _hardware(recording)
    yield "commit", run.tags.get("tidegate.commit", "not recorded")
    yield "command", run.tags.get("tidegate.command", "not recorded")
    versions = {key.rpartition(".")[2]: value for key, value in run.tags.items() if key.startswith("tidegate.version.")}
    yield "versions", ", ".join(f"{name} {value}" for name, value in sorted(versions.items())) or "not recorded"
    yield "MLflow", f"experiment {run.experiment}, run {run.id}"
    yield "page", f"written {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"


def _size(job: dict[str, Any] | None) -> str | None:
    """Parameters of the model; None where the job is of a version that this one does not read."""
    from tidegate.model.decoder import ModelConfig
    from tidegate.model.flops import total

    try:
        assert job is not None
        cost = total(ModelConfig.model_validate(job["model"]), int(job["data"]["sequence_length"]))
    except (AssertionError, KeyError, TypeError, ValueError):
        return None
    return (
        f"{cost.params / 1e6:,.1f} M parameters, {cost.active_params / 1e6:,.1f} M active, "
        f"{cost.flops_per_token / 1e6:,.1f} MFLOP a token"
    )


def _lasted(recording: Recording) -> str:
    """From its first start to its end or its last record."""
    end, times_ms = recording.run.end, recording.records.index
    if end is None and len(times_ms):
        end = datetime.fromtimestamp(float(times_ms[-1]) / 1000, timezone.utc)
    if end is None:
        return ""
    minutes, seconds = divmod(max(int((end - recording.run.start).total_seconds()), 0), 60)
    return f", {minutes // 60} h {minutes % 60} min" if minutes >= 60 else f", {minutes} min {seconds} s"


def _hardware(recording: Recording) -> str:
    """What the run's tags say, and how many workers its job asks for."""
    workers = job_number(recording.job, "resources", "workers")
    kinds = [value for key, value in sorted(recording.run.tags.items()) if key in ("gpu", "gpu_kind", "cluster")]
    device = "GPU" if _on_gpu(recording.job) else "CPU"
    layout = f"{workers:.0f} {device} worker{'s' if workers != 1 else ''}" if workers else ""
    return ", ".join([part for part in (layout, *kinds) if part]) or "not recorded"


def _on_gpu(job: dict[str, Any] | None) -> bool:
    return bool(((job or {}).get("resources") or {}).get("gpu"))


def _advice(findings: list[Finding]) -> list[dict[str, str]]:
    """Where to look first: the reds, then the ambers."""
    ranked = [finding for level in ("red", "amber") for finding in findings if finding.level == level]
    return [{"section": finding.section, "subject": finding.subject} for finding in ranked]


def _tokens_at(tokens: pd.Series, step: int) -> float | None:
    """Tokens of a step, between the recorded steps in proportion; None if none are recorded."""
    return rounded([np.interp(step, tokens.index, tokens)], 9)[0] if len(tokens) else None
