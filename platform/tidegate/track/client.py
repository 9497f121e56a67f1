"""The one door to MLflow: its environment, its client, its errors in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.redact import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

REQUEST_TIMEOUT_S = 10

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # MLflow's own 7 retries of 120 s would hide a dead server for minutes; the callers here retry by themselves.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST_TIMEOUT_S),
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def import_mlflow() -> None:
    """Import MLflow (about 2 s) with our defaults in the environment; what the user has set there wins."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401


def connect(uri: str) -> MlflowClient:
    """A client of the store at `uri`; creates and migrates the tables of a new database."""
    import_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(uri, registry_uri=uri)


def database_file(uri: str) -> Path | None:
    """The file of a SQLite store, None for every other store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def one_line(error: BaseException, limit: int = 300) -> str:
    """The error as one line of at most `limit` characters, without secrets."""
    text = redact(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
