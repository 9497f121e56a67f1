"""The `search:` section of a job: what a sweep varies, under which budgets, and how it looks for the best.

It belongs to the job file so that a sweep is one file; `tidegate train` does not look at it.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from tidegate.config import Config

__all__ = ["Goal", "PresetName", "SearchConfig", "SolveConfig", "Variation"]

PresetName = Literal[
    "gates", "routers", "experts", "granularity", "temperature", "balance", "unit_gates", "learning_rate"
]


class Variation(Config):
    """The values of one path of the job: one of the four."""

    choice: tuple[Any, ...] | None = Field(default=None, min_length=1)
    integer: tuple[int, int] | None = None
    """Both ends included, in steps of `step`."""
    uniform: tuple[float, float] | None = None
    log: tuple[float, float] | None = None
    """Uniform in the logarithm."""
    step: int = Field(default=1, ge=1)
    when: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Varied only if each of these paths of the space has one of these values; else the job's own value stays."""

    @model_validator(mode="after")
    def _one_kind(self) -> Variation:
        ranges = {name: getattr(self, name) for name in ("integer", "uniform", "log") if getattr(self, name)}
        if len(ranges) + (self.choice is not None) != 1:
            raise ValueError("give one of choice, integer, uniform and log")
        for name, (low, high) in ranges.items():
            if low > high or (name == "log" and low <= 0):
                raise ValueError(
                    f"{name}=[{low}, {high}] is no range" + (" of positive numbers" if name == "log" else "")
                )
        return self


class SolveConfig(Config):
    """An integer of the job that is chosen so that every candidate meets the `==` budgets, within 1 %."""

    path: str
    smallest: int = Field(default=8, ge=1)
    largest: int = Field(default=65536, ge=1)
    step: int = Field(default=8, ge=1)


class Goal(Config):
    """A second metric, that the sweep's metric is weighed against."""

    metric: str
    """`*` stands for every layer, whose mean counts: `moe/*/maxvio`. Of training: the mean over its second half."""
    mode: Literal["min", "max"] = "min"


class SearchConfig(Config):
    space: dict[str, Variation] = Field(default_factory=dict)
    """Paths of the job to their values."""
    presets: tuple[PresetName, ...] = ()
    """More of them, as docs/tune.md says; a path that `space` has too is as it is there."""
    budgets: tuple[str, ...] = ()
    """Such as `active_params<=300M`, `peak_memory<=79GiB`, `flops_per_token==100%` (of the job as it stands)."""
    solve: SolveConfig | None = None
    metric: str = "val/loss"
    mode: Literal["min", "max"] = "min"
    against: tuple[Goal, ...] = ()
    """What the front weighs the metric against in place of the first budget's quantity: a front for each."""
    trials: int = Field(default=16, ge=1)
    searcher: Literal["random", "tpe", "nsga2", "predictor"] = "random"
    """`nsga2` and `predictor` look for the front of the metric and the first budget's quantity, `tpe` for the best
    metric."""
    random_share: float = Field(default=0.25, gt=0, lt=1)
    """Of the trials with any other searcher, or `pbt`: drawn at random, the baseline that those have to beat."""
    scheduler: Literal["none", "asha", "median", "pbt"] = "none"
    """`asha` and `median` end candidates early that are behind others on as many tokens: at rungs, or below the median.
    `pbt` lets the worst of a population go on from the weights of the best, with settings near theirs."""
    exploit_every: int | None = Field(default=None, ge=1)
    """Tokens of a round of `pbt`."""
    gpu_share: float = Field(default=1.0, gt=0, le=1)
    """Of a GPU that a trial takes, where it has one: with 0.25 four run on it side by side, and share its memory. For
    jobs with one worker."""
    retries: int = Field(default=1, ge=0)
    """How often a trial whose process dies begins again, from its checkpoint; then it has failed."""
    max_tokens: int | None = Field(default=None, ge=1)
    """That a sweep may train on in all: no trial begins that would lead beyond it."""
    max_minutes: float | None = Field(default=None, gt=0)
    """From its start, or resume: no trial begins that is expected to end later, judged by those that have ended."""
    measured: str | None = None
    """What `tidegate bench JOB --out FILE` wrote of the job as it stands: for times and `step_time` budgets. `{job}` is
    the job's folder."""
    max_money: float | None = Field(default=None, gt=0)
    """At `resources.price_per_hour`: no trial begins expected to lead beyond it, judged by those that have ended, else
    predicted."""
    finalists: int = Field(default=2, ge=1)
    """The best so many run again with other seeds, the same for all, for the verdict."""
    seeds: int = Field(default=3, ge=1)
    """Runs of a finalist in all."""
    seed: int = Field(default=0, ge=0)
    """Of the draws."""

    moved: ClassVar[dict[str, str]] = {"price_per_hour": "resources.price_per_hour", "max_cost": "search.max_money"}

    @model_validator(mode="after")
    def _varies_something(self) -> SearchConfig:
        if not self.space and not self.presets:
            raise ValueError("space={} and presets=[] vary nothing; name a path or a preset")
        return self

    @property
    def has_baseline(self) -> bool:
        """Whether some trials are not drawn at random alone, so that those that are say what chance would find."""
        return self.searcher != "random" or self.scheduler == "pbt"

    @property
    def random_trials(self) -> int:
        return math.ceil(self.random_share * self.trials) if self.has_baseline else self.trials

    @property
    def members(self) -> int:
        """Of the population."""
        return self.trials - self.random_trials if self.scheduler == "pbt" else 0

    @property
    def most_reruns(self) -> int:
        """Finalists, the job as it stands and the best random trial, with the other seeds."""
        return (self.finalists + 1 + self.has_baseline) * (self.seeds - 1)
