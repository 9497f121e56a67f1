"""The loop on Ray Train workers, with the driver watching.

Ray's `train.report` takes seconds and carries only what comes with a checkpoint, so records go to a small actor (the
board) instead: rank 0 pushes, the driver drains. Through the board, too, the driver asks the run to stop.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import fsspec
import pyarrow.fs
import ray
import ray.train
from ray._private import ray_constants
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.train.torch import TorchConfig
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import tidegate
import tidegate_kernels
from tidegate.config import ConfigError
from tidegate.launch.capacity import Needs, check_capacity
from tidegate.launch.cost import Ledger, Meter
from tidegate.launch.doctor import why_no_ray
from tidegate.launch.elastic import NoRoom, Notices, Reason, Stopped, Trainer, Yielded, causes, is_preempted
from tidegate.launch.ended import Ended
from tidegate.launch.live import LiveMetrics
from tidegate.launch.spot import watch_cloud
from tidegate.parallel import collectives
from tidegate.redact import redact
from tidegate.track import Delivery, MetricLogger, RunHandle
from tidegate.train.checkpoint import Tracker
from tidegate.train.job import Job
from tidegate.train.limits import Spent
from tidegate.train.loop import Outcome, World, train
from tidegate.train.telemetry import Record
from tidegate.train.throughput import device_name

__all__ = [
    "SHIPPED",
    "SUBMITTED",
    "connect",
    "elsewhere",
    "forwarded_environment",
    "join",
    "run_on_ray",
    "storage_filesystem",
]

SUBMITTED = RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ
"""Whether this process was submitted to its cluster."""
SHIPPED = tuple(str(Path(str(module.__file__)).parent) for module in (tidegate, tidegate_kernels))
"""Folders of the packages that a cluster gets with a job."""


_log = logging.getLogger(__name__)

RESIZE_INTERVAL_S = 60.0
"""Between two looks at whether there is room for more of workers."""
_NOTICE_S = 5.0
"""That a worker waits for a line of its to arrive, at most: the link to the driver's machine may be cut."""


class _WorkerJob(NamedTuple):
    """What every worker gets."""

    job: Job
    dataset: Path
    checkpoints: str
    tracking: RunHandle
    spool: Path
    board: Any


def connect(address: str | None, job: Job) -> None:
    """Join the Ray cluster at `address`, or start one that only this machine reaches and check that the job fits.

    Raises:
        ConfigError: no Ray answers there, or this machine has less than the job asks for.
    """
    mine = address is None and not ray.is_initialized()
    join(address)
    if mine:  # and not a cluster, which may grow
        check_capacity(Needs.of(job), "this machine")


def join(address: str | None) -> None:
    """Join the Ray cluster at `address`, or start one that only this machine reaches.

    Raises:
        ConfigError: no Ray answers there.
    """
    # Left to itself ray.init waits two minutes for a cluster that is not there, then ends the whole process.
    problem = why_no_ray(address) if address else None
    if problem:
        raise ConfigError(f"--address {address}: no Ray cluster answers ({problem})")
    if not ray.is_initialized():  # a trial of a sweep is on its cluster already
        _start(address)


def _start(address: str | None) -> None:
    if address is None:
        _keep_to_this_machine()
    # A submitted job's processes have its packages already, and Ray refuses a second word on them.
    packages = {} if SUBMITTED else {"py_modules": list(SHIPPED)}
    runtime_env = {**packages, "env_vars": forwarded_environment(devices=True)} if address else None
    try:
        ray.init(address=address or "local", runtime_env=runtime_env, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        what = f"--address {address}: no Ray cluster answers" if address else "Ray does not start on this machine"
        raise ConfigError(f"{what} ({str(error).splitlines()[0]})") from error


def run_on_ray(
    job: Job,
    checkpoints: str,
    dataset: Path,
    tracking: RunHandle,
    spool: Path,
    show: Callable[[Record], bool],
    notice: Callable[[str], None],
    ledger: Ledger,
    sweep: str = "",
    without: Sequence[str] = (),
) -> Ended:
    """Train on Ray Train workers; continues from the newest of the run's `checkpoints`.

    No worker is placed on the nodes `without`, which are ids.

    Checkpoints do not go through `ray.train.report`, which would copy them once more and make each step wait for it:
    workers write them beside what Ray keeps of the run, and find the newest by themselves when Ray starts them again.
    """
    # Not soft, which Ray honours for half of the actors that need no CPU: a cut link must leave the board on our side.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
    board = _Board.options(**options).remote(tracking.name, sweep, job, ledger.spent)  # type: ignore[attr-defined]
    storage, _, name = checkpoints.rpartition("/")
    filesystem, path = storage_filesystem(storage)
    resources = job.resources
    task = _WorkerJob(job, dataset, checkpoints, tracking, spool, board)

    def worker() -> Any:
        return _worker(task)

    elastic = resources.min_workers is not None
    trainer = Trainer(
        sizes=job.world_sizes if elastic else None,
        board=board,
        without=without,
        needs=Needs.of(job),
        train_loop_per_worker=worker,  # no train_loop_config: Ray's dashboard shows it, a tracking URI has a password
        scaling_config=ScalingConfig(
            num_workers=(job.world_sizes[0], resources.workers) if elastic else resources.workers,
            use_gpu=resources.gpu,
            resources_per_worker={"CPU": resources.cpus_per_worker, **({"GPU": 1} if resources.gpu else {})},
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
            label_selector=elsewhere(without) if without else None,
        ),
        torch_config=TorchConfig(backend="nccl" if resources.gpu else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(
                max_failures=resources.max_failures, max_preemption_failures=resources.max_preemptions
            ),
            callbacks=[Notices()],  # type: ignore[list-item]
        ),
    )
    with _watch(board, show, notice, ledger):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            if isinstance(error, ray.train.ControllerError) and isinstance(error.controller_failure, Stopped):
                notice("stopped while there were no workers: the run is as its last checkpoint has it")
                raise SystemExit(143) from None  # as a process that SIGTERM ended
            raise _cause(error, job) from error
    outcome, delivery = result.return_value  # type: ignore[attr-defined]
    return Ended(outcome, delivery)


def elsewhere(nodes: Sequence[str]) -> dict[str, str]:
    """The label selector of all nodes but these, which are ids."""
    return {"ray.io/node-id": f"!in({','.join(nodes)})"}


def storage_filesystem(storage: str) -> tuple[pyarrow.fs.FileSystem | None, str]:
    """Filesystem and path of a folder or of any URI that fsspec knows.

    Raises:
        ConfigError: the URI names a protocol that is unknown or not installed here.
    """
    if "://" not in storage:
        return None, storage
    try:
        filesystem, path = fsspec.core.url_to_fs(storage)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"checkpoint.storage={storage}: {error}") from error
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), path


def _worker(task: _WorkerJob) -> tuple[Outcome, Delivery] | None:
    """One rank's life."""
    collectives.start()  # Ray made the process group; this binds the device
    job = task.job.at_world_size(collectives.world_size())
    rank_zero = collectives.rank() == 0
    logger = None
    if rank_zero:
        logger = MetricLogger(
            task.tracking.uri, task.tracking.run_id, spool=task.spool, flush_every_s=job.track.flush_every_s
        )
        logger.tag("gpu", device_name(collectives.default_device()))
        meter = Meter(ray.get(task.board.begin.remote(job.resources.workers)), job.resources.price_per_hour)
        meter.set_workers(job.resources.workers)

    def ask() -> Any:
        return task.board.wish.remote(job.resources.workers, meter.read())

    wishes = _Wishes(ask if rank_zero else None)

    def record(record: Record) -> None:
        assert logger is not None
        record = meter.mark(record)
        logger.log(record.metrics, step=record.step, tokens=record.tokens)
        task.board.push.remote(record)

    def notice(line: str) -> None:
        # Until it is there: this process may end next, and if it has said nothing yet the way must be found first.
        ray.wait([task.board.push.remote(line)], timeout=_NOTICE_S)

    tracker = Tracker(logger.unsent, logger.adopt) if logger is not None else None
    if rank_zero and task.job.resources.min_workers is not None:
        notice(f"{job.resources.workers} of at most {task.job.resources.workers} workers: {job.layout}")
    try:
        with watch_cloud(job.resources.spot_notices):
            outcome = train(job, World(task.dataset, task.checkpoints, record, notice, wishes.should_stop, tracker))
    finally:
        delivery = logger.close() if logger is not None else None
    reasons = collectives.gather(wishes.reason)
    if outcome.stopped and "stop" not in reasons:
        reason: Reason = "preemption" if "preemption" in reasons else "growth"
        if rank_zero:
            why = "a machine will be taken away" if reason == "preemption" else "there is room for more"
            notice(f"after step {outcome.step} the workers start again from {outcome.checkpoint}: {why}")
        raise Yielded(reason)
    return (outcome, delivery) if delivery is not None else None


class _Wishes:
    """Why this rank should end, as far as it knows; never waits.

    Args:
        ask: asks the board, on rank 0, which does so for all.
    """

    def __init__(self, ask: Callable[[], Any] | None) -> None:
        self.reason: Reason = ""
        self._ask = ask
        self._question: Any = ask() if ask is not None else None

    def should_stop(self) -> bool:
        if self._ask is not None and ray.wait([self._question], timeout=0)[0]:
            with contextlib.suppress(ray.exceptions.RayActorError):  # a board that died comes back without records
                self.reason = ray.get(self._question) or self.reason
            self._question = self._ask()
        if not self.reason and is_preempted():
            self.reason = "preemption"
        return bool(self.reason)


@ray.remote
class _Board:
    """Holds records and notices until the driver takes them, and the driver's wish to stop; shows them to Prometheus.

    Args:
        run, sweep: names for `LiveMetrics`, which outlives the workers here.
        job: the run's.
        spent: before this driver began.
    """

    def __init__(self, run: str, sweep: str, job: Job, spent: Spent) -> None:
        tokens, workers, every = job.train.tokens, job.resources.workers, job.checkpoint.every
        self._live = LiveMetrics(run, sweep, tokens=tokens, workers=workers, checkpoint_every=every)
        self._live.__enter__()  # and left when this actor's process ends
        self._price = job.resources.price_per_hour
        self._meter = Meter(spent, self._price)
        self._forgot = ray.get_runtime_context().was_current_actor_reconstructed
        self._records: list[Record | str] = []
        self._last_line = ""
        self._wish: Reason = ""

    def push(self, record: Record | str) -> None:
        if isinstance(record, str):
            if record == self._last_line:
                return  # what several ranks say is shown once
            self._last_line = record
        self._records.append(record)
        if isinstance(record, Record):
            self._live.take(record)

    @ray.method(max_task_retries=-1)
    def begin(self, workers: int) -> Spent:
        """So many workers begin, as many as there is room for; what the run has cost until then."""
        self._set_workers(workers)
        self._last_line = ""
        self._wish = "" if self._wish == "growth" else self._wish
        return self._meter.read()

    def wish(self, workers: int, spent: Spent) -> Reason:
        """Why the run should end.

        Args:
            workers: that train.
            spent: by the run until now; a board that was started again knows neither.
        """
        if self._forgot:
            self._meter = Meter(spent, self._price)
            self._set_workers(workers)
        return self._wish

    def workers_ended(self) -> None:
        self._set_workers(0)

    def _set_workers(self, number: int) -> None:
        self._forgot = False
        self._live.set_workers(number)
        self._meter.set_workers(number)

    def drain(self) -> tuple[list[Record | str], Spent]:
        records, self._records = self._records, []
        return records, self._meter.read()

    def is_stopping(self) -> bool:
        return self._wish == "stop"

    def request_stop(self) -> None:
        self._wish = "stop"

    def request_more(self) -> None:
        self._wish = self._wish or "growth"


@contextlib.contextmanager
def _watch(board: Any, show: Callable[[Record], bool], notice: Callable[[str], None], ledger: Ledger) -> Iterator[None]:
    """Show records and notices as they come; SIGTERM, a limit, or what shows them asks the run to end after a step."""
    done = threading.Event()

    def drain() -> None:
        while True:
            finished = done.wait(0.5)
            with contextlib.suppress(ray.exceptions.RayActorError):
                records, spent = ray.get(board.drain.remote())
                if ledger.take(spent):
                    board.request_stop.remote()
                for record in records:
                    try:
                        if isinstance(record, str):
                            notice(record)
                        elif show(record):
                            board.request_stop.remote()
                    except Exception:  # a terminal that is gone must not end the counting of limits
                        _log.exception("a record could not be shown")
            if finished:
                return

    def stop(number: int, frame: FrameType | None) -> None:
        board.request_stop.remote()

    thread = threading.Thread(target=drain, name="tidegate-board", daemon=True)
    in_main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, stop) if in_main else None
    thread.start()
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, previous)
        done.set()
        thread.join(timeout=10)


def _cause(error: ray.train.TrainingFailedError, job: Job) -> Exception:
    """The mistake of the user that a worker met, if that is what it was; otherwise Ray's error."""
    if isinstance(error, ray.train.ControllerError) and isinstance(error.controller_failure, NoRoom):
        return ConfigError(f"{error.controller_failure}; resume the run when they are there")
    met = list(causes(error))
    for cause in met:
        if isinstance(cause, ConfigError):
            return cause
    if any(isinstance(cause, Yielded) for cause in met) or isinstance(error, ray.train.PreemptionError):
        return ConfigError(
            "the workers' machines were taken away more often than resources.max_preemptions="
            f"{job.resources.max_preemptions} allows; resume the run, which goes on from the checkpoint saved then"
        )
    return error


def _keep_to_this_machine() -> None:
    """Have the next local Ray listen on loopback and ask for a token of its own; what the user has set wins.

    Whoever reaches a Ray can run code in it. `ray.init` refuses 127.0.0.1 as the address of its node, but has a switch
    for systems whose firewall asks about every listener. Without a token here it would write one to the home folder,
    for every Ray of the user.
    """
    wanted = os.environ.setdefault(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0")  # its processes read it
    ray_constants.ENABLE_RAY_CLUSTER = wanted.lower() in ("1", "true")  # this one did when it imported Ray
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if (
        os.environ.get("RAY_AUTH_MODE") != "disabled"
        and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def forwarded_environment(*, devices: bool) -> dict[str, str]:
    """Settings that workers elsewhere need and Ray does not forward. No secrets: Ray shows them to its users.

    Args:
        devices: also which of them there are, as a driver on the cluster knows.
    """
    wanted = ("MLFLOW_TRACKING_URI", "NCCL_", *(("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR") if devices else ()))
    settings = {name: value for name, value in os.environ.items() if name.startswith(wanted)}
    return {name: value for name, value in settings.items() if redact(value) == value}
