"""Candidates from the front that a model of finished trials predicts.

A Gaussian process is fitted to what trials came to, over features of their jobs. One function is drawn from it
(Thompson 1933: where little is known, functions differ, and some lead there). Of many random candidates, that one is
proposed which by this function adds most hypervolume to the front of the metric and the first budget's quantity. What
a candidate costs is known, so only its metric is predicted. Under an `==` budget all cost the same, and the best metric
is looked for. The same trials, told in any process, lead to the same proposal.
Source: predicted fronts as in SimQ-NAS (arXiv 2312.13301), one drawn function and its hypervolume as in TSEMO (Bradford
et al. 2018).

Letters: N trials, C candidates, F features.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tidegate.config import flatten
from tidegate.model.flops import total
from tidegate.train.job import Job
from tidegate.tune.front import hypervolume, pareto
from tidegate.tune.searchers.base import Searcher
from tidegate.tune.space import Candidate, Space, Values
from tidegate.tune.trials import Result, Trial

if TYPE_CHECKING:
    from sklearn.gaussian_process import GaussianProcessRegressor

__all__ = ["Predictor"]

_FEWEST_TO_FIT = 4
_CANDIDATES = 128
_DRAWS_A_CANDIDATE = 2
_BEYOND_WORST = 0.1
"""Of what was measured: where hypervolume is counted from, as a share of its range."""


class _Known(NamedTuple):
    """A trial that ended."""

    values: Values
    job: Job
    value: float
    """The metric, smaller is better; infinite if it failed."""


class Predictor(Searcher):
    """Proposes from the front that a Gaussian process predicts."""

    def __init__(self, space: Space, taken: Iterable[Trial] = ()) -> None:
        super().__init__(space, taken)
        self._known: dict[int, _Known] = {}
        """By number of the trial."""

    def tell(self, result: Result) -> None:
        sign = 1 if self._space.config.mode == "min" else -1
        failed = result.status == "failed" or result.value is None or not math.isfinite(result.value)
        values = result.trial.values
        job = self._space.at(values).job if values else self._space.base
        self._known[result.trial.number] = _Known(values, job, math.inf if failed else sign * (result.value or 0.0))

    def _candidate(self, number: int) -> Candidate | None:
        chance = random.Random(f"{self._space.config.seed} {number}")
        known = [self._known[key] for key in sorted(self._known)]
        measured = [one.value for one in known if math.isfinite(one.value)]
        pool = list(self._pool(known, chance))
        if not pool or len(measured) < _FEWEST_TO_FIT:
            return pool[0] if pool else None
        # What diverged a little or wholly is as bad: else the model would spend itself on how bad.
        middle = float(np.median(measured))
        worst = 2 * middle - min(measured)
        value_N = np.array([min(one.value, worst) for one in known])
        x = _features(self._space, [*(one.job for one in known), *(one.job for one in pool)])
        x_NF, x_CF = x[: len(known)], x[len(known) :]
        model = _fitted(x_NF, value_N, chance.randrange(2**31))
        drawn_C = model.sample_y(x_CF, random_state=chance.randrange(2**31))[:, 0]
        if self._space.budgets and self._space.budgets[0].exact:
            return pool[int(drawn_C.argmin())]
        smooth_N = model.predict(x_NF).tolist()  # without a seed's luck
        ended = [(one, value) for one, value in zip(known, smooth_N, strict=True) if math.isfinite(one.value)]
        before = [(self._log_cost(one.job), value) for one, value in ended]
        after = [(self._log_cost(one.job), value) for one, value in zip(pool, drawn_C.tolist(), strict=True)]
        reference = _beyond(before)
        gains = [hypervolume([*before, point], reference) for point in after]
        best = max(range(len(pool)), key=lambda place: (gains[place], -after[place][1]))
        return pool[best]

    def _pool(self, known: Sequence[_Known], chance: random.Random) -> Iterator[Candidate]:
        """Candidates at random: every other one is drawn from the space, the others are near the measured front."""
        ended = [one for one in known if math.isfinite(one.value)]
        points = [(self._log_cost(one.job), one.value) for one in ended]
        front = [ended[place] for place in pareto(points) if ended[place].values]
        seen, found = set[str](), 0
        for place in range(_DRAWS_A_CANDIDATE * _CANDIDATES):
            values = self._space.draw(chance)
            if front and place % 2:
                values = self._near(chance.choice(front).values, values, chance)
            key = self._space.key(values)
            candidate = None if key in seen else self._fresh(values)
            seen.add(key)
            if candidate is not None:
                yield candidate
                found += 1
                if found == _CANDIDATES:
                    return

    def _near(self, values: Values, drawn: Values, chance: random.Random) -> Values:
        """Some of these values, each path with the same chance, one on average, as they were drawn."""
        spare = self._space.draw(chance)  # for paths that only the mixture has
        new = {path for path in self._space.order if chance.random() < 1 / len(self._space.order)}

        def choose(path: str) -> Any:
            for source in (drawn, values) if path in new else (values, drawn):
                if path in source:
                    return source[path]
            return spare[path]

        return self._space.chosen(choose)

    def _log_cost(self, job: Job) -> float:
        return math.log(self._cost(job))


def _features(space: Space, jobs: Sequence[Job]) -> np.ndarray:
    """(N, F) of jobs: what the space varies in them, with mean 0 and deviation 1; and logarithms of what they cost.

    A logarithm is not scaled: what costs nearly the same is nearly the same.
    """
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.preprocessing import StandardScaler

    varied_NV = DictVectorizer(sparse=False).fit_transform([_varied(space, job) for job in jobs])
    costs = [total(job.model, job.data.sequence_length) for job in jobs]
    log_costs_N3 = np.log([(cost.active_params, cost.params, cost.flops_per_token) for cost in costs])
    return np.hstack([StandardScaler().fit_transform(varied_NV), log_costs_N3 - log_costs_N3.mean(axis=0)])


def _varied(space: Space, job: Job) -> dict[str, float | str]:
    """Leaves of the job below the paths of the space: numbers as such, which are features, and all else as text, each
    value of which becomes one."""
    whole, varied = job.model_dump(mode="json"), dict[str, float | str]()
    for path, variation in space.config.space.items():
        value: Any = whole
        for name in path.split("."):
            value = value[int(name)] if isinstance(value, list) else value.get(name) if value is not None else None
        leaves = flatten(value, path) if isinstance(value, Mapping) else {path: value}
        for name, leaf in leaves.items():
            if isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
                varied[name] = math.log(leaf) if variation.log else float(leaf)
            else:
                varied[name] = str(leaf)
    return varied


def _fitted(x_NF: np.ndarray, value_N: np.ndarray, seed: int) -> GaussianProcessRegressor:
    """A Gaussian process without the noise that it found in the values, which is between seeds and none of the jobs."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    F = x_NF.shape[1]  # each with a length of its own: most say nothing, and a common one would blur the others
    smooth = ConstantKernel() * Matern([math.sqrt(F)] * F, (0.1 * math.sqrt(F), 100 * math.sqrt(F)), nu=2.5)
    kernel = smooth + WhiteKernel(0.1, (1e-4, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # at a bound: a feature that says nothing
        noisy = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=2, random_state=seed)
        found = noisy.fit(x_NF, value_N).kernel_
    return GaussianProcessRegressor(found.k1, alpha=found.k2.noise_level, optimizer=None, normalize_y=True).fit(
        x_NF, value_N
    )


def _beyond(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """A little worse than the worst in each."""
    table = np.array(points)
    worst = table.max(axis=0) + _BEYOND_WORST * (table.max(axis=0) - table.min(axis=0))
    return float(worst[0]), float(worst[1])
