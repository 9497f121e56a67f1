"""Whole runs through the command line, in real processes that are really killed."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tidegate.config import load
from tidegate.launch.preflight import checkpoint_bytes_per_parameter
from tidegate.model.flops import total
from tidegate.train.job import Job

LOCAL = ["--local", "--workers", "1"]
STEPS = 12


class Tidegate:
    """The command line on one state directory."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.output = state.with_suffix(".log")
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *args: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tidegate.cli", "train", *args, "--state-dir", str(self.state)]
        with self.output.open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, cwd=self.state.parent)
        self._started.append(process)
        return process

    def end(self) -> None:
        """Kill what is left of a test that failed half-way."""
        for process in self._started:
            if process.poll() is None:
                for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                    with suppress(psutil.NoSuchProcess):
                        each.kill()

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
        for step, value in self.series(run, "train/loss"):
            found.setdefault(step, set()).add(value)
        return found

    def series(self, run: str, metric: str) -> list[tuple[int, float]]:
        """Steps and values in the order in which they were recorded."""
        query = "select step, value from metrics where run_uuid = ? and key = ? order by timestamp, value"
        return self._ask(run, query, metric)

    def stopped_by(self, run: str) -> str:
        ((value,),) = self._ask(run, "select value from tags where run_uuid = ? and key = ?", "tidegate.stopped_by")
        return str(value)

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
        ((status,),) = self._ask(run, "select status from runs where run_uuid = ?")
        return str(status)

    def _ask(self, run: str, query: str, *more: str) -> list[tuple[Any, ...]]:
        record = json.loads((self.state / "runs" / run / "run.json").read_text())
        with closing(sqlite3.connect(self.state / "mlflow" / "mlflow.db")) as store:
            return store.execute(query, (record["run_id"], *more)).fetchall()


@pytest.fixture
def tidegate(tmp_path: Path) -> Iterator[Tidegate]:
    command = Tidegate(tmp_path / "state")
    yield command
    command.end()


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
@pytest.mark.parametrize(
    ("state", "zero_stage", "expected"), [("bf16", 1, 2 + 4 + 2 * 2), ("fp32", 0, 2 + 2 * (4 + 2 * 4))]
)
def test_a_checkpoint_takes_the_bytes_that_it_was_predicted_to(
    tidegate: Tidegate, tiny_job: Callable[..., Path], state: str, zero_stage: int, expected: int
) -> None:
    sections = {"optimizer": {"state": state}, "parallel": {"zero_stage": zero_stage}, "model": {"vocab_size": 40_000}}
    file = tiny_job(train={"tokens": 1024, "precision": "bf16"}, **sections)
    tidegate.run(str(file), *LOCAL)
    job = load(file, Job).config
    assert checkpoint_bytes_per_parameter(job) == expected
    (checkpoint,) = tidegate.checkpoints("tiny-1")
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    assert size / total(job.model, job.data.sequence_length).params == pytest.approx(expected, rel=0.02)


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
def test_a_limit_saves_ends_and_counts_over_resumes(tidegate: Tidegate, tiny_job: Callable[..., Path]) -> None:
    a_second = {"resources": {"price_per_hour": 3600.0}}  # costs 1
    job = tiny_job(train={"tokens": 512 * 4000}, checkpoint={"every": 10_000}, limits={"max_money": 1.5}, **a_second)
    printed = tidegate.run(str(job), *LOCAL, status=124)
    assert "limits.max_money=1.5 is reached; continue with: tidegate train --resume tiny-1 --local" in printed
    assert "--set limits.max_money=..." in printed
    assert re.search(r"cost: [0-9.]+ worker-hours, [0-9.]+ in money", printed)
    assert tidegate.run_status("tiny-1") == "KILLED"
    assert tidegate.stopped_by("tiny-1") == "limits.max_money=1.5"
    (checkpoint,) = tidegate.checkpoints("tiny-1")
    first = [value for _, value in tidegate.series("tiny-1", "cost/money")]
    assert first == sorted(first)
    assert 1.5 <= first[-1] < 10, "it ends with the step in which the limit is reached, and its evaluation"
    hours = dict(tidegate.series("tiny-1", "cost/gpu_hours"))
    assert all(value == pytest.approx(3600 * hours[step]) for step, value in tidegate.series("tiny-1", "cost/money"))
    kept = json.loads((checkpoint.parent / "cost.json").read_text())
    assert kept["money"] >= first[-1]

    refused = tidegate.run("--resume", "tiny-1", *LOCAL, status=2)
    assert "limits.max_money=1.5 is reached: the run has cost" in refused
    assert tidegate.run_status("tiny-1") == "KILLED", "it was not begun"

    step = max(tidegate.losses("tiny-1"))
    more = ["--set", "limits.max_money=1000", "--set", f"train.pause_at_tokens={512 * (step + 3)}"]
    tidegate.run("--resume", "tiny-1", *LOCAL, *more)
    assert sorted(tidegate.losses("tiny-1")) == list(range(1, step + 4))
    assert tidegate.stopped_by("tiny-1") == ""
    resumed = [value for _, value in tidegate.series("tiny-1", "cost/money")][len(first) :]
    assert len(resumed) >= 3
    assert kept["money"] < resumed[0] < resumed[-1] < kept["money"] + 60


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


@pytest.mark.ray
@pytest.mark.slow
def test_a_limit_ends_workers_on_ray_and_lost_ones_are_counted(
    tidegate: Tidegate, tiny_job: Callable[..., Path]
) -> None:
    resources = {"workers": 2, "max_failures": 1, "price_per_hour": 1800.0}  # 1 a second
    limits = {"max_gpu_hours": 40 / 1800}  # 20 s of both: a slow machine must not reach it before one is lost
    job = tiny_job(resources=resources, limits=limits, train={"tokens": 512 * 20_000}, checkpoint={"every": 1000})
    process = tidegate.start(str(job))
    tidegate.wait_for_step(process, 3)
    lost = next(
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "RayTrainWorker" in " ".join(child.cmdline())
    )
    lost.kill()
    assert process.wait(timeout=240) == 124, tidegate.output.read_text()
    assert "limits.max_gpu_hours=0.0222222 is reached" in tidegate.output.read_text()
    assert tidegate.run_status("tiny-1") == "KILLED"
    assert tidegate.checkpoints("tiny-1")
    series = tidegate.series("tiny-1", "cost/money")
    begun_again = [index for index, (step, _) in enumerate(series) if step == 1]
    assert len(begun_again) == 2
    money = [value for _, value in series]
    assert money == sorted(money)
    assert money[begun_again[1]] > money[begun_again[1] - 1] > 0, "it began again from nothing but for the cost"
    assert 40 <= money[-1] < 80
