"""Resolving a store, opening, resuming and finishing runs, on real SQLite stores."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tidegate.config import Config, ConfigError
from tidegate.track import (
    RunHandle,
    TrackConfig,
    finish_run,
    log_dict,
    log_file,
    log_text,
    open_run,
    resolve_tracking_uri,
    run_url,
    tag_run,
)
from tidegate.track.client import connect, one_line
from tidegate.track.provenance import git_commit


def open_job(uri, resolved, *, run_id=None, notice=lambda _: None, changes=None, **more) -> RunHandle:
    return open_run(
        uri,
        TrackConfig(),
        job="gate",
        resolved=resolved,
        changes=changes or {},
        command=["tidegate", "run", "a b.yaml"],
        run_id=run_id,
        notice=notice,
        **more,
    )


def artifact(handle: RunHandle, path: str) -> str:
    root = connect(handle.uri).get_run(handle.run_id).info.artifact_uri
    from mlflow.utils.file_utils import local_file_uri_to_path

    return (Path(local_file_uri_to_path(root)) / path).read_text()


# --- which store


def test_config_wins_over_environment_over_embedded_store(tmp_path, monkeypatch):
    assert resolve_tracking_uri(TrackConfig(), tmp_path) == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env:5000")
    assert resolve_tracking_uri(TrackConfig(), tmp_path) == "http://env:5000"
    assert resolve_tracking_uri(TrackConfig(tracking_uri="http://job:5000"), tmp_path) == "http://job:5000"


def test_embedded_store_is_absolute_for_a_relative_state_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_tracking_uri(TrackConfig(), Path(".tidegate")) == f"sqlite:///{tmp_path}/.tidegate/mlflow/mlflow.db"


@pytest.mark.parametrize("uri", ["./mlruns", "mlruns", "file:///srv/mlruns", "sqlite:///mlflow.db"])
def test_stores_that_workers_cannot_use_are_refused_by_field_and_value(uri, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"^track\.tracking_uri: '" + uri.replace(".", r"\.")) as caught:
        resolve_tracking_uri(TrackConfig(tracking_uri=uri), tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match=r"^MLFLOW_TRACKING_URI: "):
        resolve_tracking_uri(TrackConfig(), tmp_path)


# --- opening


def test_first_use_of_a_store_is_announced(template):
    assert len(template.notices) == 1
    assert str(template.database) in template.notices[0]


def test_a_run_holds_its_config_changes_and_provenance(uri, state_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resolved = {"model": {"gate": {"kind": "sdpa"}, "layers": [{"d": 1}, {"d": 2}]}, "lr": 3e-4, "empty": None}
    handle = open_job(uri, resolved, changes={"lr": 3e-4}, name="first try", tags={"mlflow.parentRunId": "p"})
    run = connect(uri).get_run(handle.run_id)
    assert run.data.params == {
        "model.gate.kind": "sdpa",
        "model.layers.0.d": "1",
        "model.layers.1.d": "2",
        "lr": "0.0003",
        "empty": "null",
    }
    assert (run.info.status, run.info.run_name, run.info.experiment_id) == (
        "RUNNING",
        "first try",
        handle.experiment_id,
    )
    assert json.loads(artifact(handle, "job/resolved.json")) == resolved
    assert json.loads(artifact(handle, "job/changes.json")) == {"lr": 3e-4}
    tags = run.data.tags
    assert tags["tidegate.job"] == "gate"
    assert tags["tidegate.command"] == "tidegate run 'a b.yaml'"
    assert tags["mlflow.parentRunId"] == "p"
    assert {f"tidegate.version.{name}" for name in ("python", "torch", "ray", "mlflow")} <= tags.keys()
    # Artifacts are beside the database, not in whatever directory the process is in.
    assert (state_dir / "mlflow" / "artifacts" / handle.run_id / "artifacts" / "job" / "resolved.json").exists()
    assert not (tmp_path / "mlruns").exists()


def test_host_and_user_are_not_recorded(handle):
    tags = connect(handle.uri).get_run(handle.run_id).data.tags
    assert not {key for key in tags if "user" in key or "host" in key or key == "mlflow.source.name"}
    assert all(socket.gethostname() != value for value in tags.values())


def test_a_pydantic_config_is_flattened(uri):
    handle = open_job(uri, TrackConfig(experiment="e"))
    assert connect(uri).get_run(handle.run_id).data.params == {
        "experiment": "e",
        "tracking_uri": "null",
        "flush_every_s": "2.0",
        "page_every_s": "60.0",
    }
    assert issubclass(TrackConfig, Config)


def test_many_long_and_oddly_named_params(uri):
    resolved = {f"k{i}": i for i in range(251)} | {"at": "x" * 6000, "over": "y" * 6001, "mix": {"../a@b": 0.5}}
    params = connect(uri).get_run(open_job(uri, resolved).run_id).data.params
    assert len(params) == 254
    assert params["mix..._a_b"] == "0.5"
    assert params["k250"] == "250"
    assert params["at"] == "x" * 6000
    assert params["over"] == "y" * 5997 + "..."


def test_passwords_are_recorded_nowhere(uri, state_dir):
    secret = "postgresql://me:hunter2@db/x"
    handle = open_job(uri, {"track": {"tracking_uri": secret}}, changes={"track.tracking_uri": secret})
    run = connect(uri).get_run(handle.run_id)
    assert run.data.params == {"track.tracking_uri": "postgresql://me:***@db/x"}
    everything = artifact(handle, "job/resolved.json") + artifact(handle, "job/changes.json") + str(run.data.tags)
    assert "hunter2" not in everything


def test_unreachable_server_is_a_one_line_error_within_seconds(unused_port):
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"^track\.tracking_uri: 'http://me:\*\*\*@127") as caught:
        open_job(f"http://me:hunter2@127.0.0.1:{unused_port}", {})
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_deleted_experiment_and_unknown_run_are_named(uri, handle):
    with pytest.raises(ConfigError, match="nosuchrun"):
        open_job(uri, {}, run_id="nosuchrun")
    connect(uri).delete_run(handle.run_id)
    with pytest.raises(ConfigError, match=rf"run '{handle.run_id}' is deleted"):
        open_job(uri, {}, run_id=handle.run_id)
    connect(uri).delete_experiment(handle.experiment_id)
    with pytest.raises(ConfigError, match=r"^track\.experiment: 'tidegate' is deleted"):
        open_job(uri, {})


# --- resuming


def test_a_resumed_run_keeps_id_params_and_name_and_notes_what_differs(uri):
    first = open_job(uri, {"steps": 10, "lr": 1.0, "old": 1}, name="kept")
    assert finish_run(first, "FAILED")
    notices: list[str] = []
    resolved = {"steps": 20, "lr": 1.0, "new": 5}
    second = open_job(uri, resolved, run_id=first.run_id, notice=notices.append, name="ignored")
    assert second == first
    run = connect(uri).get_run(first.run_id)
    assert run.data.params == {"steps": "10", "lr": "1.0", "old": "1", "new": "5"}
    assert run.info.status == "RUNNING"
    assert len(notices) == 1
    assert "2 values differ" in notices[0]
    assert "steps=20" in notices[0]
    assert json.loads(artifact(first, "job/resolved.json")) == {"steps": 10, "lr": 1.0, "old": 1}
    note = json.loads(artifact(first, "job/resumed-1.json"))
    assert note["differs"] == {"steps": "20", "old": None}
    assert note["resolved"] == resolved
    open_job(uri, resolved, run_id=first.run_id)
    assert connect(uri).get_run(first.run_id).data.tags["tidegate.resumed"] == "2"
    assert json.loads(artifact(first, "job/resumed-2.json"))["resolved"] == resolved


def test_a_resumed_run_is_no_longer_stopped_by_anything(uri):
    first = open_job(uri, {})
    tag_run(first, "tidegate.stopped_by", "limits.max_hours=2")
    finish_run(first, "KILLED")
    open_job(uri, {}, run_id=first.run_id)
    run = connect(uri).get_run(first.run_id)
    assert (run.info.status, run.data.tags["tidegate.stopped_by"]) == ("RUNNING", "")


def test_an_unchanged_resume_says_nothing(uri):
    notices: list[str] = []
    resolved = {"lr": 1.0, "name": "y" * 7000}
    first = open_job(uri, resolved)
    assert open_job(uri, resolved, run_id=first.run_id, notice=notices.append) == first
    assert notices == []


# --- afterwards


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_final_status(handle, status):
    assert finish_run(handle, status)
    info = connect(handle.uri).get_run(handle.run_id).info
    assert info.status == status
    assert info.end_time >= info.start_time


def test_artifacts_of_the_driver(handle, tmp_path):
    (tmp_path / "plan.txt").write_text("plan")
    assert log_file(handle, tmp_path / "plan.txt", "launch")
    assert log_text(handle, "<p>", "report/index.html")
    assert log_dict(handle, {"a": [1, None]}, "report/data.json")
    assert artifact(handle, "launch/plan.txt") == "plan"
    assert artifact(handle, "report/index.html") == "<p>"
    assert json.loads(artifact(handle, "report/data.json")) == {"a": [1, None]}


def test_after_opening_a_lost_server_only_warns(unused_port, caplog):
    lost = RunHandle(f"http://127.0.0.1:{unused_port}", "1", "a" * 32, "n")
    with caplog.at_level(logging.WARNING, "tidegate.track"):
        assert not finish_run(lost, "FINISHED")
        assert not log_text(lost, "x", "x.txt")
    assert [record.levelname for record in caplog.records if record.name.startswith("tidegate")] == ["WARNING"] * 2


def test_run_url():
    page = "/#/experiments/7/runs/abc"
    assert run_url(RunHandle("https://me:pw@host/mlflow/", "7", "abc", "n")) == f"https://host/mlflow{page}"
    embedded = run_url(RunHandle("sqlite:////s/mlflow/mlflow.db", "7", "abc", "n"))
    assert embedded.startswith("tidegate ui")
    assert page in embedded
    database = run_url(RunHandle("postgresql://me:pw@host/db", "7", "abc", "n"))
    assert "pw" not in database
    assert page in database


def test_commit_says_when_files_differ_from_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() is None
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    (tmp_path / "a").write_text("1")
    for arguments in (["init", "-q"], ["add", "a"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *arguments], check=True)
    clean = git_commit()
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "a").write_text("2")
    assert git_commit() == f"{clean}+dirty"


def test_errors_become_one_line():
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 999))) == 300


def test_importing_track_imports_nothing_heavy():
    code = "import sys, tidegate.track; print([m for m in ('mlflow', 'torch', 'ray', 'deepspeed') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
