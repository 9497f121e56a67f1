"""Runs beside each other: what differs between them, and which is better after as many tokens and after as many FLOPs.

Everything comes from the tracking store, so that runs of other machines can be compared. Runs that differ in nothing
but their seed are one setting, with a spread.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from itertools import product
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tidegate.config import ConfigError, load_stored
from tidegate.launch.paired import verdict
from tidegate.metric_path import parse_metric
from tidegate.model.flops import total
from tidegate.track import RunData
from tidegate.train.job import Job

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["METRICS", "Comparison", "Setting", "Traced"]

METRICS = (
    "val/loss",
    "val/bpb",
    "val/*/loss",
    "val/*/bpb",
    "val/*/ppl",
    "train/loss",
    "moe/*/maxvio",
    "moe/*/dead_experts",
    "moe/*/domain_information",
    "attention/*/first_token",
    "attention/sink_heads",
    "hidden/max_mean",
    "speed/tokens_per_s",
    "speed/mfu",
    "cost/hours",
    "cost/gpu_hours",
    "cost/money",
)
"""What is compared. For a layer, a `*` is every one, and the mean counts; else it is a row each."""
_NO_SETTINGS = ("name", "train.seed", "track.", "checkpoint.")
"""Parameters that make no other setting."""
_TOKENIZER, _EVALUATED = ("data.tokenizer.",), ("data.eval_sequences",)
_TEXT = ("data.domains.", "data.sequence_length", "data.documents", "data.seed")
_WEIGHT = ".weight"
"""Of a domain: says how often training draws it."""
_LOSSES = ("val/loss", "val/bpb", "train/loss")
"""The first that can be compared says which setting is better."""
_DRAWN = ("val/loss", "val/bpb", "train/loss", "moe/*/maxvio")
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
_SAME_STRETCH = 0.99
"""Of the bytes that runs with other tokenizers score: for the same text, but for the end of its last sequence."""
_LAST = 0.1
"""Of the tokens before a moment: what a metric of training is a mean over."""


class Traced:
    """A run with its history and its price a token.

    Attributes:
        label: its name.
        settings: parameters that make it another setting than others.
        seed: of its training, as recorded; empty if none was.
        flops_per_token: of training; None if its job cannot be read and it has no such tag.
    """

    def __init__(self, run: RunData) -> None:
        self.run, self.label = run, run.name
        self.settings = {path: value for path, value in run.params.items() if not path.startswith(_NO_SETTINGS)}
        self.seed = run.params.get("train.seed", "")
        self.flops_per_token = _flops_per_token(run)
        self._series: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @cached_property
    def history(self) -> pd.DataFrame:
        """(steps) x (tokens, metrics), without steps before the first record."""
        return self.run.history()

    def series(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and finite values of a metric, or of the mean of those that a pattern matches; empty without any."""
        if metric not in self._series:
            self._series[metric] = self._read(metric)
        return self._series[metric]

    def _read(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        columns = [name for name in self.history.columns if PurePosixPath(name).match(metric)]
        if not columns:
            return np.empty(0), np.empty(0)
        values = self.history[columns].mean(axis=1, skipna=False)
        known = np.isfinite(values) & self.history["tokens"].notna()
        return self.history["tokens"][known].to_numpy(float), values[known].to_numpy(float)

    def at(self, metric: str, tokens: float) -> float | None:
        """A metric after so many tokens: of evaluations and costs between the two around it, else a mean before it.

        None where the run has not come that far, or did not record it.
        """
        when, values = self.series(metric)
        if not len(when) or tokens > when[-1] * (1 + 1e-9):
            return None
        if metric.startswith(("val/", "cost/")):
            return float(np.interp(tokens, when, values)) if tokens >= when[0] else None
        end = int(np.searchsorted(when, tokens * (1 + 1e-9), side="right"))
        begin = min(int(np.searchsorted(when, (1 - _LAST) * tokens, side="right")), end - 1)  # at least the last
        return float(values[begin:end].mean()) if end else None

    @property
    def hours(self) -> float | None:
        """From its start to its end."""
        return None if self.run.end is None else (self.run.end - self.run.start).total_seconds() / 3600


class Setting(NamedTuple):
    """Runs that differ in nothing but their seeds."""

    label: str
    """A letter."""
    runs: tuple[Traced, ...]


class Comparison:
    """Runs beside each other.

    Args:
        runs: at least one.
        force: compare what tokenizers or held-out text make incomparable too.
        more: metrics beside `METRICS`, as patterns.

    Raises:
        ConfigError: there is no run, or one without a record, or a pattern is empty.
    """

    def __init__(self, runs: Sequence[RunData], *, force: bool = False, more: Sequence[str] = ()) -> None:
        if not runs:
            raise ConfigError("no run to compare")
        for pattern in more:
            if not PurePosixPath(pattern).parts:
                raise ConfigError(f"--metric {pattern!r}: no name or pattern of metrics")
        traced = [Traced(run) for run in runs]
        for one in traced:
            if "tokens" not in one.history.columns or one.history["tokens"].notna().sum() == 0:
                raise ConfigError(f"run {one.label} ({one.run.status}) has recorded nothing yet; leave it out")
        groups: dict[str, list[Traced]] = {}
        for one in traced:
            groups.setdefault(json.dumps(one.settings, sort_keys=True), []).append(one)
            if sum(other.label == one.label for other in traced) > 1:
                one.label += f" {one.run.id[:8]}"
        self.settings = [Setting(_letters(place), tuple(group)) for place, group in enumerate(groups.values())]
        self.warnings: list[str] = []
        self._other_tokens = self._differ("tokenizer", _TOKENIZER)
        # Evaluations of the same text differ in the tag too where tokens do.
        self._other_text = self._differ("" if self._other_tokens else "validation", (*_TEXT, *_EVALUATED))
        only_evaluated = self._differ("", _EVALUATED) and not self._differ("", _TEXT)
        other_mixture = self._differ("", ("data.domains.",), weights=True)
        self._other_training = (self._other_text and not only_evaluated) or other_mixture
        if self._other_tokens:
            self.warnings.append("tokenizers differ: loss and perplexity are of other tokens; bits per byte compare")
        other_stretches = self._other_tokens and not self._score_as_much()
        if other_stretches:
            self.warnings.append(
                "bits per byte are not known to be of the same stretch of the held-out text (their tags scored_bytes "
                "differ or are missing): no winner is named by them without --force"
            )
        self._deciding = [name for name in _LOSSES if force or not (name == "val/bpb" and other_stretches)]
        if self._other_text:
            self.warnings.append("held-out text differs: nothing of val/ is of the same text")
        if self._other_training:
            self.warnings.append("training text or its mixture differs: train/loss is of other text")
        self.warnings += [line for run in self.runs if (line := _diverged(run))]
        refused = [name for name in self._recorded() if self._is_refused(name)]
        if refused and not force:
            self.warnings.append(f"not compared without --force: {', '.join(refused)}")
        self.metrics = [name for name in self._recorded(more) if force or name not in refused]

    @property
    def runs(self) -> list[Traced]:
        return [run for setting in self.settings for run in setting.runs]

    def differences(self) -> dict[str, list[str | None]]:
        """Parameters that are not the same for all settings: the value in each, None where it has no such."""
        first = [setting.runs[0].settings for setting in self.settings]
        paths = sorted({path for settings in first for path in settings})
        values = {path: [settings.get(path) for settings in first] for path in paths}
        return {path: found for path, found in values.items() if len(set(found)) > 1}

    @cached_property
    def tokens(self) -> float:
        """As far as all runs have come."""
        return min(float(run.history["tokens"].max()) for run in self.runs)

    @cached_property
    def flops(self) -> float | None:
        """As far as all runs have come in FLOPs; None if those of a run are not known."""
        costs = [run.flops_per_token for run in self.runs]
        if None in costs:
            return None
        return min(float(run.history["tokens"].max()) * (run.flops_per_token or 0.0) for run in self.runs)

    def moment(self, metric: str, at: str) -> float | None:
        """Where a metric is read: as far as all have come that recorded it, in tokens or FLOPs; None without any."""
        ends = [(run, when[-1]) for run in self.runs if len(when := run.series(metric)[0])]
        return min((end * _price(run, at) for run, end in ends), default=None)

    def tokens_at(self, metric: str, run: Traced, at: str) -> float:
        """After how many of a run's tokens a metric is read, which all or some recorded."""
        moment = self.moment(metric, at)
        return math.inf if moment is None else moment / _price(run, at)

    def values(self, metric: str, setting: Setting, *, at: str) -> dict[str, float]:
        """By run, of a setting.

        Args:
            metric: a name or pattern.
            setting: whose.
            at: `tokens` or `FLOPs`.
        """
        found: dict[str, float] = {}
        for run in setting.runs:
            value = run.at(metric, self.tokens_at(metric, run, at))
            if value is not None:
                found[run.label] = value
        return found

    def conclusions(self) -> list[str]:
        """The best setting against each other one, over paired seeds; by bits per byte where losses cannot be used."""
        metric = next((name for name in self._deciding if name in self.metrics), None)
        if metric is None or len(self.settings) < 2:
            return []
        lines = []
        for at in ("tokens", *(["FLOPs"] if self.flops is not None else [])):
            means = {s.label: self._mean(metric, s, at) for s in self.settings}
            known = {label: mean for label, mean in means.items() if mean is not None}
            if len(known) < 2:
                continue
            best = next(s for s in self.settings if s.label == min(known, key=lambda label: known[label]))
            for other in self.settings:
                if other is not best and other.label in known:
                    lines.append(self._against(metric, best, other, at))
        return lines

    def figure(self) -> Any:
        """Of plotly, which shows itself in a notebook: metrics against tokens and against FLOPs, a line a run."""
        from plotly.subplots import make_subplots

        drawn = [name for name in _DRAWN if name in self.metrics]
        axes = ["tokens", *(["FLOPs"] if self.flops is not None else [])]
        titles = [f"{name} by {what}" for name in drawn for what in axes]
        figure = make_subplots(rows=max(1, len(drawn)), cols=len(axes), subplot_titles=titles)
        for place, setting in enumerate(self.settings):
            line = {"color": _COLOURS[place % len(_COLOURS)], "width": 1.2}
            for run, row, column in product(setting.runs, range(len(drawn)), range(len(axes))):
                tokens, values = run.series(drawn[row])
                figure.add_scatter(
                    x=(tokens * (1.0 if column == 0 else run.flops_per_token)).tolist(),
                    y=[value if math.isfinite(value) else None for value in values.tolist()],
                    mode="lines",
                    line=line,
                    name=f"{setting.label} {run.label}",
                    legendgroup=run.label,
                    showlegend=row == column == 0,
                    row=row + 1,
                    col=column + 1,
                )
        return figure.update_layout(template="plotly_white", height=330 * max(1, len(drawn)), margin={"t": 40})

    def _against(self, metric: str, best: Setting, other: Setting, at: str) -> str:
        ours, theirs = (self._by_seed(metric, setting, at) for setting in (best, other))
        if not ours.keys() & theirs.keys():
            return f"at equal {at}, {best.label} has the lower {metric} than {other.label}; no seed is common to both"
        return f"at equal {at}, {verdict(ours, theirs).in_words(best.label, other.label, metric)}"

    def _by_seed(self, metric: str, setting: Setting, at: str) -> dict[str, float]:
        """Runs of one seed count as their mean."""
        values, found = self.values(metric, setting, at=at), defaultdict(list)
        for run in setting.runs:
            if run.label in values:
                found[run.seed].append(values[run.label])
        return {seed: statistics.fmean(same) for seed, same in found.items()}

    def _mean(self, metric: str, setting: Setting, at: str) -> float | None:
        values = self._by_seed(metric, setting, at)
        return statistics.fmean(values.values()) if values else None

    def _recorded(self, more: Sequence[str] = ()) -> list[str]:
        """Of what some run recorded: the pattern itself for layers, heads or nodes, or else each that it matches."""
        columns = {name for run in self.runs for name in run.history.columns}
        names: list[str] = []
        for pattern in (*METRICS, *more):
            matching = sorted(name for name in columns if PurePosixPath(name).match(pattern))
            of_places = matching and all(parse_metric(name).place.keys() - {"domain"} for name in matching)
            names += [pattern] if of_places else matching
        return list(dict.fromkeys(names))

    def _is_refused(self, name: str) -> bool:
        if name == "train/loss":
            return self._other_tokens or self._other_training
        of_tokens = name.endswith(("/loss", "/ppl"))
        return name.startswith("val/") and (self._other_text or (self._other_tokens and of_tokens))

    def _score_as_much(self) -> bool:
        """Whether evaluation reads as many bytes in all runs, which then are of the same text."""
        tags = [run.run.tags.get("scored_bytes", "") for run in self.runs]
        sizes = [int(tag) if tag.isdecimal() else 0 for tag in tags]
        return min(sizes) > _SAME_STRETCH * max(sizes)

    def _differ(self, tag: str, prefixes: tuple[str, ...], *, weights: bool = False) -> bool:
        """By a fingerprint that runs are tagged with, or by parameters where one has none; weights, or all but them."""
        prints = [run.run.tags.get(tag) for run in self.runs]
        if None not in prints:
            return len(set(prints)) > 1
        parts = [
            {p: v for p, v in run.settings.items() if p.startswith(prefixes) and p.endswith(_WEIGHT) == weights}
            for run in self.runs
        ]
        return any(part != parts[0] for part in parts)


def _letters(place: int) -> str:
    return (_letters(place // 26 - 1) if place >= 26 else "") + chr(ord("A") + place % 26)


def _price(run: Traced, at: str) -> float:
    """Of a token, in tokens or FLOPs."""
    return 1.0 if at == "tokens" else run.flops_per_token or math.nan


def _diverged(run: Traced) -> str | None:
    """Says from where a run's losses are not finite."""
    steps = {metric: step for metric in _LOSSES if (step := run.run.not_finite_from(metric)) is not None}
    if not steps:
        return None
    metric = min(steps, key=lambda name: steps[name])
    return f"{run.label} is not finite from step {steps[metric]} ({metric}): all are read before it"


def _flops_per_token(run: RunData) -> float | None:
    """By its job as this version counts, else by its tag."""
    try:
        job: Job = load_stored(json.dumps(run.job()), Job, f"run {run.name}")
    except ConfigError:  # of another version, or its artifacts are out of reach
        tag = run.tags.get("flops_per_token", "")
        return float(tag) if tag.isdecimal() else None
    return total(job.model, job.data.sequence_length).flops_per_token
