"""From data to model in MLflow: the datasets that a run reads, the models that it gave, their names in the registry.

A model here is an entry: which files, of which checkpoint, with which digest. The weights stay where they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tidegate.config import ConfigError
from tidegate.redact import redact
from tidegate.track.client import connect, one_line
from tidegate.track.store import RunHandle, best_effort

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

__all__ = [
    "DatasetUse",
    "ModelEntry",
    "check_model_name",
    "log_datasets",
    "log_model",
    "logged_model",
    "register_model",
]

_DIGEST_DIGITS = 36  # MLflow's limit for a dataset


class DatasetUse(NamedTuple):
    """One domain's text as a run reads it."""

    name: str
    digest: str
    """Hex, of the tokens."""
    source: Mapping[str, object]
    """Where the text came from."""
    profile: Mapping[str, int]
    """What there is of it."""
    context: str
    """MLflow's word for what it is for: `training` or `validation`."""


class ModelEntry(NamedTuple):
    """Weights in files."""

    name: str
    kind: str
    """Format of the files: `tidegate`, `hf` or `checkpoint`."""
    step: int
    tags: Mapping[str, str]
    manifest: Path | None
    """Kept with the entry, if it is a file here."""


def log_datasets(handle: RunHandle, uses: Sequence[DatasetUse]) -> bool:
    """Record what a run reads; False, with a warning logged, when the store does not answer."""

    def log(client: MlflowClient) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        schema = json.dumps({"mlflow_colspec": [{"name": "token", "type": "integer", "required": True}]})
        inputs = [
            DatasetInput(
                Dataset(
                    name=use.name,
                    digest=use.digest[:_DIGEST_DIGITS],
                    source_type="tidegate",
                    source=json.dumps(dict(use.source)),
                    schema=schema,
                    profile=json.dumps(dict(use.profile)),
                ),
                [InputTag("mlflow.data.context", use.context)],
            )
            for use in uses
        ]
        client.log_inputs(handle.run_id, datasets=inputs)

    return best_effort(handle, "what it reads", log)


def log_model(handle: RunHandle, entry: ModelEntry) -> bool:
    """Record a model as what the run gave; False, with a warning logged, when the store does not answer."""
    return best_effort(handle, f"model {entry.name}", lambda client: _log_model(client, handle.run_id, entry))


def logged_model(handle: RunHandle) -> str | None:
    """Id of the newest model that the run gave, not counting bare checkpoints; None without any.

    Raises:
        ConfigError: the store does not answer, or does not have the run.
    """
    try:
        found = _models(connect(handle.uri), handle.run_id)
    except Exception as error:  # MLflow lets errors of requests, SQLAlchemy and the file system through
        raise _refused(handle, error) from error
    return next((model.model_id for model in found if model.model_type != "checkpoint"), None)


def check_model_name(name: str, alias: str | None) -> None:
    """Refuse what the registry would, before anything is written there.

    Raises:
        ConfigError: names the option and its value.
    """
    if not name.strip() or re.search(r"[/:]", name):
        raise ConfigError(f"--name {name!r}: the name of a model has no / and no : in it, and is not empty")
    if alias is None:
        return
    if not re.fullmatch(r"[\w-]{1,255}", alias, re.ASCII) or re.fullmatch(r"(?i)latest|v\d+", alias):
        raise ConfigError(
            f"--alias {alias!r}: an alias is of letters, digits, - and _, and neither `latest` nor a version like `v1`"
        )


def register_model(handle: RunHandle, name: str, alias: str | None, model: str | ModelEntry) -> str:
    """Make a model of the run the next version of a registered model.

    Args:
        handle: the run.
        name: of the registered model, created when there is none.
        alias: moved to this version; None moves nothing.
        model: id of one that the run gave, or one to record first.

    Returns:
        The version. Its tags are the model's, its id, and `val_loss`: held-out loss at its step, if it was measured.

    Raises:
        ConfigError: the store does not answer or refuses.
    """
    check_model_name(name, alias)
    try:
        client = connect(handle.uri)
        model_id = model if isinstance(model, str) else _log_model(client, handle.run_id, model)
        logged = client.get_logged_model(model_id)
        tags = {key: value for key, value in logged.tags.items() if not key.startswith("mlflow.")}
        tags["model"] = model_id
        losses = [m for m in client.get_metric_history(handle.run_id, "val/loss") if str(m.step) == tags["step"]]
        if losses:
            tags["val_loss"] = repr(max(losses, key=lambda metric: metric.timestamp).value)
        _create_registered(client, name)
        version = client.create_model_version(
            name, logged.artifact_location, handle.run_id, tags=tags, await_creation_for=0, model_id=model_id
        )
        if alias is not None:
            client.set_registered_model_alias(name, alias, version.version)
    except Exception as error:  # as above
        raise _refused(handle, error) from error
    return str(version.version)


def _models(client: MlflowClient, run_id: str) -> list[LoggedModel]:
    """The run's, the newest first."""
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'")
    return sorted(found, key=lambda model: model.creation_timestamp, reverse=True)


def _log_model(client: MlflowClient, run_id: str, entry: ModelEntry) -> str:
    from mlflow.entities import LoggedModelOutput

    name = re.sub(r"[^\w-]", "_", entry.name)
    for model in _models(client, run_id):
        if model.name == name and model.tags.get("digest") == entry.tags.get("digest"):
            return model.model_id  # recorded before
    model = client.create_logged_model(
        client.get_run(run_id).info.experiment_id, name, run_id, tags=dict(entry.tags), model_type=entry.kind
    )
    if entry.manifest is not None:
        client.log_model_artifact(model.model_id, str(entry.manifest))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, entry.step)])
    return model.model_id


def _create_registered(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _refused(handle: RunHandle, error: Exception) -> ConfigError:
    return ConfigError(f"run {handle.name}: {redact(handle.uri)} does not answer or refuses: {one_line(error)}")
