"""What a population decides on invented values, and a real one on Ray: killed, resumed, and looked at."""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tidegate.config import ConfigError, load
from tidegate.launch.state import StateDir
from tidegate.train.checkpoint_store import TRACKER, CheckpointStore
from tidegate.train.job import Job
from tidegate.train.storage import Storage
from tidegate.tune.population import decide, recipe, rounds, schedule_of
from tidegate.tune.space import Space
from tidegate.tune.sweep import drawn_trials
from tidegate.tune.trials import Phase, Result, Trial

PEAK, WEIGHT = "optimizer.schedule.peak", "balance.loss_weight"
SEARCH: dict[str, Any] = {
    "space": {PEAK: {"log": [1e-4, 1e-1]}, WEIGHT: {"choice": [0.0, 0.01, 0.1]}},
    "trials": 12,
    "scheduler": "pbt",
    "exploit_every": 1024,
}


@pytest.fixture
def space(tiny_job: Callable[..., Path]) -> Space:
    return Space(tiny_job(search=SEARCH))


def after_a_round(space: Space, values: dict[int, float]) -> list[Result]:
    """Members that came to these values; one without has failed."""
    members = [trial for trial in drawn_trials(space) if trial.kind == "member"]
    done = []
    for trial in members:
        value = values.get(trial.number)
        evaluations = ((512, 9.0), (1024, value)) if value is not None else ((512, 9.0),)
        status = "failed" if value is None else "paused"
        done.append(Result(trial=trial, run=f"r-{trial.number}", status=status, evaluations=evaluations))
    return done


def test_rounds_are_of_as_many_tokens_and_the_last_ends_the_run(space: Space) -> None:
    assert rounds(space.base) == [(n * 1024, (n + 1) * 1024) for n in range(6)]
    short = space.base.model_copy(update={"train": space.base.train.model_copy(update={"tokens": 2500})})
    assert rounds(short) == [(0, 1024), (1024, 2048), (2048, 2500)]


def test_a_quarter_of_trials_is_random_and_the_rest_a_population(space: Space) -> None:
    trials = drawn_trials(space)
    assert [trial.kind for trial in trials] == ["base"] + ["random"] * 3 + ["member"] * 9
    assert all(t.phases == (Phase(begin=0, end=1024, values=t.values),) for t in trials if t.kind == "member")


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("seed", range(20))
def test_the_worst_quarter_and_who_failed_go_on_from_the_best_quarter_with_values_near_theirs(
    tiny_job: Callable[..., Path], mode: str, seed: int
) -> None:
    space = Space(tiny_job(search={**SEARCH, "mode": mode, "seed": seed}))
    sign = 1 if mode == "min" else -1
    members = after_a_round(space, {number: sign * float(number) for number in (4, 5, 6, 8, 9, 10, 11, 12)})
    phases = decide(space, members, 1)
    assert {number for number, phase in phases.items() if phase.parent is not None} == {7, 11, 12}
    assert {phases[number].parent for number in (7, 11, 12)} <= {4, 5}
    first = {member.trial.number: member.trial.values for member in members}
    for number, phase in phases.items():
        assert (phase.begin, phase.end) == (1024, 2048)
        if phase.parent is None:
            assert phase.values == first[number]
        else:
            assert 1e-4 <= phase.values[PEAK] <= 1e-1
            assert phase.values[WEIGHT] in (0.0, 0.01, 0.1)
    assert decide(space, members, 1) == phases
    begun = members[0].model_copy(update={"tokens": 1536, "evaluations": (*members[0].evaluations, (1536, 99.0))})
    assert decide(space, [begun, *members[1:]], 1) == phases, "what comes later decides nothing"


def test_values_are_moved_by_a_factor_or_to_a_neighbour_and_now_and_then_drawn_anew(
    tiny_job: Callable[..., Path],
) -> None:
    moved = drawn = same = total = 0
    for seed in range(30):
        space = Space(tiny_job(search={**SEARCH, "seed": seed}))
        members = after_a_round(space, {number: float(number) for number in range(4, 13)})
        for phase in decide(space, members, 1).values():
            if phase.parent is None:
                continue
            before = next(m.trial.values for m in members if m.trial.number == phase.parent)
            clipped = [min(max(before[PEAK] * factor, 1e-4), 1e-1) for factor in (0.8, 1.25)]
            total, moved = total + 1, moved + (phase.values[PEAK] in clipped)
            drawn += phase.values[PEAK] not in clipped
            same += phase.values == before
    assert total == 90
    assert 0.65 < moved / total < 0.85
    assert drawn == total - moved
    assert same < 0.05 * total


def test_a_population_that_failed_as_a_whole_decides_nothing_and_one_that_is_left_helps_all(space: Space) -> None:
    assert decide(space, after_a_round(space, {}), 1) == {}
    phases = decide(space, after_a_round(space, {9: 3.0}), 1)
    assert {number: phase.parent for number, phase in phases.items()} == {
        n: None if n == 9 else 9 for n in range(4, 13)
    }
    unborn = [m.model_copy(update={"run": ""}) if m.trial.number == 4 else m for m in after_a_round(space, {9: 3.0})]
    assert 4 not in decide(space, unborn, 1), "it has no run that could go on"


def member(number: int, *phases: tuple[float, int | None], **told: Any) -> Result:
    made = tuple(
        Phase(begin=1024 * place, end=1024 * (place + 1), values={PEAK: peak}, parent=parent)
        for place, (peak, parent) in enumerate(phases)
    )
    trial = Trial(number=number, values=made[0].values, seed=0, kind="member", phases=made)
    return Result(trial=trial, run=f"r-{number}", status="paused", **told)


def test_a_schedule_is_that_of_the_line_of_parents_and_equal_stretches_are_one() -> None:
    found = [
        member(1, (0.1, None), (0.1, None), (0.4, 2)),
        member(2, (0.2, None), (0.3, 3), (0.3, None)),
        member(3, (0.5, None), (0.5, None), (0.5, None)),
    ]
    lines = {
        r.trial.number: [(p.begin, p.end, p.values[PEAK], p.parent) for p in schedule_of(r.trial, found)] for r in found
    }
    assert lines[1] == [(0, 1024, 0.5, None), (1024, 2048, 0.3, 3), (2048, 3072, 0.4, 2)]
    assert lines[2] == [(0, 1024, 0.5, None), (1024, 3072, 0.3, 3)]
    assert lines[3] == []
    plain = Trial(number=9, values={PEAK: 0.5}, seed=3, kind="seed")
    assert recipe(plain, found) == recipe(found[2].trial, found) != recipe(found[1].trial, found)
    again = Trial(number=9, values={PEAK: 0.5}, seed=3, kind="seed", phases=schedule_of(found[1].trial, found))
    assert recipe(again, found) == recipe(found[1].trial, found)


def test_the_phase_of_a_rerun_follows_its_tokens_and_of_a_member_its_file() -> None:
    phases = member(1, (0.1, None), (0.2, None)).trial.phases
    rerun = Trial(number=1, values=phases[0].values, seed=1, kind="seed", phases=phases)
    for tokens, place in ((0, 0), (1023, 0), (1024, 1), (2048, 1)):
        assert Result(trial=rerun, run="r", status="paused", tokens=tokens).phase == phases[place]
    assert member(1, (0.1, None), (0.2, 3), tokens=300).phase == Phase(
        begin=1024, end=2048, values={PEAK: 0.2}, parent=3
    ), "it failed before the first one ended"


@pytest.mark.parametrize(
    ("search", "problem"),
    [
        ({"exploit_every": None}, "exploit_every=None: .* needs rounds of a multiple of train.batch_tokens=512"),
        ({"exploit_every": 1000}, "exploit_every=1000: .* multiple of train.batch_tokens=512, less than"),
        ({"exploit_every": 6144}, "exploit_every=6144: .* less than train.tokens=6144"),
        (
            {"space": {"model.ffn.top_k": {"choice": [1, 2]}}},
            "space.model.ffn.top_k cannot change in the middle of a run",
        ),
        ({"searcher": "tpe"}, "searcher=tpe: the population of search.scheduler=pbt is drawn at random"),
        ({"metric": "train/loss"}, "metric=train/loss is not of evaluations"),
        ({"trials": 2}, "trials=2 leaves 1 for the population beside 1 random"),
        ({"scheduler": "asha"}, "exploit_every=1024 is of search.scheduler=pbt, not asha"),
    ],
)
def test_a_population_that_cannot_be_is_refused(
    tiny_job: Callable[..., Path], search: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        Space(tiny_job(search={**SEARCH, **search}))


def test_a_pause_is_not_for_sweeps(tiny_job: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"train\.pause_at_tokens=512 would pause every trial"):
        Space(tiny_job(search=SEARCH, train={"pause_at_tokens": 512}))


@pytest.mark.ray
@pytest.mark.slow
def test_a_population_that_was_killed_goes_on_and_its_heir_wins(sweeps: Any, tiny_job: Callable[..., Path]) -> None:
    """Of the members, at 1e-4 and 1e-6, the second goes on from the first at 5e-3, the only rate that learns much."""
    search = {
        "space": {PEAK: {"choice": [1e-6, 1e-5, 1e-4, 5e-3]}},
        "trials": 3,
        "random_share": 0.3,
        "scheduler": "pbt",
        "exploit_every": 2048,
        "finalists": 1,
        "seeds": 2,
        "seed": 4,
    }
    job = tiny_job(
        search=search,
        train={"tokens": 4096},
        optimizer={"schedule": {"kind": "cosine", "peak": 1e-6, "warmup_tokens": 512}},
        checkpoint={"every": 1, "keep_last": 99},
    )
    sweeps.kill_when(job, lambda result: len(result["trial"]["phases"]) == 2 and result["status"] == "running")
    before = sweeps.results()
    done = subprocess.run(sweeps.command("tune", "--resume", "tiny-1"), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    after = sweeps.results()
    assert {result["status"] for result in after.values()} == {"finished"}
    assert [after[n]["trial"]["kind"] for n in sorted(after)] == ["base", "random", "member", "member", *["seed"] * 3]
    for number, result in before.items():
        assert after[number]["evaluations"][: len(result["evaluations"])] == result["evaluations"]
        assert after[number]["trial"] == result["trial"]
    taken = [(n, p["parent"]) for n in after for p in after[n]["trial"]["phases"] if p["parent"] is not None]
    assert taken == [(3, 2)]
    assert [phase["values"][PEAK] for phase in after[3]["trial"]["phases"]] == [1e-6, 5e-3]

    state = StateDir(sweeps.state)
    stores = {n: CheckpointStore(Storage(state.run(after[n]["run"]).read().checkpoints)) for n in (2, 3)}
    (heir,), (parent,) = (
        [entry.manifest for entry in stores[n].valid() if entry.manifest and entry.manifest.tokens == 2048]
        for n in (3, 2)
    )
    weights_and_moments = [file for file in parent.files if file != TRACKER]
    assert any("optim" in file for file in weights_and_moments)
    assert all(heir.files[file] == parent.files[file] for file in weights_and_moments)
    assert min(entry.step for entry in stores[3].valid()) == 4, "of its own weights nothing is left"

    report = (sweeps.folder / "report.md").read_text()
    assert "members went on from better ones' weights 1 times" in report
    assert "trial 3 is a schedule: best.yaml begins it, then" in report
    command = "tidegate train --resume RUN --set optimizer.schedule.peak=0.005 --set train.pause_at_tokens=null"
    assert f"at 2048 tokens (the weights were trial 2's): {command}" in report
    assert "over 2 paired seeds" in report
    best = load(sweeps.folder / "best.yaml", Job).config
    assert (best.optimizer.schedule.peak, best.train.pause_at_tokens) == (1e-4, 2048)

    rerun = next(r for r in after.values() if r["trial"]["kind"] == "seed" and r["trial"]["phases"])
    assert [phase["values"][PEAK] for phase in rerun["trial"]["phases"]] == [1e-4, 5e-3]
    with closing(sqlite3.connect(sweeps.state / "mlflow" / "mlflow.db")) as database:
        schedule = best.optimizer.schedule.model_copy(update={"peak": 5e-3})
        query = "select step, value from metrics where key = 'train/learning_rate' and run_uuid = ?"
        for result in (after[3], rerun):
            run_id = state.run(result["run"]).read().run_id
            rates = dict(database.execute(query, [run_id]).fetchall())
            for step in range(5, 9):
                assert rates[step] == pytest.approx(schedule.at(512 * step, 4096))
        tag = "select value from tags where key = 'tidegate.from_tokens.2048'"
        assert database.execute(tag).fetchall() == [(f"weights of trial 2 ({after[2]['run']}), {PEAK}=0.005",)]
