"""Hours and money of a run, by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tidegate.config import ConfigError, load
from tidegate.launch.cost import Ledger, Meter
from tidegate.train.job import Job
from tidegate.train.limits import LimitsConfig, Spent
from tidegate.train.telemetry import Record


class Clock:
    """Of hours that a test lets pass."""

    def __init__(self) -> None:
        self.hours = 5.0

    def __call__(self) -> float:
        return 3600 * self.hours


def approx(**values: float | None) -> Any:
    return pytest.approx({"hours": 0.0, "gpu_hours": 0.0, "money": None, **values})


def test_workers_cost_while_they_are_there() -> None:
    clock = Clock()
    meter = Meter(Spent(hours=1, gpu_hours=3, money=7), 2.5, clock=clock)
    clock.hours += 9  # before there are workers
    meter.set_workers(3)
    clock.hours += 0.5
    assert meter.read().model_dump() == approx(hours=1.5, gpu_hours=4.5, money=7 + 2.5 * 1.5)
    clock.hours += 0.5
    meter.set_workers(0)  # lost
    clock.hours += 100
    meter.set_workers(1)
    clock.hours += 2
    assert meter.read().model_dump() == approx(hours=4, gpu_hours=8, money=7 + 2.5 * 5)
    marked = meter.mark(Record(4, 2048, {"train/loss": 1.0}))
    wanted = {"train/loss": 1.0, "cost/hours": 4, "cost/gpu_hours": 8, "cost/money": 19.5}
    assert marked == (4, 2048, pytest.approx(wanted), None)


def test_a_part_of_a_gpu_costs_a_part() -> None:
    clock = Clock()
    meter = Meter(Spent(), 4, share=0.25, clock=clock)
    meter.set_workers(1)
    clock.hours += 3
    assert meter.read().model_dump() == approx(hours=3, gpu_hours=0.75, money=3)


def test_without_a_price_there_are_hours_alone_and_hours_of_before_get_none() -> None:
    clock = Clock()
    meter = Meter(Spent(), None, clock=clock)
    meter.set_workers(2)
    clock.hours += 1
    free = meter.read()
    assert free.model_dump() == approx(hours=1, gpu_hours=2)
    assert free.metrics() == pytest.approx({"cost/hours": 1, "cost/gpu_hours": 2})
    priced = Meter(free, 3, clock=clock)
    priced.set_workers(2)
    clock.hours += 1
    assert priced.read().model_dump() == approx(hours=2, gpu_hours=4, money=6)


def test_a_limit_is_reached_at_its_value_and_money_only_where_there_is_some() -> None:
    limits = LimitsConfig(max_hours=2, max_gpu_hours=16, max_money=30)
    assert limits.reached(Spent(hours=1.9, gpu_hours=15.9, money=29.9)) == ""
    assert limits.reached(Spent(hours=2, gpu_hours=15.9)) == "limits.max_hours=2"
    assert limits.reached(Spent(gpu_hours=16)) == "limits.max_gpu_hours=16"
    assert limits.reached(Spent(money=30.1)) == "limits.max_money=30"
    assert LimitsConfig().reached(Spent(hours=9e9, gpu_hours=9e9, money=9e9)) == ""


@pytest.fixture
def job(tiny_job: Callable[..., Path]) -> Callable[..., Job]:
    def read(**limits: float) -> Job:
        loaded: Job = load(tiny_job(limits=limits, resources={"price_per_hour": 2.0, "gpu": True}), Job).config
        return loaded

    return read


def test_the_ledger_goes_where_the_checkpoints_are(job: Callable[..., Job], tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "run"), job(max_gpu_hours=3))
    assert not ledger.take(Spent(hours=1, gpu_hours=2, money=4))
    assert json.loads((tmp_path / "run" / "cost.json").read_text())["gpu_hours"] == 2, "at once the first time"
    assert not ledger.take(Spent(hours=1.2, gpu_hours=2.4, money=4.8))
    assert json.loads((tmp_path / "run" / "cost.json").read_text())["gpu_hours"] == 2, "but not every half second"
    assert not ledger.take(Spent(hours=1.1, gpu_hours=2.2, money=4.4)), "it never goes down"
    ledger.write()
    (tmp_path / "run").rename(tmp_path / "moved")
    there = Ledger(str(tmp_path / "moved"), job(max_gpu_hours=3))
    assert there.spent == Spent(hours=1.2, gpu_hours=2.4, money=4.8)
    assert there.meter().read() == there.spent
    assert there.in_words() == "2.4 GPU-hours, 4.8 in money"
    assert there.take(Spent(hours=1.6, gpu_hours=3.2, money=6.4))
    assert there.limit == "limits.max_gpu_hours=3"
    there.write()
    with pytest.raises(ConfigError) as refused:
        Ledger(str(tmp_path / "moved"), job(max_gpu_hours=3))
    assert str(refused.value) == (
        "limits.max_gpu_hours=3 is reached: the run has cost 3.2 GPU-hours, 6.4 in money so far; raise it with --set "
        "limits.max_gpu_hours=..."
    )


def test_a_ledger_that_cannot_be_read_is_named_and_one_that_cannot_be_written_ends_no_run(
    job: Callable[..., Job], tmp_path: Path
) -> None:
    (tmp_path / "cost.json").write_text('{"gpu_hours": -1}')
    with pytest.raises(ConfigError, match=r"cost\.json: gpu_hours: .*-1"):
        Ledger(str(tmp_path), job())
    (tmp_path / "file").write_text("")
    said: list[str] = []
    ledger = Ledger(str(tmp_path / "run"), job(max_hours=1), notice=said.append)
    (tmp_path / "run").write_text("no folder")
    assert not ledger.take(Spent(hours=0.5, gpu_hours=0.5))
    ledger.write()
    (line,) = said
    assert line.startswith("what the run costs is not kept for the next start: ")
    assert ledger.take(Spent(hours=1, gpu_hours=1)), "limits hold all the same"


def test_money_needs_a_price(tiny_job: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"limits\.max_money=5 needs resources\.price_per_hour, what a worker costs"):
        load(tiny_job(limits={"max_money": 5}), Job)
    with pytest.raises(ConfigError, match=r"resources\.price_per_hour: .*0"):
        load(tiny_job(resources={"price_per_hour": 0}), Job)
    with pytest.raises(ConfigError, match=r"limits\.max_cost: unknown field.*did you mean"):
        load(tiny_job(limits={"max_cost": 5}), Job)
