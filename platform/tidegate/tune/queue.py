"""What a sweep runs next: what was under way, what was drawn, what the searcher proposes, until a limit or the end.

A trial is in the sweep's folder before it is given out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from tidegate.train.job import Job
from tidegate.train.search import SearchConfig
from tidegate.tune.measured import training_time, workers_of
from tidegate.tune.searchers import Searcher
from tidegate.tune.trials import Result, SweepFolder, Trial

__all__ = ["Limits", "Queue"]


class Limits:
    """Whether a trial may begin, and the reruns of finalists after it: `search.max_tokens`, `max_minutes`, `max_money`.

    Args:
        job: of which each trial is a variation; all train on as many tokens.
        concurrent: trials at a time.
        clock: in seconds.
    """

    def __init__(self, job: Job, concurrent: int, clock: Callable[[], float] = time.monotonic) -> None:
        assert job.search is not None
        self._config: SearchConfig = job.search
        self._tokens, self._concurrent, self._clock = job.train.tokens, concurrent, clock
        self._begun, self._price = clock(), workers_of(job) * (job.resources.price_per_hour or 0.0) / 3600
        self._predicted = training_time(job) if self._config.measured is not None else 0.0

    def reached(self, results: Sequence[Result], reruns: int) -> str:
        """Which limit forbids one more trial and so many reruns after it; empty if none does.

        Args:
            results: of all other trials.
        """
        tokens = sum(result.tokens if result.ended else self._tokens for result in results)
        most, minutes = self._config.max_tokens, self._config.max_minutes
        if most is not None and tokens + self._tokens * (1 + reruns) > most:
            return f"search.max_tokens={most}"
        ended = [result.seconds for result in results if result.status == "finished"]
        each = sum(ended) / len(ended) if ended else self._predicted
        rounds = 1 + math.ceil(reruns / self._concurrent)
        if minutes is not None and self._clock() - self._begun + rounds * each > 60 * minutes:
            return f"search.max_minutes={minutes:g}"
        seconds = sum(result.seconds if result.ended else max(result.seconds, each) for result in results)
        money = self._config.max_money
        if money is not None and self._price * (seconds + each * (1 + reruns)) > money:
            return f"search.max_money={money:g}"
        return ""


class Queue:
    """Gives out trials one by one.

    Args:
        folder: of the sweep.
        fixed: trials known beforehand; those that ended are left out, and those under way come first.
        limits: that hold.
        reruns: that must still fit after a trial.
        searcher: proposes more after those.
        searched: so many in all, those of before included.
    """

    def __init__(
        self,
        folder: SweepFolder,
        fixed: Sequence[Trial],
        limits: Limits,
        reruns: int = 0,
        searcher: Searcher | None = None,
        searched: int = 0,
    ) -> None:
        self._folder, self._limits, self._reruns, self._searcher = folder, limits, reruns, searcher
        self.stopped_by = ""
        """Why there are no more although not all were given out."""
        before = folder.results()
        known = {result.trial.number: result for result in before}
        proposed = [result.trial for result in before if result.trial.kind == "searched"] if searcher else []
        left = [t for t in (*proposed, *fixed) if t.number not in known or not known[t.number].ended]
        self._left = sorted(left, key=lambda trial: trial.number not in known)
        self._to_propose = max(0, searched - len(proposed)) if searcher else 0
        self._next = 1 + max([0, *known, *(trial.number for trial in fixed)])

    @property
    def most(self) -> int:
        """At most so many will be given out."""
        return len(self._left) + self._to_propose

    def next(self) -> Trial | None:
        """The next trial, which the folder holds then; None at the end."""
        if self.stopped_by or not self.most:
            return None
        number = self._left[0].number if self._left else self._next
        results = self._folder.results()
        others = [result for result in results if result.trial.number != number]
        limit = self._limits.reached(others, self._reruns)
        if limit:
            self.stopped_by = f"{limit} is reached; tidegate tune --resume {self._folder.name} goes on with more of it"
            return None
        known = {result.trial.number for result in results}
        if self._left:
            trial = self._left.pop(0)
            if self._searcher is not None and number not in known:
                self._searcher.adopt(trial)
        else:
            assert self._searcher is not None
            proposed = self._searcher.propose(number)
            if proposed is None:
                self.stopped_by = "asked often, the searcher proposed nothing new within the budgets"
                return None
            trial, self._to_propose, self._next = proposed, self._to_propose - 1, self._next + 1
        if number not in known:
            self._folder.put(Result(trial=trial, run="", status="proposed"))
        return trial

    def ended(self, number: int) -> None:
        """Tell the searcher what came of a trial, as the folder has it."""
        if self._searcher is not None:
            self._searcher.tell(self._folder.result(number))
