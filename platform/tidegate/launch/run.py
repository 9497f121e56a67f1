"""From a job file to a finished run: check, prepare data, open the run in MLflow, train, report."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn

from tidegate.config import ConfigError, LoadedJob, load
from tidegate.data import TokenDataset, prepare, unigram_perplexity
from tidegate.launch.preflight import check_dataset, check_machine, check_space
from tidegate.launch.report import Reporter
from tidegate.launch.state import RunFolder, StateDir
from tidegate.track import (
    Delivery,
    MetricLogger,
    RunHandle,
    finish_run,
    log_dict,
    log_file,
    open_run,
    resolve_tracking_uri,
    run_url,
)
from tidegate.train.job import Job

if TYPE_CHECKING:  # the driver need not import DeepSpeed
    from tidegate.train.loop import Outcome

__all__ = ["Request", "prepare_data", "run"]


class Request(NamedTuple):
    """What the command line asked for."""

    job_file: Path | None
    """None when resuming."""
    overrides: Sequence[str]
    state: StateDir
    resume: str | None = None
    local: bool = False
    address: str | None = None


class _Plan(NamedTuple):
    loaded: LoadedJob
    job: Job
    job_dir: Path
    resumed: RunFolder | None


def run(request: Request) -> bool:
    """Run a job to its end; returns whether it got there (False: stopped on request).

    Raises:
        ConfigError: a mistake that can be known beforehand, or that a worker met.
    """
    plan = _plan(request)
    job = plan.job
    check_machine(job, local=request.local, remote=request.address is not None)
    reporter = Reporter(job)
    storage = job.resources.storage or str(request.state.checkpoints)
    if "://" not in storage:
        check_space(job, Path(storage).absolute())
    dataset = prepare_data(job, request.state, plan.job_dir, reporter)
    if not request.local:
        from tidegate.launch.ray_train import connect

        connect(request.address, job)
    run_folder, tracking = _open(request, plan, reporter)
    if request.address and tracking.uri.startswith("sqlite"):
        reporter.say("MLflow is a SQLite file: workers on other machines cannot write to it; set MLFLOW_TRACKING_URI")
    reporter.header(run_folder.name, "this process" if request.local else request.address or "local Ray")
    reporter.say(f"MLflow: {run_url(tracking)}")
    status = "FAILED"
    reporter.start()
    try:
        outcome, delivery = _train(request, job, run_folder, dataset, storage, tracking, reporter)
        status = "FINISHED" if outcome.finished else "KILLED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        reporter.stop()
        finish_run(tracking, status)  # type: ignore[arg-type]
    _conclude(job, run_folder, dataset, storage, tracking, reporter, outcome, delivery)
    return outcome.finished


def prepare_data(job: Job, state: StateDir, job_dir: Path, reporter: Reporter) -> Path:
    """Build or find the token shards of a job, with a progress bar."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,} of {task.total:,}")
    with Progress(*columns, console=reporter.console, transient=True, disable=not reporter.console.is_terminal) as bar:
        tasks: dict[str, object] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
                if bar.disable:
                    reporter.say(f"data: {stage}")
            bar.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]

        folder = prepare(job.data, cache_dir=state.data, job_dir=job_dir, progress=progress)
    check_dataset(job, folder)
    return folder


def _plan(request: Request) -> _Plan:
    if request.resume is not None:
        resumed = request.state.run(request.resume)
        loaded = load(resumed.job_file, Job, request.overrides)
        return _Plan(loaded, loaded.config, Path(resumed.read().job_dir), resumed)
    if request.job_file is None:
        raise ConfigError("name a job file, or --resume RUN")
    loaded = load(request.job_file, Job, request.overrides)
    return _Plan(loaded, loaded.config, request.job_file.absolute().parent, None)


def _open(request: Request, plan: _Plan, reporter: Reporter) -> tuple[RunFolder, RunHandle]:
    """Create or re-open the run, here and in MLflow."""
    job, resumed = plan.job, plan.resumed
    run_folder = resumed or request.state.new_run(job.name)
    try:
        record = resumed.read() if resumed else None
        tracking = open_run(
            record.tracking_uri if record else resolve_tracking_uri(job.track, request.state.root),
            job.track,
            job=job.name,
            resolved=job,
            changes=plan.loaded.overrides,
            command=sys.argv,
            name=run_folder.name,
            run_id=record.run_id if record else None,
            notice=reporter.say,
        )
    except ConfigError:
        if resumed is None:
            run_folder.folder.rmdir()  # nothing half-written: the name is free again
        raise
    if resumed is None:
        run_folder.write(job, plan.job_dir, tracking, sys.argv)
    return run_folder, tracking


def _train(
    request: Request,
    job: Job,
    run_folder: RunFolder,
    dataset: Path,
    storage: str,
    tracking: RunHandle,
    reporter: Reporter,
) -> tuple[Outcome, Delivery]:
    if request.local:
        from tidegate.launch.local import run_local

        logger = MetricLogger(
            tracking.uri, tracking.run_id, spool=run_folder.spool, flush_every_s=job.track.flush_every_s
        )
        folder = Path(storage).absolute() / run_folder.name
        folder.mkdir(parents=True, exist_ok=True)
        return run_local(job, dataset, folder, logger, reporter.record)
    from tidegate.launch.ray_train import run_on_ray

    storage = storage if "://" in storage else str(Path(storage).absolute())
    return run_on_ray(job, run_folder.name, dataset, storage, tracking, run_folder.spool, reporter.record)


def _conclude(
    job: Job,
    run_folder: RunFolder,
    dataset_folder: Path,
    storage: str,
    tracking: RunHandle,
    reporter: Reporter,
    outcome: Outcome,
    delivery: Delivery,
) -> None:
    """Store the last artifacts and print the tables."""
    checkpoint = f"{storage.rstrip('/')}/{run_folder.name}"
    log_dict(tracking, {"step": outcome.step, "tokens": outcome.tokens, "folder": checkpoint}, "checkpoint.json")
    log_file(tracking, dataset_folder / "tokenizer.json")
    if outcome.evaluation is not None:
        dataset = TokenDataset.open(dataset_folder, verify=False)
        unigram = unigram_perplexity(dataset, job.data)
        reporter.evaluation(outcome.evaluation, unigram)
        summary = {"perplexity": outcome.evaluation.perplexity(), "unigram_perplexity": unigram}
        log_dict(tracking, summary, "summary.json")
        if outcome.evaluation.load_DLE is not None:
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / "expert_load.npz"
                np.savez(
                    path, domains=np.array(outcome.evaluation.domains), load_DLE=np.array(outcome.evaluation.load_DLE)
                )
                log_file(tracking, path)
    if not outcome.finished:
        reporter.say(f"stopped at step {outcome.step}; continue with: tidegate train --resume {run_folder.name}")
    if delivery.undelivered:
        reporter.say(
            f"MLflow did not take {delivery.undelivered} records; they are in {delivery.spool} "
            f"and go out when the run is resumed"
        )
    reporter.say(f"checkpoints: {checkpoint}")
    reporter.say(f"run {run_folder.name} in MLflow: {run_url(tracking)}")
