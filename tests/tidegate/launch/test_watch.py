"""`tidegate watch` on planted runs: what it shows is what was logged, whatever has become of the run."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tidegate.config import ConfigError
from tidegate.launch.state import StateDir
from tidegate.launch.watch import watch
from tidegate.track import TrackConfig, finish_run, open_run, resolve_tracking_uri, tag_run
from tidegate.track.client import connect
from tidegate.track.store import RunHandle


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> StateDir:
    """One for all: MLflow takes seconds to make a store."""
    return StateDir(tmp_path_factory.mktemp("state"))


def begin(uri: str, name: str) -> RunHandle:
    resolved = {"train": {"tokens": 40_000}, "resources": {"gpu": True}}
    return open_run(uri, TrackConfig(), job="job", resolved=resolved, changes={}, command=["x"], name=name)


def log(handle: RunHandle, ago_s: float, *records: dict[str, float]) -> None:
    """Records of steps 1, 2, ... of 1000 tokens; the last one so long ago."""
    from mlflow.entities import Metric

    end_ms = int((time.time() - ago_s) * 1000)
    for step, record in enumerate(records, 1):
        values = {**record, "tokens": 1000.0 * step}
        time_ms = end_ms - len(records) + step
        metrics = [Metric(key, value, time_ms, step) for key, value in values.items()]
        connect(handle.uri).log_batch(handle.run_id, metrics=metrics)


def record(step: int) -> dict[str, float]:
    more = {"val/loss": (2.5, 2.25, 2.75)[step // 4 - 1], "val/prose.en/ppl": 9.5} if step % 4 == 0 else {}
    return more | {
        "train/loss": 4.0 - step / 8,
        "train/loss_spikes": float(step > 6) + 2 * (step > 10),
        "speed/tokens_per_s": 250.0,
        "speed/mfu": 0.413,
        "speed/peak_tflops_per_device": 989.0,
        "cost/gpu_hours": step / 4,
        "cost/money": step / 2,
        "checkpoint/age_s": 30.0,
        "checkpoint/write_s": 1.5,
        **{f"moe/{layer}/maxvio": layer / 4 for layer in range(11)},
        **{f"moe/{layer}/dead_experts": 0.25 * (layer == 2) for layer in range(11)},
        "moe/3/prose.en/maxvio": 77.0,
        "moe/3/load/5": 0.123,
    }


def shown(capsys: Any, name: str, state: StateDir, store: str | None = None) -> str:
    capsys.readouterr()
    watch(name, state, store, once=True, every_s=1)
    return str(capsys.readouterr().out)


def test_a_run_is_shown_while_it_runs_and_when_it_ended(state: StateDir, capsys: pytest.CaptureFixture[str]) -> None:
    handle = begin(resolve_tracking_uri(TrackConfig(), state.root), "a-run")
    log(handle, 10.0, *map(record, range(1, 13)))
    text = shown(capsys, "a-run", state)
    assert re.search(r"^a-run  RUNNING .* last record 0:00:1\d ago$", text, re.MULTILINE), text
    for row in (
        r"tokens +12,000 .* 30%, 0:01:52 to go  step 12",
        r"loss +2.5000 +█\S{10}▁",
        r"held-out +2.7500 +▅▁█",
        r"perplexity +prose.en 9.5",
        r"tokens/s +250 +",
        r"MFU +41.3% +of 989 TFLOP/s",
        r"cost +3 GPU-hours, 6 in money",
        r"checkpoint +0:00:4\d old +took 1.5 s",
    ):
        assert re.search(f"^{row}", text, re.MULTILINE), (row, text)
    layers = re.findall(r"(?:^|   ) *(\d+) ([█▁]{12}) +(\d\.\d\d)((?:  25% dead)?)", text, re.MULTILINE)
    assert [(layer, violation) for layer, _, violation, _ in layers] == [
        (str(layer), f"{layer / 4:.2f}") for layer in range(11)
    ], text
    assert [bar.count("█") for _, bar, _, _ in layers] == [round(12 * layer / 4 / 2.5) for layer in range(11)]
    assert [layer for layer, *_, dead in layers if dead] == ["2"]
    assert "77" not in text, "of one domain"
    events = re.findall(r"^  step (\d+)  (.+?) *$", text, re.MULTILINE)
    assert events == [
        ("4", "best held-out loss so far, 2.5000"),
        ("7", "loss spike (1 so far)"),
        ("8", "best held-out loss so far, 2.2500"),
        ("11", "loss spike (3 so far)"),
    ]

    tag_run(handle, "tidegate.stopped_by", "limits.max_money=6")
    finish_run(handle, "KILLED")
    text = shown(capsys, "a-run", state)
    assert re.search(r"^a-run  KILLED .* stopped by limits.max_money=6  ended \d{4}", text)
    assert "to go" not in text
    assert "0:00:30 old" in text, "as old as it was at the end"


def test_one_that_crashed_is_suspected_and_one_without_a_record_says_so(
    state: StateDir, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = resolve_tracking_uri(TrackConfig(), state.root)
    log(begin(uri, "quiet"), 3600.0, {"train/loss": float("nan")}, {"train/loss": float("nan")})
    text = shown(capsys, "quiet", state)
    assert re.search(r"last record 1:00:0\d ago; it may have crashed", text)
    assert re.search(r"^loss +nan", text, re.MULTILINE)
    handle = begin(uri, "empty")
    assert "no record yet" in shown(capsys, "empty", state)
    finish_run(handle, "FAILED")
    assert "it ended before its first record" in shown(capsys, handle.run_id, state)
    with pytest.raises(ConfigError, match="'nobody': no such run"):
        watch("nobody", state, None, once=True, every_s=1)


def test_a_resumed_run_has_not_ended(state: StateDir, capsys: pytest.CaptureFixture[str]) -> None:
    handle = begin(resolve_tracking_uri(TrackConfig(), state.root), "resumed")
    log(handle, 5.0, {"train/loss": 3.0})
    finish_run(handle, "FAILED")
    assert "ended" in shown(capsys, "resumed", state)
    open_run(handle.uri, TrackConfig(), job="job", resolved={}, changes={}, command=["x"], run_id=handle.run_id)
    text = shown(capsys, "resumed", state)
    assert "ended" not in text
    assert re.search(r"^resumed  RUNNING .*  resumed 1 times  last record 0:00:\d\d ago$", text, re.MULTILINE), text


def test_what_a_resume_left_behind_is_not_shown(state: StateDir, capsys: pytest.CaptureFixture[str]) -> None:
    handle = begin(resolve_tracking_uri(TrackConfig(), state.root), "back")
    log(handle, 10.0, {}, {"train/loss": 3.0, "val/loss": 3.0, "speed/tokens_per_s": 250.0})
    log(handle, 5.0, {})  # and from step 1 again
    text = shown(capsys, "back", state)
    assert re.search(r"^tokens .* step 1$", text, re.MULTILINE), text
    assert not re.search(r"^(loss|held-out|tokens/s) ", text, re.MULTILINE), text


def test_a_record_of_a_clock_that_is_ahead_is_of_now(state: StateDir, capsys: pytest.CaptureFixture[str]) -> None:
    log(begin(resolve_tracking_uri(TrackConfig(), state.root), "ahead"), -3600.0, record(1))
    text = shown(capsys, "ahead", state)
    assert "last record 0:00:00 ago" in text
    assert re.search(r"^checkpoint +0:00:30 old", text, re.MULTILINE), text


def test_a_run_of_another_machine_is_read_from_its_store(
    state: StateDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    log(begin(uri, "far"), 1.0, {"train/loss": 1.25})
    assert re.search(r"^loss +1.2500", shown(capsys, "far", state, uri), re.MULTILINE)


def test_it_goes_on_until_the_run_ends(state: StateDir, capsys: pytest.CaptureFixture[str]) -> None:
    handle = begin(resolve_tracking_uri(TrackConfig(), state.root), "live")
    log(handle, 0.0, {"train/loss": 3.0})
    ender = threading.Timer(1.0, finish_run, (handle, "KILLED"))
    ender.start()
    watch("live", state, None, once=False, every_s=0.1)
    assert not ender.is_alive()
    assert "live  KILLED" in capsys.readouterr().out
