"""What is timed is the job's own training: the losses are those of the loop."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tidegate.config import load
from tidegate.data.random_tokens import write_random_tokens
from tidegate.data.shards import TokenDataset
from tidegate.train.job import Job

WARM_UP, STEPS = 3, 3


def measured_and_losses_of_the_loop(job: Job, tokens: Path, folder: Path) -> tuple[Any, list[float]]:
    from tidegate.train.bench import measure
    from tidegate.train.loop import World, train

    found: list[float] = []

    def record(record: Any) -> None:
        if "train/loss" in record.metrics:
            found.append(record.metrics["train/loss"])

    train(job, World(tokens, str(folder), record, print, lambda: False))
    return measure(job, tokens, STEPS), found


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.documents=join", "parallel.zero_stage=0", "balance.counts=running"],
        ["model.ffn.router={kind: hash}", "balance.bias_rate=0"],
    ],
    ids=["tiny", "joined", "hash"],
)
def test_the_losses_are_those_of_the_loop(
    tiny_job: Callable[..., Path], on_ranks: Callable[..., Any], tmp_path: Path, overrides: list[str]
) -> None:
    path = tiny_job(train={"tokens": 512 * (WARM_UP + STEPS)}, checkpoint={"every": 1000})
    job: Job = load(path, Job, overrides).config
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    write_random_tokens(tokens, job.data, vocab_size=job.model.vocab_size, num_windows=5)
    ((measured, expected),) = on_ranks(1, measured_and_losses_of_the_loop, job, tokens, tmp_path / "checkpoints")
    assert len(expected) == WARM_UP + STEPS
    assert measured.losses == pytest.approx(expected, rel=1e-6)
    assert len(set(measured.losses)) == len(expected)  # it trains

    assert len(measured.steps_s) == STEPS
    split = measured.split.model_dump()
    counts = job.balance.counts == "exact" and "model.ffn.router={kind: hash}" not in overrides
    assert (split["counting_s"] > 0) == counts
    assert all(split[name] > 0 for name in ("forward_s", "backward_s", "optimizer_s", "other_s"))
    assert sum(split.values()) == pytest.approx(statistics.median(measured.steps_s), rel=0.3)
    assert 0 < measured.data_s < 1
    assert 0.2 < measured.observed_over_plain < 5


def test_random_tokens_are_a_dataset_of_the_job(tiny_job: Callable[..., Path], tmp_path: Path) -> None:
    job: Job = load(tiny_job(), Job).config
    write_random_tokens(tmp_path, job.data, vocab_size=301, num_windows=1000)
    dataset = TokenDataset.open(tmp_path, verify=True)
    assert dataset.domains == ("letters", "digits")
    train_tokens = dataset.stream(0, "train").read(0, 64 * 1000 + 1)
    assert set(train_tokens.tolist()) == set(range(301))
    ends = (train_tokens == dataset.eot_id).nonzero()[0]
    assert (ends % 300 == 299).all()
    assert (dataset.stream(1, "train").read(0, 64) != train_tokens[:64]).any()
    assert len(dataset.stream(1, "held_out")) >= 65
