"""`tidegate probe` on a run that was really trained."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tidegate
from tidegate import cli
from tidegate.config import ConfigError


def probe(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["probe", *arguments])
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_a_trained_run_is_asked_and_mlflow_has_the_answer(tiny_job: Callable[..., Path], tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    command = [sys.executable, "-m", "tidegate.cli", "train", str(tiny_job(train={"tokens": 2048})), "--local"]
    subprocess.run([*command, "--state-dir", state], check=True, capture_output=True, timeout=240)

    printed = probe("tiny-1", "--sequences", "4", "--state-dir", state)
    path = tmp_path / "state" / "probes" / "tiny-1-step4.json"
    assert str(path) in printed.replace("\n", "")
    found = json.loads(path.read_text())
    assert (found["run"], found["step"], found["tokens"], found["sequences"]) == ("tiny-1", 4, 2048, 4)
    assert {"attention/0/first_token", "hidden/1/max"} <= set(found["sink"])
    assert {"moe/0/domain_information", "moe/1/maxvio"} <= set(found["experts"])
    assert [loss["context"] for loss in found["long"]] == [32, 64, 128, 256]
    assert len(found["recall"]) == 9
    assert [sample["domain"] for sample in found["samples"]] == ["letters", "digits"]
    (run,) = tidegate.runs("tiny-1", state_dir=state)
    assert json.loads(run.artifact("probes/step4.json")) == found

    probe("tiny-1", "--suite", "experts", "--state-dir", state)
    assert set(json.loads(path.read_text())) == {"run", "checkpoint", "step", "tokens", "sequences", "experts"}
    for arguments, problem in (
        (["--suite", "sink,all"], "--suite all: unknown; some of sink, experts, long, recall, samples, lm_eval"),
        (["--sequences", "1"], "--sequences 1: must be at least 2"),
        (["--device", "abacus"], "--device abacus: "),
        (["--checkpoint", "no"], "--checkpoint no: no such checkpoint of tiny-1"),
    ):
        with pytest.raises(ConfigError, match=problem):
            probe("tiny-1", *arguments, "--state-dir", state)
