"""Schedulers that know after a resume what they knew before, and a stop of a trial with several workers."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tidegate.config import load
from tidegate.train.job import Job
from tidegate.tune.schedulers import build_scheduler
from tidegate.tune.trials import Result, SweepFolder, SweepRecord, Trial

SEARCH: dict[str, Any] = {"space": {"balance.loss_weight": {"log": [1e-3, 1e-1]}}, "seeds": 1}
EVALUATED_EVERY = 2 * 512


class Judged:
    """A sweep's folder and a scheduler over it, which is told as Ray tells it."""

    def __init__(self, job: Job, folder: SweepFolder) -> None:
        self.job, self.folder, self.scheduler = job, folder, build_scheduler(job, folder)

    def resumed(self) -> Judged:
        return Judged(self.job, self.folder)

    def evaluate(self, number: int, tokens: int, value: float) -> bool:
        """Whether the trial has been stopped, now or before."""
        known = self.folder.result(number)
        self.folder.put(known.model_copy(update={"evaluations": (*known.evaluations, (tokens, value))}))
        ray = SimpleNamespace(trial_id=f"{id(self)}-{number}", config={"number": number})
        self.scheduler.on_trial_result(None, ray, {"tokens": tokens, "val/loss": value})
        return self.folder.result(number).status == "stopped"


@pytest.fixture
def begin(tiny_job: Callable[..., Path], tmp_path: Path) -> Callable[[str], Judged]:
    def begin(scheduler: str) -> Judged:
        train = {"tokens": 18 * EVALUATED_EVERY, "eval_every": 2}
        job = load(tiny_job(search={**SEARCH, "scheduler": scheduler}, train=train), Job).config
        folder = SweepFolder.new(tmp_path / "sweeps", "s")
        for number in range(9):
            trial = Trial(number=number, values={}, seed=0, kind="random" if number else "base")
            folder.put(Result(trial=trial, run="r", status="running"))
        return Judged(job, folder)

    return begin


@pytest.mark.parametrize("scheduler", ["asha", "median"])
@pytest.mark.parametrize("seed", range(4))
def test_a_resumed_sweep_stops_whom_one_that_was_never_killed_stops(
    begin: Callable[[str], Judged], scheduler: str, seed: int
) -> None:
    """Trials come in any order and are cut off anywhere; the second scheduler is made anew at every evaluation."""
    whole, killed = begin(scheduler), begin(scheduler)
    chance = random.Random(seed)
    quality = {number: chance.random() for number in range(9)}
    left = {number: list(range(1, 18)) for number in range(9)}
    while left:
        number = chance.choice(sorted(left))
        at = left[number].pop(0)
        value = 3 + quality[number] + 1 / at
        killed = killed.resumed()
        stopped = whole.evaluate(number, at * EVALUATED_EVERY, value)
        assert stopped == killed.evaluate(number, at * EVALUATED_EVERY, value)
        if stopped or not left[number]:
            del left[number]
    results = whole.folder.results()
    assert 3 <= sum(result.status == "stopped" for result in results) < 9
    best = min(range(1, 9), key=quality.__getitem__)
    assert {results[0].status, results[best].status} == {"running"}
    assert [r.stopped_by for r in results] == [r.stopped_by for r in killed.folder.results()]


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_who_comes_after_a_resume_is_compared_with_those_before_it(
    begin: Callable[[str], Judged], scheduler: str
) -> None:
    judged = begin(scheduler)
    assert not judged.evaluate(8, 4 * EVALUATED_EVERY, 9.0), "there is nobody to be behind"
    for number in (1, 2, 3):
        judged.evaluate(number, 4 * EVALUATED_EVERY, 3.0)
    assert judged.resumed().evaluate(4, 4 * EVALUATED_EVERY, 9.0)
    assert not judged.resumed().evaluate(0, 4 * EVALUATED_EVERY, 9.0), "the job as it stands"


@pytest.mark.ray
@pytest.mark.slow
def test_the_median_of_before_the_resume_stops_a_trial_with_two_workers(
    sweeps: Any, tiny_job: Callable[..., Path]
) -> None:
    """Of the sweep that was killed there are three good candidates; the one that is left runs on Ray Train."""
    job = tiny_job(
        search={**SEARCH, "scheduler": "median", "trials": 4, "finalists": 1},
        train={"tokens": 512 * 600, "eval_every": 20, "log_every": 20},
        checkpoint={"every": 1000},
        resources={"workers": 2},
        parallel={"expert": 2},
    )
    folder = SweepFolder.new(sweeps.folder.parent, "tiny")
    trials = [Trial(number=n, values={"balance.loss_weight": 0.01 + n / 1000}, seed=0, kind="random") for n in range(5)]
    base = Trial(number=0, values={}, seed=0, kind="base")
    stored = load(job, Job).config.model_dump(mode="json")
    record = SweepRecord(job_file=str(job), job=stored, overrides=(), budgets=(), trials=(base, *trials[1:]))
    folder.write(record)
    curve = tuple((20 * 512 * at, 1.0) for at in range(1, 31))
    for trial in record.trials[:4]:
        done = {"value": 1.0, "tokens": 512 * 600, "evaluations": curve}
        folder.put(Result(trial=trial, run=f"gone-{trial.number}", status="finished", **done))
    done = subprocess.run(sweeps.command("tune", "--resume", "tiny-1"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = folder.result(4)
    assert (found.status, found.stopped_by) == ("stopped", "median")
    assert 600 * 512 / 9 <= found.tokens < 600 * 512
    assert "trial 4 was stopped by median after" in (folder.folder / "report.md").read_text()
    steps = list((sweeps.state / "checkpoints").glob("*/step_*/manifest.json"))
    assert len(steps) == 1, "it ended with a checkpoint"
    assert json.loads(steps[0].read_text())["layout"]["resources.workers"] == 2
    with closing(sqlite3.connect(sweeps.state / "mlflow" / "mlflow.db")) as database:
        tagged = database.execute(
            "select status, value from runs join tags using (run_uuid) where key = 'tidegate.stopped_by'"
        ).fetchall()
    assert tagged == [("KILLED", "median")]
