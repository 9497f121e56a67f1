"""What it costs to record a run of 10,000 steps with every series of a medium model, and how fast the UI opens it.

    python docs/measure_logging.py [STEPS] [--everything]

A model of 8 layers x 32 experts x 4 domains x 8 heads takes two real steps and an evaluation. Their records, with fresh
noise, are what a `MetricLogger` then writes into a new SQLite store, as often as the loop does; with `--everything`,
the series of single experts, heads and domains come with every record too. Then MLflow's own server answers what its UI
asks for when it opens the run. Nothing is trained meanwhile: `logging` is what the training thread would spend, and
`delivery` the background thread, which takes Python's lock from it now and then.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from tidegate.launch.run import Request, run
from tidegate.launch.state import StateDir
from tidegate.track import MetricLogger, RunHandle, TrackConfig, open_run
from tidegate.train.metric_path import parse_metric
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


def records(folder: Path) -> list[Record]:
    """Of two real steps and the evaluation after them."""
    seen: list[Record] = []

    def watch(record: Record) -> bool:
        seen.append(record)
        return False

    run(Request(JOB, MEDIUM, StateDir(folder), local=True, watch=watch))
    return seen


def write(handle: RunHandle, folder: Path, seen: list[Record], steps: int, everything: bool) -> None:
    *_, trained, evaluated = seen
    spent, calls = 0.0, 0
    cpu = time.process_time()
    logger = MetricLogger(handle.uri, handle.run_id, spool=folder / "spool.jsonl")
    began = time.perf_counter()
    for step in range(LOG_EVERY, steps + 1, LOG_EVERY):
        detailed = everything or step % EVAL_EVERY == 0
        for record in (trained, evaluated) if step % EVAL_EVERY == 0 else (trained,):
            kept = {
                name: value for name, value in record.metrics.items() if detailed or not parse_metric(name).is_detail
            }
            noisy = {name: value * random.uniform(0.9, 1.1) for name, value in kept.items()}
            before = time.perf_counter()
            logger.log(noisy, step=step, tokens=step * 4096)
            spent, calls = spent + time.perf_counter() - before, calls + 1
    delivery = logger.close(timeout_s=3600)
    cpu = time.process_time() - cpu
    assert delivery.undelivered == 0, delivery
    took = time.perf_counter() - began
    summary = sum(not parse_metric(name).is_detail for name in trained.metrics)
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
        names = sorted({name for record in seen for name in record.metrics} | {"tokens"})
        history = "metrics/get-history-bulk-interval?run_ids={}&metric_key={}&max_results={}"
        took = [timed(port, history.format(handle.run_id, name, POINTS)) for name in names]
        print(f"UI: runs/get {run_took:.2f} s; a curve {sorted(took)[len(took) // 2] * 1e3:.0f} ms")
        print(f"UI: the run and every one of its {len(took)} curves, one after the other: {run_took + sum(took):.1f} s")
    finally:
        server.terminate()
        server.wait()


def timed(port: int, path: str) -> float:
    began = time.perf_counter()
    ask(port, path)
    return time.perf_counter() - began


def main(steps: int, everything: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="tidegate-") as scratch:
        folder = Path(scratch)
        seen = records(folder / "state")
        database = folder / "mlflow.db"
        handle = open_run(
            f"sqlite:///{database}", TrackConfig(), job="logging", resolved={"steps": steps}, changes={}, command=[]
        )
        write(handle, folder, seen, steps, everything)
        print(f"database: {database.stat().st_size / 1e6:,.0f} MB")
        open_in_ui(handle, seen, folder)


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--everything"]
    if len(arguments) > 1:
        raise SystemExit(__doc__)
    main(int(arguments[0]) if arguments else 10_000, everything="--everything" in sys.argv)
