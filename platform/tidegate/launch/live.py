"""A run as Ray metrics, which Prometheus scrapes beside Ray's own; dashboards/README.md says what is exported.

`moe/3/maxvio` becomes `tidegate_moe_maxvio{run, sweep, layer="3"}`, which Ray exports with `ray_` before it. Metrics
with two places in their names (layer and expert, block and head, layer and domain) are left out: a large model has
thousands of them, and MLflow keeps them.

Ray drops a gauge that nobody has set for some 20 s. So values are set again until the run ends, and are gone soon
after.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from types import TracebackType

from ray.util.metrics import Gauge

from tidegate.metric_path import parse_metric
from tidegate.train.telemetry import Record

__all__ = ["OF_THE_RUN", "LiveMetrics", "gauge_of"]

REFRESH_S = 1.0
"""Ray reports as often at most, by default every 10 s."""
_PLACES = ("layer", "block", "domain", "node")
"""Labels of every gauge; Prometheus takes an empty one for none."""

OF_THE_RUN: Mapping[str, str] = {
    "tidegate_step": "optimizer steps so far",
    "tidegate_tokens": "tokens so far",
    "tidegate_tokens_wanted": "tokens of the whole run",
    "tidegate_workers_wanted": "resources.workers",
    "tidegate_checkpoint_every": "checkpoint.every, in optimizer steps",
    "tidegate_workers_present": "workers that train; 0 until they start, and between a failure and the next start",
    "tidegate_recorded_at_s": "when the last record came, in seconds since 1970",
}
"""What is exported beside the metrics of records."""


def gauge_of(pattern: str) -> str | None:
    """Name of the gauge for a name or pattern of docs/metrics.md; None if it is left out.

    >>> gauge_of("moe/<layer>/maxvio"), gauge_of("moe/<layer>/load/<expert>")
    ('tidegate_moe_maxvio', None)
    """
    parts = pattern.split("/")
    words = [part for part in parts if not part.startswith("<")]
    return "tidegate_" + "_".join(words) if len(parts) - len(words) <= 1 else None


class LiveMetrics:
    """The latest values of one run, exported by this process of a Ray from entering to leaving.

    Args:
        run: its name.
        sweep: name of the sweep that it is a trial of, or nothing.
        tokens: of the whole run.
        workers: that it asks for.
        checkpoint_every: optimizer steps.
    """

    def __init__(self, run: str, sweep: str, *, tokens: int, workers: int, checkpoint_every: int) -> None:
        self._labels = {"run": run, "sweep": sweep}
        self._gauges: dict[str, Gauge] = {}
        self._series: dict[str, tuple[Gauge, dict[str, str]] | None] = {}  # by name of metric
        self._values: dict[str, float] = {}
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="tidegate-live", daemon=True)
        for name, description in OF_THE_RUN.items():
            self._series[name] = self._gauge(name, description), self._labels | dict.fromkeys(_PLACES, "")
        wanted = {"tidegate_tokens_wanted": tokens, "tidegate_workers_wanted": workers}
        self._set(wanted | {"tidegate_checkpoint_every": checkpoint_every, "tidegate_workers_present": 0})

    def take(self, record: Record) -> None:
        """Export a record's metrics."""
        step, tokens = float(record.step), float(record.tokens)
        self._set(
            record.metrics | {"tidegate_step": step, "tidegate_tokens": tokens, "tidegate_recorded_at_s": time.time()}
        )

    def set_workers(self, number: int) -> None:
        """So many train now."""
        self._set({"tidegate_workers_present": number})

    def __enter__(self) -> LiveMetrics:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _set(self, values: Mapping[str, float]) -> None:
        with self._lock:
            for name in values:
                if name not in self._series:
                    self._series[name] = self._new_series(name)
            self._values.update((name, value) for name, value in values.items() if self._series[name] is not None)
            self._export()

    def _keep(self) -> None:
        while not self._done.wait(REFRESH_S):
            with self._lock:
                self._export()

    def _export(self) -> None:
        for name, value in self._values.items():
            series = self._series[name]
            assert series is not None
            gauge, labels = series
            gauge.set(value, labels)

    def _new_series(self, name: str) -> tuple[Gauge, dict[str, str]] | None:
        pattern, place = parse_metric(name)
        gauge = gauge_of(pattern)
        if gauge is None:
            return None
        return self._gauge(gauge, pattern), self._labels | dict.fromkeys(_PLACES, "") | place

    def _gauge(self, name: str, description: str) -> Gauge:
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, description, tag_keys=(*self._labels, *_PLACES))
        return self._gauges[name]
