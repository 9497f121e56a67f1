"""What the queue asks of a searcher.

A searcher keeps nothing of its own between processes: it is told everything again from the sweep's folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from tidegate.config import ConfigError
from tidegate.train.job import Job
from tidegate.tune.budget import QUANTITIES, violations
from tidegate.tune.space import Candidate, Space, Values
from tidegate.tune.trials import Result, Trial

__all__ = ["CANDIDATES", "Searcher", "cost_axis"]

CANDIDATES = ("random", "searched")
"""Kinds of trials that are points of the space."""


def cost_axis(space: Space) -> str:
    """The quantity that the metric is weighed against."""
    return space.budgets[0].quantity if space.budgets else "active_params"


class Searcher(ABC):
    """Proposes candidates that are valid, within the budgets, and new.

    Args:
        space: what may be tried.
        taken: candidates that will be tried anyway.
    """

    def __init__(self, space: Space, taken: Iterable[Trial] = ()) -> None:
        self._space, self._seen = space, {space.key(trial.values) for trial in taken}

    def adopt(self, trial: Trial) -> None:
        """Count as under way what is begun without having been proposed here."""
        self._seen.add(self._space.key(trial.values))

    def propose(self, number: int) -> Trial | None:
        """The next trial, under this number; None if nothing new is found within the budgets, however often tried."""
        candidate = self._candidate(number)
        if candidate is None:
            return None
        self._seen.add(self._space.key(candidate.values))
        return Trial(number=number, values=candidate.values, seed=self._space.base.train.seed, kind="searched")

    @abstractmethod
    def tell(self, result: Result) -> None:
        """What came of a trial: its value, at which tokens it was stopped, or that it failed."""

    @abstractmethod
    def _candidate(self, number: int) -> Candidate | None:
        """The one to propose under this number; `_fresh` has accepted it."""

    def _fresh(self, values: Values) -> Candidate | None:
        """The candidate with these values if it is new, valid and within the budgets."""
        if self._space.key(values) in self._seen:
            return None
        try:
            candidate = self._space.at(values)
        except ConfigError:
            return None
        return None if violations(candidate.job, self._space.budgets) else candidate

    def _cost(self, job: Job) -> float:
        return QUANTITIES[cost_axis(self._space)].of(job)
