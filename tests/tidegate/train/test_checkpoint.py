"""Saving and resuming on real ranks, with a model of one number in the engine's place."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tidegate.config import ConfigError, load
from tidegate.parallel import collectives
from tidegate.train.checkpoint import Checkpoints, Position, Tracker
from tidegate.train.checkpoint_store import CheckpointStore
from tidegate.train.job import Job
from tidegate.train.storage import Storage


class OneNumber:
    """What `Checkpoints` asks of an engine."""

    device = torch.device("cpu")
    store = None

    def __init__(self) -> None:
        self.value = torch.zeros(1)

    def save(self, put: Callable[[str, Any], None], state: dict[str, Any]) -> None:
        put(f"state/{collectives.rank()}.pt", self.value.clone())
        if collectives.rank() == 0:
            put("state/state.pt", state)

    def load(self, fetch: Callable[[str], io.BytesIO], names: Any, *, reshape: bool) -> dict[str, Any]:
        assert not reshape
        assert {"state/state.pt", "rank_00000.json", f"state/{collectives.rank()}.pt"} <= set(names)
        self.value = torch.load(fetch(f"state/{collectives.rank()}.pt"), weights_only=True)
        return torch.load(fetch("state/state.pt"), weights_only=True)


def opened(folder: str, job: Job, notices: list[str], unsent: list[Any], adopted: list[Any]) -> Checkpoints:
    engine: Any = OneNumber()
    tracker = Tracker(lambda: list(unsent), adopted.extend) if collectives.rank() == 0 else None
    return Checkpoints(folder, job, engine, tracker, notices.append)


def position(step: int) -> Position:
    return Position(step, 100 * step, {"cursors": {"prose": step}}, [float(step)])


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def saved_and_resumed(folder: str, job_file: str) -> dict[str, Any]:
    """Save twice, resume, damage the second, resume again."""
    job = load(job_file, Job, ["resources.workers=2"]).config
    rank = collectives.rank()
    notices: list[str] = []
    unsent = [{"timestamp_ms": 5, "step": 1, "metrics": {"loss": float("nan")}}]
    adopted: list[Any] = []
    with opened(folder, job, notices, unsent, adopted) as checkpoints:
        fresh = checkpoints.resume()
        first = draws()
        checkpoints._engine.value.fill_(10 + rank)  # type: ignore[attr-defined]
        checkpoints.save(position(1), {"train/loss": 3.0, "other": 1.0})
        after_one = draws()
        checkpoints._engine.value.fill_(20 + rank)  # type: ignore[attr-defined]
        checkpoints.save(position(2), {})
        after_two = draws()
        checkpoints.evaluated(2, {"val/loss": 1.5, "oracle/gap": 2.0})
        checkpoints.evaluated(1, {"val/loss": 9.0})

    def resumed() -> tuple[Any, ...]:
        with opened(folder, job, notices, [], adopted) as checkpoints:
            found = checkpoints.resume()
            return found, float(checkpoints._engine.value), draws(), checkpoints.newest  # type: ignore[attr-defined]

    whole = resumed()
    store = CheckpointStore(Storage(folder))
    metrics = [entry.manifest.metrics for entry in store.entries() if entry.manifest]
    torch.distributed.barrier()
    if rank == 0:
        path = Path(folder, store.names()[-1], "state", "1.pt")
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    torch.distributed.barrier()
    fallen_back = resumed()
    torch.distributed.barrier()
    return {
        "fresh": fresh,
        "draws": (first, after_one, after_two),
        "whole": whole,
        "fallen back": fallen_back,
        "metrics": metrics,
        "notices": notices,
        "adopted": adopted,
    }


def test_every_rank_gets_its_own_state_back(
    on_ranks: Callable[..., list[Any]], tiny_job: Callable[..., Path], tmp_path: Path
) -> None:
    ranks = on_ranks(2, saved_and_resumed, str(tmp_path / "run"), str(tiny_job()))
    for rank, found in enumerate(ranks):
        _, after_one, after_two = found["draws"]
        assert found["fresh"] is None
        assert found["whole"][:3] == (position(2), 20.0 + rank, after_two)
        assert found["fallen back"][:3] == (position(1), 10.0 + rank, after_one)
        assert "/step_00000001-" in found["fallen back"][3]
        assert found["metrics"] == [{"train/loss": 3.0}, {"val/loss": 1.5}]
    assert ranks[0]["draws"] != ranks[1]["draws"]
    (notice,) = ranks[0]["notices"]
    assert "/step_00000002-" in notice
    assert "is not used: state/1.pt: its content is not what was written" in notice
    assert ranks[1]["notices"] == []
    steps = [record["step"] for record in ranks[0]["adopted"]]
    assert steps == [1, 1]
    assert np.isnan(ranks[0]["adopted"][0]["metrics"]["loss"])


def same_draws_in_two_runs(folder: str, job_file: str) -> tuple[Any, Any]:
    def first(run: str) -> Any:
        with opened(f"{folder}/{run}", load(job_file, Job).config, [], [], []) as checkpoints:
            checkpoints.resume()
            return draws()

    return first("a"), first("b")


def test_generators_start_from_the_seed(
    on_ranks: Callable[..., list[Any]], tiny_job: Callable[..., Path], tmp_path: Path
) -> None:
    ((one, other),) = on_ranks(1, same_draws_in_two_runs, str(tmp_path), str(tiny_job()))
    assert one == other


def stalls(folder: str, job_file: str) -> tuple[float, float, dict[str, float], dict[str, float]]:
    """Seconds that the first and the second save stood still, on a disk that takes half a second a checkpoint."""
    settle = CheckpointStore.commit

    def slow(*args: Any) -> None:
        time.sleep(0.5)
        settle(*args)

    CheckpointStore.commit = slow  # type: ignore[method-assign]
    with opened(folder, load(job_file, Job).config, [], [], []) as checkpoints:
        checkpoints.save(position(1), {})
        first = checkpoints.stalled_s
        before = checkpoints.read()
        checkpoints.save(position(2), {})
        return first, checkpoints.stalled_s, before, checkpoints.read()


def test_training_stands_still_only_for_a_save_before_and_that_is_recorded(
    on_ranks: Callable[..., list[Any]], tiny_job: Callable[..., Path], tmp_path: Path
) -> None:
    ((first, both, before, after),) = on_ranks(1, stalls, str(tmp_path / "run"), str(tiny_job()))
    assert first < 0.4
    assert both - first > 0.4
    assert before.pop("checkpoint/age_s") >= first
    assert before == {"checkpoint/stall_s": first, "checkpoint/write_s": 0.0}
    assert after["checkpoint/stall_s"] == pytest.approx(both - first)
    assert after["checkpoint/write_s"] > 0.5
    assert after["checkpoint/age_s"] < 0.4, "the save before, for which this one waited"


def refused(folder: str, job_file: str, overrides: list[str]) -> str:
    with opened(folder, load(job_file, Job).config, [], [], []) as checkpoints:
        checkpoints.save(position(1), {})
    try:
        with opened(folder, load(job_file, Job, overrides).config, [], [], []) as checkpoints:
            checkpoints.resume()
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "parallel.zero_stage=0",
            "written at parallel.zero_stage=1, this job has parallel.zero_stage=0; resume with the checkpoint's: "
            "reshaping needs parallel.zero_stage=1 or 2 on both sides",
        ),
        ("train.precision=bf16", "written at train.precision=fp32, this job has train.precision=bf16; resume with"),
        ("model.width=40", "written at model.width=32, this job has model.width=40"),
        ("train.seed=7", ""),
    ],
)
def test_another_layout_is_refused_by_name(
    on_ranks: Callable[..., list[Any]], tiny_job: Callable[..., Path], tmp_path: Path, override: str, message: str
) -> None:
    (printed,) = on_ranks(1, refused, str(tmp_path / "run"), str(tiny_job()), [override])
    assert message in printed
    assert bool(printed) == bool(message)
