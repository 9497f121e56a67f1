"""Times and money from a real measurement of the job."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tidegate.config import ConfigError, load
from tidegate.launch.bench import read_result
from tidegate.train.job import Job
from tidegate.tune.budget import QUANTITIES, known_of, parse, shown
from tidegate.tune.queue import Limits
from tidegate.tune.space import Space, draw

SPACE: dict[str, Any] = {"model.ffn.num_experts": {"choice": [4, 8, 16]}, "model.ffn.top_k": {"choice": [2, 3, 4]}}


def tidegate(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tidegate.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_times_are_those_of_the_measured_rate(tiny_job: Callable[..., Path]) -> None:
    job = tiny_job()
    done = tidegate("bench", job, "--steps", "2", "--out", job.parent / "bench.json")
    assert done.returncode == 0, done.stderr
    measured = read_result(job.parent / "bench.json")

    search = {"space": SPACE, "measured": "{job}/bench.json", "budgets": ["step_time<=120%"], "trials": 5, "seeds": 2}
    space = Space(tiny_job(search=search, resources={"price_per_hour": 7.5}))
    assert QUANTITIES["step_time"].of(space.base) == pytest.approx(measured.step_s), "of the job that was measured"
    assert parse("step_time<=3ms", space.base).limit == pytest.approx(0.003)
    for candidate in draw(space, 5, random.Random(0)):
        step = QUANTITIES["step_time"].of(candidate.job)
        flops = QUANTITIES["flops_per_token"].of(candidate.job) / QUANTITIES["flops_per_token"].of(space.base)
        assert step == pytest.approx(measured.step_s * flops)
        assert step <= 1.2 * measured.step_s
    with pytest.raises(ConfigError, match="unknown unit 'M' of step_time; known are %, us, ms, s"):
        parse("step_time<=3M", space.base)

    dry = tidegate("tune", job, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "step_time" in dry.stdout
    (line,) = (line for line in dry.stdout.splitlines() if "worker hours" in line)
    assert "at most 9 trials" in line, "the job, five candidates, and two finalists and the job again"
    hours, workers, money = map(float, re.findall(r"([0-9.e-]+) (?:hours|worker|at resources)", line))
    assert hours == workers == pytest.approx(9 * 12 * measured.step_s / 3600, rel=0.15), "of 12 steps"
    assert money == pytest.approx(7.5 * workers, rel=0.01)

    limits = Limits(Space(tiny_job(search={**search, "max_money": 1e-9}, resources={"price_per_hour": 7.5})).base, 1)
    assert limits.reached([], 0) == "search.max_money=1e-09", "as predicted, before any trial has ended"

    with pytest.raises(ConfigError, match=r"bench.json has train.precision=fp32, and the job train.precision=bf16"):
        Space(tiny_job(search=search, train={"precision": "bf16"}))


def test_without_a_measurement_there_are_no_times(tiny_job: Callable[..., Path]) -> None:
    job = tiny_job(search={"space": SPACE, "trials": 2})
    assert "step_time" not in known_of(load(job, Job).config)
    dry = tidegate("tune", job, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "needs search.measured, which `tidegate bench JOB --out FILE` writes" in dry.stdout
    with pytest.raises(ConfigError, match=r"budget 'step_time<=10ms' needs search.measured, the file that"):
        Space(job, budgets=["step_time<=10ms"])


@pytest.mark.parametrize(("text", "problem"), [(None, "cannot be read"), ("{}", "not a result of tidegate bench")])
def test_what_is_no_measurement_is_refused(tiny_job: Callable[..., Path], text: str | None, problem: str) -> None:
    job = tiny_job(search={"space": SPACE, "measured": "{job}/bench.json"})
    if text is not None:
        (job.parent / "bench.json").write_text(text)
    with pytest.raises(ConfigError, match=f"search.measured .*bench.json: {problem}"):
        Space(job)


@pytest.mark.parametrize(("value", "text"), [(0.0123, "12.3ms"), (2.5, "2.5s"), (4.5e-5, "45us")])
def test_times_are_shown_in_their_unit(value: float, text: str) -> None:
    assert shown("step_time", value) == text
