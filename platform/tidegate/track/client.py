"""The one door to MLflow: its environment, its client, its errors in one line."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.config import ConfigError
from tidegate.redact import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

REQUEST_TIMEOUT_S = 10
_MIGRATION_S = 1.0
"""No step of making MLflow's tables takes longer."""

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
    """A client of the store at `uri`; creates the tables of a new database.

    Raises:
        ConfigError: the database has another MLflow's tables, which this one would migrate without a backup.
    """
    schema_of(uri)
    from mlflow import MlflowClient

    return MlflowClient(uri, registry_uri=uri)


def schema_of(uri: str) -> str | None:
    """Revision of a database's tables, which is this MLflow's; None of a database without any, and of other stores.

    Raises:
        ConfigError: the tables are another MLflow's.
    """
    if not is_database(uri):
        return None
    database = database_file(uri)
    if database and not database.exists():  # SQLite would make one
        return None
    import mlflow
    from mlflow.store.db.utils import _get_latest_schema_revision  # private, but else opening would migrate

    expected, there, before = _get_latest_schema_revision(), _revision(uri), None
    while there not in (None, expected, before):  # it changes while another process makes the tables
        time.sleep(_MIGRATION_S)
        there, before = _revision(uri), there
    if there not in (None, expected):
        raise ConfigError(
            f"{redact(uri)}: written by another MLflow (schema {there}; {mlflow.__version__} has {expected}); read it "
            "with that one, or back it up and run `mlflow db upgrade`"
        )
    return there


def _revision(uri: str) -> str | None:
    import sqlalchemy
    from alembic.runtime.migration import MigrationContext

    engine = sqlalchemy.create_engine(uri)
    try:
        with engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision()
    finally:
        engine.dispose()


def is_database(uri: str) -> bool:
    """Whether MLflow opens the store as a database, and not through a server."""
    import_mlflow()
    from mlflow.store.db.db_types import DATABASE_ENGINES

    return uri.partition(":")[0].partition("+")[0] in DATABASE_ENGINES


def database_file(uri: str) -> Path | None:
    """The file of a SQLite store, None for every other store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def one_line(error: BaseException, limit: int = 300) -> str:
    """The error as one line of at most `limit` characters, without secrets."""
    text = redact(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
