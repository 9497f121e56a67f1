"""From a job file to a finished run: check, prepare data, open the run in MLflow, train, report."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from rich.progress import BarColumn, Progress, TextColumn

from tidegate.config import ConfigError, LoadedJob, diff, flatten, load, load_stored
from tidegate.data import TokenDataset, prepare, unigram_perplexity
from tidegate.launch.cost import Ledger
from tidegate.launch.ended import Ended
from tidegate.launch.lineage import dataset_uses, job_tags
from tidegate.launch.preflight import check_dataset, check_machine, check_space, hide_gpus
from tidegate.launch.report import Reporter
from tidegate.launch.run_page import RunPage
from tidegate.launch.show import notes
from tidegate.launch.state import RunFolder, RunRecord, StateDir, check_name
from tidegate.track import (
    MetricLogger,
    RunHandle,
    RunStatus,
    finish_run,
    log_datasets,
    log_dict,
    log_file,
    open_run,
    recorded_uri,
    resolve_tracking_uri,
    run_url,
    tag_run,
)
from tidegate.train.checkpoint_store import CheckpointStore
from tidegate.train.init_from import check_init_from
from tidegate.train.job import Job
from tidegate.train.layout import reshapes
from tidegate.train.masks import check_mask
from tidegate.train.storage import Storage
from tidegate.train.telemetry import Record

if TYPE_CHECKING:
    from tidegate.train.loop import Outcome  # DeepSpeed comes with it

__all__ = ["Ran", "Request", "prepare_data", "run"]


class Request(NamedTuple):
    """What the command line asked for."""

    job_file: Path | None
    """None when resuming."""
    overrides: Sequence[str]
    state: StateDir
    resume: str | None = None
    name: str | None = None
    """Of the run; one of this name that began, here or with the job's storage elsewhere, goes on."""
    job_dir: Path | None = None
    """What `{job}` stands for; the folder of `job_file` by default."""
    local: bool = False
    address: str | None = None
    without: tuple[str, ...] = ()
    """Ids of Ray's nodes that get no workers, beside those that are found unfit."""
    tags: Mapping[str, str] = MappingProxyType({})
    """More tags for MLflow."""
    opened: Callable[[str], None] = lambda name: None
    """Is told the run's name when it exists."""
    watch: Callable[[Record], bool] = lambda record: False
    """Sees every record as it comes, beside the terminal; true asks the run to end after a step."""
    page: bool = True
    """Whether to write the run page."""


class Ran(NamedTuple):
    """A run that ended by itself."""

    name: str
    tracking: RunHandle
    outcome: Outcome
    limit: str
    """Of the job that ended it early, such as `limits.max_hours=2`, or empty."""


class _Plan(NamedTuple):
    loaded: LoadedJob
    job: Job
    job_dir: Path
    resumed: RunFolder | None


def run(request: Request) -> Ran:
    """Run a job to its end, or until it is stopped on request.

    Raises:
        ConfigError: a mistake that can be known beforehand, or that a worker met.
    """
    plan = _plan(request)
    job = plan.job
    check_machine(job, local=request.local, remote=request.address is not None)
    if plan.resumed is None:
        check_init_from(job)
    check_mask(job)
    hide_gpus(job)
    storage = _storage(request, job)
    reporter = Reporter(job)
    if not request.local:
        from tidegate.launch.ray_train import connect, storage_filesystem

        storage_filesystem(storage)
        connect(request.address, job)
    dataset = prepare_data(job, request.state, plan.job_dir, reporter)
    if request.address is not None:
        from tidegate.launch.capacity import Needs, wait_for_room

        wait_for_room(Needs.of(job), request.address, reporter.say)
    unfit = _unfit_nodes(request, plan, storage, reporter) if request.address is not None else ()
    run_folder, tracking, checkpoints, ledger = _open(
        request, plan, storage, TokenDataset.open(dataset, verify=False), reporter
    )
    request.opened(run_folder.name)
    status: RunStatus = "FAILED"
    with RunPage(tracking, run_folder, job.track, enabled=request.page) as page:
        try:
            _introduce(request, run_folder, tracking, reporter)
            reporter.start()
            ended = _train(request, job, run_folder, dataset, checkpoints, tracking, reporter, page, ledger, unfit)
            status = "FINISHED" if ended.outcome.finished else "KILLED"
        except (KeyboardInterrupt, SystemExit):  # Ray ends the process on Ctrl-C
            status = "KILLED"
            raise
        finally:
            reporter.stop()
            ledger.write()
            finish_run(tracking, status)
        limit = ledger.limit if ended.outcome.stopped else ""
        if limit:
            tag_run(tracking, "tidegate.stopped_by", limit)
        _conclude(request, job, run_folder, dataset, tracking, reporter, ended, limit)
        reporter.say(f"cost: {ledger.in_words()}")
    return Ran(run_folder.name, tracking, ended.outcome, limit)


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
    check_dataset(job, folder, job_dir)
    return folder


def _plan(request: Request) -> _Plan:
    if request.resume is not None:
        resumed = request.state.run(request.resume)
        record = resumed.read()
        loaded = load(resumed.job_file, Job, request.overrides)
        for field in ("init_from", "from_tokens", "mask"):
            if f"train.{field}" in loaded.overrides:
                raise ConfigError(
                    f"train.{field}={getattr(loaded.config.train, field)} is for a new run; --resume {request.resume} "
                    "goes on with its own weights"
                )
        return _Plan(loaded, loaded.config, Path(record.job_dir), resumed)
    if request.job_file is None:
        raise ConfigError("name a job file, or --resume RUN")
    loaded = load(request.job_file, Job, request.overrides)
    job_dir = request.job_dir or request.job_file.absolute().parent
    job = _with_whole_paths(loaded.config, job_dir)
    return _Plan(loaded, job, job_dir, None if request.name is None else _begun(request, request.name, job, job_dir))


_WHERE = ("resources", "limits", "parallel", "checkpoint", "track", "guards", "kernels", "train.pause_at_tokens")
"""What says where and how a run goes on, and not what it learns."""


def _begun(request: Request, name: str, job: Job, job_dir: Path) -> RunFolder | None:
    """The run of that name, if there is one.

    Raises:
        ConfigError: it is of another job.
    """
    check_name(name)
    known = name in request.state.runs()
    run = request.state.run(name) if known else request.state.adopt(name, request.state.storage_of(job), job_dir)
    if run is None:
        return None
    stored = load_stored(run.job_file.read_text(encoding="utf-8"), Job, str(run.job_file))
    differs = {field: value for field, value in diff(stored, job).items() if not field.startswith(_WHERE)}
    if differs:
        if not known:
            shutil.rmtree(run.folder)  # it is not this one, and stays where it is
        was, (field, value) = flatten(stored), next(iter(differs.items()))
        raise ConfigError(
            f"{request.job_file}: {field}={value}, but the run {name} has begun with {was.get(field)}"
            + (f" ({len(differs) - 1} more fields differ)" if len(differs) > 1 else "")
            + f"; take another --name, or change that run with --resume {name} --set {field}=..."
        )
    return run


def _with_whole_paths(job: Job, job_dir: Path) -> Job:
    """The job as any process on any machine can read it, whatever its current folder."""
    paths = {"init_from": job.train.init_from, "mask": job.train.mask}
    whole = {
        field: str(Path(path.replace("{job}", str(job_dir))).absolute())
        for field, path in paths.items()
        if path is not None
    }
    return job.model_copy(update={"train": job.train.model_copy(update=whole)})


class _Opened(NamedTuple):
    folder: RunFolder
    tracking: RunHandle
    checkpoints: str
    """Folder or URI of this run's."""
    ledger: Ledger


def _open(request: Request, plan: _Plan, storage: str, dataset: TokenDataset, reporter: Reporter) -> _Opened:
    """Create or re-open the run, here and in MLflow."""
    job, resumed = plan.job, plan.resumed
    record = resumed.read() if resumed else None
    run_folder = resumed or (request.state.named_run(request.name) if request.name else request.state.new_run(job.name))
    checkpoints = _resumed_from(plan, storage, record, run_folder.name, reporter) if record else None
    ledger = _ledger(request, job, checkpoints, reporter) if checkpoints else None  # refuses before the run is opened
    cluster = "process" if request.local else "local_ray" if request.address is None else "ray"
    try:
        tracking = open_run(
            _tracking_uri(request, plan),
            job.track,
            job=job.name,
            resolved=job,
            changes=plan.loaded.overrides,
            command=sys.argv,
            name=run_folder.name,
            run_id=record.run_id if record else None,
            tags=job_tags(job, dataset, plan.loaded.base, cluster) | dict(request.tags),
            notice=reporter.say,
        )
    except BaseException:
        if resumed is None:
            run_folder.folder.rmdir()  # nothing half-written: the name is free again
        raise
    if resumed is None:
        log_datasets(tracking, [*dataset_uses(dataset)])
    checkpoints = checkpoints or _checkpoints(storage, run_folder.name, tracking.run_id)
    run_folder.write(job, plan.job_dir, tracking, record.command if record else sys.argv, checkpoints)
    return _Opened(run_folder, tracking, checkpoints, ledger or _ledger(request, job, checkpoints, reporter))


def _ledger(request: Request, job: Job, checkpoints: str, reporter: Reporter) -> Ledger:
    shares = job.search is not None and job.resources.gpu and "tidegate.sweep" in request.tags
    return Ledger(checkpoints, job, job.search.gpu_share if job.search and shares else 1.0, reporter.say)


def _tracking_uri(request: Request, plan: _Plan) -> str:
    if plan.resumed is not None:
        return recorded_uri(plan.resumed.read().tracking_uri)
    return resolve_tracking_uri(plan.job.track, request.state.root)


def _is_submitted() -> bool:
    from tidegate.launch.ray_train import SUBMITTED

    return SUBMITTED


def _unfit_nodes(request: Request, plan: _Plan, storage: str, reporter: Reporter) -> tuple[str, ...]:
    from tidegate.launch.cluster_check import unfit_nodes

    assert request.address is not None
    folders = dict.fromkeys((str(request.state.root), storage))
    return unfit_nodes(plan.job, request.address, [*folders], _tracking_uri(request, plan), reporter.say)


def _checkpoints(storage: str, run: str, run_id: str) -> str:
    """Unique also where several state directories share one storage."""
    return f"{storage}/{run}-{run_id[:8]}"


def _resumed_from(plan: _Plan, storage: str, record: RunRecord, run: str, reporter: Reporter) -> str:
    """Where a resumed run's checkpoints are; says where it goes on. Which of them are damaged, the workers find."""
    moved = "checkpoint.storage" in plan.loaded.overrides
    checkpoints = _checkpoints(storage, run, record.run_id) if moved else record.checkpoints
    valid = CheckpointStore(Storage(checkpoints)).valid()
    if moved and not valid:
        raise ConfigError(
            f"checkpoint.storage={plan.job.checkpoint.storage} holds no checkpoint of this run; first copy "
            f"{record.checkpoints} to {checkpoints}"
        )
    if valid:
        newest = valid[-1]
        assert newest.manifest is not None
        # Refuses another model before the run's stored job is overwritten.
        reshapes(plan.job, newest.manifest, f"{checkpoints}/{newest.name}")
        reporter.say(f"checkpoints: {checkpoints}, the newest is of step {valid[-1].step}")
    else:
        reporter.say(f"{checkpoints} holds no checkpoint: the run begins again from its first step")
    return checkpoints


def _storage(request: Request, job: Job) -> str:
    """Where checkpoints go, with room for them if that is a folder."""
    storage = request.state.storage_of(job)
    if "://" not in storage:
        check_space(job, Path(storage))
    return storage


def _introduce(request: Request, run_folder: RunFolder, tracking: RunHandle, reporter: Reporter) -> None:
    reporter.header(run_folder.name, "this process" if request.local else request.address or "local Ray")
    if reporter.job.train.init_from is not None:
        reporter.say(f"a new run begins with the weights of {reporter.job.train.init_from}")
    for note in notes(reporter.job):
        reporter.say(note)
    reporter.say(f"MLflow: {run_url(tracking)}")
    if request.address:
        read = [path for path in (reporter.job.train.init_from, reporter.job.train.mask) if path is not None]
        reporter.say(f"workers must see {' and '.join([str(request.state.root), *read])}: what they read is there")
        if tracking.uri.startswith("sqlite"):
            reporter.say("and MLflow is a SQLite file there; set MLFLOW_TRACKING_URI to a server for several machines")


def _train(
    request: Request,
    job: Job,
    run_folder: RunFolder,
    dataset: Path,
    checkpoints: str,
    tracking: RunHandle,
    reporter: Reporter,
    page: RunPage,
    ledger: Ledger,
    unfit: Sequence[str],
) -> Ended:
    def show(record: Record) -> bool:
        reporter.record(record)
        page.record(record)
        return request.watch(record)

    def notice(line: str) -> None:
        reporter.say(line)
        page.notice(line)

    if not request.local:
        from tidegate.launch.ray_train import run_on_ray

        sweep = request.tags.get("tidegate.sweep", "")
        without = *request.without, *unfit
        return run_on_ray(job, checkpoints, dataset, tracking, run_folder.spool, show, notice, ledger, sweep, without)
    from tidegate.launch.local import run_local

    logger = MetricLogger(tracking.uri, tracking.run_id, spool=run_folder.spool, flush_every_s=job.track.flush_every_s)
    return run_local(job, dataset, checkpoints, logger, show, notice, ledger)


def _conclude(
    request: Request,
    job: Job,
    run_folder: RunFolder,
    dataset_folder: Path,
    tracking: RunHandle,
    reporter: Reporter,
    ended: Ended,
    limit: str,
) -> None:
    """Store the last artifacts and print the tables."""
    outcome, delivery = ended
    log_dict(tracking, {"step": outcome.step, "tokens": outcome.tokens, "path": outcome.checkpoint}, "checkpoint.json")
    log_file(tracking, dataset_folder / "tokenizer.json")
    if outcome.evaluation is not None:
        dataset = TokenDataset.open(dataset_folder, verify=False)
        unigram = unigram_perplexity(dataset, job.data)
        reporter.evaluation(outcome.evaluation, unigram)
        summary = {"perplexity": outcome.evaluation.perplexity(), "unigram_perplexity": unigram}
        log_dict(tracking, summary, "summary.json")
    if not outcome.finished:
        submitted = request.address is not None and _is_submitted()
        where = f" --address {request.address}" if request.address and not submitted else ""
        flags = " --local" if request.local else where
        flags += "" if job.train.pause_at_tokens is None else " --set train.pause_at_tokens=null"
        flags += f" --set {limit.partition('=')[0]}=..." if limit else ""
        why = f", {limit} is reached" if limit else ""
        resume = f"tidegate {'resume' if submitted else 'train --resume'} {run_folder.name}{flags}"
        reporter.say(f"stopped at step {outcome.step}{why}; continue with: {resume}")
    if delivery.undelivered:
        reporter.say(
            f"MLflow did not take {delivery.undelivered} records; they are in {delivery.spool} "
            f"and go out when the run is resumed"
        )
    reporter.say(f"checkpoint: {outcome.checkpoint} (training stood still {outcome.stalled_s:.1f} s for checkpoints)")
    reporter.say(f"run {run_folder.name} in MLflow: {run_url(tracking)}")
