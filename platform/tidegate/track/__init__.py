"""Recording runs in MLflow, and the only code that imports it.

The driver opens a run (`open_run`) and hands its `RunHandle` to rank 0, which logs step metrics through a
`MetricLogger`. A tracking server that fails during a run costs the run nothing: see `logger.py`.
"""

from tidegate.track.config import TrackConfig
from tidegate.track.delivery import replay_spool
from tidegate.track.lineage import (
    DatasetUse,
    ModelEntry,
    check_model_name,
    log_datasets,
    log_model,
    logged_model,
    register_model,
)
from tidegate.track.logger import Delivery, MetricLogger
from tidegate.track.read import RunData, find_run, find_runs
from tidegate.track.store import (
    RunHandle,
    RunStatus,
    finish_run,
    log_dict,
    log_file,
    log_metrics,
    log_text,
    open_run,
    recorded_uri,
    resolve_tracking_uri,
    run_url,
    tag_run,
)
from tidegate.track.ui import check_tracking, serve_ui, stop_server

__all__ = [
    "DatasetUse",
    "Delivery",
    "MetricLogger",
    "ModelEntry",
    "RunData",
    "RunHandle",
    "RunStatus",
    "TrackConfig",
    "check_model_name",
    "check_tracking",
    "find_run",
    "find_runs",
    "finish_run",
    "log_datasets",
    "log_dict",
    "log_file",
    "log_metrics",
    "log_model",
    "log_text",
    "logged_model",
    "open_run",
    "recorded_uri",
    "register_model",
    "replay_spool",
    "resolve_tracking_uri",
    "run_url",
    "serve_ui",
    "stop_server",
    "tag_run",
]
