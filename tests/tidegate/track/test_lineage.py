"""Datasets, models and the registry through a real MLflow server, as a cluster has it."""

from __future__ import annotations

import json

import pytest

from tidegate.config import ConfigError
from tidegate.track import (
    DatasetUse,
    ModelEntry,
    RunHandle,
    TrackConfig,
    log_datasets,
    log_model,
    logged_model,
    open_run,
    register_model,
)
from tidegate.track.client import connect

TAGS = {"digest": "ab" * 32, "checkpoint": "step_7", "step": "7", "tokens": "63", "location": "/elsewhere"}
NAME = "o'brien's 1.5%"


@pytest.mark.slow
def test_a_server_takes_data_models_and_versions(server, tmp_path):
    handle = open_run(server.uri, TrackConfig(), job="job", resolved={}, changes={}, command=["x"])
    client = connect(server.uri)
    use = DatasetUse("prose", "c" * 64, {"hub": "a/b"}, {"tokens": 63}, "validation")
    assert log_datasets(handle, [use, use._replace(context="training", digest="d" * 64)])
    (manifest := tmp_path / "manifest.json").write_text("{}")
    entry = ModelEntry("job-1 step7.hf", "hf", 7, TAGS, manifest)
    assert logged_model(handle) is None
    assert log_model(handle, entry)
    assert log_model(handle, entry), "the same again is no other model"
    assert log_model(handle, ModelEntry("job-1-checkpoint", "checkpoint", 9, {**TAGS, "digest": "e"}, None))
    for step, value in ((6, 1.0), (7, 3.25), (8, 1.0)):
        client.log_metric(handle.run_id, "val/loss", value, step=step)

    run = client.get_run(handle.run_id)
    first, second = run.inputs.dataset_inputs
    assert {(each.tags[0].value, each.dataset.digest) for each in (first, second)} == {
        ("validation", "c" * 36),
        ("training", "d" * 36),
    }
    assert json.loads(first.dataset.profile) == {"tokens": 63}
    assert len(run.outputs.model_outputs) == 2

    newest = logged_model(handle)
    assert newest is not None
    assert client.get_logged_model(newest).model_type == "hf"
    assert [file.path for file in client.list_logged_model_artifacts(newest)] == ["manifest.json"]
    assert register_model(handle, NAME, None, newest) == "1"
    assert register_model(handle, NAME, "champion", entry) == "2"
    champion = client.get_model_version_by_alias(NAME, "champion")
    assert champion.version == "2"
    assert {**TAGS, "val_loss": "3.25", "model": newest}.items() <= champion.tags.items()
    assert register_model(handle, NAME, "champion", newest) == "3"
    assert client.get_model_version_by_alias(NAME, "champion").version == "3"


def test_what_the_store_does_not_take_is_said(handle, unused_port):
    gone = RunHandle(f"http://127.0.0.1:{unused_port}", "1", handle.run_id, "job-1")
    with pytest.raises(ConfigError, match=r"run job-1: http://127\.0\.0\.1:\d+ does not answer or refuses: "):
        logged_model(gone)
    assert not log_datasets(gone, [])
    with pytest.raises(ConfigError, match="m-none"):
        register_model(handle, "lm", None, "m-none")
    assert not connect(handle.uri).search_registered_models(), "nothing half-registered"
