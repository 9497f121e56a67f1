"""One trial of a folder of trials: a run like any other, whose end is written down."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tidegate.config import ConfigError, load_stored
from tidegate.launch.live import LiveMetrics
from tidegate.launch.run import Request, run
from tidegate.launch.state import RunFolder, StateDir
from tidegate.redact import redact
from tidegate.track import RunHandle, open_run, resolve_tracking_uri, tag_run
from tidegate.train.checkpoint_store import CheckpointStore
from tidegate.train.job import Job
from tidegate.train.search import Goal
from tidegate.train.storage import Storage
from tidegate.train.telemetry import Record
from tidegate.tune.space import overrides_of
from tidegate.tune.trials import Phase, SweepFolder

__all__ = ["Task", "gpus_of", "left_out", "one_line", "open_parent", "run_trial"]


class Task(NamedTuple):
    """What every trial's process gets."""

    job_file: Path
    overrides: tuple[str, ...]
    folder: Path
    """Of the sweep."""
    state: Path
    parent: str
    """The sweep's run in MLflow."""
    metric: str
    tokens: int
    """Of a whole trial."""
    alone: bool
    """Train in the trial's process."""
    judged: bool
    """By a scheduler."""
    against: tuple[Goal, ...] = ()
    budget: str = ""
    """That all keep to."""
    without: tuple[str, ...] = ()
    """Ids of Ray's nodes that train nothing."""


def gpus_of(job: Job) -> float:
    """GPUs that a trial takes."""
    assert job.search is not None
    return job.resources.workers * job.resources.gpu * job.search.gpu_share


def left_out(job: Job, address: str | None, state: StateDir, trials: int = 1) -> tuple[str, ...]:
    """Ids of a cluster's nodes that are unfit to train such a job, so many trials at a time; says which and why.

    Raises:
        ConfigError: without them not one trial fits.
    """
    if address is None:
        return ()
    from tidegate.launch.cluster_check import unfit_nodes  # Ray takes seconds

    folders = dict.fromkeys((str(state.root), state.storage_of(job)))
    return unfit_nodes(job, address, [*folders], resolve_tracking_uri(job.track, state.root), print, trials)


def open_parent(
    folder: SweepFolder, job: Job, state: StateDir, notice: Callable[[str], None], budget: str = ""
) -> RunHandle:
    """The run in MLflow that trials are nested in."""
    return open_run(
        resolve_tracking_uri(job.track, state.root),
        job.track,
        job=job.name,
        resolved=job,
        changes={},
        command=sys.argv,
        name=folder.name,
        tags={"tidegate.sweep": folder.name, "budget": budget},
        notice=notice,
    )


def run_trial(number: int, task: Task, judge: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Run what the folder holds under this number, and write there what comes of it; resumes its run if it began once.

    Args:
        number: of the trial.
        task: what all trials share.
        judge: gets every new value of the metric of a trial that is `judged`; returns when a scheduler has seen it.
    """
    folder = SweepFolder(task.folder.parent, task.folder.name)
    trial, before = (known := folder.result(number)).trial, known.run
    if known.ended:  # its process died after it
        return
    state, begun = StateDir(task.state), time.monotonic()
    latest = known.model_copy(update={"status": "running"})

    def put(**changed: Any) -> None:
        nonlocal latest
        latest = latest.model_copy(update=changed)
        folder.put(latest)

    seen: dict[str, list[float]] = {goal.metric: [] for goal in task.against}

    live: list[LiveMetrics] = []

    def opened(name: str) -> None:
        put(run=name)
        if task.alone:  # others train on workers, and are shown from there
            job_file = state.run(name).job_file
            job = load_stored(job_file.read_text(encoding="utf-8"), Job, str(job_file))
            every = job.checkpoint.every
            shown = LiveMetrics(name, folder.name, tokens=task.tokens, workers=1, checkpoint_every=every)
            live.append(exits.enter_context(shown))
            live[0].set_workers(1)

    def watch(record: Record) -> bool:
        nonlocal latest
        for metrics in live:
            metrics.take(record)
        if 2 * record.tokens > task.tokens:
            for goal, means in seen.items():
                found = [value for name, value in record.metrics.items() if PurePosixPath(name).match(goal)]
                means += [statistics.fmean(found)] if found else []
        # A run that resumes evaluates again where it was.
        if task.metric in record.metrics and record.tokens > latest.tokens:
            value, evaluations = record.metrics[task.metric], latest.evaluations
            if task.metric.startswith("val/") and math.isfinite(value):
                evaluations = (*evaluations, (record.tokens, value))
            seconds = known.seconds + time.monotonic() - begun
            put(value=value, tokens=record.tokens, evaluations=evaluations, seconds=seconds)
            if latest.status == "running" and judge and task.judged and record.tokens < task.tokens:
                judge({task.metric: value, "tokens": record.tokens})  # waits for the scheduler
                latest = folder.result(trial.number)
        return latest.status == "stopped"

    began, phase = bool(before) and (task.state / "runs" / before / "run.json").exists(), known.phase
    settings = overrides_of(trial.values if phase is None else phase.values) if phase or not began else []
    if phase is not None:
        settings.append(f"train.pause_at_tokens={phase.end if phase.end < task.tokens else 'null'}")
    asked = Request(
        None if began else task.job_file,
        settings if began else [*task.overrides, *settings, f"train.seed={trial.seed}"],
        state,
        resume=before if began else None,
        local=task.alone,
        without=task.without,
        tags={
            "mlflow.parentRunId": task.parent,
            "tidegate.sweep": folder.name,
            "tidegate.trial": str(trial.number),
            "tidegate.trial.kind": trial.kind,
            "budget": task.budget,
        },
        opened=opened,
        watch=watch,
        page=False,  # megabytes a trial; `tidegate report` writes one for any of them
    )
    try:
        if phase is not None and phase.begin:
            _refuse_without_weights(state.run(before), phase)
        with contextlib.ExitStack() as exits:
            ran = run(asked)
    except Exception as error:  # one trial never ends the sweep
        put(status="failed", error=one_line(error))
        return
    if latest.status == "stopped" and not ran.outcome.finished:
        tag_run(ran.tracking, "tidegate.stopped_by", latest.stopped_by)
        return
    if phase is not None and not ran.outcome.finished and not ran.outcome.stopped:
        put(status="paused")
        return
    measured = {goal: statistics.fmean(means) for goal, means in seen.items() if means}
    missing = [task.metric] if latest.value is None else sorted(seen.keys() - measured.keys())
    problem = f"{ran.limit} is reached" if ran.limit else f"it never reported {', '.join(missing)}" if missing else ""
    status = "finished" if ran.outcome.finished and not problem else "failed"
    put(status=status, error=problem, stopped_by="", measured=measured)


def _refuse_without_weights(run: RunFolder, phase: Phase) -> None:
    """Raise ConfigError where a run would begin again instead of going on."""
    checkpoints = run.read().checkpoints
    valid = CheckpointStore(Storage(checkpoints)).valid()
    if not any(entry.manifest is not None and entry.manifest.tokens >= phase.begin for entry in valid):
        raise ConfigError(f"{checkpoints}: its checkpoint of {phase.begin} tokens is gone")


def one_line(error: Exception | None) -> str:
    """Of a report: without secrets and at most 500 characters."""
    return redact(" ".join(str(error).split()))[:500]
