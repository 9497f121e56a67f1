"""Trials on Ray Tune: one process each, fed by the queue as others end.

Ray's own record of trials is not used again: what was proposed, and what came of it, is in the sweep's folder.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from ray import tune
from ray.tune.search import Searcher as RaySearcher

from tidegate.config import ConfigError
from tidegate.launch.run import Request, run
from tidegate.launch.state import RunFolder, StateDir
from tidegate.redact import redact
from tidegate.track import finish_run, tag_run
from tidegate.train.checkpoint_store import CheckpointStore
from tidegate.train.job import Job
from tidegate.train.storage import Storage
from tidegate.train.telemetry import Record
from tidegate.tune.queue import Queue
from tidegate.tune.schedulers import build_scheduler
from tidegate.tune.space import overrides_of
from tidegate.tune.trials import Phase, SweepFolder

__all__ = ["Task", "needs_of", "run_trials"]


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


def run_trials(queue: Queue, task: Task, job: Job, concurrent: int) -> None:
    """Run what the queue gives out, so many at a time, until it gives out no more; a scheduler may end some early."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its tables show neither metrics nor runs
    if not queue.most:
        return
    assert job.search is not None
    folder = SweepFolder(task.folder.parent, task.folder.name)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, task=task), needs_of(job, task.alone)),
        tune_config=tune.TuneConfig(
            search_alg=_Feed(queue),
            scheduler=build_scheduler(job, folder) if task.judged else None,
            num_samples=queue.most,
            max_concurrent_trials=concurrent,
        ),
        run_config=tune.RunConfig(
            name=f"{task.folder.name}-{time.time_ns()}",
            storage_path=str(task.folder / "ray"),
            callbacks=[_Announcer(task)],
            failure_config=tune.FailureConfig(max_failures=job.search.retries),
            verbose=0,
        ),
    )
    tuner.fit()


def needs_of(job: Job, alone: bool) -> dict[str, float]:
    """What a trial's process asks Ray for."""
    if alone:
        return {"CPU": float(job.resources.cpus_per_worker), "GPU": float(job.resources.gpu)}
    # Ray Train asks for its workers by itself. Ray refuses to be asked for nothing, so for one byte.
    return {"memory": 1.0}


class _Feed(RaySearcher):
    """The queue as Ray Tune asks it."""

    def __init__(self, queue: Queue) -> None:
        super().__init__()
        self._queue = queue
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        trial = self._queue.next()
        if trial is None:
            return RaySearcher.FINISHED
        self._numbers[trial_id] = trial.number
        return {"number": trial.number}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        self._queue.ended(self._numbers.pop(trial_id))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the sweep's folder is what a resumed sweep reads."""

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("a sweep resumes from its folder, not from what Ray kept")


class _Announcer(tune.Callback):
    """Says a line when a trial has ended, and notes the death of its process; Ray pickles it."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._folder = SweepFolder(task.folder.parent, task.folder.name)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = self._folder.result(trial.config["number"])
        value = "" if result.value is None else f", {result.value:.4f}"
        print(f"trial {result.trial.number} ({result.run}) {result.status}{value} {result.error}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        print(f"trial {trial.config['number']}: its process died; it begins again from its checkpoint")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The process could not say it itself."""
        known = self._folder.result(trial.config["number"])
        if known.status != "finished" and known.run:
            run = StateDir(self._task.state).run(known.run)
            finish_run(run.handle(), "KILLED" if known.status == "stopped" else "FAILED")
        if not known.ended:
            reason = f"its process died {trial.num_failures} times: {_one_line(trial.get_pickled_error())}"
            known = known.model_copy(update={"status": "failed", "error": reason})
            self._folder.put(known)
        print(f"trial {known.trial.number} ({known.run}) {known.status} {known.error}")


def _trial(config: dict[str, int], task: Task) -> None:
    """One trial, in a process of its own; resumes its run if it began once."""
    folder = SweepFolder(task.folder.parent, task.folder.name)
    trial, before = (known := folder.result(config["number"])).trial, known.run
    if known.ended:  # its process died after it
        return
    state, begun = StateDir(task.state), time.monotonic()
    latest = known.model_copy(update={"status": "running"})

    def put(**changed: Any) -> None:
        nonlocal latest
        latest = latest.model_copy(update=changed)
        folder.put(latest)

    def watch(record: Record) -> bool:
        nonlocal latest
        # A run that resumes evaluates again where it was.
        if task.metric in record.metrics and record.tokens > latest.tokens:
            value, evaluations = record.metrics[task.metric], latest.evaluations
            if task.metric.startswith("val/") and math.isfinite(value):
                evaluations = (*evaluations, (record.tokens, value))
            seconds = known.seconds + time.monotonic() - begun
            put(value=value, tokens=record.tokens, evaluations=evaluations, seconds=seconds)
            if latest.status == "running" and task.judged and record.tokens < task.tokens:
                tune.report({task.metric: value, "tokens": record.tokens})  # waits for the scheduler
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
        tags={
            "mlflow.parentRunId": task.parent,
            "tidegate.sweep": folder.name,
            "tidegate.trial": str(trial.number),
            "tidegate.trial.kind": trial.kind,
        },
        opened=lambda name: put(run=name),
        watch=watch,
    )
    try:
        if phase is not None and phase.begin:
            _refuse_without_weights(state.run(before), phase)
        ran = run(asked)
    except Exception as error:  # one trial never ends the sweep
        put(status="failed", error=_one_line(error))
        return
    if latest.status == "stopped" and not ran.outcome.finished:
        tag_run(ran.tracking, "tidegate.stopped_by", latest.stopped_by)
        return
    if phase is not None and not ran.outcome.finished and not ran.outcome.stopped:
        put(status="paused")
        return
    problem = "" if latest.value is not None else f"it never reported {task.metric}"
    put(status="finished" if ran.outcome.finished and not problem else "failed", error=problem, stopped_by="")


def _refuse_without_weights(run: RunFolder, phase: Phase) -> None:
    """Raise ConfigError where a run would begin again instead of going on."""
    checkpoints = run.read().checkpoints
    valid = CheckpointStore(Storage(checkpoints)).valid()
    if not any(entry.manifest is not None and entry.manifest.tokens >= phase.begin for entry in valid):
        raise ConfigError(f"{checkpoints}: its checkpoint of {phase.begin} tokens is gone")


def _one_line(error: Exception | None) -> str:
    return redact(" ".join(str(error).split()))[:500]
