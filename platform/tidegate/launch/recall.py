"""`tidegate recall`: whether a job's stack can learn associative recall; a line a model, and JSON of all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tidegate.config import ConfigError, load
from tidegate.data.recall import recall_batch
from tidegate.launch.probe import check_device
from tidegate.launch.state import StateDir
from tidegate.track.provenance import git_commit
from tidegate.train.job import Job
from tidegate.train.recall import Learned, RecallTask, learn_recall, learned, reading

__all__ = ["RecallRequest", "recall_job"]


class RecallRequest(NamedTuple):
    """The command's arguments."""

    job: Path
    overrides: Sequence[str]
    seeds: int
    """At least 1, as are steps and pairs."""
    steps: int
    rates: str
    length: int
    pairs: int
    vocab: int
    device: str


def recall_job(request: RecallRequest, state: StateDir) -> Path:
    """Train, print, and write what came out.

    Args:
        request: what is asked.
        state: where the file goes, named after job and task.

    Raises:
        ConfigError: an option or the job is wrong.
    """
    task = RecallTask(request.length, request.pairs, request.vocab)
    try:
        recall_batch(1, *task)
    except ValueError as error:
        raise ConfigError(f"--length {task.length} --pairs {task.pairs} --vocab {task.vocab_size}: {error}") from error
    rates = _rates(request.rates)
    check_device(request.device)
    job: Job = load(request.job, Job, request.overrides).config
    found = [_seed(job, task, request, rates, seed) for seed in range(request.seeds)]
    about = {"job": job.name, "commit": git_commit(), "steps": request.steps, "rates": rates, **task._asdict()}
    out = state.root / "recall" / f"{job.name}-{task.length}-{task.pairs}-{task.vocab_size}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    document = {**about, "model": job.model.model_dump(mode="json"), "seeds": found}
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return out


def _seed(job: Job, task: RecallTask, request: RecallRequest, rates: Sequence[float], seed: int) -> dict[str, Any]:
    """The best of the rates, each from the same weights, up to the first at which the model recalls."""
    best, best_rate = Learned(-1.0, None), rates[0]
    for rate in rates:
        result = learned(learn_recall(job.model, job.balance, task, request.steps, rate, seed, request.device))
        when = f"0.99 at step {result.reached}" if result.reached else f"not 0.99 in {request.steps} steps"
        says = reading(result.accuracy, task)
        print(f"seed {seed}, rate {rate:g}: accuracy {result.accuracy:.3f}, {when}: {says}", flush=True)
        if result.accuracy > best.accuracy:
            best, best_rate = result, rate
        if result.reached is not None:
            break
    return {"seed": seed, "rate": best_rate, **best._asdict(), "reading": reading(best.accuracy, task)}


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--rates {text}: not numbers with commas") from error
    if not all(0 < rate < 1 for rate in rates):
        raise ConfigError(f"--rates {text}: must be between 0 and 1")
    return rates
