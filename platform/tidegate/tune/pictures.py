"""The front as a picture, and as a page to look around in."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Panel", "Point", "draw_page", "draw_picture", "draw_pruning"]

_MARKERS = {
    "base": ("s", "square"),
    "random": ("D", "diamond"),
    "searched": ("o", "circle"),
    "member": ("o", "circle"),
}
"""Of matplotlib and of plotly."""
_NAMES = {"base": "the job as it stands", "random": "random", "searched": "searched", "member": "of the population"}
_FRONT, _DOMINATED = "#1f77b4", "#c0c0c0"


class Point(NamedTuple):
    """A candidate, over its seeds."""

    trial: int
    run: str
    kind: str
    cost: float
    mean: float
    """Of the metric."""
    spread: float
    """Half of what its seeds range over."""
    seeds: int
    on_front: bool
    values: Mapping[str, Any]


class Panel(NamedTuple):
    """What the metric is weighed against."""

    axis: str
    points: Sequence[Point]


def draw_picture(path: Path, panels: Sequence[Panel], metric: str) -> None:
    """A PNG: the fronts blue, what is dominated grey."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, row = plt.subplots(1, len(panels), figsize=(7 * len(panels), 4.5), sharey=True, squeeze=False)
    for panel, axes in zip(panels, row[0], strict=True):
        for point in panel.points:
            colour = _FRONT if point.on_front else _DOMINATED
            marker = _MARKERS[point.kind][0]
            axes.errorbar(point.cost, point.mean, yerr=point.spread or None, color=colour, marker=marker, capsize=3)
        axes.set(xlabel=panel.axis, ylabel=metric)
    figure.suptitle(f"on the front: blue; {'; '.join(f'{_NAMES[k]}: {m[1]}' for k, m in _MARKERS.items())}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_pruning(path: Path, tickets: Mapping[float, float], control: tuple[float, float] | None, metric: str) -> None:
    """A PNG: metric against density, logarithmic.

    Args:
        tickets: metric by share of the weights that are kept, the dense run's at 1.
        control: the same of the last mask with other initial weights.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    axes.plot(list(tickets), list(tickets.values()), "o-", color=_FRONT, label="rewound")
    if control is not None:
        axes.plot(*control, "s", color=_DOMINATED, markeredgecolor="black", label="other initial weights")
    axes.axhline(tickets[1.0], color="black", linewidth=0.5, linestyle="--", label="dense")
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set(xlabel="share of the prunable weights that is kept", ylabel=metric)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_page(path: Path, panels: Sequence[Panel], metric: str, baseline: float | None) -> None:
    """An HTML page that needs no network: the same, with the values of what the pointer is on.

    Args:
        baseline: metric of the best random trial, drawn as a line; None: none is drawn.
    """
    from plotly.subplots import make_subplots

    figure = make_subplots(cols=len(panels), shared_yaxes=True)
    for column, panel in enumerate(panels, 1):
        where = {"row": 1, "col": column}
        for on_front in (False, True):  # the front above
            for kind, name in _NAMES.items():
                shown = [point for point in panel.points if point.kind == kind and point.on_front == on_front]
                if not shown:
                    continue
                figure.add_scatter(
                    x=[point.cost for point in shown],
                    y=[point.mean for point in shown],
                    error_y={"type": "data", "array": [point.spread for point in shown], "thickness": 1},
                    mode="markers",
                    marker={"color": _FRONT if on_front else _DOMINATED, "symbol": _MARKERS[kind][1], "size": 10},
                    name=f"{name}, {'on the front' if on_front else 'dominated'}",
                    showlegend=column == 1,
                    text=[_hover(point, panel.axis, metric) for point in shown],
                    hovertemplate="%{text}<extra></extra>",
                    **where,
                )
        front = sorted((point.cost, point.mean) for point in panel.points if point.on_front)
        figure.add_scatter(
            x=[cost for cost, _ in front],
            y=[mean for _, mean in front],
            mode="lines",
            line={"color": _FRONT, "shape": "hv", "width": 1},
            name="front",
            showlegend=column == 1,
            hoverinfo="skip",
            **where,
        )
        figure.update_xaxes(title_text=panel.axis, **where)
    if baseline is not None:
        figure.add_hline(y=baseline, line_dash="dash", line_color="grey", annotation_text="best random trial")
    figure.update_yaxes(title_text=metric, col=1)
    figure.update_layout(template="plotly_white")
    figure.write_html(path, include_plotlyjs=True, div_id="front")


def _hover(point: Point, axis: str, metric: str) -> str:
    lines = {
        f"trial {point.trial}": point.run,
        metric: f"{point.mean:.4f} +- {point.spread:.4f}, {point.seeds} seeds",
        axis: f"{point.cost:.4g}",
        **point.values,
    }
    return "<br>".join(html.escape(f"{name}: {value}", quote=False) for name, value in lines.items())
