"""Draw a Grafana dashboard without Grafana: its panels, in its grid, from the Prometheus that it would ask.

    python docs/draw_dashboard.py DASHBOARD.json RUN OUT.png [http://127.0.0.1:9090]

The expressions are those of the file, from the run's first to its last sample of the last hour; the drawing is ours.
"""

from __future__ import annotations

import json
import re
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

STEP_S = 5
COLUMNS = 24
"""Of Grafana's grid."""
SCALES = {
    "percentunit": (100, " %"),
    "percent": (1, " %"),
    "s": (1, " s"),
    "ms": (1, " ms"),
    "watt": (1, " W"),
    "Bps": (1e-6, " MB/s"),
    "bytes": (2**-30, " GiB"),
    "short": (1, ""),
}
"""Factor and sign of Grafana's units."""


class Series(NamedTuple):
    """What one expression gave for one set of labels."""

    name: str
    minutes: list[float]
    values: list[float]


class Source(NamedTuple):
    """A Prometheus, the run that is looked at, and from when to when, in Unix seconds."""

    url: str
    run: str
    start: float
    end: float

    def ask(self, expression: str, legend: str) -> list[Series]:
        query = {"query": expression.replace("$run", self.run), "start": self.start, "end": self.end, "step": STEP_S}
        with urllib.request.urlopen(f"{self.url}/api/v1/query_range?{urllib.parse.urlencode(query)}") as response:
            found = json.load(response)["data"]["result"]
        return [self._series(result, legend) for result in found]

    def _series(self, result: dict[str, Any], legend: str) -> Series:
        name = re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda label: result["metric"].get(label[1], ""), legend)
        times, values = zip(*result["values"], strict=True)
        return Series(name, [(moment - self.start) / 60 for moment in times], [float(value) for value in values])


def draw(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    factor, sign = SCALES[panel["fieldConfig"]["defaults"]["unit"]]
    series = [found for target in panel["targets"] for found in source.ask(target["expr"], target["legendFormat"])]
    axes.set_title(panel["title"] + ("" if series else ": no data"), fontsize=9, loc="left")
    if panel["type"] == "timeseries":
        for name, minutes, values in series:
            axes.plot(minutes, [factor * value for value in values], label=name, linewidth=1.2)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=7)
        axes.set_ylabel(sign.strip(), fontsize=7)
        if series:
            axes.legend(fontsize=6, frameon=False)
    else:  # one number
        axes.axis("off")
        if series:
            last = factor * series[-1].values[-1]
            axes.text(0.5, 0.5, f"{last:,.{0 if last == int(last) else 1}f}{sign}", ha="center", fontsize=16)


def main(dashboard: Path, run: str, out: Path, url: str) -> None:
    now = time.time()
    hour = Source(url, run, now - 3600, now)
    steps = hour.ask('max(ray_tidegate_step{run="$run"})', "")
    if not steps:
        raise SystemExit(f"{url} has no run {run!r} in the last hour")
    source = Source(url, run, *(hour.start + 60 * steps[0].minutes[index] for index in (0, -1)))
    panels = json.loads(dashboard.read_text())["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    width, height = 13, 0.27 * rows  # inches
    figure = plt.figure(figsize=(width, height))
    for panel in panels:
        place = panel["gridPos"]
        left, bottom = place["x"] / COLUMNS, 1 - (place["y"] + place["h"]) / rows
        if panel["type"] == "row":
            figure.text(left + 0.1 / width, bottom, panel["title"], fontsize=11, fontweight="bold")
            continue
        size = place["w"] / COLUMNS - 0.7 / width, place["h"] / rows - 0.6 / height
        draw(figure.add_axes((left + 0.55 / width, bottom + 0.25 / height, *size)), panel, source)
    figure.savefig(out, dpi=90, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), *(sys.argv[4:] or ["http://127.0.0.1:9090"]))
