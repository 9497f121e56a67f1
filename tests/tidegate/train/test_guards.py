"""Verdicts on steps, and whole runs with planted faults that go on, go back, or end."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tidegate.config import ConfigError, load
from tidegate.data import prepare
from tidegate.parallel import collectives
from tidegate.parallel.engine import Engine
from tidegate.train import loop
from tidegate.train.guards import GuardsConfig, Judge, SpikeConfig, TrainingDiverged
from tidegate.train.job import Job
from tidegate.train.loop import Outcome, World, train
from tidegate.train.telemetry import Record


def judge(**settings: Any) -> tuple[Judge, list[str]]:
    lines: list[str] = []
    return Judge(GuardsConfig(**settings), lines.append), lines


def test_a_spike_counts_once_and_does_not_move_the_limit_away() -> None:
    watched, lines = judge()
    noise = random.Random(0)
    for step in range(400):
        loss = 3.0 + noise.gauss(0, 0.01) + (0.5 if step in (100, 101, 250) else 0.0)
        assert watched.judge(step, loss, 1.0) == "go on"
    assert watched.state.steps == 400
    assert 3 <= watched.state.spikes == len(lines) <= 4, "noise passes 4 deviations once in 30,000 steps"
    assert watched.state.mean == pytest.approx(3.0, abs=0.01)
    assert math.sqrt(watched.state.variance) == pytest.approx(0.01, rel=0.5)
    assert lines[0].startswith("step 100: the loss is 3.48")


def test_a_falling_loss_is_no_spike() -> None:
    watched, _ = judge(spikes=SpikeConfig(action="rollback"))
    assert {watched.judge(step, 8.0 * math.exp(-step / 50), 1.0) for step in range(300)} == {"go on"}


@pytest.mark.parametrize(("action", "verdict"), [("skip_batches", "skip ahead"), ("rollback", "repeat")])
def test_a_spike_goes_back_as_the_job_says_and_so_many_times(action: Any, verdict: str) -> None:
    watched, _ = judge(spikes=SpikeConfig(action=action), rollbacks=2)
    for step in range(50):
        watched.judge(step, 3.0 + 0.01 * (step % 2), 1.0)
    assert [watched.judge(50, 9.0, 1.0), watched.judge(50, 9.0, 1.0)] == [verdict] * 2
    with pytest.raises(TrainingDiverged, match=r"^step 51: the loss is 9.0000, above .*guards.rollbacks=2"):
        watched.judge(51, 9.0, 1.0)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (3.0, math.inf), (math.inf, math.nan)])
def test_steps_that_are_not_finite_are_counted_and_teach_nothing(loss: float, norm: float) -> None:
    watched, _ = judge(nonfinite_steps=3)
    watched.judge(1, 3.0, 1.0)
    before = watched.state
    assert [watched.judge(2, loss, norm), watched.judge(3, loss, norm)] == ["go on"] * 2
    assert watched.state == before._replace(nonfinite=2, in_row=2)
    assert watched.judge(4, 3.0, 1.0) == "go on"  # the row is broken
    assert [watched.judge(step, loss, norm) for step in (5, 6, 7)] == ["go on", "go on", "skip ahead"]
    assert watched.metrics() == {"train/loss_spikes": 0, "guards/nonfinite_steps": 5, "guards/rollbacks": 1}


# --- whole runs --------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    steps: list[int]
    """That were taken, in order."""
    data: list[int]
    """What each of them read, as a number."""
    lines: list[str]
    metrics: list[dict[str, float]]
    """Of the records, rank 0 has them."""
    ended: Outcome | str
    """An error, if it ended with one."""

    def values(self, name: str) -> list[float]:
        return [metrics[name] for metrics in self.metrics if name in metrics]


Fault = Callable[[Engine, int], None]
"""Gets the engine before each step, and the number of steps taken before."""


def run_with(fault: Fault | None, folder: Path, job_file: Path, overrides: list[str]) -> Result:
    job: Job = load(job_file, Job, overrides).config
    dataset = prepare(job.data, cache_dir=folder.parent / "data", job_dir=job_file.parent)
    result = Result([], [], [], [], "")
    real = loop.train_step

    def planted(engine: Engine, balancer: Any, batch: Any, clock: Any, **keywords: Any) -> Any:
        if fault is not None and collectives.rank() == collectives.world_size() - 1:
            fault(engine, len(result.steps))
        result.steps.append(clock.step)
        result.data.append(int(batch.tokens_MBT1.sum()))
        return real(engine, balancer, batch, clock, **keywords)

    def record(record: Record) -> None:
        result.metrics.append(record.metrics)

    loop.train_step = planted  # type: ignore[assignment]
    try:
        outcome = train(job, World(dataset, str(folder), record, result.lines.append, lambda: False))
        return result._replace(ended=outcome)
    except (ConfigError, TrainingDiverged) as error:
        return result._replace(ended=str(error))
    finally:
        loop.train_step = real


def infinite_gradients(at: set[int]) -> Fault:
    def fault(engine: Engine, taken: int) -> None:
        while hooks:
            hooks.pop().remove()
        if taken in at:
            weight = engine.model.blocks[0].attention.wq.weight
            hooks.append(weight.register_hook(lambda gradient: gradient * torch.inf))

    hooks: list[Any] = []
    return fault


def flipped_weights(at: int) -> Fault:
    """What broken hardware may do."""

    def fault(engine: Engine, taken: int) -> None:
        if taken == at:
            with torch.no_grad():
                engine.model.norm.weight.mul_(50.0)

    return fault


def runs(folder: Path, job_file: Path) -> dict[str, Result]:
    repeat = ["train.tokens=15360", "guards.spikes.action=rollback"]
    cases: dict[str, tuple[Fault | None, list[str]]] = {
        "infinite": (infinite_gradients({3, 6, 7, 8}), []),
        "flipped": (flipped_weights(at=24), repeat),
        "undisturbed": (None, repeat),
        "no checkpoint": (infinite_gradients({0}), ["checkpoint.every=100", "guards.nonfinite_steps=1"]),
    }
    return {name: run_with(fault, folder / name, job_file, more) for name, (fault, more) in cases.items()}


def test_runs_with_planted_faults_go_on_go_back_or_end(
    tmp_path: Path, tiny_job: Callable[..., Path], on_ranks: Callable[..., list[Any]]
) -> None:
    """Faults are on the last rank of two; both come to the same verdicts."""
    both = on_ranks(2, runs, tmp_path, tiny_job(resources={"workers": 2}, parallel={"expert": 2}))
    assert [result.steps for result in both[0].values()] == [result.steps for result in both[1].values()]
    infinite, flipped, undisturbed, no_checkpoint = both[0].values()

    # Step 4 changes nothing; steps 7 to 9 neither, the run goes back to step 6, and one more step was under way.
    assert infinite.steps == [*range(1, 11), *range(7, 13)]
    assert len(set(infinite.data)) == len(infinite.data), "no data comes twice"
    assert infinite.lines[-1] == "the run goes back to step 6 and leaves out the data since"
    assert sum("it changed nothing" in line for line in infinite.lines) == 3
    assert infinite.values("guards/nonfinite_steps")[-1] == 4
    assert infinite.values("guards/rollbacks")[-1] == 1

    # What was trained on is there to be looked at.
    kept = sorted(path.relative_to(tmp_path / "infinite").as_posix() for path in tmp_path.glob("infinite/replay/*/*"))
    assert kept == [f"replay/batch_{n:08d}/rank_{rank:05d}.pt" for n in (4, 7, 8, 9) for rank in (0, 1)]
    batch = torch.load(tmp_path / "infinite" / kept[-1], weights_only=True)
    assert (batch["step"], int(batch["tokens_MBT1"].sum())) == (9, both[1]["infinite"].data[8])

    # The same data again, as if there had been no fault.
    assert flipped.steps == [*range(1, 27), *range(25, 31)]
    assert flipped.lines[-1] == "the run goes back to step 24 with the same data"
    assert flipped.values("train/loss")[-6:] == undisturbed.values("train/loss")[-6:]
    assert flipped.values("val/loss") == undisturbed.values("val/loss")
    assert flipped.values("train/loss_spikes")[-1] == 1

    assert isinstance(no_checkpoint.ended, str)
    assert "no checkpoint to go back to yet; lower checkpoint.every=100" in no_checkpoint.ended
