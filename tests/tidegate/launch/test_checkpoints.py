"""`tidegate checkpoints` and `tidegate verify` on checkpoints without a run behind them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tidegate import cli
from tidegate.config import ConfigError
from tidegate.launch.state import RunRecord, StateDir
from tidegate.train.checkpoint_store import MANIFEST, CheckpointStore, Manifest
from tidegate.train.retention import CheckpointConfig
from tidegate.train.saver import Saver
from tidegate.train.storage import Storage


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    """A state directory with one run of three checkpoints; the second is damaged, the third has no manifest."""
    state = StateDir(tmp_path / "state")
    run = state.new_run("tiny")
    location = state.checkpoints / "tiny-1-0123abcd"
    record = RunRecord(
        job_dir="/", checkpoints=str(location), tracking_uri="sqlite:////x", run_id="0123abcd", command=("tidegate",)
    )
    (run.folder / "run.json").write_text(record.model_dump_json(), encoding="utf-8")
    run.job_file.write_text(json.dumps({}), encoding="utf-8")
    store = CheckpointStore(Storage(location))
    saver = Saver(store, CheckpointConfig(keep_last=3), rank=0, world_size=1, attempt="a")
    for step in (10, 20, 30):
        metrics = {"train/loss": 1 / step, "val/prose/loss": 2.0}
        files: dict[str, Any] = {"state/weights.pt": {"w": [step]}, "rank_00000/generators.pt": step}
        saver.wait()
        saver.save(
            Manifest(tidegate="0", step=step, tokens=1000 * step, layout={}, model={}, metrics=metrics, files={}), files
        )
    saver.close()
    (location / "step_00000020-a" / "state" / "weights.pt").write_bytes(b"x")
    (location / "step_00000030-a" / MANIFEST).unlink()
    return state


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, list(arguments))
    if isinstance(result.exception, ConfigError):
        raise result.exception
    return result.exit_code, result.output


def test_the_list_says_what_is_there_and_what_is_wrong(state: StateDir) -> None:
    status, printed = run("checkpoints", "tiny-1", "--state-dir", str(state.root))
    assert status == 0
    rows = [line for line in printed.splitlines() if "step_" in line]
    assert len(rows) == 3
    assert "10,000" in rows[0]
    assert "train/loss=0.1 " in rows[0]
    assert "prose" not in rows[0]
    assert "valid" in rows[0]
    assert "state/weights.pt: has 1 bytes, not" in printed
    assert "manifest.json is missing" in rows[2]
    with pytest.raises(ConfigError, match=r"tiny-2: no such run in .*; there are: tiny-1"):
        run("checkpoints", "tiny-2", "--state-dir", str(state.root))


def test_verify_names_the_file_that_changed(state: StateDir) -> None:
    folder = state.checkpoints / "tiny-1-0123abcd"
    status, printed = run("verify", str(folder / "step_00000010-a"))
    assert (status, printed) == (0, "step_00000010-a: every file is what was written\n")
    path = folder / "step_00000010-a" / "rank_00000" / "generators.pt"
    changed = bytearray(path.read_bytes())
    changed[100] ^= 4
    path.write_bytes(changed)
    status, printed = run("verify", str(folder / "step_00000010-a") + "/")
    assert status == 1
    assert "rank_00000/generators.pt: its content is not what was written" in printed
    status, printed = run("verify", str(folder))
    assert status == 1
    assert [line.split(":")[0] for line in printed.splitlines() if line.startswith("step_")] == [
        "step_00000010-a",
        "step_00000020-a",
        "step_00000030-a",
    ]


def test_verify_of_nothing_is_a_mistake(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", tmp_path / "step_00000001-a"):
        with pytest.raises(ConfigError, match=r"neither an export nor a checkpoint|no such checkpoint"):
            run("verify", str(path))


@pytest.mark.parametrize(
    "name", ["../../elsewhere", "../runs/tiny-1", "linked-1", "", ".", "/", "tiny-1/", "x" * 5000, "a\0b"]
)
@pytest.mark.parametrize("command", [["checkpoints"], ["export"], ["train", "--local", "--resume"]], ids=lambda c: c[0])
def test_the_name_of_a_run_is_no_path(state: StateDir, tmp_path: Path, command: list[str], name: str) -> None:
    runs = state.root / "runs"
    shutil.copytree(runs / "tiny-1", tmp_path / "elsewhere")
    (runs / "linked-1").symlink_to(tmp_path / "elsewhere")
    ended = CliRunner().invoke(cli.app, [*command, name, "--state-dir", str(state.root)])
    assert isinstance(ended.exception, ConfigError)
    assert str(ended.exception) == f"{name}: no such run in {runs}; there are: tiny-1"


def test_a_link_is_no_checkpoint(state: StateDir, tmp_path: Path) -> None:
    (location,) = state.checkpoints.iterdir()
    store = CheckpointStore(Storage(location))
    newest = store.valid()[-1].name
    (location / newest).rename(tmp_path / newest)
    (location / newest).symlink_to(tmp_path / newest)
    assert newest not in store.names()
