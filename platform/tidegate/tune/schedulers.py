"""Schedulers: which trials end early, by what they came to on as many tokens as others.

Ray Tune decides, and the decision is written to the trial's file. The trial finds it there and ends as if its user had
asked it to: with a checkpoint and its metrics delivered, where Ray would end its process.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from tidegate.train.job import Job
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
        # Else it pauses trials, which would begin again.
        scheduler = _Median(**told, min_time_slice=job.train.tokens)
    else:
        return None
    scheduler.sweep = folder.folder
    return scheduler


class _Noting:
    """Notes in the sweep's folder whom the scheduler beside it would stop, and lets Ray go on."""

    sweep: Path
    name: str

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        folder = SweepFolder(self.sweep.parent, self.sweep.name)
        known = folder.result(trial.config["number"])
        if known.trial.kind == "base":
            return TrialScheduler.CONTINUE
        decision: str = super().on_trial_result(tune_controller, trial, result)  # type: ignore[misc]
        if decision != TrialScheduler.STOP:
            return decision
        folder.put(known.model_copy(update={"status": "stopped", "stopped_by": self.name}))
        return TrialScheduler.CONTINUE


class _Asha(_Noting, ASHAScheduler):
    name = "asha"


class _Median(_Noting, MedianStoppingRule):
    name = "median"
