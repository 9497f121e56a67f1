"""`tidegate tune`: candidates under a budget, each a run like any other, and the best ones again with other seeds.

Every trial is the main job: in its trial's process where it has one worker, else on Ray Train. Ray Tune packs them onto
the cluster, and goes on when one fails. What was finished is in the sweep's folder, whatever happens to this process.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from tidegate.config import ConfigError
from tidegate.launch.report import Reporter
from tidegate.launch.run import Request, prepare_data, run
from tidegate.launch.state import StateDir
from tidegate.redact import redact
from tidegate.track import RunHandle, finish_run, log_file, open_run, resolve_tracking_uri, run_url
from tidegate.train.job import Job
from tidegate.train.telemetry import Record
from tidegate.tune.budget import QUANTITIES, shown
from tidegate.tune.report import console_of_width, field_of, ranked_results, report, short
from tidegate.tune.space import Candidate, Space, draw, overrides_of
from tidegate.tune.trials import Result, SweepFolder, SweepRecord, Trial

__all__ = ["SweepRequest", "show_candidates", "show_front", "sweep"]


class SweepRequest(NamedTuple):
    """What the command line asked for."""

    job_file: Path | None
    """None when resuming."""
    overrides: Sequence[str]
    budgets: Sequence[str]
    state: StateDir
    resume: str | None = None
    force: bool = False
    address: str | None = None


def sweep(request: SweepRequest) -> SweepFolder:
    """Run what is left of a sweep, new or resumed, and report.

    Raises:
        ConfigError: no candidate is within the budgets, the job changed since the sweep began, a trial does not fit on
            the cluster, or no trial came to its end.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if request.address is not None and redact(uri) != uri:
        raise ConfigError(
            f"MLFLOW_TRACKING_URI={uri}: its password does not go to the cluster, where Ray would show it; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where the cluster's nodes start, and here"
        )
    folder, space = _open(request)
    record, base = folder.read(), space.base
    console = console_of_width()
    concurrent = _connect(request, base)
    reporter = Reporter(base)
    prepare_data(base, request.state, Path(record.job_file).parent, reporter)
    parent = open_run(
        resolve_tracking_uri(base.track, request.state.root),
        base.track,
        job=base.name,
        resolved=base,
        changes={},
        command=sys.argv,
        name=folder.name,
        tags={"tidegate.sweep": folder.name},
        notice=reporter.say,
    )
    console.print(f"sweep {folder.name}: {len(record.trials)} trials, {concurrent} at a time; {run_url(parent)}")
    finished = False
    try:
        _run(request, folder, record, record.trials, parent, concurrent)
        again = _finalists(space, folder)
        _run(request, folder, record, again, parent, concurrent)
        report(folder, space, console)
        for name in ("report.md", "front.png"):
            log_file(parent, folder.folder / name)
        finished = True
    finally:
        finish_run(parent, "FINISHED" if finished else "KILLED")
    return folder


def show_candidates(request: SweepRequest) -> None:
    """Print the candidates that a sweep would try, and what each costs."""
    assert request.job_file is not None
    space = Space(request.job_file, request.overrides, request.budgets)
    varied = [*space.config.space, *([space.config.solve.path] if space.config.solve else [])]
    table = Table("", *map(field_of, varied), *QUANTITIES)
    for trial in _trials(space):
        candidate = space.at(trial.values) if trial.values else Candidate({}, space.base)
        values = (short(candidate.values.get(path, "")) for path in varied)
        table.add_row(trial.kind, *values, *(shown(name, q.of(candidate.job)) for name, q in QUANTITIES.items()))
    console_of_width().print(table)


def show_front(name: str, state: StateDir) -> None:
    """Print and plot what a sweep has found so far."""
    folder = SweepFolder.existing(state.root / "sweeps", name)
    record = folder.read()
    report(folder, Space(Path(record.job_file), record.overrides, record.budgets), console_of_width())


def _open(request: SweepRequest) -> tuple[SweepFolder, Space]:
    sweeps = request.state.root / "sweeps"
    if request.resume is not None:
        folder = SweepFolder.existing(sweeps, request.resume)
        record = folder.read()
        space = Space(Path(record.job_file), [*record.overrides, *request.overrides], record.budgets)
        if not request.force:
            folder.refuse_another(space.base)
        return folder, space
    if request.job_file is None:
        raise ConfigError("name a job file with a search: section, or --resume SWEEP")
    space = Space(request.job_file, request.overrides, request.budgets)
    trials = tuple(_trials(space))  # before there is a folder: there may be none
    folder = SweepFolder.new(sweeps, space.base.name)
    resolved = space.base.model_dump(mode="json")
    whole = str(request.job_file.absolute())
    budgets, overrides = tuple(request.budgets), tuple(request.overrides)
    folder.write(SweepRecord(job_file=whole, job=resolved, overrides=overrides, budgets=budgets, trials=trials))
    return folder, space


def _trials(space: Space) -> list[Trial]:
    """The job as it stands if the budgets allow it, then candidates at random."""
    seed, base = space.base.train.seed, []
    if not any(budget.excess(space.base) for budget in space.budgets):
        base = [Trial(number=0, values={}, seed=seed, kind="base")]
    drawn = draw(space, space.config.trials, random.Random(space.config.seed))
    return base + [Trial(number=1 + i, values=one.values, seed=seed, kind="random") for i, one in enumerate(drawn)]


def _connect(request: SweepRequest, job: Job) -> int:
    """Join or start Ray; how many trials fit on it at a time."""
    import ray

    from tidegate.launch.ray_train import connect

    connect(request.address, job)
    resources, available = job.resources, ray.cluster_resources()
    fits = int(available["CPU"] // (resources.workers * resources.cpus_per_worker))
    if resources.gpu:
        fits = min(fits, int(available.get("GPU", 0) // resources.workers))
    return fits


def _run(
    request: SweepRequest,
    folder: SweepFolder,
    record: SweepRecord,
    trials: Sequence[Trial],
    parent: RunHandle,
    concurrent: int,
) -> None:
    """Run those trials that have not ended, so many at a time."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its tables show neither metrics nor runs
    from ray import tune

    ended = {result.trial.number for result in folder.results() if result.status in ("finished", "stopped", "failed")}
    left = [trial for trial in trials if trial.number not in ended]
    if not left:
        return
    space = Space(Path(record.job_file), record.overrides, record.budgets)
    resources = space.base.resources
    alone = resources.workers == 1
    by_number = {trial.number: trial for trial in left}
    task = _Task(record, by_number, folder.folder, request.state.root, parent.run_id, space.config.metric, alone)
    # What Ray Train asks for by itself is not asked for twice.
    needs = {"CPU": float(resources.cpus_per_worker), "GPU": float(resources.gpu)} if alone else {"CPU": 0.0}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, task=task), needs),
        param_space={
            "number": tune.grid_search([trial.number for trial in left]),
            "trials": {t.number: t.model_dump() for t in left},
        },
        tune_config=tune.TuneConfig(max_concurrent_trials=concurrent),
        run_config=tune.RunConfig(
            name=f"{folder.name}-{int(time.time())}",
            storage_path=str(folder.folder / "ray"),
            callbacks=[_announcer(folder)],
            verbose=0,
        ),
    )
    tuner.fit()


def _announcer(folder: SweepFolder) -> Any:
    """Says a line when a trial has ended; Ray pickles it."""
    from ray import tune

    class Announcer(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            for result in folder.results():
                if result.trial.number == trial.config["number"]:
                    value = "" if result.value is None else f", {result.value:.4f}"
                    print(f"trial {result.trial.number} ({result.run}) {result.status}{value} {result.error}")

    return Announcer()


class _Task(NamedTuple):
    """What every trial's process gets."""

    record: SweepRecord
    trials: dict[int, Trial]
    folder: Path
    state: Path
    parent: str
    metric: str
    alone: bool


def _trial(config: dict[str, int], task: _Task) -> None:
    """One trial, in a process of its own; resumes its run if it began once."""
    trial = task.trials[config["number"]]
    folder = SweepFolder(task.folder.parent, task.folder.name)
    before = next((result.run for result in folder.results() if result.trial.number == trial.number), "")
    state, begun = StateDir(task.state), time.monotonic()
    latest: dict[str, Any] = {"trial": trial, "run": before, "status": "running"}

    def put(**known: Any) -> None:
        latest.update(known)
        folder.put(Result(**latest))

    def watch(record: Record) -> None:
        if task.metric in record.metrics:
            put(value=record.metrics[task.metric], tokens=record.tokens, seconds=time.monotonic() - begun)

    overrides = [*task.record.overrides, *overrides_of(trial.values), f"train.seed={trial.seed}"]
    began = bool(before) and (task.state / "runs" / before / "run.json").exists()
    asked = Request(
        None if began else Path(task.record.job_file),
        [] if began else overrides,
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
        ran = run(asked)
    except Exception as error:  # one trial never ends the sweep
        put(status="failed", error=redact(" ".join(str(error).split()))[:500])
        return
    problem = "" if latest.get("value") is not None else f"it never reported {task.metric}"
    put(status="finished" if ran.outcome.finished and not problem else "failed", error=problem)


def _finalists(space: Space, folder: SweepFolder) -> list[Trial]:
    """The best candidates, and the job as it stands, again, with the same other seeds for each."""
    config, first = space.config, space.base.train.seed
    ranked = ranked_results(folder.results(), config.mode == "min", seed=first)
    if not ranked:
        failed = [f"trial {result.trial.number}: {result.error}" for result in folder.results()]
        raise ConfigError(f"{folder.name}: no trial came to its end; {'; '.join(failed[:3])}")
    number = 1 + max(result.trial.number for result in folder.results() if result.trial.kind != "seed")
    base = [result for result in ranked[config.finalists :] if result.trial.kind == "base"]
    pairs = [(result, seed) for result in [*ranked[: config.finalists], *base] for seed in range(1, config.seeds)]
    return [
        Trial(number=number + place, values=result.trial.values, seed=first + seed, kind="seed")
        for place, (result, seed) in enumerate(pairs)
    ]
