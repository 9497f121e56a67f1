"""Runs that are killed in every way and continue bit for bit. Only processes that a test started are killed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from tidegate.train.checkpoint_store import MANIFEST, CheckpointStore
from tidegate.train.storage import Storage

LOCAL = ["--local", "--workers", "1"]
STEPS = 12
MARK = "TIDEGATE_TEST_RUN"
"""An environment variable that all processes of a run inherit; Ray's too, which are no children of the driver."""


class Finished(Exception):
    """The run ended before the moment came."""


class Run:
    """One run of the tiny job in its own state directory, and the processes that belong to it."""

    def __init__(self, folder: Path, job: Path, *flags: str) -> None:
        self.state, self.job, self.flags = folder / "state", str(job), flags
        self.log = folder / "log"
        folder.mkdir()
        self.mark = f"{folder.name}-{os.getpid()}"

    def start(self, *args: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tidegate.cli", "train", *args, *self.flags, "--state-dir", str(self.state)]
        # Ray waits a minute for a control store that died; nobody brings this one back.
        environment = os.environ | {MARK: self.mark, "RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
        self.log.touch()
        self.printed_before = len(self.log.read_bytes())
        self.written_before = set(self.folders())
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=self.state.parent, env=environment
            )

    def begin(self) -> subprocess.Popen[bytes]:
        return self.start(self.job)

    def finish(self) -> None:
        process = self.start("--resume", "tiny-1") if self.began() else self.begin()
        assert process.wait(timeout=240) == 0, self.log.read_text()

    def began(self) -> bool:
        return (self.state / "runs" / "tiny-1" / "run.json").exists()

    def processes(self) -> list[psutil.Process]:
        """All that still run, of this run only."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill(self, wanted: Callable[[list[str]], bool] = lambda command: True) -> int:
        """SIGKILL to the run's processes whose command line is wanted, at once; returns how many there were."""
        victims = []
        for process in self.processes():
            try:
                if wanted(process.cmdline()):
                    victims.append(process)
            except psutil.Error:
                continue
        for process in victims:
            os.kill(process.pid, signal.SIGSTOP)  # none sees another die
        for process in victims:
            os.kill(process.pid, signal.SIGKILL)
        psutil.wait_procs(victims, timeout=10)
        return len(victims)

    def wait_until(self, condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 180
        while not condition():
            if process.poll() == 0:
                raise Finished
            assert process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.002)

    def folders(self) -> list[Path]:
        return list((self.state / "checkpoints").glob("tiny-1-*/step_*"))

    def printed(self, step: int) -> bool:
        return f"step {step}/".encode() in self.log.read_bytes()

    def steps_since_start(self) -> int:
        return len(re.findall(rb"^step \d+/", self.log.read_bytes()[self.printed_before :], re.MULTILINE))

    @property
    def store(self) -> CheckpointStore:
        (folder,) = (self.state / "checkpoints").glob("tiny-1-*")
        return CheckpointStore(Storage(folder))

    def metrics(self, *prefixes: str) -> dict[tuple[str, int], set[float]]:
        """Name and step to the values recorded; more than one where a step came out otherwise when done again."""
        record = json.loads((self.state / "runs" / "tiny-1" / "run.json").read_text())
        found: dict[tuple[str, int], set[float]] = {}
        with closing(sqlite3.connect(self.state / "mlflow" / "mlflow.db")) as database:
            query = "select key, step, value from metrics where run_uuid = ?"
            for key, step, value in database.execute(query, (record["run_id"],)):
                if key.startswith(prefixes):
                    found.setdefault((key, step), set()).add(value)
        return found

    def last_state(self) -> dict[str, str]:
        """SHA-256 of the last checkpoint's files: weights, moments, data position, generators."""
        manifest = self.store.valid()[-1].manifest
        assert manifest is not None
        states = [name for name in manifest.files if name.endswith(".pt") and not name.endswith("tracker.pt")]
        return {name: manifest.files[name].sha256 for name in states}


@pytest.fixture
def new_run(tmp_path: Path, tiny_job: Callable[..., Path]) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def make(job: Path, *flags: str) -> Run:
        runs.append(Run(tmp_path / f"run{len(runs)}", job, *flags))
        return runs[-1]

    yield make
    for run in runs:  # of a test that failed half-way
        run.kill()


def assert_same(run: Run, undisturbed: Run, steps: int = STEPS) -> None:
    """Every step was recorded, bit for bit as if nobody had stopped the run, and it ends in the same state."""
    names = ("train/loss", "val/", "moe/", "balance/")
    found, expected = run.metrics(*names), undisturbed.metrics(*names)
    assert all(values == expected[key] for key, values in found.items())
    # Records of the last moments before a kill, after the last checkpoint, come again with their steps.
    assert found.keys() == expected.keys()
    assert {step for name, step in found if name == "train/loss"} == set(range(1, steps + 1))
    assert run.last_state() == undisturbed.last_state()
    assert [entry.problem for entry in run.store.entries()] == [None] * len(run.store.entries())


def writing(run: Run, file: str, step: int) -> Callable[[], bool]:
    """Whether this start has written a file of a checkpoint of at least this step, and not yet its manifest."""

    def is_writing() -> bool:
        return any(
            int(folder.name[5:13]) >= step and not (folder / MANIFEST).exists() and any(folder.glob(file))
            for folder in run.folders()
            if folder not in run.written_before
        )

    return is_writing


def test_a_run_whose_processes_all_die_at_once_ends_as_if_they_had_not(
    new_run: Callable[..., Run], tiny_job: Callable[..., Path]
) -> None:
    """While a checkpoint is written, at a step that nobody chose."""
    job = tiny_job(checkpoint={"every": 1}, train={"eval_every": 4})
    undisturbed = new_run(job, *LOCAL)
    run = new_run(job, *LOCAL)
    process = run.begin()
    run.wait_until(writing(run, "state/*.pt", random.randint(2, 8)), process)
    assert run.kill() >= 1
    process.wait()
    run.finish()
    undisturbed.finish()
    assert_same(run, undisturbed)


@pytest.mark.slow
def test_a_run_may_be_killed_again_and_again(new_run: Callable[..., Run], tiny_job: Callable[..., Path]) -> None:
    job = tiny_job(checkpoint={"every": 1, "keep_last": 1}, train={"eval_every": 3})
    undisturbed = new_run(job, *LOCAL)
    undisturbed.finish()
    run = new_run(job, *LOCAL)
    moments: list[Callable[[], bool]] = [
        run.began,
        lambda: run.printed(2),
        writing(run, "state/*.pt", 4),
        lambda: run.printed(6),
        writing(run, "rank_00000.json", 7),
        writing(run, f"{MANIFEST}.writing", 8),
        lambda: b"step 12 held-out" in run.log.read_bytes(),
    ]
    for moment in moments:
        process = run.start("--resume", "tiny-1") if run.began() else run.begin()
        with suppress(Finished):  # a moment of a few microseconds may be missed
            run.wait_until(moment, process)
        run.kill()
        process.wait()
    run.finish()
    assert_same(run, undisturbed)


def is_worker(command: list[str]) -> bool:
    return "RayTrainWorker" in " ".join(command)


def is_driver(command: list[str]) -> bool:
    return "tidegate.cli" in command


def is_raylet(command: list[str]) -> bool:
    return bool(command) and command[0].endswith("/raylet")


def is_control_store(command: list[str]) -> bool:
    return bool(command) and command[0].endswith("/gcs_server")


def is_anything(command: list[str]) -> bool:
    return True


@pytest.mark.chaos
@pytest.mark.ray
def test_expert_parallel_runs_on_ray_survive_whatever_is_killed(
    new_run: Callable[..., Run], tiny_job: Callable[..., Path]
) -> None:
    """A worker, the driver, the two processes of Ray's head, and all at once in the middle of a checkpoint."""
    two = {"parallel": {"expert": 2}, "resources": {"workers": 2}, "data": {"eval_sequences": 2}}
    steps = 120
    job = tiny_job(**two, train={"tokens": 512 * steps, "eval_every": 50}, checkpoint={"every": 4, "keep_last": 1})
    undisturbed, run = new_run(job), new_run(job)
    undisturbed.finish()
    # Workers go on for seconds without a head; on a fast machine to the end of the run.
    for wanted in (is_worker, is_driver, is_anything, is_control_store, is_raylet):
        process = run.start("--resume", "tiny-1") if run.began() else run.begin()
        with suppress(Finished):
            writes = writing(run, "state/*.pt", 0) if wanted is is_anything else lambda: run.steps_since_start() >= 6
            run.wait_until(writes, process)
            assert run.kill(wanted) >= 1, wanted
        process.wait(timeout=150)  # by itself, whichever part died
        deadline = time.monotonic() + 60
        while left := run.processes():
            assert time.monotonic() < deadline, [process.cmdline() for process in left]
            time.sleep(0.2)
    run.finish()
    assert_same(run, undisturbed, steps)
