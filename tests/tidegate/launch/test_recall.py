"""`tidegate recall`: what it prints and writes, and how it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tidegate import cli
from tidegate.config import ConfigError

TASK = ("--length", "16", "--pairs", "3", "--vocab", "32")


def recall(job: Path, *arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["recall", str(job), *arguments, "--state-dir", str(job.parent / "state")])
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_line_a_model_and_the_best_of_each_seed_as_json(tiny_job: Callable[..., Path]) -> None:
    job = tiny_job()
    printed = recall(job, *TASK, "--seeds", "2", "--steps", "3", "--rates", "1e-3,1e-4", "--set", "model.width=16")
    *lines, path = printed.splitlines()
    began = [f"seed {seed}, rate {rate}: accuracy 0.0" for seed in (0, 1) for rate in ("0.001", "0.0001")]
    assert [line[: len(begin)] for line, begin in zip(lines, began, strict=True)] == began
    assert all(line.endswith("not 0.99 in 3 steps: no recall across tokens") for line in lines)
    assert Path(path) == job.parent / "state" / "recall" / "tiny-16-3-32.json"
    found = json.loads(Path(path).read_text())
    assert (found["job"], found["steps"], found["rates"]) == ("tiny", 3, [1e-3, 1e-4])
    assert (found["length"], found["pairs"], found["vocab_size"], found["model"]["width"]) == (16, 3, 32, 16)
    tried = [float(line.split("accuracy ")[1].split(",")[0]) for line in lines]
    best = [max(tried[:2]), max(tried[2:])]
    assert [round(seed["accuracy"], 3) for seed in found["seeds"]] == best
    assert [seed["seed"] for seed in found["seeds"]] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--length", "14", "--pairs", "4"], "--length 14 --pairs 4 --vocab 128: .*length >= 4 pairs"),
        (["--vocab", "65"], "--length 48 --pairs 6 --vocab 65: .*are even"),
        (["--vocab", "12"], "--length 48 --pairs 6 --vocab 12: .*vocab_size > 2 pairs"),
        (["--rates", "fast"], "--rates fast: not numbers with commas"),
        (["--rates", "1e-3,-1"], "--rates 1e-3,-1: must be between 0 and 1"),
        (["--device", "abacus"], "--device abacus: "),
        (["--set", "model.width=15"], "model.width"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_trained(
    arguments: list[str], problem: str, tiny_job: Callable[..., Path]
) -> None:
    job = tiny_job()
    with pytest.raises(ConfigError, match=problem):
        recall(job, *arguments)
    assert not (job.parent / "state" / "recall").exists()
