"""Whole runs through the command line, in real processes that are really killed."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

LOCAL = ["--local", "--workers", "1"]
STEPS = 12


class Tidegate:
    """The command line on one state directory."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.output = state.with_suffix(".log")

    def start(self, *args: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tidegate.cli", "train", *args, "--state-dir", str(self.state)]
        with self.output.open("w") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, cwd=self.state.parent)

    def run(self, *args: str, status: int = 0) -> str:
        """Run to the end; returns what it printed."""
        process = self.start(*args)
        assert process.wait(timeout=240) == status, self.output.read_text()
        return self.output.read_text()

    def wait_for_step(self, process: subprocess.Popen[str], step: int) -> None:
        deadline = time.monotonic() + 120
        while f"step {step}/" not in self.output.read_text():
            assert process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.01)

    def losses(self, run: str) -> dict[int, set[float]]:
        """Step to the values of train/loss; more than one where a step was done again and came out otherwise."""
        found: dict[int, set[float]] = {}
        record = json.loads((self.state / "runs" / run / "run.json").read_text())
        with closing(sqlite3.connect(self.state / "mlflow" / "mlflow.db")) as store:
            query = "select step, value from metrics where run_uuid = ? and key = 'train/loss'"
            for step, value in store.execute(query, (record["run_id"],)):
                found.setdefault(step, set()).add(value)
        return found

    def page(self, run: str) -> dict[str, Any]:
        """The values of the page that the run logged."""
        run_id = json.loads((self.state / "runs" / run / "run.json").read_text())["run_id"]
        (page,) = self.state.glob(f"mlflow/artifacts/{run_id}/artifacts/report.html")
        found = re.search(r'type="application/json">(.*?)</script>', page.read_text())
        assert found is not None
        return json.loads(found[1])

    def checkpoints(self, run: str) -> list[Path]:
        return sorted(self.state.glob(f"checkpoints/{run}-*/step_*"))

    def run_status(self, run: str) -> str:
        record = json.loads((self.state / "runs" / run / "run.json").read_text())
        with closing(sqlite3.connect(self.state / "mlflow" / "mlflow.db")) as store:
            return store.execute("select status from runs where run_uuid = ?", (record["run_id"],)).fetchone()[0]


@pytest.fixture
def tidegate(tmp_path: Path) -> Iterator[Tidegate]:
    command = Tidegate(tmp_path / "state")
    yield command
    for process in psutil.Process(os.getpid()).children(recursive=True):  # of a test that failed half-way
        process.kill()


@pytest.mark.slow
def test_a_killed_and_resumed_run_has_the_losses_of_one_that_was_left_alone(
    tidegate: Tidegate, tiny_job: Callable[..., Path]
) -> None:
    job = str(tiny_job())
    printed = tidegate.run(job, *LOCAL)
    undisturbed = tidegate.losses("tiny-1")
    assert sorted(undisturbed) == list(range(1, STEPS + 1))
    assert "unigram" in printed
    assert "expert load" in printed
    assert tidegate.run_status("tiny-1") == "FINISHED"

    process = tidegate.start(job, *LOCAL)
    tidegate.wait_for_step(process, 5)
    process.kill()
    process.wait()
    checkpoints = tidegate.checkpoints("tiny-2")
    assert checkpoints, "nothing saved before the kill"
    assert len(checkpoints) <= 2

    process = tidegate.start("--resume", "tiny-2", *LOCAL)
    tidegate.wait_for_step(process, 8)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) in (143, 0)
    tidegate.run("--resume", "tiny-2", *LOCAL)
    resumed = tidegate.losses("tiny-2")
    # The kill may lose records of the last moments before it, never change one.
    assert set(range(7, STEPS + 1)) <= set(resumed)
    assert all(values == undisturbed[step] for step, values in resumed.items())

    page = tidegate.page("tiny-2")
    assert page["status"] == "FINISHED"
    assert page["findings"][0]["level"] == "green"
    assert [event["kind"] for event in page["events"]].count("resume") == 2
    loads = next(section for section in page["sections"] if section["id"] == "load")["figures"][0]["groups"]
    assert len(loads) > 1
    assert all(group["x"]["steps"][-1] == STEPS for group in loads)


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_go_on(tidegate: Tidegate, tiny_job: Callable[..., Path]) -> None:
    settings = {"tokens": 512_000, "log_every": 2}
    process = tidegate.start(str(tiny_job(train=settings, checkpoint={"every": 1000})), *LOCAL)
    tidegate.wait_for_step(process, 4)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert "tidegate train --resume tiny-1 --local" in tidegate.output.read_text()
    assert len(tidegate.checkpoints("tiny-1")) == 1
    assert tidegate.run_status("tiny-1") == "KILLED"


@pytest.mark.slow
def test_what_a_checkpoint_does_not_fit_is_refused_by_name(tidegate: Tidegate, tiny_job: Callable[..., Path]) -> None:
    tidegate.run(str(tiny_job(train={"tokens": 1024})), *LOCAL)
    longer = ["--resume", "tiny-1", "--set", "train.tokens=2048"]
    printed = tidegate.run(*longer, *LOCAL, "--set", "model.attention.num_kv_heads=4", status=2)
    assert "model.attention.num_kv_heads=2, this job has model.attention.num_kv_heads=4" in printed
    # What was refused is not what the run is from then on.
    printed = tidegate.run("--resume", "tiny-1", *LOCAL, "--set", "parallel.zero_stage=0", status=2)
    assert "parallel.zero_stage=1, this job has parallel.zero_stage=0" in printed
    printed = tidegate.run("--resume", "tiny-1", *LOCAL, "--set", "train.precision=bf16", status=2)
    assert "train.precision=fp32, this job has train.precision=bf16" in printed
    tidegate.run(*longer, *LOCAL)
    assert sorted(tidegate.losses("tiny-1")) == [1, 2, 3, 4]


@pytest.mark.ray
@pytest.mark.slow
def test_expert_parallel_workers_on_ray_survive_a_killed_worker(
    tidegate: Tidegate, tiny_job: Callable[..., Path]
) -> None:
    two = {"parallel": {"expert": 2}, "resources": {"workers": 2, "max_failures": 1}}
    steps = 5 * STEPS  # it must still be running when its workers are looked up
    job = str(tiny_job(**two, data={"eval_sequences": 2}, train={"tokens": 512 * steps}, checkpoint={"every": 12}))
    tidegate.run(job)
    undisturbed = tidegate.losses("tiny-1")
    assert sorted(undisturbed) == list(range(1, steps + 1))

    process = tidegate.start(job)
    tidegate.wait_for_step(process, 5)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.is_running() and "RayTrainWorker" in " ".join(child.cmdline())
    ]
    assert len(workers) == 2
    workers[-1].kill()
    assert process.wait(timeout=240) == 0, tidegate.output.read_text()
    resumed = tidegate.losses("tiny-2")
    assert sorted(resumed)[-1] == steps
    assert all(values == undisturbed[step] for step, values in resumed.items())
    assert tidegate.run_status("tiny-2") == "FINISHED"


@pytest.mark.ray
@pytest.mark.slow
def test_sigterm_to_the_driver_stops_ray_workers_after_a_checkpoint_and_resume_goes_on(
    tidegate: Tidegate, tiny_job: Callable[..., Path]
) -> None:
    job = str(tiny_job(resources={"workers": 2}, train={"tokens": 512 * 400}, checkpoint={"every": 1000}))
    process = tidegate.start(job)
    tidegate.wait_for_step(process, 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143, tidegate.output.read_text()
    stopped_at = max(tidegate.losses("tiny-1"))
    assert stopped_at < 400
    printed = tidegate.run("--resume", "tiny-1", "--set", f"train.pause_at_tokens={512 * (stopped_at + 2)}")
    assert f"step {stopped_at + 2}/400" in printed
    assert f"step {stopped_at + 3}/" not in printed
    assert f"step {stopped_at}/" not in printed
    assert "continue with: tidegate train --resume tiny-1 --set train.pause_at_tokens=null" in printed
    assert tidegate.run_status("tiny-1") == "KILLED"
