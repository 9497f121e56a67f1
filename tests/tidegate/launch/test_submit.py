"""A job file goes to a Ray cluster, stops, goes on there and elsewhere, and stays one run; what cannot work is said."""

from __future__ import annotations

import itertools
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tidegate.config import ConfigError, JobFile
from tidegate.launch import submit as submitting
from tidegate.launch.cluster_head import look
from tidegate.launch.state import StateDir
from tidegate.launch.submissions import Cluster, follow
from tidegate.launch.submit import Submit, resume, submit


def recorded(database: Path, metric: str) -> dict[str, dict[int, set[float]]]:
    """By name of run and step; of a loss more than one where a step was done again and came out otherwise."""
    found: dict[str, dict[int, set[float]]] = {}
    query = "select runs.name, step, value from metrics join runs using (run_uuid) where key = ?"
    with closing(sqlite3.connect(database)) as store:
        for run, step, value in store.execute(query, (metric,)):
            found.setdefault(run, {}).setdefault(step, set()).add(value)
    return found


def losses(database: Path) -> dict[str, dict[int, set[float]]]:
    return recorded(database, "train/loss")


def local(*args: str, status: int = 0) -> str:
    command = [sys.executable, "-m", "tidegate.cli", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


STEPS = 200


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray, about its client of web sockets
def test_from_here_to_a_cluster_stopped_and_on_it_is_one_run(
    head: Any, tiny_job: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database = tmp_path / "tracked.db"
    job = tiny_job(
        train={"tokens": 512 * STEPS},
        track={"tracking_uri": f"sqlite:///{database}", "flush_every_s": 0.2},
        checkpoint={"every": 50, "storage": str(tmp_path / "storage")},
    )
    here, there = (str(tmp_path / name) for name in ("here", "there"))
    local("train", str(job), "--local", "--name", "alone", "--state-dir", here)
    pause = ("--set", "train.pause_at_tokens=2048")
    printed = local("train", str(job), *pause, "--local", "--name", "whole", "--state-dir", here)
    assert "stopped at step 4" in printed

    # The cluster has a state directory of its own: it knows of the run by what stands beside its checkpoints.
    request = Submit(head.address, name="whole", state_dir=there)
    assert submit(job, request) == 0
    assert submit(job, request) == 0, "it runs already"
    cluster = Cluster(head.address)
    assert [found.id for found in cluster.submissions()] == ["whole.1"]
    with pytest.raises(ConfigError, match="stop it first"):
        resume("whole", Submit(head.address))
    until = time.monotonic() + 120
    while "step 10/" not in local("logs", "whole", "--address", head.address):
        assert time.monotonic() < until
        time.sleep(0.2)
    assert "whole: stopped; go on with: tidegate resume whole" in local("stop", "whole", "--address", head.address)
    assert StateDir(Path(there)).runs() == ["whole"]
    stopped = max(losses(database)["whole"])
    assert 10 <= stopped < STEPS, "it saved after a step"
    assert resume("whole", Submit(head.address, wait=True)) == 0
    assert f"step {stopped}" in capsys.readouterr().out
    assert submit(job, request) == 0
    assert "has ended already" in capsys.readouterr().out
    assert [(found.id, found.status) for found in cluster.submissions()] == [
        ("whole.1", "STOPPED"),
        ("whole.2", "SUCCEEDED"),
    ]
    assert losses(database)["whole"] == losses(database)["alone"], "bitwise, each step once"
    costs = [sorted(values) for _, values in sorted(recorded(database, "cost/hours")["whole"].items())]
    in_order = [*itertools.chain.from_iterable(costs)]
    assert in_order == sorted(in_order), "what it has cost goes along"
    assert len([*Path(tmp_path / "storage").glob("whole-*")]) == 1
    sent = [path for path in head.folder.glob("session_2*/runtime_resources/*/_ray_pkg_*/**/*") if path.is_file()]
    assert {path.suffix for path in sent} >= {".py", ".yaml"}
    assert not [path for path in sent if path.name in ("letters.txt", "tracked.db") or path.suffix == ".pyc"]
    assert sum(path.stat().st_size for path in sent) < 20e6


@pytest.mark.ray
@pytest.mark.slow
def test_what_cannot_run_there_is_said_before_anything_is_sent(
    head: Any, tiny_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, state = tiny_job(), str(tmp_path / "there")
    with pytest.raises(ConfigError, match=r"there is no /nowhere/letters\.txt; there is no /nowhere/digits\.txt"):
        submit(job, Submit(head.address, name="refused", state_dir=state, job_dir="/nowhere"))
    with pytest.raises(ConfigError, match=r"on the head, .*/tiny\.yaml/state cannot be written"):
        submit(job, Submit(head.address, name="refused", state_dir=f"{job}/state"))
    with pytest.raises(ConfigError, match="say where runs live on the cluster, or set TIDEGATE_STATE there"):
        submit(job, Submit(head.address, name="refused"))
    versions = submitting._versions()
    monkeypatch.setattr(submitting, "_versions", lambda: versions | {"torch": "9.9", "left-pad": "1.0"})
    there = versions["torch"].replace("+", r"\+")
    with pytest.raises(ConfigError, match=rf"torch {there}, here 9\.9; no left-pad, here 1\.0"):
        submit(job, Submit(head.address, name="refused", state_dir=state))
    with pytest.raises(ConfigError, match="nothing of that name"):
        resume("refused", Submit(head.address))
    assert not Path(state).exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # as above
def test_an_entrypoints_own_exit_status_comes_back(head: Any) -> None:
    cluster = Cluster(head.address)
    for attempt, status in enumerate((124, 0), 1):
        assert cluster.submit("limited", cluster.latest("limited"), "", f"exit {status}", {}) == f"limited.{attempt}"
        assert follow(cluster, f"limited.{attempt}") == status


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_that_asks_for_a_token(head_with_token: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    head, token = head_with_token
    with pytest.raises(ConfigError, match="it does not know you; set RAY_AUTH_MODE=token"):
        Cluster(head.address).submissions()
    owner = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    command = [sys.executable, "-m", "tidegate.cli", "jobs", "--address", head.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | owner)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("address", [None, "auto", "127.0.0.1:8265", "http://127.0.0.1:1"])
def test_an_address_that_leads_nowhere(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"name the cluster's dashboard|no Ray cluster answers"):
        Cluster(address)


def test_which_versions_differ() -> None:
    here = {"torch": "2.13.0+cpu", "ray": "2.60.0"}
    assert [*submitting.mismatches(here, "3.11.7", {"torch": "2.13.0+cu130", "ray": "2.60.0"}, "3.11.2")] == []
    assert [*submitting.mismatches(here, "3.11.7", {"torch": "2.13.1+cpu", "ray": None}, "3.12.7")] == [
        "python 3.12.7, here 3.11.7",
        "torch 2.13.1+cpu, here 2.13.0+cpu",
        "no ray, here 2.60.0",
    ]
    assert {"ray", "torch", "deepspeed"} <= submitting._versions().keys()


def test_what_is_looked_for_on_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").touch()
    wanted = {"packages": ["ray", "left-pad"], "paths": [f"{tmp_path}/*.txt", f"{tmp_path}/*.parquet"], "state": None}
    monkeypatch.setenv("TIDEGATE_STATE", str(tmp_path / "new" / "state"))
    found = look(wanted)
    assert found["packages"] == {"ray": submitting._versions()["ray"], "left-pad": None}
    assert found["missing"] == [f"{tmp_path}/*.parquet"]
    assert (found["state"], found["writable"]) == (str(tmp_path / "new" / "state"), True)


def test_a_jobs_files_travel_as_they_stand_to_each_other(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "jobs" / "deep").mkdir(parents=True)
    (tmp_path / "base" / "data.txt").write_text("stays")
    (tmp_path / "base" / "a.yaml").write_text("name: a\n")
    (tmp_path / "jobs" / "deep" / "b.yaml").write_text("extends: ../../base/a.yaml\n")
    files = JobFile(tmp_path / "jobs" / "deep" / "b.yaml").paths
    folder, name = submitting._pack(files)
    assert name == "jobs/deep/b.yaml"
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["a.yaml", "b.yaml"]
    assert [path.read_text() for path in JobFile(folder / name).paths] == [path.read_text() for path in files]
    shutil.rmtree(folder)


def test_names_and_runs_that_only_look_alike(tiny_job: Callable[..., Path], tmp_path: Path) -> None:
    job, state = str(tiny_job()), str(tmp_path / "state")
    assert "a name has letters, digits" in local("train", job, "--name", "../x", "--state-dir", state, status=2)
    local("train", job, "--local", "--name", "mine", "--state-dir", state, "--set", "train.tokens=1024")
    other = ["--local", "--name", "mine", "--state-dir", state, "--set", "optimizer.gradient_clip=0.25"]
    printed = local("train", job, *other, status=2)
    assert "but the run mine has begun with" in printed
    assert "more fields differ" in printed
    assert StateDir(Path(state)).runs() == ["mine"]
