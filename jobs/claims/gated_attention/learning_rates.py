"""How large a learning rate the arms of this claim stand: `python jobs/claims/gated_attention/learning_rates.py`.

Every arm is trained at the job's peak rate and at its doublings, with equal seeds, until no arm's held-out loss is
within 0.1 of its best or the rates end. What has ended in the state directory is not trained again. The table goes into
README.md, the losses into learning_rates.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import run  # noqa: E402  # the script beside this folder

from tidegate.config import load  # noqa: E402
from tidegate.launch.state import default_state_dir  # noqa: E402
from tidegate.train.job import Job  # noqa: E402

WITHIN = 0.1
"""Nats that a rate may cost against the arm's best."""
MARKS = ("<!-- learning rates: written by learning_rates.py -->\n", "<!-- end of learning rates -->\n")

Losses = Mapping[str, Mapping[float, Sequence[float]]]
"""Arm, rate, seed: held-out loss at the end, infinite for a run that diverged."""


def losses_at(rate: float, arms: Sequence[str], seeds: int, state: Path, tokens: int) -> dict[str, list[float]]:
    """Train every arm at the rate."""
    overrides = [f"optimizer.schedule.peak={rate}", f"train.tokens={tokens}"]
    mark = f"-{tokens}-at-{rate:g}"
    claim = run.Claim("", {"loss": "val/loss"})
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for seed in range(seeds):
        for arm in arms:
            name = run.run_name(HERE, arm, seed, mark)
            if name not in run.finished(HERE, state):
                try:
                    run.train(HERE, arm, seed, state, overrides, mark)
                except subprocess.CalledProcessError as error:
                    if "TrainingDiverged" not in error.stderr:
                        raise
                    found[arm].append(math.inf)
                    continue
            loss = run.read(run.finished(HERE, state)[name], claim)["loss"]
            found[arm].append(loss if math.isfinite(loss) else math.inf)
    return found


def largest(of_rates: Mapping[float, float]) -> float:
    """The largest rate whose loss is within `WITHIN` of the best."""
    return max(rate for rate, loss in of_rates.items() if loss <= min(of_rates.values()) + WITHIN)


def of_mean(of_rates: Mapping[float, Sequence[float]]) -> dict[float, float]:
    return {rate: mean(of_seeds) for rate, of_seeds in of_rates.items()}


def table(losses: Losses) -> list[str]:
    """Markdown: mean (standard deviation over seeds) at each rate; then the largest rate by the mean, and by each
    seed."""
    rates = list(next(iter(losses.values())))
    headings = [*(f"{rate:g}" for rate in rates), "largest", "of each seed"]
    lines = ["| arm | " + " | ".join(headings) + " |", "|" + "---|" * (1 + len(headings))]
    for arm, of_rates in losses.items():
        cells = [run.with_spread(values) if max(values) < math.inf else "diverged" for values in of_rates.values()]
        seeds = range(len(of_rates[rates[0]]))
        of_each = [largest({rate: values[seed] for rate, values in of_rates.items()}) for seed in seeds]
        cells += [f"{largest(of_mean(of_rates)):g}", ", ".join(f"{rate:g}" for rate in of_each)]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def write(losses: Losses, about: Mapping[str, str]) -> None:
    """learning_rates.json and the table in README.md."""
    document = {"about": about, "losses": losses}
    (HERE / "learning_rates.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    readme = HERE / "README.md"
    head, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    told = (
        f"\nHeld-out loss by peak rate; the largest rate is the last within {WITHIN} of the arm's best. "
        f"`{about['command']}`, {about['hardware']}, commit {about['commit']}.\n"
    )
    body = "\n".join(table(losses)) + "\n" + told
    readme.write_text(head + MARKS[0] + body + MARKS[1] + rest.partition(MARKS[1])[2], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=204_800)
    parser.add_argument("--most", type=float, default=0.3, help="no rate above it")
    parser.add_argument("--state-dir", type=Path, default=default_state_dir())
    parser.add_argument("--hardware", default=f"{os.cpu_count()} CPU cores")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arms, state = run.arms(HERE), arguments.state_dir
    job: Job = load(HERE / "base.yaml", Job).config
    rate = job.optimizer.schedule.peak
    losses: dict[str, dict[float, list[float]]] = {arm: {} for arm in arms}
    while rate <= arguments.most:
        for arm, of_seeds in losses_at(rate, arms, arguments.seeds, state, arguments.tokens).items():
            losses[arm][rate] = of_seeds
        print("\n".join(table(losses)), flush=True)
        if all(largest(of_mean(of_rates)) < rate for of_rates in losses.values()):
            break
        rate *= 2
    marks = {f"-{arguments.tokens}-at-{rate:g}" for rate in losses[arms[0]]}
    commits = {
        ended.tags.get("tidegate.commit", "unknown")
        for name, ended in run.finished(HERE, state).items()
        if name.endswith(tuple(marks))
    }
    about = {
        "command": " ".join(["python", "jobs/claims/gated_attention/learning_rates.py", *sys.argv[1:]]),
        "hardware": arguments.hardware,
        "commit": " and ".join(sorted(map(run.short, commits))),
    }
    write(losses, about)


if __name__ == "__main__":
    main()
