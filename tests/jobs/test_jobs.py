"""Every job in jobs/ is valid, names the data it brings, and can be shown."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from tidegate.config import load
from tidegate.launch.show import show_job
from tidegate.model.flops import total
from tidegate.model.routers import RouterConfig
from tidegate.train.job import Job

ROOT = Path(__file__).resolve().parents[2]
FILES = (ROOT / "jobs").glob("**/*.yaml")
JOBS = sorted(path.relative_to(ROOT).as_posix() for path in FILES if path.name != "cpu.yaml")  # a part of jobs


def test_there_are_jobs():
    assert "jobs/demo.yaml" in JOBS


@pytest.mark.parametrize("name", JOBS)
def test_every_job_shows(name, capsys):
    job: Job = load(ROOT / name, Job).config
    show_job(ROOT / name, [])
    shown = capsys.readouterr().out
    cost = total(job.model, job.data.sequence_length)
    assert shown.startswith(f"name: {job.name}")
    assert f"{cost.params:,}" in shown
    assert f"length: {job.total_steps:,} steps" in shown


@pytest.mark.parametrize("name", JOBS)
def test_every_job_finds_its_files(name):
    job: Job = load(ROOT / name, Job).config
    paths = [path for domain in job.data.domains for path in domain.paths if path.startswith("{job}/")]
    missing = [path for path in paths if not any((ROOT / name).parent.glob(path.removeprefix("{job}/")))]
    assert missing == []


def test_names_are_not_used_twice():
    names = [load(ROOT / name, Job).config.name for name in JOBS]
    assert len(set(names)) == len(names), names


def test_every_router_has_a_job_in_the_zoo():
    used = {load(ROOT / name, Job).config.model.ffn.router.kind for name in JOBS if name.startswith("jobs/zoo/")}
    known = {router.model_fields["kind"].default for router in get_args(get_args(RouterConfig)[0])}
    assert used == known
