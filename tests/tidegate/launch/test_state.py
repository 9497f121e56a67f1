"""Where a run's checkpoints go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tidegate.config import load
from tidegate.launch.run import Request, _storage
from tidegate.launch.state import StateDir
from tidegate.train.job import Job


@pytest.mark.parametrize(
    ("of_job", "of_nodes", "where"),
    [
        ("s3://a/b", "s3://c/d", "s3://a/b"),
        (None, "s3://c/d/", "s3://c/d"),
        (None, "", "{state}/checkpoints"),
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
    monkeypatch.delenv("TIDEGATE_STORAGE", raising=False)
    if of_nodes is not None:
        monkeypatch.setenv("TIDEGATE_STORAGE", of_nodes)
    file, state = tiny_job(), StateDir(tmp_path / "state")
    job = load(file, Job, [f"checkpoint.storage={of_job}"] if of_job else []).config
    assert _storage(Request(file, (), state), job) == where.format(state=state.root)
