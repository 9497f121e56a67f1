"""A real sweep on a local Ray: killed in the middle, resumed, and looked at."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray import tune

from tidegate.config import ConfigError, load
from tidegate.train.job import Job
from tidegate.tune.on_ray import needs_of
from tidegate.tune.space import Space
from tidegate.tune.sweep import trials_at_a_time

SEARCH: dict[str, Any] = {
    "space": {"model.ffn.top_k": {"choice": [2, 3, 4]}, "balance.loss_weight": {"log": [0.001, 0.1]}},
    "budgets": ["active_params<=160%"],
    "trials": 3,
    "finalists": 1,
    "seeds": 2,
    "max_tokens": 5 * 2560,  # without the third candidate
}


ANY = {"space": {"optimizer.weight_decay": {"choice": [0.1]}}}


def kill_trial(driver: int) -> int:
    """SIGKILL to the process that trains; the Ray of a driver is among its children."""
    training = [p for p in psutil.Process(driver).children(recursive=True) if "ray::ImplicitFunc" in p.name()]
    assert len(training) == 1
    training[0].kill()
    return training[0].pid


@pytest.mark.parametrize("alone", [True, False])
def test_what_a_trial_asks_for_is_something_that_ray_takes(tiny_job: Callable[..., Path], alone: bool) -> None:
    job = load(tiny_job(search=ANY), Job).config
    needs = needs_of(job, alone)
    assert needs.get("CPU", 0) == alone, "workers on Ray Train ask for theirs"
    tune.with_resources(lambda config: None, needs)
    off = needs_of(job, alone, without=["aa", "bb"])
    tune.with_resources(lambda config: None, off)
    assert off.bundles == [{name: number for name, number in needs.items() if number}]
    assert off._bound.kwargs["bundle_label_selector"] == [{"ray.io/node-id": "!in(aa,bb)"}]


@pytest.mark.parametrize(
    ("workers", "gpu", "wanted", "expected"),
    [(1, False, None, 7), (1, False, 7, 7), (1, False, 3, 3), (3, False, None, 2), (3, True, None, 1), (1, True, 3, 3)],
)
def test_as_many_trials_run_at_a_time_as_fit(
    tiny_job: Callable[..., Path], workers: int, gpu: bool, wanted: int | None, expected: int
) -> None:
    resources = {"workers": workers, "gpu": gpu}
    job = load(tiny_job(train={"batch_tokens": 768}, resources=resources, search=ANY), Job).config
    there = {"CPU": 7.0, "GPU": 3.0, "memory": 1e9}
    assert trials_at_a_time(job, there, wanted, "it") == expected
    problem = rf"--concurrent 8: a trial takes {workers} CPUs{f' and {workers} GPUs' if gpu else ''} .* at most "
    with pytest.raises(ConfigError, match=problem + rf"{3 // workers if gpu else 7 // workers} fit"):
        trials_at_a_time(job, there, 8, "it")


@pytest.mark.parametrize(("share", "expected"), [(1.0, 3), (0.5, 6), (0.3, 10), (0.1, 30)])
def test_small_trials_share_a_gpu(tiny_job: Callable[..., Path], share: float, expected: int) -> None:
    search = {**ANY, "gpu_share": share}
    job = load(tiny_job(search=search, resources={"gpu": True}), Job).config
    assert trials_at_a_time(job, {"CPU": 64.0, "GPU": 3.0}, None, "it") == expected
    assert needs_of(job, True) == {"CPU": 1.0, "GPU": share}
    if share < 1:
        with pytest.raises(ConfigError, match=rf"search.gpu_share={share} is for jobs with one worker on a GPU"):
            Space(tiny_job(search=search))


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_and_loses_no_finished_trial(
    sweeps: Any, tiny_job: Callable[..., Path]
) -> None:
    train = {"tokens": 2560, "eval_every": 5}
    job = tiny_job(search=SEARCH, train=train)
    sweeps.kill_when(job, lambda result: result["status"] == "finished")
    before = sweeps.results()

    other = tiny_job(search=SEARCH, train={**train, "tokens": 3072})
    refused = subprocess.run(sweeps.command("tune", "--resume", "tiny-1"), capture_output=True, text=True)
    assert refused.returncode == 2
    assert "is not the one that this sweep compares (train.tokens=3072)" in refused.stderr
    assert other == tiny_job(search=SEARCH, train=train)

    done = subprocess.run(sweeps.command("tune", "--resume", "tiny-1"), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    after = sweeps.results()
    assert all(after[number] == result for number, result in before.items() if result["status"] == "finished")
    assert [after[number]["trial"]["kind"] for number in sorted(after)] == [
        "base",
        "random",
        "random",
        *["seed"] * (len(after) - 3),
    ]
    assert {result["status"] for result in after.values()} == {"finished"}

    folder = sweeps.folder
    assert "1 candidates were not begun: search.max_tokens=12800 is reached" in (folder / "report.md").read_text()
    assert "over 2 paired seeds" in (folder / "report.md").read_text()
    assert (folder / "front.png").stat().st_size > 5000
    best = min((r for r in after.values() if r["trial"]["seed"] == 0 and r["value"]), key=lambda r: r["value"])
    won = load(job, Job, [f"{path}={json.dumps(value)}" for path, value in best["trial"]["values"].items()]).config
    assert load(folder / "best.yaml", Job).config.model_dump(exclude={"data"}) == won.model_dump(exclude={"data"})

    with closing(sqlite3.connect(sweeps.state / "mlflow" / "mlflow.db")) as database:
        nested = database.execute("select count(*) from tags where key = 'mlflow.parentRunId'").fetchone()[0]
        budgets = database.execute("select distinct value from tags where key = 'budget'").fetchall()
    assert len(budgets) == 1, "of the sweep and of every trial"
    assert budgets[0][0].startswith("active_params<=")
    assert nested >= sum(result["run"] != "" for result in after.values())

    found = job.parent / "found" / "tiny-1.yaml"
    again = subprocess.run(sweeps.command("front", "tiny-1", "--write", str(found)), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert yaml.safe_load(found.read_text())["extends"] == "../tiny.yaml"
    read = subprocess.run(sweeps.command("tokenize", str(found)), capture_output=True, text=True)
    assert read.returncode == 0, f"its data are found from there: {read.stderr}"
    over = subprocess.run(sweeps.command("front", "tiny-1", "--write", str(job)), capture_output=True, text=True)
    assert (over.returncode, "is there already" in over.stderr) == (2, True)
    assert "val/loss" in again.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_goes_on_when_a_trial_fails_and_its_scheduler_stops_those_behind(
    sweeps: Any, tiny_job: Callable[..., Path]
) -> None:
    """Four are drawn: the first diverges before it is compared, the last does not move, after one that learns."""
    search = {
        "space": {"optimizer.schedule.peak": {"choice": [3e-3, 1e-8, 1e30]}, "model.ffn.top_k": {"choice": [2, 3, 4]}},
        "trials": 5,
        "searcher": "tpe",
        "random_share": 0.8,
        "seed": 3,
        "scheduler": "asha",
        "finalists": 1,
        "seeds": 1,
    }
    job = tiny_job(search=search, train={"tokens": 5120, "eval_every": 1}, resources={"price_per_hour": 250.0})
    done = subprocess.run(sweeps.command("tune", str(job)), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = sweeps.results()
    assert len(found) == 6
    assert found[0]["status"] == "finished", "the job as it stands is never stopped"
    drawn = [found[number]["trial"]["values"]["optimizer.schedule.peak"] for number in range(1, 5)]
    assert drawn == [1e30, 3e-3, 1e30, 1e-8]
    for number in range(1, 6):
        fails = found[number]["trial"]["values"]["optimizer.schedule.peak"] == 1e30
        assert found[number]["status"] in (("failed", "stopped") if fails else ("finished", "stopped"))
    failed = [result for result in found.values() if result["status"] == "failed"]
    stopped = [result for result in found.values() if result["status"] == "stopped"]
    assert failed
    assert stopped
    report = (sweeps.folder / "report.md").read_text()
    ledgers = [json.loads(file.read_text()) for file in (sweeps.state / "checkpoints").glob("*/cost.json")]
    assert len(ledgers) == 6, "those that failed cost too"
    hours = sum(ledger["gpu_hours"] for ledger in ledgers)
    assert f"cost of all 6 trials: {hours:.3g} worker-hours, {250 * hours:.3g} in money" in report
    for result in failed:
        assert f"trial {result['trial']['number']} failed: {result['error'][:40]}" in report
    with closing(sqlite3.connect(sweeps.state / "mlflow" / "mlflow.db")) as database:
        statuses = dict(database.execute("select run_uuid, status from runs").fetchall())
        tagged = dict(database.execute("select run_uuid, value from tags where key = 'tidegate.stopped_by'").fetchall())
        trials = "select run_uuid from tags where key = 'mlflow.parentRunId'"
        whole = f"select key, value from latest_metrics where run_uuid not in ({trials})"
        of_sweep = dict(database.execute(whole).fetchall())
    assert of_sweep == {
        "cost/hours": pytest.approx(sum(ledger["hours"] for ledger in ledgers)),
        "cost/gpu_hours": pytest.approx(hours),
        "cost/money": pytest.approx(250 * hours),
    }
    for result in stopped:
        assert result["stopped_by"] == "asha"
        assert 512 <= result["tokens"] < 5120
        assert f"trial {result['trial']['number']} was stopped by asha after {result['tokens']} tokens" in report
        run = json.loads((sweeps.state / "runs" / result["run"] / "run.json").read_text())["run_id"]
        assert (statuses[run], tagged[run]) == ("KILLED", "asha")
    assert len(tagged) == len(stopped)


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_whose_process_dies_begins_again_from_its_checkpoint_and_fails_when_it_dies_again(
    sweeps: Any, tiny_job: Callable[..., Path]
) -> None:
    space = {"model.ffn.expert_dim": {"choice": [8]}}  # the job as it stands is beyond the budget, so it does not run
    search = {"space": space, "budgets": ["total_params<=99%"], "trials": 1, "seeds": 1, "retries": 1}
    job = tiny_job(search=search, train={"tokens": 512 * 600, "log_every": 50}, checkpoint={"every": 20})
    state, killed = sweeps.state, set()
    with subprocess.Popen(
        sweeps.command("tune", str(job)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        deadline = time.monotonic() + 300
        while len(killed) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
            run = sweeps.results().get(1, {}).get("run")
            saved = sorted((state / "checkpoints").glob(f"{run}-*/step_*/manifest.json")) if run else []
            attempts = {path.parent.name.rpartition("-")[2] for path in saved}
            if len(attempts) > len(killed):
                killed.add(kill_trial(process.pid))
        said = process.communicate(timeout=200)[0]
    assert process.returncode == 2, said
    assert "trial 1: its process died; it begins again from its checkpoint" in said
    assert "no trial came to its end; trial 1: its process died 2 times: The actor died unexpectedly" in said
    found = sweeps.results()
    assert found[1]["status"] == "failed"
    steps = [int(path.parent.name.split("_")[1].split("-")[0]) for path in saved]
    assert len(steps) == len(set(steps)), "the second process went on where the first had been"
    with closing(sqlite3.connect(state / "mlflow" / "mlflow.db")) as database:
        run_id = json.loads((state / "runs" / found[1]["run"] / "run.json").read_text())["run_id"]
        status = database.execute("select status from runs where run_uuid = ?", [run_id]).fetchone()[0]
        resumed = "select value from tags where key = 'tidegate.resumed' and run_uuid = ?"
        assert database.execute(resumed, [run_id]).fetchone() == ("1",)
    assert status == "FAILED"
