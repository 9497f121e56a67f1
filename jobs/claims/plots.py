"""A claim's pictures: its columns seed by seed, and which experts which text goes to.

`run.py` draws both; `python jobs/claims/plots.py NAME ...` the first alone, again, from results.json.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tidegate.launch.notebook import StoredRun
from tidegate.track.page import LOADS_FILE, read_loads

_SEED_MARKS = "osD^v"


def draw_columns(folder: Path) -> None:
    """results.png: a panel a column, a row an arm, a mark a seed, a bar at their mean."""
    results: Mapping[str, Mapping[str, Mapping[str, Any]]]
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))["results"]
    first = next(iter(next(iter(results.values())).values()))
    figure, panels = plt.subplots(
        1,
        len(first),
        figsize=(2 + 2.4 * len(first), 0.8 + 0.35 * len(results)),
        sharey=True,
        squeeze=False,
        constrained_layout=True,
    )
    for heading, panel in zip(first, panels[0], strict=True):
        for place, seeds in enumerate(results.values()):
            rows = enumerate(row[heading] for row in seeds.values())
            values = [(number, value) for number, value in rows if value is not None and not math.isnan(value)]
            for number, value in values:
                panel.plot(value, place, _SEED_MARKS[number % len(_SEED_MARKS)], color="black", alpha=0.55, ms=5)
            if values:
                panel.plot(sum(value for _, value in values) / len(values), place, "|", color="tab:red", ms=16, mew=2)
        panel.set_title(heading, fontsize=9)
        panel.set_yticks(range(len(results)), results)
        panel.tick_params(labelsize=8)
        panel.locator_params(axis="x", nbins=4)
        panel.grid(axis="x", alpha=0.3)
        panel.margins(x=0.15, y=0.15)
    panels[0][0].invert_yaxis()
    figure.savefig(folder / "results.png", dpi=110)
    plt.close(figure)


def draw_experts(folder: Path, runs: Mapping[str, StoredRun]) -> None:
    """experts.png: a row an arm, a panel a layer, of the last evaluation; nothing where no run has experts.

    A panel's rows are kinds of text, its columns experts; 1 is an even share of a text's tokens.
    """
    found = {arm: read_loads(run.artifact(LOADS_FILE) or b"") for arm, run in runs.items()}
    loads = {arm: load for arm, load in found.items() if load is not None}
    if not loads:
        return
    layers = max(load.load_SDLE.shape[2] for load in loads.values())
    size = 1 + 2.6 * layers, 0.6 + 1.1 * len(loads)
    figure, panels = plt.subplots(len(loads), layers, figsize=size, squeeze=False, constrained_layout=True)
    for (arm, load), row in zip(loads.items(), panels, strict=True):
        share_DLE = load.load_SDLE[-1]
        for layer, panel in enumerate(row):
            if layer < share_DLE.shape[1]:
                even = share_DLE[:, layer] * share_DLE.shape[2]
                image = panel.imshow(even, cmap="viridis", vmin=0, vmax=4, aspect="auto", interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks(range(len(load.domains)) if layer == 0 else [], load.domains if layer == 0 else [])
            panel.tick_params(labelsize=7)
            panel.set_title(f"{arm}, layer {layer}", fontsize=8)
    figure.colorbar(image, ax=panels, label="times an even share", shrink=0.8)
    figure.savefig(folder / "experts.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        draw_columns(Path(__file__).parent / name)
