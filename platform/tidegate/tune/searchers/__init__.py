"""Searchers: candidates proposed from what earlier ones came to; a new one is a file and a line in `build_searcher`."""

from __future__ import annotations

from collections.abc import Iterable

from tidegate.tune.searchers.base import CANDIDATES, Searcher, cost_axis
from tidegate.tune.searchers.from_optuna import OptunaSearcher, importances
from tidegate.tune.searchers.predictor import Predictor
from tidegate.tune.space import Space
from tidegate.tune.trials import Result, Trial

__all__ = ["CANDIDATES", "OptunaSearcher", "Predictor", "Searcher", "build_searcher", "cost_axis", "importances"]


def build_searcher(space: Space, results: Iterable[Result], taken: Iterable[Trial] = ()) -> Searcher | None:
    """The searcher that a space names, told what has come of its sweep; None for `random`, which asks nobody.

    Args:
        space: what may be tried.
        results: of the sweep so far.
        taken: candidates that will be tried anyway.
    """
    results = list(results)
    searcher: Searcher
    match space.config.searcher:
        case "random":
            return None
        case "predictor":
            searcher = Predictor(space, taken)
        case _:
            searcher = OptunaSearcher(space, len(results), taken)
    for result in results:
        if result.trial.kind != "seed":
            searcher.adopt(result.trial)
            if result.ended:
                searcher.tell(result)
    return searcher
