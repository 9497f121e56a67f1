"""What it costs to record a run of 10,000 steps with every series of a medium model, and how fast the UI opens it.

    python docs/measure_logging.py [STEPS]

A model of 8 layers x 32 experts x 4 domains x 8 heads takes two real steps and an evaluation. Their records, with fresh
noise, are what a `MetricLogger` then writes into a new SQLite store, as often as the loop does. Then MLflow's own
server answers, and Chromium (Debian: chromium, chromium-driver) opens the run and its metrics. Nothing is trained
meanwhile: `logging` is what the training thread would spend, and `delivery` the background thread, which takes Python's
lock from it now and then.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tidegate.launch.run import Request, run
from tidegate.launch.state import StateDir
from tidegate.metric_path import without_details
from tidegate.track import MetricLogger, RunHandle, TrackConfig, open_run
from tidegate.train.telemetry import Record

JOB = Path(__file__).parents[1] / "jobs" / "demo.yaml"
LOG_EVERY, EVAL_EVERY = 10, 100
STEP_S = 0.5
"""Assumed; that of jobs/bench/h100.yaml takes 0.68 s on one H100."""
MEDIUM = (
    "model.num_layers=8",
    "model.width=64",
    "model.attention.num_heads=8",
    "model.attention.head_dim=8",
    "model.ffn.num_experts=32",
    "model.ffn.expert_dim=8",
    "data.eval_sequences=1",
    "train.tokens=8192",
    "train.log_every=1",
    "optimizer.schedule.warmup_tokens=4096",
    "parallel.expert=1",
    "resources.workers=1",
)
POINTS = 320
"""Of a curve that the UI asks for."""
CHARTS = 4
"""In view where the metrics of the run begin."""


def records(folder: Path) -> list[Record]:
    """Of two real steps and the evaluation after them."""
    seen: list[Record] = []

    def watch(record: Record) -> bool:
        seen.append(record)
        return False

    run(Request(JOB, MEDIUM, StateDir(folder), local=True, watch=watch))
    return seen


def write(handle: RunHandle, folder: Path, seen: list[Record], steps: int) -> None:
    *_, trained, evaluated = seen
    spent, calls = 0.0, 0
    cpu = time.process_time()
    logger = MetricLogger(handle.uri, handle.run_id, spool=folder / "spool.jsonl")
    began = time.perf_counter()
    for step in range(LOG_EVERY, steps + 1, LOG_EVERY):
        detailed = step % EVAL_EVERY == 0
        for record in (trained, evaluated) if step % EVAL_EVERY == 0 else (trained,):
            kept = record.metrics if detailed else without_details(record.metrics)
            noisy = {name: value * random.uniform(0.9, 1.1) for name, value in kept.items()}
            before = time.perf_counter()
            logger.log(noisy, step=step, tokens=step * 4096)
            spent, calls = spent + time.perf_counter() - before, calls + 1
    delivery = logger.close(timeout_s=3600)
    cpu = time.process_time() - cpu
    assert delivery.undelivered == 0, delivery
    took = time.perf_counter() - began
    summary = len(without_details(trained.metrics))
    print(f"series: {len(trained.metrics)} {summary} with every record; {len(evaluated.metrics)} of an evaluation")
    print(f"logging: {spent / calls * 1e6:,.0f} us a call, {spent / steps / STEP_S:.4%} of a step of {STEP_S} s")
    print(f"delivery: {took:,.1f} s, {cpu:,.1f} s of a core: {cpu / (steps * STEP_S):.2%} of one while the steps take")


def ask(port: int, path: str) -> dict[str, object]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/ajax-api/2.0/mlflow/{path}", timeout=600) as answer:
        found: dict[str, object] = json.load(answer)
        return found


def open_in_ui(handle: RunHandle, seen: list[Record], folder: Path) -> None:
    """Time the requests of MLflow's run page against its server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    environment = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | os.environ
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--backend-store-uri", handle.uri], env=environment, stdout=log, stderr=log, cwd=folder
        )
    try:
        while True:
            assert server.poll() is None, (folder / "server.log").read_text()
            try:
                ask(port, "experiments/search?max_results=1")
                break
            except OSError:
                time.sleep(0.5)
        run_took = timed(port, f"runs/get?run_id={handle.run_id}")
        names = sorted({name for record in seen for name in without_details(record.metrics)} | {"tokens"})
        history = "metrics/get-history-bulk-interval?run_ids={}&metric_key={}&max_results={}"
        took = [timed(port, history.format(handle.run_id, name, POINTS)) for name in names]
        print(
            f"server: runs/get {run_took:.2f} s; of {len(took)} curves one {sorted(took)[len(took) // 2] * 1e3:.0f} ms"
        )
        look(f"http://127.0.0.1:{port}/#/experiments/{handle.experiment_id}/runs/{handle.run_id}", folder / "profile")
    finally:
        server.terminate()
        server.wait()


def timed(port: int, path: str) -> float:
    began = time.perf_counter()
    ask(port, path)
    return time.perf_counter() - began


def look(page: str, profile: Path) -> None:
    """Open a run's page and its metrics in a browser, three times, the first with nothing cached."""
    options = webdriver.ChromeOptions()
    flags = "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update"
    for flag in (*flags.split(), f"user-data-dir={profile}", "window-size=1600,1000"):
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as browser:
        browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        for _ in range(3):
            browser.get("about:blank")
            opening = Stopwatch(browser)
            browser.get(page)
            opening.show("the run", "return document.body.innerText.includes('attention/0/entropy')")
            charts = Stopwatch(browser)
            browser.find_element(By.XPATH, "//*[@role='tab' and .='Model metrics']").click()
            charts.show("its metrics", f"return document.querySelectorAll('.scatterlayer .js-line').length >= {CHARTS}")


class Stopwatch:
    """Seconds that pass, and those that the page's own thread computes."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self._browser = browser
        self._began, self._computed = time.perf_counter(), self._thread()

    def show(self, what: str, shown: str) -> None:
        """Print them and the page's requests so far, as soon as the script `shown` says true."""
        WebDriverWait(self._browser, 120, poll_frequency=0.2).until(lambda browser: browser.execute_script(shown))
        passed, computed = time.perf_counter() - self._began, self._thread() - self._computed
        count = "return performance.getEntriesByType('resource').filter(e => e.name.includes('/ajax-api/')).length"
        requests = self._browser.execute_script(count)
        print(f"browser: {what} after {passed:.1f} s, {computed:.1f} s of CPU in the page, {requests} requests")

    def _thread(self) -> float:
        metrics = self._browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")


def main(steps: int) -> None:
    with tempfile.TemporaryDirectory(prefix="tidegate-") as scratch:
        folder = Path(scratch)
        seen = records(folder / "state")
        database = folder / "mlflow.db"
        handle = open_run(
            f"sqlite:///{database}", TrackConfig(), job="logging", resolved={"steps": steps}, changes={}, command=[]
        )
        write(handle, folder, seen, steps)
        files = [path.stat().st_size for path in folder.rglob("details/*.json")]
        print(f"database: {database.stat().st_size / 1e6:,.0f} MB; {len(files)} files: {sum(files) / 1e6:,.1f} MB")
        open_in_ui(handle, seen, folder)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        raise SystemExit(__doc__)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
