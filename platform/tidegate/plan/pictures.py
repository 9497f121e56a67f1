"""How a job scales from one GPU to thousands, as a picture or a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tidegate.config import ConfigError, JobFile
from tidegate.plan.search import MOST_GPUS, Plan, make_plan

__all__ = ["Point", "draw_scaling", "scale"]

_SERIES = {"same tokens a step": "#1f77b4", "same tokens a step and GPU": "#d62728"}


class Point(NamedTuple):
    series: str
    gpus: int
    tokens_per_s: float
    mfu: float
    layout: str


def scale(job: Path, overrides: Sequence[str], plan: Plan) -> Iterator[Point]:
    """The fastest layout at every power of two, of which those are left out where nothing fits.

    Args:
        job: the file.
        overrides: of `--set`.
        plan: of it; tokens a step and GPU are this one's.
    """
    held = [override.partition("=")[0] for override in overrides]
    each = plan.best.job.train.batch_tokens // plan.hardware.num_gpus
    length = plan.best.job.data.sequence_length
    for exponent in range(MOST_GPUS.bit_length()):
        count = 2**exponent
        sizes = {"same tokens a step": plan.best.job.train.batch_tokens, "same tokens a step and GPU": each * count}
        for series, batch_tokens in sizes.items():
            if batch_tokens % (count * length):
                continue
            file = JobFile(job, [*overrides, f"train.batch_tokens={batch_tokens}"])
            try:
                found = make_plan(file, plan.hardware._replace(num_gpus=count), held=held, num=1)
            except ConfigError:
                continue
            yield Point(series, count, found.best.tokens_per_s, found.mfu, found.best.job.layout)


def draw_scaling(path: Path, job: Path, overrides: Sequence[str], plan: Plan) -> None:
    """tokens/s and MFU against GPUs, to a `.png` or an `.html` that needs no network."""
    points = list(scale(job, overrides, plan))
    title = f"{plan.base.name} on {plan.hardware.name}, predicted"
    draw = _draw_picture if path.suffix == ".png" else _draw_page
    draw(path, points, title)


def _draw_picture(path: Path, points: Sequence[Point], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (speed, share) = plt.subplots(1, 2, figsize=(12, 4.5))
    for series, colour in _SERIES.items():
        shown = [point for point in points if point.series == series]
        gpus = [point.gpus for point in shown]
        speed.plot(gpus, [point.tokens_per_s for point in shown], "o-", color=colour, label=series)
        share.plot(gpus, [100 * point.mfu for point in shown], "o-", color=colour, label=series)
    speed.set(xlabel="GPUs", ylabel="tokens/s", yscale="log")
    share.set(xlabel="GPUs", ylabel="MFU, %", ylim=(0, None))
    for axes in (speed, share):
        axes.set_xscale("log", base=2)
    speed.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_page(path: Path, points: Sequence[Point], title: str) -> None:
    from plotly.subplots import make_subplots

    figure = make_subplots(cols=2)
    for series, colour in _SERIES.items():
        shown = [point for point in points if point.series == series]
        for column, values in enumerate(([p.tokens_per_s for p in shown], [100 * p.mfu for p in shown]), 1):
            figure.add_scatter(
                x=[point.gpus for point in shown],
                y=values,
                mode="lines+markers",
                line={"color": colour},
                name=series,
                showlegend=column == 1,
                text=[f"{p.layout}<br>{p.tokens_per_s:,.0f} tokens/s, MFU {p.mfu:.1%}" for p in shown],
                hovertemplate="%{x} GPUs<br>%{text}<extra></extra>",
                row=1,
                col=column,
            )
    axis: dict[str, Any] = {"type": "log", "title_text": "GPUs", "dtick": "0.30103"}
    figure.update_xaxes(**axis)
    figure.update_yaxes(title_text="tokens/s", type="log", col=1)
    figure.update_yaxes(title_text="MFU, %", rangemode="tozero", col=2)
    figure.update_layout(template="plotly_white", title=title)
    figure.write_html(path, include_plotlyjs=True, div_id="scaling")
