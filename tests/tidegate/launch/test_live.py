"""What Prometheus gets to see of a run: the real endpoint of a real Ray, and what the rule leaves out."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tidegate.launch.live import OF_THE_RUN, gauge_of
from tidegate.metric_path import parse_metric


@pytest.mark.parametrize(
    ("pattern", "gauge"),
    [
        ("train/loss", "tidegate_train_loss"),
        ("moe/<layer>/maxvio", "tidegate_moe_maxvio"),
        ("val/<domain>/loss", "tidegate_val_loss"),
        ("val/loss", "tidegate_val_loss"),
        ("moe/<layer>/load/<expert>", None),
        ("moe/<layer>/<domain>/maxvio", None),
        ("attention/<block>/head/<head>/gate_mean", None),
        ("attention/<block>/gate_mean", "tidegate_attention_gate_mean"),
    ],
)
def test_a_name_with_two_places_is_left_out(pattern: str, gauge: str | None) -> None:
    assert gauge_of(pattern) == gauge


class Scraped:
    """The endpoints of a Ray, as Prometheus finds and reads them."""

    def __init__(self, temp: Path) -> None:
        self._temp = temp

    def values(self) -> dict[tuple[str, str], float]:
        """Values of Tidegate's series by name and place."""
        found = {}
        for discovery in self._temp.glob("ray/session_2*/prom_metrics_service_discovery.json"):
            for target in json.loads(discovery.read_text())[0]["targets"]:
                try:
                    with urllib.request.urlopen(f"http://{target}/metrics", timeout=5) as answer:
                        text = answer.read().decode()
                except OSError:  # it has begun, or ended, by half
                    continue
                for metric in text_string_to_metric_families(text):
                    for sample in metric.samples:
                        if sample.name.startswith("ray_tidegate_"):
                            assert sample.labels["run"] == "tiny-1"
                            assert sample.labels["sweep"] == ""
                            place = "".join(sample.labels[key] for key in ("layer", "block", "domain", "node"))
                            found[sample.name.removeprefix("ray_"), place] = sample.value
        return found

    def wait_for(self, what: Callable[[dict[tuple[str, str], float]], bool], why: str) -> dict[tuple[str, str], float]:
        deadline = time.monotonic() + 180
        while not what(values := self.values()):
            assert time.monotonic() < deadline, (why, values)
            time.sleep(0.3)
        return values


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Ray's sockets do not take long paths."""
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="tg", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_is_seen_at_rays_endpoint_and_a_lost_worker_is_missed(
    tiny_job: Callable[..., Path], tmp_path: Path, short_folder: Path
) -> None:
    job = tiny_job(
        train={"tokens": 512 * 100_000, "eval_every": 3}, checkpoint={"every": 2}, resources={"max_failures": 1}
    )
    command = [sys.executable, "-m", "tidegate.cli", "train", str(job), "--state-dir", str(tmp_path / "state")]
    environment = os.environ | {"RAY_TMPDIR": str(short_folder), "RAY_metrics_report_interval_ms": "1000"}
    scraped = Scraped(short_folder)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=environment)
    try:
        first = scraped.wait_for(lambda seen: seen.get(("tidegate_step", ""), 0) > 6, "steps")
        with closing(sqlite3.connect(tmp_path / "state" / "mlflow" / "mlflow.db")) as store:
            recorded = [name for (name,) in store.execute("select distinct key from metrics")]
        paths = [parse_metric(name) for name in recorded if name != "tokens"]
        expected = {(gauge_of(path.pattern), "".join(path.place.values())) for path in paths if len(path.place) <= 1}
        assert len(expected) > 40
        assert first.keys() == expected | {(name, "") for name in OF_THE_RUN}
        assert first["tidegate_tokens_wanted", ""] == 512 * 100_000
        assert first["tidegate_workers_wanted", ""] == first["tidegate_workers_present", ""] == 1
        assert first["tidegate_tokens", ""] == 512 * first["tidegate_step", ""]
        assert first["tidegate_checkpoint_every", ""] == 2
        assert abs(first["tidegate_recorded_at_s", ""] - time.time()) < 10
        assert 0 <= first["tidegate_checkpoint_age_s", ""] < 60
        assert 0 < first["tidegate_train_loss", ""] < 6
        assert first["tidegate_val_loss", ""] == pytest.approx(
            (first["tidegate_val_loss", "letters"] + first["tidegate_val_loss", "digits"]) / 2, rel=1e-5
        )

        (worker,) = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "RayTrainWorker" in " ".join(child.cmdline())
        ]
        worker.suspend()  # a run that hangs stays in sight, or nobody could be told
        time.sleep(4)
        assert ("tidegate_step", "") in scraped.values(), "twice as long as Ray keeps what is not set again"
        worker.kill()
        scraped.wait_for(lambda seen: seen.get(("tidegate_workers_present", "")) == 0, "the lost worker")
        again = scraped.wait_for(lambda seen: seen.get(("tidegate_workers_present", "")) == 1, "the new worker")
        assert again["tidegate_workers_wanted", ""] == 1
    except AssertionError as error:
        raise AssertionError((tmp_path / "log").read_text()) from error
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        for left in (process, *(child for child in family if child.is_running())):  # where an assertion failed half-way
            left.kill()
        process.wait()
