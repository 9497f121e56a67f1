"""Candidates proposed by Optuna, and which paths of a space matter by its fANOVA.

When it proposes what does not fit the budgets, it is asked again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from tidegate.train.search import Variation
from tidegate.tune.searchers.base import CANDIDATES, Searcher
from tidegate.tune.space import Candidate, Space, Values
from tidegate.tune.trials import Result, Trial

if TYPE_CHECKING:
    import optuna

__all__ = ["OptunaSearcher", "importances"]

FEWEST_FOR_IMPORTANCE = 8
_ASKS_A_PROPOSAL = 200


class OptunaSearcher(Searcher):
    """TPE or NSGA-II.

    Args:
        space: what may be tried, and the searcher's name.
        before: results that it will be told of: a resumed sweep does not draw what it drew before.
        taken: candidates that will be tried anyway.
    """

    def __init__(self, space: Space, before: int = 0, taken: Iterable[Trial] = ()) -> None:
        import optuna

        super().__init__(space, taken)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        config, seed = space.config, space.config.seed + before
        self._asked: dict[int, optuna.trial.Trial] = {}
        startup = max(2, config.random_trials)  # random trials are what it begins with
        goal: Literal["minimize", "maximize"] = "minimize" if config.mode == "min" else "maximize"
        sampler: optuna.samplers.BaseSampler
        if config.searcher == "tpe":
            self._directions: list[Literal["minimize", "maximize"]] = [goal]
            sampler = optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed, constant_liar=True)
        else:
            assert config.searcher == "nsga2"
            self._directions = [goal, "minimize"]
            sampler = optuna.samplers.NSGAIISampler(population_size=startup, seed=seed)
        self._study = optuna.create_study(directions=self._directions, sampler=sampler)

    def adopt(self, trial: Trial) -> None:
        super().adopt(trial)
        if trial.kind not in CANDIDATES:
            return
        self._study.enqueue_trial({p: _told(self._space.config.space[p], v) for p, v in self._told_of(trial)})
        asked = self._study.ask()
        if self._space.key(self._suggest(asked)) == self._space.key(trial.values):
            self._asked[trial.number] = asked  # else it is from before the space was changed by force

    def tell(self, result: Result) -> None:
        from optuna.trial import TrialState

        asked = self._asked.pop(result.trial.number, None)
        if asked is None:
            return
        value = result.value
        if value is None or not math.isfinite(value) or not result.ended or result.status == "failed":
            self._study.tell(asked, state=TrialState.FAIL)
        elif result.status == "stopped":
            if len(self._directions) == 1:
                asked.report(value, result.tokens)
            self._study.tell(asked, state=TrialState.PRUNED)
        else:
            job = self._space.at(result.trial.values).job
            self._study.tell(asked, [value, self._cost(job)][: len(self._directions)])

    def _candidate(self, number: int) -> Candidate | None:
        for _ in range(_ASKS_A_PROPOSAL):
            asked = self._study.ask()
            candidate = self._fresh(self._suggest(asked))
            if candidate is not None:
                self._asked[number] = asked
                return candidate
            # It stays under way for Optuna, which takes such for bad ones. Pruned ones would be too, but count among
            # those of which TPE calls a tenth good: under a tight budget soon all that were ever within.
        return None

    def _suggest(self, asked: optuna.trial.Trial) -> Values:
        space = self._space.config.space
        return self._space.chosen(lambda path: _value(space[path], _suggested(asked, path, space[path])))

    def _told_of(self, trial: Trial) -> list[tuple[str, Any]]:
        return [(path, trial.values[path]) for path in self._space.config.space if path in trial.values]


def distribution(variation: Variation) -> optuna.distributions.BaseDistribution:
    """Of Optuna; a choice is by its JSON, since Optuna takes no mappings."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if variation.choice is not None:
        return CategoricalDistribution([_text(value) for value in variation.choice])
    if variation.integer is not None:
        low, high = variation.integer
        return IntDistribution(low, high - (high - low) % variation.step, step=variation.step)
    if variation.uniform is not None:
        return FloatDistribution(*variation.uniform)
    assert variation.log is not None
    return FloatDistribution(*variation.log, log=True)


def _suggested(asked: optuna.trial.Trial, path: str, variation: Variation) -> Any:
    if variation.choice is not None:
        return asked.suggest_categorical(path, [_text(value) for value in variation.choice])
    if variation.integer is not None:
        low, high = variation.integer
        return asked.suggest_int(path, low, high - (high - low) % variation.step, step=variation.step)
    if variation.uniform is not None:
        return asked.suggest_float(path, *variation.uniform)
    assert variation.log is not None
    return asked.suggest_float(path, *variation.log, log=True)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _told(variation: Variation, value: Any) -> Any:
    return value if variation.choice is None else _text(value)


def _value(variation: Variation, told: Any) -> Any:
    return told if variation.choice is None else next(v for v in variation.choice if _text(v) == told)


def importances(space: Space, results: Iterable[Result]) -> dict[str, float]:
    """The metric's variance over the space that each path explains by itself, by fANOVA, in shares, the largest first.

    Paths that only some candidates have are left out.

    Args:
        results: those that ended; empty if they are too few, or all alike.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ended = [r for r in results if r.trial.kind in CANDIDATES and r.status == "finished" and r.value is not None]
    if len(ended) < FEWEST_FOR_IMPORTANCE or len({result.value for result in ended}) == 1:
        return {}
    variations = space.config.space
    study = optuna.create_study()
    for result in ended:
        paths = [path for path in variations if path in result.trial.values]
        study.add_trial(
            optuna.trial.create_trial(
                params={path: _told(variations[path], result.trial.values[path]) for path in paths},
                distributions={path: distribution(variations[path]) for path in paths},
                value=result.value,
            )
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
