"""Trials on Ray Tune: one process each, fed by the queue as others end.

Ray's own record of trials is not used again: what was proposed, and what came of it, is in the sweep's folder.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from ray import tune
from ray.tune.search import Searcher as RaySearcher

from tidegate.launch.ray_train import elsewhere
from tidegate.launch.state import StateDir
from tidegate.track import finish_run
from tidegate.train.job import Job
from tidegate.tune.queue import Queue
from tidegate.tune.run_trial import Task, gpus_of, one_line, run_trial
from tidegate.tune.schedulers import build_scheduler
from tidegate.tune.trials import SweepFolder

__all__ = ["needs_of", "run_trials"]


def run_trials(queue: Queue, task: Task, job: Job, concurrent: int) -> None:
    """Run what the queue gives out, so many at a time, until it gives out no more; a scheduler may end some early."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its tables show neither metrics nor runs
    if not queue.most:
        return
    assert job.search is not None
    folder = SweepFolder(task.folder.parent, task.folder.name)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, task=task), needs_of(job, task.alone, task.without)),
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


def needs_of(job: Job, alone: bool, without: Sequence[str] = ()) -> dict[str, float] | tune.PlacementGroupFactory:
    """What a trial's process asks Ray for, on none of the nodes `without`, which are ids."""
    # Ray Train asks for its workers by itself. Ray refuses to be asked for nothing, so for one byte.
    needs = {"CPU": float(job.resources.cpus_per_worker), "GPU": gpus_of(job)} if alone else {"memory": 1.0}
    return tune.PlacementGroupFactory([needs], bundle_label_selector=[elsewhere(without)]) if without else needs


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
            reason = f"its process died {trial.num_failures} times: {one_line(trial.get_pickled_error())}"
            known = known.model_copy(update={"status": "failed", "error": reason})
            self._folder.put(known)
        print(f"trial {known.trial.number} ({known.run}) {known.status} {known.error}")


def _trial(config: dict[str, int], task: Task) -> None:
    """One trial, in a process of its own, of which the scheduler sees every metric."""
    run_trial(config["number"], task, tune.report)
