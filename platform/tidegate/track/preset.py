"""Our view of an experiment in MLflow's UI: the columns by which runs are compared, and tokens across its charts.

MLflow keeps a view as a tag of the experiment, the JSON that its button *Share* writes, and opens it where the address
has the tag's key. There is no other way to choose columns for a reader. tests/tidegate/track/test_browser.py opens it.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from tidegate.track.client import connect

__all__ = ["ExperimentPage", "experiment_pages", "view_tags"]

_KEY = "tidegate"
_METRICS = (
    "val/loss",
    "val/bpb",
    "tokens",
    "moe/maxvio_mean",
    "moe/dead_experts_mean",
    "attention/sink_heads",
    "speed/tokens_per_s",
    "cost/gpu_hours",
    "cost/money",
)
_TAGS = ("gate", "granularity", "router", "active_params", "flops_per_token", "gpu")


class ExperimentPage(NamedTuple):
    """Where a server shows an experiment in our view."""

    name: str
    path: str
    """From the server's root, with its slash."""


def view_tags() -> dict[str, str]:
    """The tags of an experiment that has our view."""
    names = {f"metrics.`{name}`": name for name in _METRICS} | {f"tags.`{name}`": name for name in _TAGS}
    view = {
        "selectedColumns": [*names],
        "columnOrder": ["duration", *names],
        # Pixels in which the name and four digits can be read.
        "columnWidths": {column: 40 + 7 * max(len(name), 9) for column, name in {"duration": "", **names}.items()},
        "globalLineChartConfig": {"xAxisKey": "metric", "selectedXAxisMetricKey": "tokens", "lineSmoothness": 0},
    }
    return {f"mlflow.sharedViewState.{_KEY}": json.dumps(view)}


def experiment_pages(uri: str) -> list[ExperimentPage]:
    """Give our view to every experiment with a run, and say where it is shown."""
    client, pages = connect(uri), []
    for experiment in client.search_experiments():
        if not client.search_runs([experiment.experiment_id], max_results=1):
            continue
        for key, value in view_tags().items():
            if experiment.tags.get(key) != value:
                client.set_experiment_tag(experiment.experiment_id, key, value)
        path = f"/#/experiments/{experiment.experiment_id}/runs?viewStateShareKey={_KEY}&workflowType=machine_learning"
        pages.append(ExperimentPage(experiment.name, path))
    return pages
