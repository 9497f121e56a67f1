"""`tidegate tune`: candidates under a budget, each a run like any other, and the best ones again with other seeds.

Every trial is the main job: in its trial's process where it has one worker, else on Ray Train. Ray Tune packs them onto
the cluster, and goes on when one fails. What was finished is in the sweep's folder, whatever happens to this process.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from tidegate.config import ConfigError
from tidegate.launch.preflight import check_space
from tidegate.launch.report import Reporter
from tidegate.launch.run import prepare_data
from tidegate.launch.state import StateDir
from tidegate.redact import redact
from tidegate.track import finish_run, log_file, log_metrics, run_url
from tidegate.train.job import Job
from tidegate.tune.budget import known_of, shown
from tidegate.tune.measured import estimate
from tidegate.tune.population import begin_round, recipe, rounds, schedule_of
from tidegate.tune.queue import Limits, Queue
from tidegate.tune.report import console_of_width, cost_of, field_of, ranked_results, report, short
from tidegate.tune.run_trial import Task, gpus_of, left_out, open_parent
from tidegate.tune.searchers import build_searcher
from tidegate.tune.space import Candidate, Space, draw
from tidegate.tune.trials import Phase, SweepFolder, SweepRecord, Trial

__all__ = ["SweepRequest", "drawn_trials", "finalists", "show_candidates", "show_front", "sweep", "trials_at_a_time"]


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
    concurrent: int | None = None
    """Trials at a time; None: as many as fit."""


def sweep(request: SweepRequest) -> SweepFolder:
    """Run what is left of a sweep, new or resumed, and report.

    Raises:
        ConfigError: no candidate is within the budgets, the job changed since the sweep began, fewer trials fit on the
            cluster than are asked for, their checkpoints do not fit into the storage, or no trial came to its end.
    """
    from tidegate.tune.on_ray import run_trials  # Ray takes seconds

    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if request.address is not None and redact(uri) != uri:
        raise ConfigError(
            f"MLFLOW_TRACKING_URI={uri}: its password does not go to the cluster, where Ray would show it; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where the cluster's nodes start, and here"
        )
    folder, space = _open(request)
    record, base, config = folder.read(), space.base, space.config
    console = console_of_width()
    concurrent = _connect(request, base)
    without = left_out(base, request.address, request.state, concurrent)
    limits = Limits(base, concurrent)
    reporter = Reporter(base)
    prepare_data(base, request.state, Path(record.job_file).parent, reporter)
    budget = ", ".join(map(str, space.budgets))
    parent = open_parent(folder, base, request.state, reporter.say, budget)
    console.print(f"sweep {folder.name}: {config.trials} candidates, {concurrent} at a time; {run_url(parent)}")
    where = Path(record.job_file), record.overrides, folder.folder, request.state.root
    alone, judged = base.resources.workers == 1, config.scheduler in ("asha", "median")
    task = Task(*where, parent.run_id, config.metric, base.train.tokens, alone, judged, config.against, budget, without)
    finished, notes = False, list[str]()

    def run_queue(what: str, queue: Queue, task: Task) -> bool:
        run_trials(queue, task, base, concurrent)
        if queue.stopped_by:
            notes.append(f"{queue.most} {what} were not begun: {queue.stopped_by}")
        return not queue.stopped_by

    try:
        searcher = build_searcher(space, folder.results(), record.trials)
        searched = config.trials - config.random_trials - config.members
        whole = [trial for trial in record.trials if trial.kind != "member"]
        run_queue("candidates", Queue(folder, whole, limits, config.most_reruns, searcher, searched), task)
        for place in range(len(rounds(base)) if config.members else 0):
            members = begin_round(space, folder, request.state, place)
            if not run_queue("members", Queue(folder, members, limits, config.most_reruns), task):
                break
        again = finalists(space, folder)
        for _ in range(max([1, *(len(trial.phases) for trial in again)])):  # a process trains one phase
            if not run_queue("reruns of finalists", Queue(folder, again, limits), task._replace(judged=False)):
                break
        report(folder, space, console, notes)
        for name in ("report.md", "front.png", "front.html"):
            log_file(parent, folder.folder / name)
        finished = True
    finally:
        finish_run(parent, "FINISHED" if finished else "KILLED")
        log_metrics(parent, cost_of(folder).metrics())
    return folder


def show_candidates(request: SweepRequest) -> None:
    """Print the candidates that a sweep would try, and what each costs."""
    assert request.job_file is not None
    space = Space(request.job_file, request.overrides, request.budgets)
    varied = [*space.config.space, *([space.config.solve.path] if space.config.solve else [])]
    quantities, jobs = known_of(space.base), []
    table = Table("", *map(field_of, varied), *quantities)
    for trial in drawn_trials(space):
        candidate = space.at(trial.values) if trial.values else Candidate({}, space.base)
        values = (short(candidate.values.get(path, "")) for path in varied)
        jobs.append(candidate.job)
        table.add_row(trial.kind, *values, *(shown(name, q.of(candidate.job)) for name, q in quantities.items()))
    console = console_of_width()
    console.print(table)
    more = space.config.trials - space.config.random_trials - space.config.members
    if more:
        console.print(f"and {more} more that {space.config.searcher} proposes from what those come to")
    console.print(_expected(space.base, jobs, more + space.config.most_reruns), soft_wrap=True)


def _expected(job: Job, drawn: Sequence[Job], more: int) -> str:
    """What a sweep is predicted to take."""
    assert job.search is not None
    if job.search.measured is None:
        return (
            "time and cost are not predicted: that needs search.measured, which `tidegate bench JOB --out FILE` writes"
        )
    found = estimate(drawn, more)
    price = job.resources.price_per_hour
    money = f", {found.worker_hours * price:.3g} at resources.price_per_hour={price:g}" if price is not None else ""
    return (
        f"the steps of at most {len(drawn) + more} trials, reruns of finalists included, are predicted to take "
        f"{found.hours:.3g} hours one at a time, {found.worker_hours:.3g} worker hours{money}"
    )


def show_front(name: str, state: StateDir, found: Path | None = None) -> None:
    """Print and plot what a sweep has found so far.

    Args:
        found: where the best goes as a job that extends the one that was varied; no file yet.
    """
    if found is not None and found.exists():
        raise ConfigError(f"--write {found}: is there already")
    folder = SweepFolder.existing(state.root / "sweeps", name)
    record = folder.read()
    space = Space(Path(record.job_file), record.overrides, record.budgets)
    report(folder, space, console_of_width(), found=found)


def _open(request: SweepRequest) -> tuple[SweepFolder, Space]:
    sweeps = request.state.root / "sweeps"
    if request.resume is not None:
        folder = SweepFolder.existing(sweeps, request.resume)
        record = folder.read()
        space = Space(Path(record.job_file), [*record.overrides, *request.overrides], record.budgets)
        if not request.force:
            folder.refuse_another(space.base)
        _check_space(request, space, record.trials, sum(result.ended for result in folder.results()))
        return folder, space
    if request.job_file is None:
        raise ConfigError("name a job file with a search: section, or --resume SWEEP")
    space = Space(request.job_file, request.overrides, request.budgets)
    trials = tuple(drawn_trials(space))  # before there is a folder: there may be none
    _check_space(request, space, trials, 0)
    folder = SweepFolder.new(sweeps, space.base.name)
    resolved = space.base.model_dump(mode="json")
    whole = str(request.job_file.absolute())
    budgets, overrides = tuple(request.budgets), tuple(request.overrides)
    folder.write(SweepRecord(job_file=whole, job=resolved, overrides=overrides, budgets=budgets, trials=trials))
    return folder, space


def _check_space(request: SweepRequest, space: Space, drawn: Sequence[Trial], ended: int) -> None:
    """Room for the checkpoints of all trials that are still to be made, in a folder that this machine sees.

    Args:
        drawn: the sweep's first trials.
        ended: how many of all have.
    """
    storage = request.state.storage_of(space.base)
    if "://" in storage:
        return
    trials = sum(trial.kind == "base" for trial in drawn) + space.config.trials + space.config.most_reruns
    check_space(space.base, Path(storage), runs=trials - ended, at_once=request.concurrent or 1)


def drawn_trials(space: Space) -> list[Trial]:
    """The job as it stands if the budgets allow it, then the candidates that are drawn."""
    seed, base = space.base.train.seed, []
    if not any(budget.excess(space.base) for budget in space.budgets):
        base = [Trial(number=0, values={}, seed=seed, kind="base")]
    config, trials = space.config, []
    drawn = draw(space, config.random_trials + config.members, random.Random(config.seed))
    for number, values in ((1 + place, one.values) for place, one in enumerate(drawn)):
        if number <= config.random_trials:
            trials.append(Trial(number=number, values=values, seed=seed, kind="random"))
        else:
            begin, end = rounds(space.base)[0]
            phases = (Phase(begin=begin, end=end, values=values),)
            trials.append(Trial(number=number, values=values, seed=seed, kind="member", phases=phases))
    return base + trials


def _connect(request: SweepRequest, job: Job) -> int:
    """Join or start Ray; how many trials are to run on it at a time."""
    import ray

    from tidegate.launch.capacity import Needs, wait_for_room
    from tidegate.launch.ray_train import connect

    connect(request.address, job)
    if request.address is not None:
        wait_for_room(Needs.of(job).times(request.concurrent or 1), request.address, print)
    return trials_at_a_time(job, ray.cluster_resources(), request.concurrent, request.address or "this machine")


def trials_at_a_time(job: Job, available: Mapping[str, float], wanted: int | None, where: str) -> int:
    """How many trials run at a time: as many as are wanted, or as fit.

    Args:
        job: of a trial.
        available: Ray's resources, of which there is enough for one.
        where: they are, for the message.

    Raises:
        ConfigError: more are wanted than fit.
    """
    resources = job.resources
    needs = {"CPU": resources.workers * resources.cpus_per_worker, "GPU": gpus_of(job)}
    fits = min(int(available.get(kind, 0) / number + 1e-6) for kind, number in needs.items() if number)
    if wanted is not None and wanted > fits:
        takes = " and ".join(f"{number:g} {kind}s" for kind, number in needs.items() if number)
        there = " and ".join(f"{available.get(kind, 0):g} {kind}s" for kind, number in needs.items() if number)
        raise ConfigError(
            f"--concurrent {wanted}: a trial takes {takes} (resources.workers={resources.workers}), and {where} has "
            f"{there}: at most {fits} fit at a time"
        )
    return wanted or fits


def finalists(space: Space, folder: SweepFolder) -> list[Trial]:
    """The best candidates, the job as it stands and the best random trial, again, each with the same other seeds."""
    config, first, results = space.config, space.base.train.seed, folder.results()
    ranked = ranked_results(results, config.mode == "min", seed=first)
    if not ranked:
        failed = [f"trial {result.trial.number}: {result.error}" for result in results]
        raise ConfigError(f"{folder.name}: no trial came to its end; {'; '.join(failed[:3])}")
    chosen = [result for result in ranked if result.trial.kind != "base"][: config.finalists]
    for kind in ("base", *(["random"] if config.has_baseline else [])):
        best = [result for result in ranked if result.trial.kind == kind][:1]
        chosen += [result for result in best if result not in chosen]
    record = folder.read()
    number = 1 + max(t.number for t in (*record.trials, *(result.trial for result in results)))
    known = {(recipe(t, results), t.seed): t for t in (r.trial for r in results if r.trial.kind == "seed")}
    trials = []
    for result in chosen:
        for seed in range(first + 1, first + config.seeds):
            phases = tuple(p.model_copy(update={"parent": None}) for p in schedule_of(result.trial, results))
            values = phases[0].values if phases else result.trial.last_values
            new = Trial(number=number, values=values, seed=seed, kind="seed", phases=phases)
            trials.append(known.get((recipe(new, results), seed), new))
            number += trials[-1] is new
    return trials
