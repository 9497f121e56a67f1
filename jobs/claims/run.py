"""Train the jobs of a claim with paired seeds and write its table: `python jobs/claims/run.py balance_scope`.

A claim is a folder here: jobs, the arms, and claim.json, which says what is compared, and in `recall` whether the arms'
stacks learn associative recall as well. Runs go to the state directory's MLflow, in an experiment of the claim's name;
those that have ended there are not trained again. Beside the jobs come results.json, runs.csv (the runs as MLflow has
them), the table of README.md and, where matplotlib is installed, pictures (plots.py).
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import tidegate
from tidegate.config import ConfigError, load
from tidegate.data.build import prepare
from tidegate.launch.notebook import StoredRun
from tidegate.launch.state import StateDir, default_state_dir
from tidegate.track.client import connect
from tidegate.track.store import resolve_tracking_uri
from tidegate.train.job import Job

HERE = Path(__file__).resolve().parent
LAST_RECORDS = 5
"""A step's metric is noisy: averaged over the last records."""
RECALL = ("recall accuracy", "seeds at 0.99")
"""Headings of what `tidegate recall` finds; results.json has the step as well."""
MARKS = ("<!-- table: written by run.py -->\n", "<!-- end of table -->\n")


class Claim(NamedTuple):
    """What claim.json says."""

    baseline: str
    """The arm that others are compared with."""
    columns: Mapping[str, str]
    """Heading to metric; `*` is every layer, block or domain, of which the mean is taken."""
    recall: Mapping[str, Any] | None = None
    """Options of `tidegate recall`: all that say what the task is (length, pairs, vocab, steps, rates), and device."""

    @property
    def headings(self) -> list[str]:
        return [*self.columns, *(RECALL if self.recall else ())]


def read_claim(folder: Path) -> Claim:
    """Raises ValueError: claim.json is missing, has other entries, or names no arm of the folder as its baseline."""
    path = folder / "claim.json"
    try:
        claim = Claim(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if claim.baseline not in arms(folder):
        raise ValueError(f"{path}: baseline={claim.baseline!r} is none of {', '.join(arms(folder))}")
    return claim


def arms(folder: Path) -> list[str]:
    """The folder's jobs but base.yaml, which others extend."""
    return sorted(path.stem for path in folder.glob("*.yaml") if path.stem != "base")


def run_name(folder: Path, arm: str, seed: int) -> str:
    return f"{folder.name}-{arm}-{seed}".replace("_", "-")


def train(folder: Path, arm: str, seed: int, state: Path, overrides: Sequence[str]) -> None:
    """One run, in a process of its own; raises CalledProcessError if it fails."""
    settings = [f"train.seed={seed}", f"data.seed={seed}", f"track.experiment={folder.name}", *overrides]
    command = [sys.executable, "-m", "tidegate.cli", "train", str(folder / f"{arm}.yaml"), "--local"]
    command += ["--name", run_name(folder, arm, seed), "--state-dir", str(state)]
    command += [word for setting in settings for word in ("--set", setting)]
    _call(command)
    print(run_name(folder, arm, seed), "has ended", flush=True)


def text_of(folder: Path) -> list[str]:
    """The setting that trains on a folder's files, a domain each, in the place of what the jobs name."""
    domains = [
        {"name": path.name.partition(".")[0], "paths": [str(path.resolve())]}
        for path in sorted(folder.glob("*.jsonl*"))
    ]
    return [f"data.domains={json.dumps(domains)}"]


def make_ready(folder: Path, runs: Sequence[tuple[str, int]], state: Path, overrides: Sequence[str]) -> None:
    """Make the store and the token shards, which runs at a time would make once each."""
    for arm, seed in runs:
        job: Job = load(folder / f"{arm}.yaml", Job, [f"data.seed={seed}", *overrides]).config
        prepare(job.data, cache_dir=StateDir(state).data, job_dir=folder)
        (state / "mlflow").mkdir(exist_ok=True)
        connect(resolve_tracking_uri(job.track, state)).search_experiments()


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
        done.check_returncode()


class Recalled(NamedTuple):
    """What an arm's stack recalls."""

    commit: str
    rows: Mapping[int, Mapping[str, float | None]]
    """By seed: the columns of `RECALL` and the step."""


def recall(folder: Path, arm: str, claim: Claim, seeds: int, state: Path, overrides: Sequence[str]) -> Recalled:
    """Train the arm's stack on associative recall, unless the state directory has the same of as many seeds."""
    asked = claim.recall
    assert asked is not None
    job: Job = load(folder / f"{arm}.yaml", Job, overrides).config
    path = state / "recall" / f"{job.name}-{asked['length']}-{asked['pairs']}-{asked['vocab']}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    wanted = {
        "model": job.model.model_dump(mode="json"),
        "steps": asked["steps"],
        "rates": [float(rate) for rate in asked["rates"].split(",")],
    }
    if not wanted.items() <= found.items() or len(found["seeds"]) < seeds:
        command = [sys.executable, "-m", "tidegate.cli", "recall", str(folder / f"{arm}.yaml"), "--seeds", str(seeds)]
        command += [word for name, value in asked.items() for word in (f"--{name}", str(value))]
        command += [word for setting in overrides for word in ("--set", setting)]
        _call([*command, "--state-dir", str(state)])
        found = json.loads(path.read_text(encoding="utf-8"))
        print(folder.name, arm, "has learned recall", flush=True)
    rows = {
        row["seed"]: {RECALL[0]: row["accuracy"], RECALL[1]: float(row["reached"] is not None), "step": row["reached"]}
        for row in found["seeds"]
    }
    return Recalled(found["commit"] or "unknown", rows)


def finished(folder: Path, state: Path) -> dict[str, StoredRun]:
    """Runs of the claim that have ended, by name."""
    try:
        found = tidegate.runs(experiment=folder.name, state_dir=state)
    except ConfigError:  # no store, or no experiment yet
        return {}
    return {run.name: run for run in found if run.status == "FINISHED"}


def read(run: StoredRun, claim: Claim) -> dict[str, float]:
    """The claim's columns of one run."""
    history = run.history()
    row = {}
    for heading, pattern in claim.columns.items():
        series = [history[name].dropna() for name in fnmatch.filter(history.columns, pattern)]
        last = [float(values.tail(1 if pattern.startswith("val/") else LAST_RECORDS).mean()) for values in series]
        row[heading] = statistics.mean(last) if last else float("nan")
    return row


Results = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Arm, seed, heading."""


def table(results: Results, claim: Claim) -> list[str]:
    """Markdown: mean (standard deviation over seeds), and behind it the difference to the baseline at equal seeds."""
    lines = ["| arm | " + " | ".join(claim.headings) + " |", "|" + "---|" * (1 + len(claim.headings))]
    for arm, seeds in results.items():
        cells = []
        for heading in claim.headings:
            values = [row[heading] for row in seeds.values()]
            cell = _with_spread(values)
            if arm != claim.baseline:
                against = results[claim.baseline]
                differences = [row[heading] - against[seed][heading] for seed, row in seeds.items() if seed in against]
                cell += f"; {_with_spread(differences, sign='+')}"
            cells.append(cell)
        lines.append(f"| [{arm}]({arm}.yaml) | " + " | ".join(cells) + " |")
    return lines


def _with_spread(values: Sequence[float], sign: str = "") -> str:
    mean = statistics.mean(values)
    if math.isnan(mean):  # an arm that does not record the metric
        return "-"
    digits = 3 if abs(mean) < 100 else 1
    spread = f" ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{mean:{sign}.{digits}f}{spread}"


def write(folder: Path, claim: Claim, results: Results, about: Mapping[str, Any], found: Sequence[StoredRun]) -> None:
    """results.json, runs.csv and the table in README.md."""
    document = {"about": about, "results": results}
    (folder / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    params = sorted({name for run in found for name in run.params if len({r.params.get(name) for r in found}) > 1})
    metrics = sorted({name for run in found for name in run.metrics if not name.startswith(("system/", "time/"))})
    with (folder / "runs.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "status", *params, *metrics])
        for run in found:
            values = [f"{run.metrics[name]:.6g}" if name in run.metrics else "" for name in metrics]
            writer.writerow([run.name, run.status, *(run.params.get(name, "") for name in params), *values])
    readme = folder / "README.md"
    head, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    tail = rest.partition(MARKS[1])[2]
    told = (
        f"\nMean over {about['seeds']} seeds (their standard deviation); after the semicolon the difference to "
        f"{claim.baseline} at equal seeds. `{about['command']}`, {about['hardware']}, commit {about['commit']}.\n"
    )
    body = "\n".join(table(results, claim)) + "\n" + told
    readme.write_text(head + MARKS[0] + body + MARKS[1] + tail, encoding="utf-8")


def _short(commit: str) -> str:
    digits, _, dirty = commit.partition("+")
    return digits[:7] + ("+" + dirty if dirty else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=sorted(path.parent.name for path in HERE.glob("*/claim.json")))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, a thread each")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="PATH=VALUE", help="of all jobs"
    )
    parser.add_argument("--text", type=Path, help="folder of .jsonl[.gz|.xz|.zst] files: the text, a domain each")
    parser.add_argument("--state-dir", type=Path, default=default_state_dir())
    parser.add_argument("--hardware", default=f"{os.cpu_count()} CPU cores")
    arguments = parser.parse_args()
    folder, state = HERE / arguments.claim, arguments.state_dir
    claim = read_claim(folder)
    overrides = [*arguments.overrides, *(text_of(arguments.text) if arguments.text else ())]
    for arm in arms(folder):
        load(folder / f"{arm}.yaml", Job, overrides)  # a mistake ends it here, not in the middle
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    wanted = [(arm, seed) for seed in range(arguments.seeds) for arm in arms(folder)]
    there = finished(folder, state)
    todo = [each for each in wanted if run_name(folder, *each) not in there]
    make_ready(folder, todo, state, overrides)
    with ThreadPoolExecutor(arguments.parallel) as pool:
        for future in [pool.submit(train, folder, arm, seed, state, overrides) for arm, seed in todo]:
            future.result()
    there = finished(folder, state)
    found = [there[run_name(folder, *each)] for each in wanted]
    results: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in arms(folder)}
    commits = {run.tags.get("tidegate.commit", "unknown") for run in found}
    for (arm, seed), run in zip(wanted, found, strict=True):
        results[arm][seed] = read(run, claim)
    if claim.recall:
        with ThreadPoolExecutor(arguments.parallel) as pool:
            learned = pool.map(lambda arm: recall(folder, arm, claim, arguments.seeds, state, overrides), results)
        for rows, recalled in zip(results.values(), learned, strict=True):
            commits.add(recalled.commit)
            for seed in rows:
                rows[seed] |= recalled.rows[seed]
    about = {
        "command": " ".join(["python", "jobs/claims/run.py", *sys.argv[1:]]),
        "seeds": arguments.seeds,
        "hardware": arguments.hardware,
        "commit": " and ".join(sorted(map(_short, commits))),
    }
    write(folder, claim, results, about, found)
    if importlib.util.find_spec("matplotlib"):
        import plots  # beside this file

        plots.draw_columns(folder)
        plots.draw_experts(folder, {arm: there[run_name(folder, arm, 0)] for arm in arms(folder)})
    print("\n".join(table(results, claim)))


if __name__ == "__main__":
    main()
