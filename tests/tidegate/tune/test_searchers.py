"""Searchers and the queue on a tabulated toy: no Ray, no training, the same folder as a sweep's."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tidegate.config import ConfigError, load
from tidegate.train.job import Job
from tidegate.tune.budget import QUANTITIES, violations
from tidegate.tune.front import hypervolume
from tidegate.tune.queue import Limits, Queue
from tidegate.tune.report import report
from tidegate.tune.searchers import OptunaSearcher, build_searcher, importances
from tidegate.tune.space import Space
from tidegate.tune.sweep import drawn_trials, finalists
from tidegate.tune.trials import Result, SweepFolder, SweepRecord, Trial

GATES = [{"kind": "none"}, {"kind": "sdpa_output", "granularity": "headwise"}]
SPACE: dict[str, Any] = {
    "model.attention.gate": {"choice": GATES},
    "model.ffn.num_experts": {"integer": [4, 32], "step": 4},
    "balance.loss_weight": {"log": [1e-4, 1e-1]},
    "model.attention.gate.granularity": {
        "choice": ["headwise", "elementwise"],
        "when": {"model.attention.gate": GATES[1:]},
    },
}
SEARCH: dict[str, Any] = {"space": SPACE, "budgets": ["total_params<=90k"], "trials": 16, "seeds": 1}


def toy(trial: Trial) -> float:
    """Best at a balance loss of 0.01, with a gate, and with more experts."""
    values = trial.values
    gate = 0.0 if values.get("model.attention.gate") == GATES[1] else 0.5
    experts = values.get("model.ffn.num_experts", 4)
    return math.log(values.get("balance.loss_weight", 0.1) / 0.01) ** 2 + gate - experts / 32


class Toy:
    """A sweep of the toy, which can be begun again from its folder."""

    def __init__(self, job: Path, folder: Path, **told: Any) -> None:
        self.space = Space(job)
        config = self.space.config
        if not folder.exists():
            self.folder = SweepFolder.new(folder.parent, folder.name.removesuffix("-1"))
            record = SweepRecord(
                job_file=str(job), job={}, overrides=(), budgets=(), trials=tuple(drawn_trials(self.space))
            )
            self.folder.write(record)
        self.folder = SweepFolder.existing(folder.parent, folder.name)
        self.record = self.folder.read()
        results = self.folder.results()
        self.searcher = build_searcher(self.space, results, self.record.trials)
        limits = Limits(self.space.base, told.pop("concurrent", 1), **told)
        searched = config.trials - config.random_trials
        self.queue = Queue(self.folder, self.record.trials, limits, config.most_reruns, self.searcher, searched)

    def run(self, number: int, concurrent: int = 1, status: Any = "finished") -> list[Trial]:
        """So many trials, so many at a time; leaves those under way at the end as a killed sweep would."""
        given: list[Trial] = []
        under_way: list[Trial] = []
        while len(given) < number and (trial := self.queue.next()) is not None:
            assert self.folder.result(trial.number).trial == trial, "in the folder before it begins"
            given.append(trial)
            under_way.append(trial)
            if len(under_way) == concurrent:
                self.end(under_way.pop(0), status)
        return given

    def end(self, trial: Trial, status: Any = "finished", better_by: float = 0) -> None:
        tokens = self.space.base.train.tokens
        self.folder.put(
            Result(trial=trial, run="r", status=status, value=toy(trial) - better_by, tokens=tokens, seconds=60)
        )
        self.queue.ended(trial.number)


@pytest.fixture
def begin(tiny_job: Callable[..., Path], tmp_path: Path) -> Callable[..., Toy]:
    def begin(
        name: str = "toy-1", told: dict[str, Any] | None = None, price: float | None = None, **search: Any
    ) -> Toy:
        job = tiny_job(search={**SEARCH, **search}, resources={"price_per_hour": price})
        return Toy(job, tmp_path / "sweeps" / name, **(told or {}))

    return begin


@pytest.mark.parametrize("searcher", ["tpe", "nsga2", "predictor"])
def test_what_is_proposed_is_new_and_within_the_budget_and_a_share_is_random(
    begin: Callable[..., Toy], searcher: str
) -> None:
    sweep = begin(searcher=searcher, random_share=0.3)
    given = sweep.run(99, concurrent=3)
    kinds = [trial.kind for trial in given]
    assert kinds == ["base", *["random"] * 5, *["searched"] * 11]
    assert [trial.number for trial in given] == list(range(17))
    keys = [sweep.space.key(trial.values) for trial in given]
    assert len(set(keys)) == len(keys)
    for trial in given[1:]:
        assert not violations(sweep.space.at(trial.values).job, sweep.space.budgets)
        gated = trial.values["model.attention.gate"] == GATES[1]
        assert ("model.attention.gate.granularity" in trial.values) == gated
        assert trial.values["model.ffn.num_experts"] in range(4, 33, 4)
        assert 1e-4 <= trial.values["balance.loss_weight"] <= 1e-1
    assert sweep.queue.stopped_by == ""


def test_tpe_finds_what_chance_does_not(begin: Callable[..., Toy]) -> None:
    found = {}
    for searcher in ("tpe", "random"):
        given = begin(f"{searcher}-1", searcher=searcher, trials=40, seed=1).run(99)
        found[searcher] = sorted(toy(trial) for trial in given)
    assert found["tpe"][0] <= found["random"][0]
    assert sum(found["tpe"][:15]) < sum(found["random"][:15]) - 5, found


def test_nsga2_weighs_the_metric_against_the_first_budget(begin: Callable[..., Toy]) -> None:
    """It keeps few experts, which cost little, and many, which the metric likes, and finds the loss weight for both."""
    off, costs = {}, {}
    for searcher in ("nsga2", "random"):
        sweep = begin(
            f"{searcher}-1", searcher=searcher, trials=60, random_share=0.2, budgets=["total_params<=1M"], seed=3
        )
        later = sweep.run(99)[-24:]
        costs[searcher] = [QUANTITIES["total_params"].of(sweep.space.at(trial.values).job) for trial in later]
        off[searcher] = sum(abs(math.log(trial.values["balance.loss_weight"] / 0.01)) for trial in later) / len(later)
    assert off["nsga2"] < 0.6 * off["random"]
    assert sum(cost < 60e3 for cost in costs["nsga2"]) >= 3, "a searcher of the metric alone would leave these"
    assert max(costs["nsga2"]) > 2 * min(costs["nsga2"])


def test_the_predictor_finds_more_of_the_front_than_chance(begin: Callable[..., Toy]) -> None:
    share, off = {}, {}
    for searcher in ("predictor", "random"):
        sweep = begin(f"{searcher}-1", searcher=searcher, trials=32, budgets=["total_params<=1M"], seed=2)
        given = sweep.run(99)[1:]
        points = [(QUANTITIES["total_params"].of(sweep.space.at(t.values).job), toy(t)) for t in given]
        share[searcher] = hypervolume(points, (140e3, 1.5))
        off[searcher] = sum(abs(math.log(trial.values["balance.loss_weight"] / 0.01)) for trial in given[-12:])
    assert share["predictor"] > 1.1 * share["random"], share
    assert off["predictor"] < 0.75 * off["random"], off


def test_the_predictor_looks_for_the_best_alone_where_all_cost_the_same(
    begin: Callable[..., Toy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.tune.searchers.predictor._CANDIDATES", 32)  # each is solved for
    space = {path: SPACE[path] for path in ("model.ffn.num_experts", "balance.loss_weight")}
    solve = {"path": "model.ffn.expert_dim", "largest": 512}
    search = {"space": space, "budgets": ["active_params==120k"], "solve": solve}
    best = {}
    for searcher in ("predictor", "random"):
        sweep = begin(f"{searcher}-1", searcher=searcher, trials=16, seed=1, **search)
        best[searcher] = sorted(toy(trial) for trial in sweep.run(99) if trial.number > 4)[:6]
    assert sum(best["predictor"]) < sum(best["random"]) - 1, best


def test_what_the_predictor_proposes_hangs_on_what_it_was_told_alone(
    begin: Callable[..., Toy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep in one go, one killed on the way, and one whose metric is large where the others' is small."""
    monkeypatch.setattr("tidegate.tune.searchers.predictor._CANDIDATES", 16)
    whole = begin("whole-1", searcher="predictor").run(99)
    begin("killed-1", searcher="predictor").run(9)
    killed = begin("killed-1", searcher="predictor")
    killed.run(99)
    assert [result.trial for result in killed.folder.results()] == whole
    largest = begin("largest-1", searcher="predictor", mode="max")
    while (trial := largest.queue.next()) is not None:
        largest.end(trial, better_by=2 * toy(trial))
    assert [result.trial for result in largest.folder.results()] == whole
    assert begin("other-1", searcher="predictor", seed=1).run(99) != whole


def test_the_predictor_keeps_away_from_what_failed(begin: Callable[..., Toy]) -> None:
    """All fail beyond a balance loss of 0.003, where the toy would be best. It knows random trials alone, and not what
    came of its own proposals: a last digit in one of them would lead to others in all later ones."""
    sweep = begin(told={"concurrent": 15}, searcher="predictor", trials=50, random_share=0.7)
    proposed = []
    while (trial := sweep.queue.next()) is not None:
        weight = trial.values.get("balance.loss_weight", 0)
        if trial.kind == "searched":
            proposed.append(weight)
        else:
            sweep.end(trial, "failed" if weight > 0.003 else "finished")
    assert len(proposed) == 15
    assert sum(weight <= 0.003 for weight in proposed) >= 13, proposed


@pytest.mark.parametrize("searcher", ["random", "tpe", "nsga2", "predictor"])
def test_a_sweep_that_was_killed_goes_on_with_what_was_under_way_and_knows_what_ended(
    begin: Callable[..., Toy], searcher: str
) -> None:
    killed = begin(searcher=searcher)
    first = killed.run(9, concurrent=3)
    left = {result.trial.number for result in killed.folder.results() if not result.ended}
    assert len(left) == 2
    resumed = begin(searcher=searcher)
    again = resumed.run(99)
    assert {trial.number for trial in again[:2]} == left
    assert all(trial in first for trial in again[:2])
    results = resumed.folder.results()
    assert [result.trial.number for result in results] == list(range(17))
    assert all(result.status == "finished" for result in results)
    assert len({resumed.space.key(result.trial.values) for result in results}) == 17
    if isinstance(resumed.searcher, OptunaSearcher):
        study = resumed.searcher._study
        complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
        assert sorted(trial.values[0] for trial in complete) == sorted(
            r.value for r in results[1:] if r.value is not None
        )
    assert begin(searcher=searcher).run(99) == []


def test_trials_that_failed_are_not_tried_again_and_teach_nothing(begin: Callable[..., Toy]) -> None:
    sweep = begin(searcher="tpe", trials=8)
    given = sweep.run(99, status="failed")
    assert len(given) == 9
    assert isinstance(sweep.searcher, OptunaSearcher)
    assert not [t for t in sweep.searcher._study.trials if t.state.name == "COMPLETE"]
    assert begin(searcher="tpe", trials=8).run(99) == []


def test_a_space_that_is_used_up_ends_the_search(begin: Callable[..., Toy]) -> None:
    sweep = begin(searcher="tpe", space={"model.ffn.top_k": {"choice": [2, 3, 4]}}, trials=8, random_share=0.2)
    assert [trial.kind for trial in sweep.run(99)] == ["base", "random", "random", "searched"]
    assert "proposed nothing new" in sweep.queue.stopped_by
    assert sweep.queue.most == 5


def test_no_trial_begins_that_would_lead_beyond_max_tokens(begin: Callable[..., Toy]) -> None:
    """Of 6144 tokens each; three reruns of finalists must fit too."""
    limits = {"seeds": 2, "finalists": 1, "max_tokens": 6144 * 8 + 1}
    assert len(begin(searcher="tpe", **limits).run(99, concurrent=2)) == 5
    resumed = begin(searcher="tpe", **limits)
    assert len(resumed.run(99)) == 1, "the one that was under way"
    assert "search.max_tokens=49153 is reached" in resumed.queue.stopped_by
    more = begin(searcher="tpe", **{**limits, "max_tokens": 6144 * 9})
    assert len(more.run(99)) == 1


def test_no_trial_begins_that_is_expected_to_end_after_max_minutes(begin: Callable[..., Toy]) -> None:
    """Trials take a minute; two rounds of reruns are kept free."""
    now = [0.0]
    limits = {"seeds": 2, "finalists": 2, "max_minutes": 10}
    sweep = begin(**limits, told={"concurrent": 2, "clock": lambda: now[0]})
    given = 0
    while sweep.run(1):
        given, now[0] = given + 1, now[0] + 60
    assert given == 8
    assert "search.max_minutes=10 is reached" in sweep.queue.stopped_by


def test_no_trial_begins_that_would_lead_beyond_max_money(begin: Callable[..., Toy]) -> None:
    """Trials take a minute on one worker, which costs 1; two reruns are kept free."""
    limits: dict[str, Any] = {"seeds": 2, "finalists": 1, "price": 60, "max_money": 8.5}
    assert len(begin(**limits).run(99)) == 6
    resumed = begin(**limits)
    assert resumed.run(99) == []
    assert "search.max_money=8.5 is reached" in resumed.queue.stopped_by
    assert len(begin(**{**limits, "max_money": 10.5}).run(99, concurrent=2)) == 2, "the other is still under way"
    with pytest.raises(ConfigError, match=r"search\.max_money=3 needs resources\.price_per_hour"):
        begin("free-1", max_money=3)
    with pytest.raises(ConfigError, match=r"search\.max_cost: is called search\.max_money now"):
        begin("old-1", max_cost=3)


def test_finalists_run_again_once_each_and_none_that_was_stopped(begin: Callable[..., Toy]) -> None:
    sweep = begin(searcher="tpe", finalists=2, seeds=3, trials=8)
    for trial in sweep.run(9, concurrent=99):
        sweep.end(trial, "stopped" if trial.number == 7 else "finished")
    again = finalists(sweep.space, sweep.folder)
    results = sweep.folder.results()
    ranked = sorted((r for r in results if r.status == "finished"), key=lambda result: toy(result.trial))
    best_random = next(result for result in ranked if result.trial.kind == "random")
    wanted = {sweep.space.key(r.trial.values) for r in (*ranked[:2], best_random, results[0])}
    assert {(sweep.space.key(trial.values), trial.seed) for trial in again} == {(k, s) for k in wanted for s in (1, 2)}
    assert min(trial.number for trial in again) == 9
    sweep.end(again[1])
    assert finalists(sweep.space, sweep.folder)[1] == again[1]
    more = finalists(sweep.space, sweep.folder)
    assert len({trial.number for trial in more}) == len(more)


def test_the_best_is_so_over_its_seeds(begin: Callable[..., Toy]) -> None:
    """A value that the other seeds do not confirm wins nothing, and neither do candidates with one seed."""
    sweep = begin(searcher="random", finalists=2, seeds=3, trials=8)
    for trial in sweep.run(99, concurrent=99):
        sweep.end(trial, better_by=20 * (trial.number in (1, 2)) + 10 * (trial.number == 1))
    lucky = sweep.folder.result(1).trial.values
    for trial in finalists(sweep.space, sweep.folder):
        sweep.end(trial, better_by=-60 if trial.values == lucky else 20 * bool(trial.values))
    report(sweep.folder, sweep.space, Console(quiet=True))
    text = (sweep.folder.folder / "report.md").read_text()
    assert re.search(r"trial 2 beats the job as it stands \(trial 0\) by more than 4\.3 standard errors", text)
    assert re.search(r"trial 2 .*beat.* the runner-up \(trial 0\)", text)
    assert (sweep.folder.folder / "best.yaml").read_text().startswith("# The best of sweep toy-1: trial 2, ")


def test_the_report_says_what_mattered_and_how_chance_did(begin: Callable[..., Toy]) -> None:
    sweep = begin(searcher="tpe", seeds=2, trials=12)
    for trial in sweep.run(99, concurrent=99):
        sweep.end(trial, better_by=20 * (trial.kind == "searched"))
    for trial in finalists(sweep.space, sweep.folder):
        sweep.end(trial)
    report(sweep.folder, sweep.space, Console(quiet=True), ["a note"])
    text = (sweep.folder.folder / "report.md").read_text()
    assert re.search(r"importance for val/loss .*: (balance|model)\..* 0\.", text)
    assert re.search(r"the best random trial: [123], ", text)
    assert re.search(r"the best random trial \(trial [123]\) by more than .* over 2 paired seeds", text)
    assert "a note" in text
    best = min((r for r in sweep.folder.results() if r.trial.seed == 0), key=lambda result: result.value or 0)
    found = load(sweep.folder.folder / "best.yaml", Job).config
    assert found.model == sweep.space.at(best.trial.values).job.model
    page = (sweep.folder.folder / "front.html").read_text(encoding="utf-8")
    assert page.count("loss_weight: ") >= 12


def test_conditions_that_go_round_are_refused(tiny_job: Callable[..., Path]) -> None:
    space = {"a.b": {"choice": [1], "when": {"a.c": [1]}}, "a.c": {"choice": [1], "when": {"a.b": [1]}}}
    with pytest.raises(ConfigError, match="`when` goes round: a"):
        Space(tiny_job(search={"space": space}))


def test_what_the_metric_hangs_on_is_the_important_one(begin: Callable[..., Toy]) -> None:
    sweep = begin(trials=30)
    sweep.run(99)
    found = importances(sweep.space, sweep.folder.results())
    assert next(iter(found)) == "balance.loss_weight"
    assert found["balance.loss_weight"] > 0.8
    assert sum(found.values()) == pytest.approx(1)
    assert "model.attention.gate.granularity" not in found
    assert importances(sweep.space, sweep.folder.results()[:8]) == {}, "seven candidates and the job as it stands"
