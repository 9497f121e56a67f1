"""`tidegate compare`: a table on the terminal, a page to look around in, a CSV."""

from __future__ import annotations

import csv
import html
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.table import Table

from tidegate.config import ConfigError
from tidegate.launch.comparison import Comparison, Setting
from tidegate.launch.run_page import find_recorded
from tidegate.launch.state import StateDir
from tidegate.track import RunData, TrackConfig, find_runs, resolve_tracking_uri

__all__ = ["compare", "wanted_runs"]

_PAGE_WIDTH = 160

_log = logging.getLogger(__name__)


def wanted_runs(
    names: Sequence[str], state: StateDir, store: str | None, experiment: str | None, filter: str
) -> list[RunData]:
    """Those that are named, then those of an experiment or that a filter finds and that have records.

    Args:
        names: names or MLflow ids.
        state: whose store is read if `store` is None.
        store: URI of another one.
        experiment, filter: as for `find_runs`; with neither, only `names` count.

    Raises:
        ConfigError: there is no such run, or the store cannot be read.
    """
    found = [find_recorded(name, state, store) for name in names]
    if filter or (experiment is not None and not names):
        known = {run.id for run in found}
        uri = resolve_tracking_uri(TrackConfig(tracking_uri=store), state.root)
        searched = [run for run in find_runs(uri, experiment=experiment, filter=filter) if run.id not in known]
        found += [run for run in searched if "tokens" in run.metrics]
        empty = [f"{run.name} ({run.status})" for run in searched if "tokens" not in run.metrics]
        if empty:  # a sweep has no records itself, nor has a run that failed before its first
            _log.warning("left out, as they have recorded nothing: %s", ", ".join(empty))
    return found


def compare(runs: Sequence[RunData], *, force: bool, more: Sequence[str], out: Path) -> None:
    """Print what differs between runs and which is better; write `compare.html` and `compare.csv`.

    Args:
        runs: as `wanted_runs` gives them.
        force, more: as for `Comparison`.
        out: folder of the two files.

    Raises:
        ConfigError: there is no run, one has recorded nothing, or `out` cannot be written.
    """
    comparison = Comparison(runs, force=force, more=more)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PAGE_WIDTH
    for warning in comparison.warnings:
        console.print(f"warning: {warning}", soft_wrap=True)
    for table in (_runs(comparison), _differences(comparison), *_metrics(comparison)):
        console.print(table)
    for line in comparison.conclusions():
        console.print(line, soft_wrap=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "compare.html").write_text(_page(comparison), encoding="utf-8")
        with (out / "compare.csv").open("w", newline="", encoding="utf-8") as file:
            _write_csv(comparison, file)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}") from error
    console.print(f"written: {out / 'compare.html'}, {out / 'compare.csv'}", soft_wrap=True)


def _runs(comparison: Comparison) -> Table:
    table = Table("", "run", "seed", "status", "tokens", "FLOPs", "hours", "started", "commit", title="runs")
    for setting in comparison.settings:
        for run in setting.runs:
            tokens = float(run.history["tokens"].max())
            table.add_row(
                setting.label,
                run.label,
                run.seed,
                run.run.status,
                f"{tokens:,.0f}",
                "" if run.flops_per_token is None else f"{tokens * run.flops_per_token:.3g}",
                "" if run.hours is None else f"{run.hours:.2f}",
                f"{run.run.start:%Y-%m-%d %H:%M}",
                run.run.tags.get("tidegate.commit", "")[:9],
            )
    return table


def _differences(comparison: Comparison) -> Table:
    table = Table("setting", *(setting.label for setting in comparison.settings), title="what differs")
    for path, values in comparison.differences().items():
        table.add_row(path, *("-" if value is None else value for value in values))
    return table


def _metrics(comparison: Comparison) -> list[Table]:
    moments = [("tokens", f"{comparison.tokens:,.0f} tokens")]
    if comparison.flops is not None:
        moments.append(("FLOPs", f"{comparison.flops:.3g} FLOPs"))
    tables = []
    for at, moment in moments:
        table = Table(
            "metric", at, *(s.label for s in comparison.settings), title=f"after {moment}, or as far as all have it"
        )
        for metric in comparison.metrics:
            read_at = comparison.moment(metric, at)
            shown = "-" if read_at is None else f"{read_at:,.0f}" if at == "tokens" else f"{read_at:.3g}"
            table.add_row(metric, shown, *(_cell(comparison, metric, setting, at) for setting in comparison.settings))
        tables.append(table)
    return tables


def _cell(comparison: Comparison, metric: str, setting: Setting, at: str) -> str:
    values = list(comparison.values(metric, setting, at=at).values())
    if not values:
        return "-"
    spread = f" +- {statistics.stdev(values):.2g} ({len(values)})" if len(values) > 1 else ""
    mean = statistics.fmean(values)
    return (f"{mean:,.0f}" if abs(mean) >= 1000 else f"{mean:.4g}") + spread


def _write_csv(comparison: Comparison, file: TextIO) -> None:
    writer = csv.writer(file)
    writer.writerow(["setting", "run", "seed", "metric", "at", "tokens", "value"])
    for metric in comparison.metrics:
        for setting in comparison.settings:
            for at in ("tokens", *(["FLOPs"] if comparison.flops is not None else [])):
                values = comparison.values(metric, setting, at=at)
                for run in setting.runs:
                    if run.label in values:
                        tokens = round(comparison.tokens_at(metric, run, at))
                        value = repr(values[run.label])
                        writer.writerow([setting.label, run.label, run.seed, metric, at, tokens, value])


def _page(comparison: Comparison) -> str:
    """One file that needs no network."""
    parts = [f"<p class=warning>{html.escape(text)}</p>" for text in comparison.warnings]
    parts += [f"<p>{html.escape(text)}</p>" for text in comparison.conclusions()]
    parts += [_as_html(table) for table in (_runs(comparison), _differences(comparison), *_metrics(comparison))]
    figure = comparison.figure().to_html(full_html=False, include_plotlyjs=True, div_id="lines")
    return _PAGE.format(body="\n".join([*parts, figure]))


def _as_html(table: Table) -> str:
    columns = [[html.escape(str(cell)) for cell in column.cells] for column in table.columns]
    heads = "".join(f"<th>{html.escape(str(column.header))}</th>" for column in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in zip(*columns, strict=True))
    return f"<h2>{html.escape(str(table.title))}</h2><table><tr>{heads}</tr>{rows}</table>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Runs compared</title>
<style>
body {{ font: 14px sans-serif; margin: 1.5em; max-width: 1200px }}
table {{ border-collapse: collapse; margin-bottom: 1em }}
th, td {{ border: 1px solid #ddd; padding: 3px 8px; text-align: left; font-variant-numeric: tabular-nums }}
h2 {{ font-size: 16px }}
.warning {{ background: #fff3cd; padding: 6px }}
</style></head><body>
<h1>Runs compared</h1>
{body}
</body></html>
"""
