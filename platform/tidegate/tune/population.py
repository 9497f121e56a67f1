"""Populations: candidates that train in rounds, after each of which the worst go on from the best ones' checkpoints.

Population-based training (Jaderberg et al. 2017, arXiv 1711.09846) in rounds of as many tokens for all. What members
come to at the end of a round decides the next, with the sweep's seed and nothing else, so that a sweep that was killed
decides the same again. All begin with the same weights and see the same data: what a member comes to is what one run
comes to that changes its settings as the member's line of parents did, its schedule.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from typing import Any

from tidegate.config import ConfigError
from tidegate.launch.state import StateDir
from tidegate.track import tag_run
from tidegate.train.checkpoint_store import Damaged
from tidegate.train.inheritance import inherit
from tidegate.train.job import Job
from tidegate.train.search import Variation
from tidegate.train.storage import StorageError
from tidegate.tune.space import Space, Values, overrides_of
from tidegate.tune.trials import Phase, Result, SweepFolder, Trial

__all__ = ["begin_round", "decide", "recipe", "rounds", "schedule_of"]

_QUANTILES = 4
"""The last of them goes on from the first."""
_RESAMPLED = 0.25
"""How often a value is drawn anew instead of moved."""
_FACTORS = (0.8, 1.25)
_ASKS_AN_HEIR = 20


def rounds(job: Job) -> list[tuple[int, int]]:
    """Where each round begins and ends, in tokens."""
    assert job.search is not None
    assert job.search.exploit_every is not None
    begins = range(0, job.train.tokens, job.search.exploit_every)
    return list(zip(begins, [*begins[1:], job.train.tokens], strict=True))


def decide(space: Space, members: Sequence[Result], round: int) -> dict[int, Phase]:
    """What each member does in a round, from the second on.

    The last quarter, and whoever failed, take the weights of one of the first quarter, and its values, moved or drawn
    anew. Whoever failed before it had a run is out.

    Args:
        members: which have all been through the round before.
        round: counted from 0.
    """
    begin, end = rounds(space.base)[round]
    sign = 1 if space.config.mode == "min" else -1
    value_at = {member.trial.number: dict(member.evaluations).get(begin) for member in members}
    values = {number: value for number, value in value_at.items() if value is not None}
    ranked = sorted(values, key=lambda number: (sign * values[number], number))
    if not ranked:
        return {}
    worst = min(-(-len(ranked) // _QUANTILES), len(ranked) // 2)
    best = ranked[: max(1, worst)]
    heirs = {*ranked[len(ranked) - worst :], *(m.trial.number for m in members if m.run)} - {*ranked[: -worst or None]}
    before = {m.trial.number: m.trial.phases[round - 1].values for m in members if len(m.trial.phases) >= round}
    phases = {n: Phase(begin=begin, end=end, values=before[n]) for n in ranked if n not in heirs}
    for number in sorted(heirs):
        chance = random.Random(f"{space.config.seed} {round} {number}")
        parent = chance.choice(best)
        phases[number] = Phase(begin=begin, end=end, values=_explored(space, before[parent], chance), parent=parent)
    return phases


def begin_round(space: Space, folder: SweepFolder, state: StateDir, round: int) -> list[Trial]:
    """Note what each member does in a round, hand checkpoints on, and return who has still to train.

    Doing it again, after a kill at any moment, changes nothing.
    """
    members = [result for result in folder.results() if result.trial.kind == "member"]
    phases = decide(space, members, round) if round else {}
    for member in members:  # all of them, before one trains
        number, trial = member.trial.number, member.trial
        if number in phases and len(trial.phases) == round:
            longer = trial.model_copy(update={"phases": (*trial.phases, phases[number])})
            folder.put(member.model_copy(update={"trial": longer, "status": "paused", "error": ""}))
    known = {result.trial.number: result for result in folder.results()}
    left = []
    for first in (trial for trial in folder.read().trials if trial.kind == "member"):
        member = known.get(first.number, Result(trial=first, run="", status="proposed"))
        if len(member.trial.phases) != round + 1 or member.ended or _has_reached(member, member.trial.phases[-1].end):
            continue
        try:
            _hand_on(member, folder, state)
        except (Damaged, StorageError) as error:  # one trial never ends the sweep
            folder.put(member.model_copy(update={"status": "failed", "error": str(error)}))
            continue
        left.append(member.trial)
    return left


def _hand_on(heir: Result, folder: SweepFolder, state: StateDir) -> None:
    phase = heir.trial.phases[-1]
    if phase.parent is None:
        return
    parent, run = folder.result(phase.parent), state.run(heir.run)
    tag_run(
        run.handle(),
        f"tidegate.from_tokens.{phase.begin}",
        f"weights of trial {phase.parent} ({parent.run}), {' '.join(overrides_of(phase.values))}",
    )
    inherit(run.read().checkpoints, state.run(parent.run).read().checkpoints, phase.begin)


def schedule_of(trial: Trial, results: Iterable[Result]) -> tuple[Phase, ...]:
    """The settings that a trial's weights were trained with, by its line of parents; empty if they never changed.

    A phase's parent is whose weights it began with, if they were another's.
    """
    by_number = {result.trial.number: result.trial.phases for result in results}
    line, phases = [], trial.phases
    for place in reversed(range(len(trial.phases))):
        line.append(phases[place])
        parent = phases[place].parent
        phases = phases if parent is None else by_number[parent]
    merged: list[Phase] = []
    for phase in reversed(line):
        if merged and merged[-1].values == phase.values:
            merged[-1] = merged[-1].model_copy(update={"end": phase.end})
        else:
            merged.append(phase)
    return tuple(merged) if len(merged) > 1 else ()


def recipe(trial: Trial, results: Iterable[Result]) -> str:
    """The same for trials that differ in nothing but their seeds."""
    phases = schedule_of(trial, results)
    last = phases[0].values if phases else trial.phases[-1].values if trial.phases else trial.values
    return json.dumps([last, *([phase.begin, phase.values] for phase in phases[1:])], sort_keys=True)


def _has_reached(member: Result, tokens: int) -> bool:
    return any(at >= tokens for at, _ in member.evaluations)


def _explored(space: Space, values: Values, chance: random.Random) -> Values:
    """Each value moved or drawn anew; as they were if that is often no valid job."""
    for _ in range(_ASKS_AN_HEIR):
        drawn = space.draw(chance)
        moved: Values = {
            path: drawn[path] if chance.random() < _RESAMPLED else _moved(variation, values[path], chance)
            for path, variation in space.config.space.items()
        }
        try:
            return space.at(moved).values
        except ConfigError:
            continue
    return dict(values)


def _moved(variation: Variation, value: Any, chance: random.Random) -> Any:
    """To a neighbour among choices, else by a factor, inside the range."""
    options: Sequence[Any] | None = variation.choice
    if variation.integer is not None:
        low, high = variation.integer
        options = range(low, high + 1, variation.step)
    if options is not None:
        place = options.index(value) + chance.choice((-1, 1))
        return options[min(max(place, 0), len(options) - 1)]
    bounds = variation.uniform or variation.log
    assert bounds is not None
    return min(max(value * chance.choice(_FACTORS), bounds[0]), bounds[1])
