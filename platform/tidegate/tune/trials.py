"""A sweep's folder: what is to be tried, and what came of it. A file a trial, so that a killed sweep loses none.

<state>/sweeps/<name>/
  sweep.json            the job as it stood, its file, and the candidates that were drawn
  trials/0007.json      one trial, written before it begins: its run, how it ended, its metric
  report.md, front.png, front.html, best.yaml   of the whole
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tidegate.config import Config, ConfigError, diff, load_stored
from tidegate.launch.state import write_whole
from tidegate.train.job import Job

__all__ = ["Phase", "Result", "SweepFolder", "SweepRecord", "Trial"]


_LIMITS = ("search.max_tokens", "search.max_minutes", "search.retries", "search.max_money", "resources.price_per_hour")
"""Of how a sweep runs; they say nothing of what it compares."""


class Phase(Config):
    """A stretch of a trial's training with the same settings."""

    begin: int
    """Tokens, as `end`."""
    end: int
    values: dict[str, Any]
    parent: int | None = None
    """The trial from whose checkpoint it goes on; None: its own."""


class Trial(Config):
    """One run that is to be made."""

    number: int
    values: dict[str, Any]
    """By path of the job, those it begins with; what was solved for too."""
    seed: int
    """`train.seed`."""
    kind: Literal["base", "random", "searched", "member", "seed", "round", "control"]
    """The job as it stands, a candidate drawn or proposed by a searcher or of a population, or a finalist again with
    another seed; of a chain that prunes, a round of it or its control."""
    phases: tuple[Phase, ...] = ()
    """Of a member what it has done and does now, of its rerun the whole schedule; of others nothing."""

    @property
    def last_values(self) -> dict[str, Any]:
        return self.phases[-1].values if self.phases else self.values


class Result(Config):
    """What came of a trial."""

    trial: Trial
    run: str
    """Name of the run, which can be resumed, looked at and exported like any other."""
    status: Literal["proposed", "running", "paused", "finished", "failed", "stopped"]
    """`proposed` before it begins; `paused` between two phases; `stopped` by a scheduler."""
    value: float | None = None
    """The last of the sweep's metric."""
    tokens: int = 0
    evaluations: tuple[tuple[int, float], ...] = ()
    """The metric by tokens, in their order, if it is one of evaluations; finite ones."""
    measured: dict[str, float] = Field(default_factory=dict)
    """Means of `search.against` over the second half of training."""
    seconds: float = 0.0
    """Of training and evaluating, without what it took to start."""
    error: str = ""
    stopped_by: str = ""
    """Which scheduler."""

    @property
    def phase(self) -> Phase | None:
        """That it is in or that comes next."""
        phases = self.trial.phases
        if self.trial.kind == "member" or not phases:
            return phases[-1] if phases else None
        return next((phase for phase in phases if phase.end > self.tokens), phases[-1])

    @property
    def ended(self) -> bool:
        return self.status in ("finished", "failed", "stopped")


class SweepRecord(Config):
    """sweep.json."""

    job_file: str
    job: dict[str, Any]
    """Resolved."""
    overrides: tuple[str, ...]
    budgets: tuple[str, ...]
    trials: tuple[Trial, ...]


class SweepFolder:
    """The folder of one sweep.

    Args:
        sweeps: where sweeps are.
        name: of this one.
    """

    def __init__(self, sweeps: Path, name: str) -> None:
        self.name, self.folder = name, sweeps / name
        self._record = self.folder / "sweep.json"
        self._trials = self.folder / "trials"

    @staticmethod
    def new(sweeps: Path, name: str) -> SweepFolder:
        """A folder that is not there yet: `<name>-1`, `<name>-2`, ..."""
        sweeps.mkdir(parents=True, exist_ok=True)
        number = 1
        while (sweeps / f"{name}-{number}").exists():
            number += 1
        sweep = SweepFolder(sweeps, f"{name}-{number}")
        sweep._trials.mkdir(parents=True)
        return sweep

    @staticmethod
    def existing(sweeps: Path, name: str) -> SweepFolder:
        """The folder of a sweep that was begun.

        Raises:
            ConfigError: there is none of this name.
        """
        known = sorted(path.parent.name for path in sweeps.glob("*/sweep.json"))
        if name not in known:
            raise ConfigError(f"{name}: no such sweep in {sweeps}; there are: {', '.join(known) or 'none'}")
        return SweepFolder(sweeps, name)

    def write(self, record: SweepRecord) -> None:
        write_whole(self._record, record.model_dump_json(indent=1))

    def read(self) -> SweepRecord:
        return load_stored(self._record.read_text(encoding="utf-8"), SweepRecord, str(self._record))

    def refuse_another(self, job: Job) -> None:
        """Raise ConfigError if the job is not the one that the sweep was begun with, except for its limits."""
        began = Job.model_validate(self.read().job)  # fills in fields that are younger than the sweep
        changed = diff(began.model_dump(mode="json"), job.model_dump(mode="json"))
        changed = {path: value for path, value in changed.items() if path not in _LIMITS}
        if changed:
            said = ", ".join(f"{path}={value}" for path, value in sorted(changed.items()))
            raise ConfigError(
                f"{self.name}: the job is not the one that this sweep compares ({said}); begin another sweep, or say "
                "--force"
            )

    def put(self, result: Result) -> None:
        write_whole(self._trials / f"{result.trial.number:04d}.json", result.model_dump_json(indent=1))

    def result(self, number: int) -> Result:
        """Of a trial that was proposed."""
        file = self._trials / f"{number:04d}.json"
        return load_stored(file.read_text(encoding="utf-8"), Result, str(file))

    def results(self) -> list[Result]:
        """Of all trials that were proposed or begun, in order."""
        files: Iterable[Path] = sorted(self._trials.glob("[0-9]*.json"))
        return [load_stored(file.read_text(encoding="utf-8"), Result, str(file)) for file in files]
