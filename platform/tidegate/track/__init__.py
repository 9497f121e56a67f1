"""Recording runs in MLflow, and the only code that imports it.

The driver opens a run (`open_run`) and hands its `RunHandle` to rank 0, which logs step metrics through a
`MetricLogger`. A tracking server that fails during a run costs the run nothing: see `logger.py`.
"""

from tidegate.track.config import TrackConfig
from tidegate.track.delivery import replay_spool
from tidegate.track.logger import Delivery, MetricLogger
from tidegate.track.read import RunData, find_run, find_runs
from tidegate.track.store import (
    RunHandle,
    RunStatus,
    finish_run,
    log_dict,
    log_file,
    log_text,
    open_run,
    recorded_uri,
    resolve_tracking_uri,
    run_url,
    tag_run,
)
from tidegate.track.ui import check_tracking, serve_ui

__all__ = [
    "Delivery",
    "MetricLogger",
    "RunData",
    "RunHandle",
    "RunStatus",
    "TrackConfig",
    "check_tracking",
    "find_run",
    "find_runs",
    "finish_run",
    "log_dict",
    "log_file",
    "log_text",
    "open_run",
    "recorded_uri",
    "replay_spool",
    "resolve_tracking_uri",
    "run_url",
    "serve_ui",
    "tag_run",
]
