"""The driver's side of tracking: which store, opening a run, its artifacts, its end.

`open_run` fails loudly, because nothing has been computed yet. Everything after it is best effort: a tracking
server that went away must not turn a finished training into a failed one.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tidegate.config import Config, ConfigError, flatten
from tidegate.redact import HIDDEN, redact, redact_values
from tidegate.track.client import connect, database_file, one_line
from tidegate.track.config import TrackConfig
from tidegate.track.preset import view_tags
from tidegate.track.provenance import provenance_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = [
    "RunHandle",
    "RunStatus",
    "artifact_root",
    "best_effort",
    "embedded_uri",
    "finish_run",
    "log_dict",
    "log_file",
    "log_metrics",
    "log_text",
    "open_run",
    "recorded_uri",
    "resolve_tracking_uri",
    "run_url",
]

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

_PARAM_KEY_LIMIT, _PARAM_VALUE_LIMIT = 250, 6000  # MLflow refuses longer ones

_log = logging.getLogger(__name__)


class RunHandle(NamedTuple):
    """All that another process needs to write to a run; plain text, so it pickles."""

    uri: str
    experiment_id: str
    run_id: str
    name: str


def embedded_uri(state_dir: Path) -> str:
    """The URI of the SQLite store inside a state directory; absolute, because Ray workers change directory."""
    return f"sqlite:///{(state_dir.absolute() / 'mlflow' / 'mlflow.db').as_posix()}"


def artifact_root(uri: str) -> str | None:
    """The URI of the artifact folder beside a SQLite store; None where a server decides."""
    database = database_file(uri)
    return (database.parent / "artifacts").as_uri() if database else None


def resolve_tracking_uri(config: TrackConfig, state_dir: Path) -> str:
    """The store to write to: `config.tracking_uri`, else MLFLOW_TRACKING_URI, else SQLite under `state_dir`.

    Raises:
        ConfigError: the URI is relative or names a file store, which MLflow no longer has.
    """
    field = "track.tracking_uri" if config.tracking_uri else "MLFLOW_TRACKING_URI"
    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return embedded_uri(state_dir)
    shown = redact(uri)
    if uri.startswith("file:") or ("://" not in uri and uri != "databricks"):
        raise ConfigError(
            f"{field}: {shown!r} is not a store MLflow still has; give http(s)://, sqlite:/// or a database URI"
        )
    if uri.startswith("sqlite:") and not re.match(r"sqlite:///(/|[A-Za-z]:)", uri):
        raise ConfigError(
            f"{field}: {shown!r} is relative to a directory that workers change; write sqlite:////absolute/path.db"
        )
    return uri


def recorded_uri(recorded: str) -> str:
    """The whole URI of a store that a run's record names without its password: MLFLOW_TRACKING_URI has it.

    Raises:
        ConfigError: the variable is not set to that store.
    """
    if HIDDEN not in recorded:
        return recorded
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if redact(uri) != recorded:
        raise ConfigError(
            f"MLFLOW_TRACKING_URI: the run is at {recorded}, and its password is recorded nowhere; set it to the whole "
            f"URI (it is {redact(uri)!r})"
        )
    return uri


def open_run(
    uri: str,
    config: TrackConfig,
    *,
    job: str,
    resolved: Mapping[str, Any] | Config,
    changes: Mapping[str, Any],
    command: Sequence[str],
    name: str | None = None,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    notice: Callable[[str], None] = _log.info,
) -> RunHandle:
    """Create a run, or re-open one, and record what it is made of.

    A new run gets the flattened config as params, `job/resolved.json` and `job/changes.json`. A run that is
    resumed keeps them (MLflow params never change) and gets `job/resumed-N.json`, with all that differs now.

    Args:
        uri: of the store, from `resolve_tracking_uri`.
        config: names the experiment.
        job: name of the job, for the tag `tidegate.job`.
        resolved: the whole resolved job.
        changes: flat `path -> value`: what the job changed against the one it extends.
        command: the command line that started this.
        name: of a new run; `job` when None. A resumed run keeps its own.
        run_id: of the run to resume; None creates one.
        tags: more tags, for example `mlflow.parentRunId`.
        notice: is told what takes long or may surprise.

    Raises:
        ConfigError: the store cannot be reached or refuses, the experiment is deleted, or no run has `run_id`.
    """
    shown = redact(uri)
    database = database_file(uri)
    if database and not database.exists():
        if run_id is not None:
            raise ConfigError(
                f"{shown}: the run {name or run_id} is recorded there, and there is no such file on this machine; copy "
                "it here, or record runs that move with a server (MLFLOW_TRACKING_URI)"
            )
        notice(f"creating the MLflow store {database} (the first use takes up to 15 s)")
    try:
        if database:
            database.parent.mkdir(parents=True, exist_ok=True)
        client = connect(uri)
        all_tags = provenance_tags(job, command) | dict(tags or {})
        document = redact_values(_as_mapping(resolved))
        if run_id is not None:
            return _resume(client, uri, run_id, document, all_tags, notice)
        experiment_id = _experiment(client, config.experiment, artifact_root(uri))
        run = client.create_run(experiment_id, run_name=name or job, tags=all_tags)
        _log_params(client, run.info.run_id, _params(document))
        client.log_text(run.info.run_id, _pretty(document), "job/resolved.json")
        client.log_text(run.info.run_id, _pretty(redact_values(changes)), "job/changes.json")
    except ConfigError:
        raise
    except Exception as error:  # MLflow lets errors of requests, SQLAlchemy and the file system through
        raise ConfigError(f"track.tracking_uri: {shown!r} does not take the run: {one_line(error)}") from error
    return RunHandle(uri, experiment_id, run.info.run_id, name or job)


def finish_run(handle: RunHandle, status: RunStatus) -> bool:
    """Set the final status; False, with a warning logged, when the store does not answer."""
    return best_effort(handle, "its status", lambda client: client.set_terminated(handle.run_id, status))


def tag_run(handle: RunHandle, key: str, value: str) -> bool:
    """Set a tag; False, with a warning logged, when the store does not answer."""
    return best_effort(handle, f"its tag {key}", lambda client: client.set_tag(handle.run_id, key, value))


def log_metrics(handle: RunHandle, metrics: Mapping[str, float]) -> bool:
    """Store values of now, as of no step; False, with a warning logged, when that fails."""

    def log(client: MlflowClient) -> None:
        for name, value in metrics.items():
            client.log_metric(handle.run_id, name, value)

    return best_effort(handle, "its metrics", log)


def log_file(handle: RunHandle, path: Path, folder: str | None = None) -> bool:
    """Store a file as an artifact under `folder`; False, with a warning logged, when that fails."""
    return best_effort(handle, str(path), lambda client: client.log_artifact(handle.run_id, str(path), folder))


def log_text(handle: RunHandle, text: str, path: str) -> bool:
    """Store text (HTML, Markdown, CSV) as the artifact `path`; False, with a warning logged, when that fails."""
    return best_effort(handle, path, lambda client: client.log_text(handle.run_id, text, path))


def log_dict(handle: RunHandle, document: Mapping[str, Any], path: str) -> bool:
    """Store a mapping as the JSON artifact `path`; False, with a warning logged, when that fails."""
    return log_text(handle, _pretty(dict(document)), path)


def run_url(handle: RunHandle) -> str:
    """Where to look at the run: a link, or for a store without a server the command that shows it and the path."""
    page = f"/#/experiments/{handle.experiment_id}/runs/{handle.run_id}"
    if handle.uri.startswith(("http://", "https://")):
        return re.sub(r"//[^/@]+@", "//", handle.uri).rstrip("/") + page
    if database_file(handle.uri):
        return f"tidegate ui  (then open {page})"
    return f"mlflow ui --backend-store-uri {shlex.quote(redact(handle.uri))}  (then open {page})"


def best_effort(handle: RunHandle, what: str, act: Callable[[MlflowClient], object]) -> bool:
    """Do something to the run in its store; False, with a warning logged that names `what`, when that fails."""
    try:
        act(connect(handle.uri))
    except Exception as error:  # see the module docstring: a finished training stays finished
        _log.warning("run %s: %s was not stored at %s: %s", handle.run_id, what, redact(handle.uri), one_line(error))
        return False
    return True


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """The id of the experiment, created when there is none."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifacts, tags=view_tags())
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another driver may have been first
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise ConfigError(f"track.experiment: {name!r} is deleted in the store; restore it or choose another name")
    return str(found.experiment_id)


def _resume(
    client: MlflowClient,
    uri: str,
    run_id: str,
    document: dict[str, Any],
    tags: dict[str, str],
    notice: Callable[[str], None],
) -> RunHandle:
    run = client.get_run(run_id)
    if run.info.lifecycle_stage != "active":
        raise ConfigError(f"run {run_id!r} is deleted in {redact(uri)}; restore it there or start a new run")
    params = _params(document)
    _log_params(client, run_id, {key: value for key, value in params.items() if key not in run.data.params})
    differs = {key: params.get(key) for key in {**run.data.params, **params} if _differs(run, params, key)}
    if differs:
        shown = ", ".join(f"{key}={value}" for key, value in sorted(differs.items())[:5])
        notice(f"run {run_id}: {len(differs)} values differ from its first start ({shown}); its params keep the first")
    resumed = int(run.data.tags.get("tidegate.resumed", "0")) + 1
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    note = {"time": now, "tags": tags, "differs": differs, "resolved": document}
    client.log_text(run_id, _pretty(note), f"job/resumed-{resumed}.json")
    client.set_tag(run_id, "tidegate.resumed", str(resumed))
    if run.data.tags.get("tidegate.stopped_by"):
        client.set_tag(run_id, "tidegate.stopped_by", "")
    client.update_run(run_id, status="RUNNING")
    return RunHandle(uri, run.info.experiment_id, run_id, run.info.run_name)


def _differs(run: Run, params: Mapping[str, str], key: str) -> bool:
    return key in run.data.params and run.data.params[key] != params.get(key)


def _log_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()], synchronous=True)


def _params(document: Mapping[str, Any]) -> dict[str, str]:
    leaves = flatten(document).items() if document else ()  # an empty mapping flattens to a leaf without a name
    return {re.sub(r"[^\w. :-]", "_", key)[:_PARAM_KEY_LIMIT]: _param_value(value) for key, value in leaves}


def _param_value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _PARAM_VALUE_LIMIT else text[: _PARAM_VALUE_LIMIT - 3] + "..."


def _as_mapping(resolved: Mapping[str, Any] | Config) -> dict[str, Any]:
    return resolved.model_dump(mode="json") if isinstance(resolved, Config) else dict(resolved)


def _pretty(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"
