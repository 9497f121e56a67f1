"""Workers come and go, with notice and without; the run's losses stay those of one worker that nobody disturbed."""

from __future__ import annotations

import inspect
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest

from tidegate.config import ConfigError, load
from tidegate.launch.cost import Ledger
from tidegate.train.job import Job

HINT = f"Ray {version('ray')} changed what platform/tidegate/launch/elastic.py stands on: "


def test_what_is_used_of_rays_private_parts() -> None:
    import ray._private.state
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import DefaultAutoscalingCoordinator
    from ray.train.v2._internal.execution.callback import WorkerCallback
    from ray.train.v2._internal.execution.controller.controller import TrainController
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
    from ray.train.v2._internal.execution.train_fn_utils import DistributedTrainFnUtils
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    fit = inspect.getsource(DataParallelTrainer.fit)
    for name in ("self._initialize_and_run_controller(", "scaling_policy=", "failure_policy="):
        assert name in fit, HINT + "fit() hands over its policies in another way"
    assert list(inspect.signature(ElasticScalingPolicy._count_possible_workers).parameters) == [
        "self",
        "reserved_resources",
    ], HINT
    for name in ("make_decision_for_running_worker_group", "make_decision_for_non_running_worker_group"):
        assert "_count_possible_workers(" in inspect.getsource(getattr(ElasticScalingPolicy, name)), HINT + name
    assert "after_init_train_context" in vars(WorkerCallback), HINT
    spread = inspect.getsource(DistributedTrainFnUtils.get_preemption_info)
    assert "get_internal_train_context().preemption_context.preemption_info" in spread, HINT + "notices"
    assert hasattr(ray._private.state.GlobalState, "get_draining_nodes"), HINT
    assert "make_decision_for_non_running_worker_group(" in inspect.getsource(TrainController), HINT + "waiting"
    asked = inspect.signature(DefaultAutoscalingCoordinator.request_resources).parameters
    assert {"resources", "expire_after_s"} <= asked.keys(), HINT.replace("elastic.py", "capacity.py")


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"workers": 4}, (4,)),
        ({"workers": 4, "min_workers": 1}, (1, 2, 4)),
        ({"workers": 8, "min_workers": 3, "expert": 2}, (4, 8)),
        ({"workers": 4, "min_workers": 1, "expert": 4}, (1, 2, 4)),
        ({"workers": 2, "min_workers": 1, "expert": 2, "batch_tokens": 64 * 12}, (1, 2)),
        ({"workers": 6, "min_workers": 1, "expert": 2, "batch_tokens": 64 * 12}, (1, 2, 4, 6)),
        ({"workers": 6, "min_workers": 2, "expert": 3, "batch_tokens": 64 * 12, "experts": 6}, (3, 6)),
    ],
)
def test_world_sizes_divide_the_batch_and_fit_expert_parallelism(
    tiny_job: Callable[..., Path], settings: dict[str, int], sizes: tuple[int, ...]
) -> None:
    moved = {"expert": "parallel.expert", "batch_tokens": "train.batch_tokens", "experts": "model.ffn.num_experts"}
    overrides = [f"{moved.get(name, f'resources.{name}')}={value}" for name, value in settings.items()]
    job = load(str(tiny_job(train={"micro_batch": 1})), Job, overrides).config
    assert job.world_sizes == sizes
    for size in sizes:
        there = job.at_world_size(size)
        assert Job.model_validate(there.model_dump()) == there, "a job that would be accepted as it is"
        assert there.accumulation * there.train.micro_batch * size == job.global_batch
        assert size % there.parallel.expert == 0
        assert there.parallel.expert == job.parallel.expert or size < job.parallel.expert


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["resources.min_workers=3", "resources.workers=2"], "min_workers=3 is more than resources.workers=2"),
        (["resources.min_workers=1", "parallel.zero_stage=0"], "works neither at parallel.zero_stage=0 nor with"),
    ],
)
def test_a_job_that_cannot_be_elastic_is_refused(
    tiny_job: Callable[..., Path], overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(str(tiny_job()), Job, overrides)


class Disturbed:
    """A run on a Ray cluster of this machine, in another thread, while this one makes nodes come and go."""

    def __init__(self, folder: Path, job: Job, job_dir: Path) -> None:
        self.folder, self.job, self.job_dir = folder, job, job_dir
        self.losses: list[tuple[int, float]] = []
        self.notices: list[str] = []
        self.killed_at = 0

    def run(self, disturb: Callable[[Disturbed], None], monkeypatch: pytest.MonkeyPatch) -> bool:
        """Until `disturb` returns; whether the run got to its end."""
        from tidegate.data import prepare
        from tidegate.launch import ray_train
        from tidegate.track import open_run, resolve_tracking_uri

        data = self.data = prepare(self.job.data, cache_dir=self.folder / "data", job_dir=self.job_dir)
        tracking = open_run(
            resolve_tracking_uri(self.job.track, self.folder),
            self.job.track,
            job=self.job.name,
            resolved=self.job,
            changes={},
            command=[],
            name="elastic",
            run_id=None,
            notice=self.notices.append,
        )
        boards: list[Any] = []
        watch = ray_train._watch

        def remember(board: Any, *args: Any) -> Any:
            boards.append(board)
            return watch(board, *args)

        monkeypatch.setattr(ray_train, "_watch", remember)
        checkpoints, spool = str(self.folder / "checkpoints" / "elastic"), self.folder / "spool"
        self.ledger = Ledger(checkpoints, self.job)
        with ThreadPoolExecutor(1) as other:
            ended = other.submit(
                ray_train.run_on_ray,
                self.job,
                checkpoints,
                data,
                tracking,
                spool,
                self._record,
                self.notices.append,
                self.ledger,
            )
            self._ended = ended
            try:
                disturb(self)
            finally:
                boards[0].request_stop.remote()
        return ended.result().outcome.finished

    def _record(self, record: Any) -> None:
        if "train/loss" in record.metrics:
            self.losses.append((record.step, record.metrics["train/loss"]))

    def wait_for(self, what: Callable[[], bool], why: str, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < deadline, (why, self.notices, self.losses[-3:])
            if self._ended.done():
                raise AssertionError((why, self.notices, self._ended.result()))
            time.sleep(0.05)

    def wait_for_steps(self, number: int) -> None:
        """So many more."""
        target = len(self.losses) + number
        self.wait_for(lambda: len(self.losses) >= target, f"{number} steps")

    def wait_for_workers(self, number: int) -> None:
        """A new group of workers of that size, that trains."""
        seen = len(self.notices)
        line = f"{number} of at most"
        self.wait_for(lambda: any(n.startswith(line) for n in self.notices[seen:]), f"{number} workers")
        self.wait_for_steps(3)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray cluster whose head runs no workers."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def workers() -> list[psutil.Process]:
    """Training processes below this one, which started the cluster's nodes."""
    children = psutil.Process(os.getpid()).children(recursive=True)
    return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]


@pytest.mark.ray
@pytest.mark.slow
def test_a_notice_saves_and_starts_the_workers_again_on_a_budget_of_its_own(
    tiny_job: Callable[..., Path], tmp_path: Path
) -> None:
    """SIGTERM to a worker, twice; one notice is allowed, failures are not at all."""
    job = tiny_job(train={"tokens": 512 * 100_000}, checkpoint={"every": 100_000}, resources={"max_preemptions": 1})
    log = tmp_path / "log"
    command = [sys.executable, "-m", "tidegate.cli", "train", str(job), "--state-dir", str(tmp_path / "state")]

    def printed() -> str:
        return " ".join(log.read_text().split())

    def steps() -> list[int]:
        return [int(step) for step in re.findall(r"^step (\d+)/", log.read_text(), re.MULTILINE)]

    def notify_at(step: int, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 120
        while not steps() or steps()[-1] < step:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        (worker,) = workers()
        worker.send_signal(signal.SIGTERM)

    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=tmp_path)
    notify_at(3, process)
    while TAKEN not in printed():
        time.sleep(0.02)
    saved = steps()[-1]
    notify_at(saved + 3, process)
    assert process.wait(timeout=120) == 2, log.read_text()
    assert steps() == list(range(1, steps()[-1] + 1)), "each step once"
    assert printed().count(TAKEN) == 2
    assert "taken away more often than resources.max_preemptions=1 allows" in printed()


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray, about itself
def test_workers_come_and_go(
    cluster: Any,
    on_ranks: Callable[..., list[Any]],
    tiny_job: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tidegate.launch import ray_train

    monkeypatch.setattr(ray_train, "RESIZE_INTERVAL_S", 2.0)
    first, second = (cluster.add_node(num_cpus=1) for _ in range(2))
    file = tiny_job(train={"micro_batch": 1, "tokens": 512 * 100_000}, checkpoint={"every": 20})
    overrides = ["resources.workers=2", "resources.min_workers=1", "parallel.expert=2", "resources.max_failures=1"]
    run = Disturbed(tmp_path, load(str(file), Job, overrides).config, file.parent)
    nodes = [first, second]

    def disturb(run: Disturbed) -> None:
        run.wait_for_steps(5)
        drain(nodes[1])
        run.wait_for_workers(1)
        cluster.remove_node(nodes[1])
        nodes[1] = cluster.add_node(num_cpus=1)
        run.wait_for_workers(2)
        run.killed_at = run.losses[-1][0]
        workers()[0].kill()  # a failure, of which one is allowed
        run.wait_for_workers(2)
        workers()[-1].send_signal(signal.SIGTERM)
        run.wait_for_workers(2)

    assert not run.run(disturb, monkeypatch)
    went = [notice.rpartition(": ")[2] for notice in run.notices if notice.startswith("after step")]
    assert went == [TAKEN, "there is room for more", TAKEN]
    steps = max(step for step, _ in run.losses)
    assert [step for step, _ in run.losses if step < run.killed_at - 20] == list(range(1, run.killed_at - 20))
    (undisturbed,) = on_ranks(1, alone, str(tmp_path / "alone"), str(file), str(run.data), steps)
    differences = {step: abs(loss - undisturbed[step]) for step, loss in run.losses}
    assert max(differences.values()) < 1e-5, differences


TAKEN = "a machine will be taken away"


def alone(folder: str, job_file: str, data: str, steps: int) -> dict[int, float]:
    """Losses of so many steps on one worker."""
    from tidegate.train.loop import World, train

    losses: dict[int, float] = {}
    begun = itertools.count(1)

    def record(record: Any) -> None:
        losses[record.step] = record.metrics.get("train/loss", losses.get(record.step))

    world = World(Path(data), folder, record, lambda line: None, lambda: next(begun) == steps)
    train(load(job_file, Job).config, world)
    return losses


def drain(node: Any) -> None:
    """As a worker there would."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from tidegate.launch.spot import drain_this_node

    there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    ray.get(ray.remote(drain_this_node).options(num_cpus=0, scheduling_strategy=there).remote(60))
