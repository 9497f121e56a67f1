"""Where a run's checkpoints go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tidegate.config import ConfigError, load
from tidegate.launch.run import Request, _storage, run
from tidegate.launch.state import StateDir
from tidegate.train.job import Job


@pytest.mark.parametrize(
    ("of_job", "of_nodes", "where"),
    [
        ("s3://a/b", "s3://c/d", "s3://a/b"),
        (None, "s3://c/d/", "s3://c/d"),
        (None, "", "{state}/checkpoints"),
        ("beside", None, "{here}/beside"),
        (None, None, "{state}/checkpoints"),
    ],
)
def test_the_job_comes_before_the_node_and_that_before_the_state_directory(
    of_job: str | None,
    of_nodes: str | None,
    where: str,
    tiny_job: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TIDEGATE_STORAGE", raising=False)
    if of_nodes is not None:
        monkeypatch.setenv("TIDEGATE_STORAGE", of_nodes)
    file, state = tiny_job(), StateDir(tmp_path / "state")
    job = load(file, Job, [f"checkpoint.storage={of_job}"] if of_job else []).config
    assert _storage(Request(file, (), state), job) == where.format(state=state.root, here=tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of DeepSpeed, about torch
def test_a_run_of_another_job_is_not_taken_from_the_storage(tiny_job: Callable[..., Path], tmp_path: Path) -> None:
    file = tiny_job(train={"tokens": 1024}, checkpoint={"storage": str(tmp_path / "storage")})
    run(Request(file, (), StateDir(tmp_path / "here"), name="mine", local=True))
    there = StateDir(tmp_path / "there")
    with pytest.raises(ConfigError, match=r"gradient_clip=0\.25, but the run mine has begun with 0\.5"):
        run(Request(file, ["optimizer.gradient_clip=0.25"], there, name="mine", local=True))
    assert not there.runs()
    assert there.adopt("mine", str(tmp_path / "storage"), tmp_path) is not None
    assert there.runs() == ["mine"]
