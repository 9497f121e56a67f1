"""Machines come when a job asks for them, go with a notice or without one, and go when nobody needs them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.autoscaler._private.autoscaler import AutoscalerSummary
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from tidegate.launch import capacity
from tidegate.launch.submissions import Cluster, stop_job
from tidegate.launch.submit import Submit, submit


def machines(head: Any) -> list[str]:
    """Ids of the machines beside the head."""
    found = list_nodes(head.address, filters=[("state", "=", "ALIVE")], timeout=30, raise_on_missing_output=False)
    return [node.node_id for node in found if not node.is_head_node]


def wait_until(what: Callable[[], bool], timeout_s: float = 240, why: Callable[[], str] = str) -> None:
    until = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < until, why()
        time.sleep(0.3)


def drain(head: Any, node: str) -> None:
    """As a cloud's warning does, half a minute before."""
    reason = ("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=30")
    command = [str(Path(sys.executable).parent / "ray"), "drain-node", f"--address={head.gcs}", f"--node-id={node}"]
    subprocess.run([*command, *reason], check=True, capture_output=True, timeout=60)


def raylet_of(node: str) -> psutil.Process | None:
    for process in psutil.process_iter():
        try:
            if process.name() == "raylet" and process.environ().get("RAY_OVERRIDE_NODE_ID_FOR_TESTING") == node:
                return process
        except psutil.Error:
            continue
    return None


def take(node: str) -> None:
    """As a cloud does: the machine is gone from one moment to the next."""
    if raylet := raylet_of(node):
        raylet.kill()


def works(node: str) -> bool:
    """Whether a machine has a worker of a run."""
    raylet = raylet_of(node)
    return raylet is not None and any("RayTrainWorker" in " ".join(child.cmdline()) for child in raylet.children())


class Printed:
    """What a submitted run has printed so far."""

    def __init__(self, head: Any, submission: str) -> None:
        self._client, self._submission = Cluster(head.address).client, submission

    def all(self) -> str:
        return self._client.get_job_logs(self._submission)

    def last(self) -> str:
        return self.all()[-2000:]

    def steps(self) -> list[int]:
        return [int(step) for step in re.findall(r"^ *step (\d+)/", self.all(), re.MULTILINE)]

    def trains_on(self, steps: int = 3) -> None:
        """Wait for so many more."""
        before = len(self.steps())
        wait_until(lambda: len(self.steps()) >= before + steps, why=self.last)


class Timeline:
    """The number of machines over the time of a story, and what happened; for the picture in the docs."""

    def __init__(self, head: Any) -> None:
        self._head, self._t0, self._done = head, time.monotonic(), threading.Event()
        self.counts: list[tuple[float, int]] = []
        self.events: list[tuple[float, str]] = []
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def mark(self, what: str) -> None:
        self.events.append((time.monotonic() - self._t0, what))

    def end(self, story: str) -> None:
        self._done.set()
        self._thread.join()
        if folder := os.environ.get("TIDEGATE_TIMELINES"):
            document = {"machines": self.counts, "events": self.events}
            Path(folder, f"{story}.json").write_text(json.dumps(document), encoding="utf-8")

    def _look(self) -> None:
        while not self._done.wait(0.5):
            with contextlib.suppress(RayStateApiException):
                self.counts.append((time.monotonic() - self._t0, len(machines(self._head))))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray, about itself
def test_a_job_brings_its_machines_survives_their_loss_and_lets_them_go(
    cloud: Any, tiny_job: Callable[..., Path], tmp_path: Path
) -> None:
    job = tiny_job(train={"micro_batch": 1, "tokens": 512 * 100_000}, checkpoint={"every": 20})
    elastic = ["resources.workers=2", "resources.min_workers=1", "parallel.expert=2", "resources.max_failures=3"]
    assert machines(cloud) == []
    timeline = Timeline(cloud)
    timeline.mark("submitted")
    assert submit(job, Submit(cloud.address, elastic, "spot", str(tmp_path / "state"))) == 0
    run = Printed(cloud, "spot.1")

    def groups() -> list[str]:
        """Of workers, as they began: their number and expert parallelism."""
        return re.findall(r"(\d of at most 2 workers: EP \d)", run.all())

    wait_until(lambda: groups()[-1:] == ["2 of at most 2 workers: EP 2"], timeout_s=400, why=run.last)
    run.trains_on()
    timeline.mark("2 workers train, EP 2")
    assert len(machines(cloud)) == 2

    drained, saved = machines(cloud)[0], len(groups())
    timeline.mark("a machine gets its notice")
    drain(cloud, drained)
    wait_until(lambda: len(groups()) > saved, why=run.last)
    run.trains_on()
    timeline.mark("training goes on")
    assert re.search(r"after step (\d+) the workers start again .*: a machine will be taken away", run.all())
    assert run.steps() == list(range(1, run.steps()[-1] + 1)), "a notice costs no step"
    take(drained)
    wait_until(lambda: drained not in machines(cloud), why=run.last)

    wait_until(lambda: groups()[-1] == "2 of at most 2 workers: EP 2", timeout_s=400, why=run.last)
    run.trains_on()
    timeline.mark("2 workers train again")

    def losses() -> int:
        """Of workers that did not say before that they would start again."""
        printed = run.all()
        return len(re.findall(r"of at most 2 workers", printed)) - 1 - printed.count("the workers start again")

    assert losses() == 0
    timeline.mark("a machine is gone without a notice")
    take(next(filter(works, machines(cloud))))
    wait_until(lambda: losses() == 1, why=run.last)
    run.trains_on()
    timeline.mark("training goes on")
    following = list(itertools.pairwise(run.steps()))
    assert sum(now <= before for before, now in following) <= 1, "what was not saved yet is trained again, once"

    timeline.mark("stopped")
    assert stop_job(cloud.address, "spot") == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "state" / "mlflow" / "mlflow.db")) as store:
        tracked = {step for (step,) in store.execute("select step from metrics where key = 'train/loss'")}
    # Lines that a lost machine had not sent are not printed; its records come with the checkpoint.
    assert tracked == set(range(1, max(tracked) + 1)), "no step is left out"
    assert max(tracked) >= run.steps()[-1]
    wait_until(lambda: machines(cloud) == [])
    timeline.mark("no machine is left")
    timeline.end("job")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray, about itself
def test_a_sweep_brings_machines_for_its_trials_and_lets_them_go(
    cloud: Any, tiny_job: Callable[..., Path], tmp_path: Path
) -> None:
    search = {
        "space": {"optimizer.schedule.peak": {"log": [1e-4, 1e-2]}},
        "trials": 2,
        "finalists": 1,
        "seeds": 2,
        "metric": "val/loss",
    }
    job = tiny_job(search=search, train={"tokens": 2048, "eval_every": 2})
    timeline = Timeline(cloud)
    timeline.mark("tidegate tune, 2 trials at a time")
    state = str(tmp_path / "state")
    command = [sys.executable, "-m", "tidegate.cli", "tune", str(job), "--address", cloud.gcs, "--concurrent", "2"]
    done = subprocess.run([*command, "--state-dir", state], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    timeline.mark("it has ended")
    wait_until(lambda: machines(cloud) == [])
    timeline.mark("no machine is left")
    timeline.end("sweep")
    assert max(count for _, count in timeline.counts) == 2


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_that_is_larger_than_the_cluster_can_become_ends_and_leaves_no_machine(
    cloud: Any, tiny_job: Callable[..., Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tidegate.cli", "train", str(tiny_job()), "--workers", "4"]
    done = subprocess.run(
        [*command, "--address", cloud.gcs, "--state-dir", str(tmp_path / "state")],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    said = " ".join(done.stderr.split())
    assert "resources.workers=4 needs 4 CPUs, as 4 x 1 CPU" in said
    assert re.search(r"which is room for [012]; no machine is on its way: there is no autoscaler, or no more", said), (
        said
    )
    wait_until(lambda: machines(cloud) == [])


@pytest.mark.ray
@pytest.mark.slow
def test_a_pool_that_never_comes_is_waited_for_as_long_as_the_job_says(
    cloud_sold_out: Any, tiny_job: Callable[..., Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tidegate.cli", "train", str(tiny_job()), "--set", "resources.wait_minutes=0.2"]
    where = ["--address", cloud_sold_out.gcs, "--state-dir", str(tmp_path / "state")]
    done = subprocess.run([*command, *where], capture_output=True, text=True, timeout=400)
    assert done.returncode == 2, done.stdout + done.stderr
    said = " ".join(done.stderr.split())
    assert "resources.wait_minutes=0.2: the machines have not come; resources.workers=1 needs 1 CPUs" in said
    assert "there is room for 0" in said
    assert machines(cloud_sold_out) == []


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray, about itself
def test_a_run_of_one_size_waits_for_another_machine_and_stops_while_it_waits(
    cloud: Any, tiny_job: Callable[..., Path], tmp_path: Path
) -> None:
    job = tiny_job(train={"tokens": 512 * 100_000}, checkpoint={"every": 5})
    fixed = ["resources.max_failures=-1"]
    assert submit(job, Submit(cloud.address, fixed, "fixed", str(tmp_path / "state"))) == 0
    run = Printed(cloud, "fixed.1")
    run.trains_on(8)
    lost = next(filter(works, machines(cloud)))
    take(lost)
    wait_until(lambda: any(works(other) for other in machines(cloud) if other != lost), why=run.last)
    run.trains_on()

    take(next(filter(works, machines(cloud))))
    time.sleep(1)
    assert stop_job(cloud.address, "fixed") == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "state" / "mlflow" / "mlflow.db")) as store:
        assert store.execute("select status from runs where name = 'fixed'").fetchall() == [("KILLED",)]


def test_patience_is_for_machines_that_are_missing_and_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[dict[str, float]] = []
    monkeypatch.setattr(capacity, "machines_there", lambda without=(): dict(enumerate(there)))
    now = 0.0
    needs = capacity.Needs({"CPU": 2.0, "GPU": 1.0}, 2, "resources.min_workers=2", wait_s=60)
    patience = capacity.Patience(needs, clock=lambda: now)
    assert not patience.is_out()
    now = 61.0
    assert patience.is_out()
    said = patience.said()
    assert (
        "resources.wait_minutes=1: the machines have not come; resources.min_workers=2 needs 4 CPUs and 2 GPUs" in said
    )
    assert "there is room for 0" in said
    there += [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 3.0, "GPU": 2.0}]
    assert not patience.is_out(), "they are there, if busy"
    there.pop()
    now = 200.0
    assert not patience.is_out(), "missing since now"
    now = 230.0
    patience.renew()
    now = 270.0
    assert not patience.is_out()
    assert "there is room for 1" in patience.said()


@pytest.mark.parametrize(
    ("report", "coming"),
    [
        ({}, False),
        ({"pending_launches": {"gpu": 2}}, True),
        ({"pending_nodes": [("10.0.0.4", "gpu", "setting-up")]}, True),
        ({"failed_nodes": [("10.0.0.4", "gpu")]}, True),
        (None, False),
    ],
)
def test_the_first_autoscaler_says_what_is_on_its_way(
    report: dict[str, Any] | None, coming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the form in which its monitor writes a summary to Ray's store, before the first round without one."""
    nothing = {"pending_nodes": [], "pending_launches": {}, "failed_nodes": []}
    summary = None if report is None else asdict(AutoscalerSummary({"head": 1}, None, **(nothing | report)))

    class Store:
        def __init__(self, address: str) -> None:
            assert address == "10.0.0.1:6379"

        def internal_kv_get(self, key: bytes, namespace: None) -> bytes:
            assert key == DEBUG_AUTOSCALING_STATUS.encode()
            return json.dumps({"autoscaler_report": summary}, default=lambda value: value._asdict()).encode()

    monkeypatch.setattr(capacity, "GcsClient", Store)
    monkeypatch.setattr(capacity.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"))
    assert capacity._are_coming(begun=0.0) == coming


@pytest.mark.parametrize(
    ("machines", "fits"),
    [([], 0), ([{"CPU": 7.0}], 3), ([{"CPU": 3.0}, {"CPU": 3.0}], 2), ([{"CPU": 1.0}, {"GPU": 8.0}], 0)],
)
def test_room_is_counted_machine_by_machine(machines: list[dict[str, float]], fits: int) -> None:
    assert capacity.room({"CPU": 2.0}, machines) == fits
