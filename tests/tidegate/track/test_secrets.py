"""Secrets planted in every place that a run reads are in no file that it leaves, and a run goes on without them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tidegate.config import ConfigError, load
from tidegate.launch.state import StateDir
from tidegate.track import RunHandle
from tidegate.track.store import recorded_uri
from tidegate.train.job import Job
from tidegate.tune.sweep import SweepRequest, sweep

PLANTED = "Zx7PlantedQ9"


def files_with(secret: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.mark.slow
def test_a_run_leaves_no_secret_anywhere_and_goes_on_when_it_gets_it_again(
    server, tiny_job: Callable[..., Path], tmp_path: Path
) -> None:
    job, state = tiny_job(train={"tokens": 1024}), tmp_path / "state"
    store = server.uri.replace("//", f"//me:{PLANTED}1@")
    secrets = {
        "MLFLOW_TRACKING_URI": store,
        "HF_TOKEN": f"{PLANTED}2",
        "AWS_SECRET_ACCESS_KEY": f"{PLANTED}3",
        "RAY_AUTH_TOKEN": f"{PLANTED}4",
    }

    def tidegate(*arguments: str, status: int, **environment: str) -> str:
        command = [sys.executable, "-m", "tidegate.cli", *arguments, "--state-dir", str(state)]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == status, done.stdout + done.stderr
        (tmp_path / f"{len(list(tmp_path.glob('*.output')))}.output").write_text(done.stdout + done.stderr)
        return done.stdout + done.stderr

    local = ["--local", "--workers", "1"]
    printed = tidegate("train", str(job), *local, status=0, **secrets)
    assert f"MLflow: {server.uri}/#/experiments/" in printed
    record = json.loads((state / "runs" / "tiny-1" / "run.json").read_text())
    assert record["tracking_uri"] == server.uri.replace("//", "//me:***@")

    longer = ["train", "--resume", "tiny-1", *local, "--set", "train.tokens=2048"]
    assert "its password is recorded nowhere" in tidegate(*longer, status=2)
    assert "step 4/4" in tidegate(*longer, status=0, **secrets)
    tidegate("doctor", status=0, MLFLOW_TRACKING_URI=store)
    server.kill()
    assert "does not take the run" in tidegate("train", str(job), *local, status=2, **secrets)

    planted = f"checkpoint.storage=s3://key:{PLANTED}5@bucket"
    assert "holds a secret" in tidegate("train", str(job), *local, "--set", planted, status=2)
    assert files_with("tiny-1", tmp_path), "the search finds what is there"
    assert files_with(PLANTED, tmp_path) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("track.tracking_uri", f"postgresql://me:{PLANTED}@db/x"),
        ("track.tracking_uri", f"https://{PLANTED}@host"),
        ("checkpoint.storage", f"s3://key:{PLANTED}@bucket/x"),
        ("checkpoint.storage", f"https://host/x?sv=1&sig={PLANTED}"),
        ("track.password", PLANTED),
        ("data.hub_token", 123456789),
    ],
)
def test_a_job_with_a_secret_is_refused_by_field(
    tiny_job: Callable[..., Path], tmp_path: Path, field: str, value: str | int
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tiny_job(), Job, [f"{field}={value}"])
    assert f"{field}: holds a secret" in str(caught.value)
    assert str(value) not in str(caught.value)
    section, _, name = field.partition(".")
    with pytest.raises(ConfigError, match=rf"^.*tiny\.yaml: {field}: holds a secret") as caught:
        load(tiny_job(**{section: {name: value}}), Job)
    assert str(value) not in str(caught.value)


def test_a_record_has_neither_the_stores_password_nor_the_commands(
    tiny_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = StateDir(tmp_path / "state").new_run("tiny")
    store = f"mysql://me:{PLANTED}@db:3306/x"
    command = ["tidegate", "train", "--address", f"ray://me:{PLANTED}@head:1", "--set", f"a.token={PLANTED} {PLANTED}"]
    run.write(load(tiny_job(), Job).config, tmp_path, RunHandle(store, "1", "2", "tiny-1"), command, "/checkpoints")
    assert files_with(PLANTED, tmp_path) == []
    recorded = run.read().tracking_uri
    assert recorded == "mysql://me:***@db:3306/x"
    for other in (None, store.replace("db", "another")):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", other) if other else None
        with pytest.raises(ConfigError, match=r"^MLFLOW_TRACKING_URI: the run is at mysql://me:\*\*\*@db:3306/x, and "):
            recorded_uri(recorded)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert recorded_uri(recorded) == store
    assert recorded_uri("sqlite:////x/mlflow.db") == "sqlite:////x/mlflow.db"


def test_a_sweep_sends_no_password_to_a_cluster(
    tiny_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{PLANTED}@server")
    with pytest.raises(ConfigError, match=r"^MLFLOW_TRACKING_URI=http://me:\*\*\*@server: its password does not go"):
        sweep(SweepRequest(tiny_job(), [], [], StateDir(tmp_path / "state"), address="ray://head:10001"))
    assert files_with(PLANTED, tmp_path) == []
