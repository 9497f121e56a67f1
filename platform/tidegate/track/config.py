"""Where a run is recorded."""

from __future__ import annotations

from pydantic import Field

from tidegate.config import Config

__all__ = ["TrackConfig"]


class TrackConfig(Config):
    """The tracking section of a job."""

    experiment: str = Field("tidegate", min_length=1, max_length=500)
    """Name of the MLflow experiment that groups the runs; created when it does not exist."""
    tracking_uri: str | None = Field(None, min_length=1)
    """An MLflow server or database. None: MLFLOW_TRACKING_URI, else a SQLite store in the state directory.
    A password in it belongs in the variable: jobs are recorded."""
    flush_every_s: float = Field(2.0, gt=0)
    """Seconds between two deliveries of step metrics."""
    page_every_s: float | None = Field(60.0, gt=0)
    """Seconds, at least, between two writings of the run page; evaluations ask for one, and the end. None: never."""
