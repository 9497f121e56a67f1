"""How much of a known front each searcher finds in as many trials: the table and the picture of docs/tune.md.

    python docs/searchers.py docs/searchers.png      # 5 seeds x 48 trials each, two minutes on one core

The sweep is that of `tidegate tune` up to training: job, space, budget, draws and searchers. What a trial comes to is
looked up in a table of all configurations within the budget. Its losses are from a formula, which has the shapes that
papers report and none of their numbers:

    loss = 1.9 + 12 N^-0.2 (1 - gain) (E/8)^-0.05 + 0.02 c log10(w/0.01)^2 + 0.02 [E/K >= 16] + noise

N active parameters, E experts, K of them a token, w the weight of the balance loss. The gain is 0.03 for a headwise
gate, 0.04 for an elementwise one, and 0.01 more for sigmoid scores; c is 2 for softmax scores and 1 for sigmoid ones.
The noise is normal with 0.005, drawn once a configuration: what a seed does, and what no searcher can know.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tidegate.train.job import Job
from tidegate.tune.budget import QUANTITIES, violations
from tidegate.tune.front import hypervolume, pareto
from tidegate.tune.searchers import build_searcher
from tidegate.tune.space import Space
from tidegate.tune.sweep import drawn_trials
from tidegate.tune.trials import Result

JOB = Path(__file__).parent.parent / "jobs" / "demo.yaml"
SEARCHERS = ("random", "tpe", "nsga2", "predictor")
SPACE: dict[str, list[Any]] = {
    "model.attention.gate": [
        {"kind": "none"},
        {"kind": "sdpa_output", "granularity": "headwise"},
        {"kind": "sdpa_output", "granularity": "elementwise"},
    ],
    "model.ffn.router": [{"kind": "softmax_top_k"}, {"kind": "sigmoid_top_k"}],
    "model.ffn.num_experts": [8, 16, 32, 64],
    "model.ffn.top_k": [2, 3, 4],
    "model.ffn.expert_dim": [64, 128, 192, 256],
    "balance.loss_weight": [0.001, 0.003, 0.01, 0.03, 0.1],
}
BUDGET = "active_params<=1.7M"
TRIALS, SEEDS = 48, 5
SHOWN = (12, 24, 36, 48)


class Row(NamedTuple):
    log_cost: float
    loss: float


class Table(NamedTuple):
    rows: dict[str, Row]
    """By the space's key of a candidate."""
    reference: Row
    """The worst of each."""

    def share(self, keys: list[str]) -> float:
        """Of the whole front's hypervolume."""
        rows = list(self.rows.values())
        return hypervolume([self.rows[key] for key in keys], self.reference) / hypervolume(rows, self.reference)


def loss_of(job: Job) -> float:
    """The formula at the top without its noise, nats a token."""
    ffn, gate = job.model.ffn, job.model.attention.gate
    softmax = ffn.router.kind == "softmax_top_k"
    gain = 0.0 if gate.kind == "none" else {"headwise": 0.03, "elementwise": 0.04}[gate.granularity]
    gain += 0.0 if softmax else 0.01
    capacity = 12 * QUANTITIES["active_params"].of(job) ** -0.2 * (1 - gain) * (ffn.num_experts / 8) ** -0.05
    unbalanced = 0.02 * (2 if softmax else 1) * math.log10(job.balance.loss_weight / 0.01) ** 2
    return 1.9 + capacity + unbalanced + (0.02 if ffn.num_experts / ffn.top_k >= 16 else 0.0)


def space_of(searcher: str, seed: int) -> Space:
    space = {path: {"choice": values} for path, values in SPACE.items()}
    search = {"space": space, "budgets": [BUDGET], "searcher": searcher, "trials": TRIALS, "seed": seed}
    return Space(JOB, ["model.ffn.shared.num=0", f"search={json.dumps(search)}"])


def tabulated() -> Table:
    space, chance, rows = space_of("random", 0), random.Random(0), {}
    for values in itertools.product(*SPACE.values()):
        candidate = space.at(dict(zip(SPACE, values, strict=True)))
        loss = loss_of(candidate.job) + chance.gauss(0, 0.005)
        if not violations(candidate.job, space.budgets):
            rows[space.key(candidate.values)] = Row(math.log(QUANTITIES["active_params"].of(candidate.job)), loss)
    return Table(rows, Row(max(row.log_cost for row in rows.values()), max(row.loss for row in rows.values())))


def swept(table: Table, name: str, seed: int) -> list[float]:
    """The share of the front after each trial of a sweep."""
    space = space_of(name, seed)
    drawn = [trial for trial in drawn_trials(space) if trial.kind == "random"]
    searcher = build_searcher(space, [], drawn)
    keys: list[str] = []
    for number in range(TRIALS):
        if number < len(drawn):
            trial = drawn[number]
            if searcher is not None:
                searcher.adopt(trial)
        else:
            trial = searcher.propose(number)
        keys.append(space.key(trial.values))
        if searcher is not None:
            searcher.tell(Result(trial=trial, run="", status="finished", value=table.rows[keys[-1]].loss))
    return [table.share(keys[: number + 1]) for number in range(TRIALS)]


def main(picture: str) -> None:
    table = tabulated()
    print(f"{len(table.rows)} configurations, {len(pareto(list(table.rows.values())))} of them on the front\n")
    print("| searcher |", " | ".join(f"{trials} trials" for trials in SHOWN), "| s a proposal |")
    print("|---" * (len(SHOWN) + 2) + "|")
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in SEARCHERS:
        begun = time.monotonic()
        by_trial = list(zip(*(swept(table, name, seed) for seed in range(SEEDS)), strict=True))
        seconds = (time.monotonic() - begun) / (SEEDS * TRIALS)
        mean = [statistics.fmean(shares) for shares in by_trial]
        error = [statistics.stdev(shares) / math.sqrt(SEEDS) for shares in by_trial]
        shown = " | ".join(f"{mean[trials - 1]:.3f} +- {error[trials - 1]:.3f}" for trials in SHOWN)
        print(f"| {name} | {shown} | {seconds:.2f} |", flush=True)
        trials = range(1, TRIALS + 1)
        (line,) = axes.plot(trials, mean, label=name)
        low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
        axes.fill_between(trials, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="trials", ylabel="share of the front's hypervolume", ylim=(0.5, 1))
    axes.set_title(f"mean and standard error over {SEEDS} seeds; the first 12 trials are random in all", fontsize=9)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1])
