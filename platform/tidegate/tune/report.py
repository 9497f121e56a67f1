"""What a sweep says: a table with the Pareto front marked, verdicts over paired seeds, a picture, the best as a job."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from tidegate.config import ConfigError
from tidegate.launch.cost import spent_by
from tidegate.launch.paired import verdict
from tidegate.launch.state import StateDir
from tidegate.quantities import cost_shown
from tidegate.train.job import Job
from tidegate.train.limits import Spent
from tidegate.tune.budget import QUANTITIES, shown
from tidegate.tune.found import write_found
from tidegate.tune.front import pareto
from tidegate.tune.pictures import Panel, Point, draw_page, draw_picture
from tidegate.tune.population import recipe, schedule_of
from tidegate.tune.searchers import cost_axis, importances
from tidegate.tune.space import Space, overrides_of
from tidegate.tune.trials import Result, SweepFolder

__all__ = ["console_of_width", "cost_of", "field_of", "ranked_results", "report", "short"]

_PAGE_WIDTH = 140


def ranked_results(results: Sequence[Result], smaller_is_better: bool, seed: int) -> list[Result]:
    """Those that ended with this seed, the best first."""
    ended = [r for r in results if r.status == "finished" and r.value is not None and r.trial.seed == seed]
    return sorted(ended, key=lambda result: (result.value or 0.0) * (1 if smaller_is_better else -1))


def report(
    folder: SweepFolder, space: Space, console: Console, notes: Sequence[str] = (), found: Path | None = None
) -> None:
    """Print the table, the verdict and the front; write them, the picture and the best job beside the sweep.

    Args:
        notes: more lines to say.
        found: where else the best goes as a job.

    Raises:
        ConfigError: no trial has come to its end.
    """
    config, results = space.config, folder.results()
    smaller = config.mode == "min"
    ranked = ranked_results(results, smaller, space.base.train.seed)
    if not ranked:
        raise ConfigError(f"{folder.name}: no trial has come to its end")
    by_seed: dict[str, dict[int, float]] = {}
    for result in results:
        if result.status == "finished" and result.value is not None:
            by_seed.setdefault(recipe(result.trial, results), {})[result.trial.seed] = result.value
    ranked.sort(key=lambda r: statistics.fmean(by_seed[recipe(r.trial, results)].values()) * (1 if smaller else -1))
    keys = [recipe(result.trial, results) for result in ranked]
    most = max(len(by_seed[key]) for key in keys)
    # The best of those that ran with all seeds: one value of another may be luck.
    final = [result for key, result in zip(keys, ranked, strict=True) if len(by_seed[key]) == most]
    won = final[0]
    axes = _axes(space)
    panels = [_panel(axis, ranked, [by_seed[key] for key in keys], smaller) for axis in axes]
    fronts = {point.trial for panel in panels for point in panel.points if point.on_front}
    table = Table("", "trial", config.metric, "seeds", *(a.name for a in axes), "run", *map(field_of, config.space))
    for key, result in zip(keys, ranked, strict=True):
        table.add_row(
            "*" if result.trial.number in fronts else "",
            f"{result.trial.number} {result.trial.kind}",
            f"{statistics.fmean(by_seed[key].values()):.4f}",
            str(len(by_seed[key])),
            *(axis.in_words(axis.of(result)) for axis in axes),
            result.run,
            *(short(_varied(result, path, space.base)) for path in config.space),
        )
    console.print(table)
    lines = [
        *_conclusions(final, ranked, by_seed, results, smaller, config.has_baseline),
        *_population(won, results),
        *_importance(space, results),
        f"cost of all {len(results)} trials: {cost_shown(cost_of(folder).metrics(), space.base.resources.gpu)}",
        *notes,
    ]
    for line in lines:
        console.print(line, soft_wrap=True)
    best = folder.folder / "best.yaml"
    job_file = folder.read().job_file
    schedule = schedule_of(won.trial, results)
    begins_with = won.trial.last_values
    if schedule:
        begins_with = {**schedule[0].values, "train.pause_at_tokens": schedule[0].end}
    job = space.at(begins_with).job if begins_with else space.base
    values = by_seed[recipe(won.trial, results)].values()
    said = f"The best of sweep {folder.name}: trial {won.trial.number}, run {won.run}, {config.metric}="
    said += f"{statistics.fmean(values):.4f} over {len(values)} seeds"
    for file in (best, *([found] if found is not None else [])):
        write_found(file, Path(job_file), job, said)
    console.print(f"the best as a job: {found or best}", soft_wrap=True)
    drawn = [result.value for result in ranked if result.trial.kind == "random"]
    draw_picture(folder.folder / "front.png", panels, config.metric)
    page = folder.folder / "front.html"
    draw_page(page, panels, config.metric, drawn[0] if drawn and config.has_baseline else None)
    console.print(f"the front as a page: {page}", soft_wrap=True)
    text = Console(file=(folder.folder / "report.md").open("w", encoding="utf-8"), width=160)
    text.print(table)
    for line in lines:
        text.print(line, soft_wrap=True)
    text.file.close()


def cost_of(folder: SweepFolder) -> Spent:
    """Of all trials, those that failed too, as their runs have counted it."""
    state = StateDir(folder.folder.parents[1])
    runs, known = {result.run for result in folder.results()}, set(state.runs())
    return sum((spent_by(state.run(run).read().checkpoints) for run in sorted(runs & known)), Spent())


class _Axis(NamedTuple):
    """What the metric is weighed against."""

    name: str
    of: Callable[[Result], float]
    smaller_is_better: bool
    in_words: Callable[[float], str]


def _axes(space: Space) -> list[_Axis]:
    """The measured ones that the sweep names, or else what its first budget counts."""

    def job_of(result: Result) -> Job:
        return space.at(result.trial.values).job if result.trial.values else space.base

    goals = space.config.against
    if goals:
        return [
            _Axis(g.metric, lambda r, g=g: r.measured.get(g.metric, math.inf), g.mode == "min", "{:.4f}".format)  # type: ignore[misc]
            for g in goals
        ]
    name = cost_axis(space)
    return [_Axis(name, lambda result: QUANTITIES[name].of(job_of(result)), True, lambda value: shown(name, value))]


def _panel(axis: _Axis, ranked: Sequence[Result], by_seed: Sequence[Mapping[int, float]], smaller: bool) -> Panel:
    costs = [axis.of(result) for result in ranked]
    down, right = (1 if smaller else -1), (1 if axis.smaller_is_better else -1)
    front = pareto([(right * cost, down * (result.value or 0.0)) for cost, result in zip(costs, ranked, strict=True)])
    points = [
        Point(
            trial=result.trial.number,
            run=result.run,
            kind=result.trial.kind,
            cost=cost,
            mean=statistics.fmean(values.values()),
            spread=(max(values.values()) - min(values.values())) / 2,
            seeds=len(values),
            on_front=place in front,
            values=result.trial.last_values,
        )
        for place, (cost, result, values) in enumerate(zip(costs, ranked, by_seed, strict=True))
    ]
    return Panel(axis.name, points)


def _varied(result: Result, path: str, base: Job) -> Any:
    """What a trial has at a path; the job as it stands, what it says there."""
    if result.trial.kind != "base":
        return result.trial.last_values.get(path, "")
    value: Any = base.model_dump(mode="json")
    for name in path.split("."):
        value = value.get(name, "") if isinstance(value, Mapping) else ""
    return value


def _conclusions(
    final: Sequence[Result],
    ranked: Sequence[Result],
    by_seed: Mapping[str, Mapping[int, float]],
    results: Sequence[Result],
    smaller: bool,
    searched: bool,
) -> list[str]:
    best, lines = final[0], []
    others = [result for result in (*final, *ranked) if result is not best]
    rivals: list[tuple[str, Result]] = [("the runner-up", others[0])] if others else []
    rivals += [
        ("the job as it stands", result) for result in ranked if result.trial.kind == "base" and result is not best
    ]
    if searched:
        drawn = [result for result in ranked if result.trial.kind == "random"]
        lines.append(
            f"the best random trial: {drawn[0].trial.number}, {drawn[0].value:.4f}"
            + (", the best of all" if drawn[0] is best else "")
            if drawn
            else "no random trial has come to its end"
        )
        rivals += [("the best random trial", drawn[0])] if drawn and drawn[0] is not best else []
    for name, rival in rivals:
        found = verdict(*(by_seed[recipe(one.trial, results)] for one in (best, rival)), smaller_is_better=smaller)
        lines.append(found.in_words(f"trial {best.trial.number}", f"{name} (trial {rival.trial.number})"))
    failed = [result for result in results if result.status == "failed"]
    lines += [
        f"trial {r.trial.number} was stopped by {r.stopped_by} after {r.tokens} tokens, at {r.value:.4f}"
        for r in results
        if r.status == "stopped"
    ]
    lines += [f"trial {r.trial.number} has not ended" for r in results if not r.ended]
    lines += [f"trial {result.trial.number} failed: {result.error}" for result in failed]
    return lines


def _population(best: Result, results: Sequence[Result]) -> list[str]:
    """How often members took over weights, and the best one's schedule as commands."""
    taken = [phase for r in results if r.trial.kind == "member" for phase in r.trial.phases if phase.parent is not None]
    lines = [f"members went on from better ones' weights {len(taken)} times"] if taken else []
    schedule = schedule_of(best.trial, results)
    lines += [f"trial {best.trial.number} is a schedule: best.yaml begins it, then"] if schedule else []
    for phase in schedule[1:]:
        pause = "null" if phase is schedule[-1] else phase.end
        settings = [*overrides_of(phase.values), f"train.pause_at_tokens={pause}"]
        whose = "" if phase.parent is None else f" (the weights were trial {phase.parent}'s)"
        lines.append(
            f"at {phase.begin} tokens{whose}: tidegate train --resume RUN {' '.join(f'--set {s}' for s in settings)}"
        )
    return lines


def _importance(space: Space, results: Sequence[Result]) -> list[str]:
    found = importances(space, results)
    if not found:
        return []
    shares = ", ".join(f"{path} {share:.2f}" for path, share in found.items())
    return [f"importance for {space.config.metric} (fANOVA, of paths that all candidates have): {shares}"]


def console_of_width() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PAGE_WIDTH  # a pipe has no width; rich would fold the table at 80
    return console


def field_of(path: str) -> str:
    return ".".join(path.split(".")[-2:])


def short(value: Any) -> str:
    if isinstance(value, dict | list | tuple):
        return " ".join(short(part) for part in (value.values() if isinstance(value, dict) else value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
