"""Candidates of a sweep: values of the space, laid over the job as `--set` would, and kept if the budgets allow it."""

from __future__ import annotations

import graphlib
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tidegate.config import ConfigError, JobFile
from tidegate.train.job import Job
from tidegate.train.layout import CHANGEABLE
from tidegate.train.search import SearchConfig, Variation
from tidegate.tune.budget import Budget, parse, solve, violations
from tidegate.tune.measured import refuse_other_measurement
from tidegate.tune.presets import space_with_presets

__all__ = ["Candidate", "Space", "draw", "overrides_of"]

_DRAWS_A_CANDIDATE = 200
_NEVER_VALID = ("unknown field", "unknown kind", "Input should be")
"""Of errors of one field by itself, which no other values of the space would heal."""
Values = dict[str, Any]
"""By path of the job."""


class Candidate(NamedTuple):
    values: Values
    job: Job

    @property
    def overrides(self) -> list[str]:
        return overrides_of(self.values)


class Space:
    """What may be tried.

    Args:
        job_file: the job that is varied.
        overrides: laid over it first.
        budgets: beside those of its `search:` section.

    Raises:
        ConfigError: the job has no `search:` section, a preset or measurement does not fit it, a budget cannot be read,
            or what is solved for is also varied.
    """

    def __init__(self, job_file: Path, overrides: Sequence[str] = (), budgets: Sequence[str] = ()) -> None:
        self._job_file = JobFile(job_file, overrides)
        search = self._job_file.load(Job).config.search
        if search is None:
            raise ConfigError(f"{job_file}: a sweep needs search.space; `tidegate schema` says what it may hold")
        if search.measured is not None:
            measured = search.measured.replace("{job}", str(job_file.absolute().parent))
            self._job_file = JobFile(job_file, [*overrides, f"search.measured={json.dumps(measured)}"])
        self.base: Job = self._job_file.load(Job).config
        refuse_other_measurement(self.base)
        assert self.base.search is not None
        self.config: SearchConfig = self.base.search.model_copy(update={"space": space_with_presets(self.base)})
        self.budgets: list[Budget] = [parse(text, self.base) for text in (*self.config.budgets, *budgets)]
        if "train.seed" in self.config.space:
            raise ConfigError(
                f"{job_file}: search.space.train.seed: all candidates have the job's seed, and finalists run again "
                "with others; set search.seeds, and search.finalists to how many"
            )
        for path, variation in self.config.space.items():
            unknown = [other for other in variation.when if other not in self.config.space]
            if unknown:
                raise ConfigError(f"{job_file}: search.space.{path}.when: {unknown[0]} is not in the space")
        try:
            self.order = tuple(
                graphlib.TopologicalSorter({p: list(v.when) for p, v in self.config.space.items()}).static_order()
            )
            """Paths, each after those that its condition names."""
        except graphlib.CycleError as error:
            raise ConfigError(f"{job_file}: search.space: `when` goes round: {' -> '.join(error.args[1])}") from error
        domains = [domain.name for domain in self.base.data.domains]
        of_domains = (f"val/{name}/{what}" for name in domains for what in ("loss", "ppl", "bpb"))
        reported = ["val/loss", *of_domains, "val/bpb"]
        if self.config.metric.startswith("val/") and self.config.metric not in reported:
            raise ConfigError(
                f"{job_file}: search.metric={self.config.metric} is never reported; the job has {', '.join(reported)}"
            )
        least = self.base.train.tokens * (1 + self.config.most_reruns)
        if self.config.max_tokens is not None and self.config.max_tokens < least:
            raise ConfigError(
                f"{job_file}: search.max_tokens={self.config.max_tokens} is less than the {least} of one candidate "
                f"(train.tokens={self.base.train.tokens}) and {self.config.most_reruns} reruns with other seeds"
            )
        resources, share = self.base.resources, self.config.gpu_share
        if share < 1 and not (resources.gpu and resources.workers == 1):
            raise ConfigError(
                f"{job_file}: search.gpu_share={share} is for jobs with one worker on a GPU, not with "
                f"resources.workers={resources.workers} resources.gpu={resources.gpu}; set it to 1"
            )
        _check_population(job_file, self.base, self.config)
        if self.config.scheduler in ("asha", "median"):
            train, metric = self.base.train, self.config.metric
            if not metric.startswith("val/"):
                raise ConfigError(
                    f"{job_file}: search.metric={metric} is not of evaluations, as search.scheduler needs"
                )
            if train.eval_every * train.batch_tokens >= train.tokens:
                raise ConfigError(
                    f"{job_file}: search.scheduler={self.config.scheduler} judges by evaluations, and "
                    f"train.eval_every={train.eval_every} makes none before the end, at train.tokens={train.tokens}"
                )
        exact = [budget for budget in self.budgets if budget.exact]
        if self.config.solve is None and exact:
            raise ConfigError(f"{job_file}: the budget {exact[0]} needs search.solve.path, which is chosen to meet it")
        if self.config.solve is not None and not exact:
            raise ConfigError(f"{job_file}: search.solve.path={self.config.solve.path} has no == budget to meet")
        if self.config.solve is not None and self.config.solve.path in self.config.space:
            raise ConfigError(f"{job_file}: search.solve.path={self.config.solve.path} is in search.space too")

    def at(self, values: Values) -> Candidate:
        """The candidate with these values, and with what is solved for.

        Raises:
            ConfigError: the job is not valid with them.
        """
        if self.config.solve is not None:
            path = self.config.solve.path
            rest = {name: value for name, value in values.items() if name != path}
            width = solve(lambda value: self._job({**rest, path: value}), self.budgets, self.config.solve)
            values = {**rest, path: width}
        return Candidate(values, self._job(values))

    def draw(self, chance: random.Random) -> Values:
        """Values at random, of the paths whose conditions hold."""
        drawn = {path: _value(variation, chance) for path, variation in self.config.space.items()}
        return self.chosen(lambda path: drawn[path])

    def chosen(self, choose: Callable[[str], Any]) -> Values:
        """Values of the paths whose conditions hold, each after those that its condition names."""
        values: Values = {}
        for path in self.order:
            conditions = self.config.space[path].when.items()
            if all(other in values and values[other] in allowed for other, allowed in conditions):
                values[path] = choose(path)
        return values

    def key(self, values: Values) -> str:
        """The same for the same candidate, whatever is solved for."""
        return json.dumps({path: values[path] for path in self.config.space if path in values}, sort_keys=True)

    def _job(self, values: Values) -> Job:
        job: Job = self._job_file.load(Job, values).config
        return job


def _check_population(job_file: Path, job: Job, config: SearchConfig) -> None:
    """Raise ConfigError for a population that cannot be, and for a round or a pause that nothing uses."""
    every, batch, tokens = config.exploit_every, job.train.batch_tokens, job.train.tokens
    if job.train.pause_at_tokens is not None:
        raise ConfigError(
            f"{job_file}: train.pause_at_tokens={job.train.pause_at_tokens} would pause every trial; set it to null"
        )
    if config.scheduler != "pbt":
        if every is not None:
            raise ConfigError(
                f"{job_file}: search.exploit_every={every} is of search.scheduler=pbt, not {config.scheduler}"
            )
        return
    if every is None or every % batch or not every < tokens:
        raise ConfigError(
            f"{job_file}: search.exploit_every={every}: search.scheduler=pbt needs rounds of a multiple of "
            f"train.batch_tokens={batch}, less than train.tokens={tokens}"
        )
    if config.searcher != "random":
        raise ConfigError(
            f"{job_file}: search.searcher={config.searcher}: the population of search.scheduler=pbt is drawn at random"
        )
    if not config.metric.startswith("val/"):
        raise ConfigError(
            f"{job_file}: search.metric={config.metric} is not of evaluations, as search.scheduler=pbt needs"
        )
    for path, variation in config.space.items():
        if path not in CHANGEABLE:
            raise ConfigError(
                f"{job_file}: search.space.{path} cannot change in the middle of a run, as search.scheduler=pbt does; "
                f"what can: {', '.join(CHANGEABLE)}"
            )
        if variation.when:
            raise ConfigError(f"{job_file}: search.space.{path}.when does not go with search.scheduler=pbt")
    if config.members < 2:
        raise ConfigError(
            f"{job_file}: search.trials={config.trials} leaves {config.members} for the population beside "
            f"{config.random_trials} random ones (search.random_share={config.random_share}); 2 are the fewest"
        )


def draw(space: Space, number: int, chance: random.Random) -> Iterator[Candidate]:
    """So many candidates at random that are valid and within the budgets, each once.

    Raises:
        ConfigError: a path is not in the job, or a value is none that its field takes; or too few are found: it names
            the nearest, and by how much it misses.
    """
    seen: set[str] = set()
    nearest: tuple[float, str] = (math.inf, "")
    found = 0
    for _ in range(_DRAWS_A_CANDIDATE * number):
        values = space.draw(chance)
        key = space.key(values)
        if key in seen:
            continue
        seen.add(key)
        try:
            candidate = space.at(values)
        except ConfigError as error:
            if any(sign in str(error) for sign in _NEVER_VALID):
                raise
            nearest = min(nearest, (1e9, f"{_in_words(values)}: {error}"))
            continue
        missed = violations(candidate.job, space.budgets)
        if missed:
            said = (f"{budget} by {100 * excess:+.1f} %" for budget, excess in missed.items())
            nearest = min(
                nearest, (max(map(abs, missed.values())), f"{_in_words(candidate.values)} misses {', '.join(said)}")
            )
            continue
        yield candidate
        found += 1
        if found == number:
            return
    if not found:
        raise ConfigError(f"search.space: no candidate is within the budgets; the nearest: {nearest[1]}")
    if found < number:
        raise ConfigError(
            f"search.space: only {found} candidates are within the budgets, not {number}; lower search.trials, widen "
            f"the space, or loosen the budgets: {', '.join(map(str, space.budgets)) or 'none'}"
        )


def _value(variation: Variation, chance: random.Random) -> Any:
    if variation.choice is not None:
        return chance.choice(variation.choice)
    if variation.integer is not None:
        low, high = variation.integer
        return chance.randrange(low, high + 1, variation.step)
    if variation.uniform is not None:
        return chance.uniform(*variation.uniform)
    assert variation.log is not None
    return math.exp(chance.uniform(*map(math.log, variation.log)))


def overrides_of(values: Mapping[str, Any]) -> list[str]:
    """As `--set` takes them."""
    return [f"{path}={json.dumps(value)}" for path, value in values.items()]


def _in_words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{path}={json.dumps(value)}" for path, value in values.items())
