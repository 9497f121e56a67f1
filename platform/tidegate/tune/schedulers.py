"""Schedulers: which trials end early, by what they came to on as many tokens as others.

Ray Tune decides, and the decision is written to the trial's file. The trial finds it there and ends as if its user had
asked it to: with a checkpoint and its metrics delivered, where Ray would end its process.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from tidegate.train.job import Job
from tidegate.tune.searchers import CANDIDATES
from tidegate.tune.trials import SweepFolder

__all__ = ["build_scheduler"]

_REDUCTION = 3
_SHARE_BEFORE = 1 / 9
"""Of the tokens, that every trial gets, or those to its first evaluation if they are more."""


def build_scheduler(job: Job, folder: SweepFolder) -> TrialScheduler | None:
    """The scheduler that a job's sweep asks for; the job as it stands, trial 0, is never stopped."""
    config = job.search
    assert config is not None
    first = max(job.train.eval_every * job.train.batch_tokens, math.ceil(_SHARE_BEFORE * job.train.tokens))
    told: dict[str, Any] = {"time_attr": "tokens", "metric": config.metric, "mode": config.mode, "grace_period": first}
    scheduler: _Asha | _Median
    if config.scheduler == "asha":
        scheduler = _Asha(**told, max_t=job.train.tokens, reduction_factor=_REDUCTION)
    elif config.scheduler == "median":
        scheduler = _Median(**told)
    else:
        return None
    scheduler.begin(folder, config.metric)
    return scheduler


class _Seen(NamedTuple):
    """A trial as a scheduler sees it: the same before and after a resume."""

    trial_id: str


class _Noting:
    """Notes in the sweep's folder whom the scheduler beside it would stop, and lets Ray go on.

    It begins with what the folder has of earlier evaluations, so that a resumed sweep judges by all of them.
    """

    sweep: Path
    name: str
    _seen: dict[int, _Seen]

    def begin(self, folder: SweepFolder, metric: str) -> None:
        self.sweep, self._seen = folder.folder, {}
        for result in folder.results():
            if result.trial.kind in CANDIDATES:
                for tokens, value in result.evaluations:
                    self._judge(result.trial.number, {"tokens": tokens, metric: value})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        folder = SweepFolder(self.sweep.parent, self.sweep.name)
        known = folder.result(trial.config["number"])
        if known.trial.kind == "base":
            return TrialScheduler.CONTINUE
        if self._judge(known.trial.number, result) == TrialScheduler.STOP:
            folder.put(known.model_copy(update={"status": "stopped", "stopped_by": self.name}))
        return TrialScheduler.CONTINUE

    def _judge(self, number: int, result: dict[str, Any]) -> str:
        if number not in self._seen:
            self._seen[number] = _Seen(str(number))
            super().on_trial_add(None, self._seen[number])  # type: ignore[misc]
        return str(super().on_trial_result(None, self._seen[number], result))  # type: ignore[misc]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Nothing, as below: a trial counts from its first evaluation on, and that it ended teaches no more."""

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None: ...

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None: ...


class _Asha(_Noting, ASHAScheduler):
    name = "asha"


class _Median(_Noting, MedianStoppingRule):
    name = "median"

    def _judge(self, number: int, result: dict[str, Any]) -> str:
        decision = super()._judge(number, result)
        self._stopped_trials.clear()  # told of a trial again, it may stop it where it did not, and takes no more of it
        return decision

    def _on_insufficient_samples(self, tune_controller: Any, trial: Any, time: float) -> str:
        """Go on; Ray would pause, and a paused trial begins again."""
        return TrialScheduler.CONTINUE
