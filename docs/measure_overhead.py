"""What Ray Train and MLflow cost a step: a job under `tidegate train` against the same loop under `tidegate bench`.

    python docs/measure_overhead.py jobs/h100.yaml [REPEATS]

They alternate, with the same data sizes, model and engine; the bench has neither Ray nor MLflow, logs nothing and saves
nothing. Of training, the median of the rates between two log lines counts, the first (it compiles kernels) left out; so
one observed step in `train.log_every` is part of its time, and of what is found.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import mlflow

from tidegate.config import load
from tidegate.launch.bench import read_result
from tidegate.launch.state import StateDir
from tidegate.train.job import Job

LOGS = 9
"""Log lines of a training run."""


def trained(job_file: str, job: Job, state: Path) -> float:
    """Tokens a second under Ray and MLflow."""
    tokens = LOGS * job.train.log_every * job.train.batch_tokens
    sets = [f"train.tokens={tokens}", f"train.eval_every={LOGS * job.train.log_every}", f"checkpoint.every={10**9}"]
    tidegate("train", job_file, *each("--set", sets), "--state-dir", str(state))
    newest = max((state / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    record = StateDir(state).run(newest.name).read()
    history = mlflow.MlflowClient(record.tracking_uri).get_metric_history(record.run_id, "speed/tokens_per_s")
    rates = [point.value for point in sorted(history, key=lambda point: point.step)]
    return statistics.median(rates[1:])


def timed(job_file: str, job: Job, out: Path) -> float:
    """Tokens a second of the bare loop."""
    tidegate("bench", job_file, "--steps", str(2 * job.train.log_every), "--out", str(out))
    return read_result(out).tokens_per_s


def each(flag: str, values: list[str]) -> list[str]:
    return [part for value in values for part in (flag, value)]


def tidegate(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tidegate.cli", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"tidegate {' '.join(arguments)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def main(job_file: str, repeats: int) -> None:
    job = load(job_file, Job).config
    ratios = []
    with tempfile.TemporaryDirectory(prefix="tidegate-") as scratch:
        for number in range(repeats):
            bare = timed(job_file, job, Path(scratch) / f"{number}.json")
            whole = trained(job_file, job, Path(scratch) / "state")
            ratios.append(bare / whole)
            print(f"bench {bare:,.0f}, train {whole:,.0f} tokens/s: {bare / whole - 1:+.2%}", flush=True)
    print(f"median of {repeats}: {statistics.median(ratios) - 1:+.2%} a step")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) == 3 else 3)
