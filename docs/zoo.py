"""Train every job of jobs/zoo with several seeds and write docs/zoo.md: `python docs/zoo.py --parallel N`.

One process and one thread a run. With `--only NAME ...` other jobs are left out, and `--out FILE` writes elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASELINE = "softmax_top_k"
LAST_RECORDS = 5  # what a step shows is noisy: averaged over the last records
COLUMNS = {
    "maxvio": "MaxVio",
    "dead_experts": "dead experts",
    "domain_information": "domain information, nats",
    "experts_per_token": "experts a token",
}


def run(name: str, seed: int, data: str) -> dict[str, float]:
    """Train one job here and return what the table shows of it."""
    import torch

    from tidegate.config import load
    from tidegate.parallel import collectives
    from tidegate.train.job import Job
    from tidegate.train.loop import World, train
    from tidegate.train.telemetry import Record

    torch.set_num_threads(1)
    job: Job = load(ROOT / "jobs" / "zoo" / f"{name}.yaml", Job, [f"train.seed={seed}", f"data.seed={seed}"]).config
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as scratch:
        collectives.start(alone=True)
        world = World(
            Path(data), lambda step: Path(scratch) / str(step), lambda *_: None, records.append, lambda: False
        )
        train(job, world)
        collectives.stop()
    logged = [record.metrics for record in records if "train/loss" in record.metrics]
    row = {"val/loss": records[-1].metrics["val/loss"]}
    row["tokens_per_s"] = statistics.median(metrics["speed/tokens_per_s"] for metrics in logged)
    for column in COLUMNS:
        names = [f"moe/{layer}/{column}" for layer in range(job.model.num_layers)]
        row[column] = statistics.mean(m[name] for m in logged[-LAST_RECORDS:] for name in names)
    return row | {name: value for name, value in records[-1].metrics.items() if name.startswith("oracle/")}


def prepare_data() -> Path:
    """Token shards that all zoo jobs share; a seed changes the order, not the text."""
    from tidegate.config import load
    from tidegate.data import prepare
    from tidegate.launch.state import StateDir, default_state_dir
    from tidegate.train.job import Job

    path = ROOT / "jobs" / "zoo" / "base.yaml"
    job: Job = load(path, Job).config
    return prepare(job.data, cache_dir=StateDir(default_state_dir()).data, job_dir=path.parent)


def table(results: dict[str, dict[int, dict[str, float]]]) -> list[str]:
    """Markdown rows, best held-out loss first."""
    header = ["router", "held-out loss", f"minus {BASELINE}, same seed", *COLUMNS.values(), "tokens/s"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, seeds in sorted(results.items(), key=lambda item: mean(item[1], "val/loss")):
        differences = [row["val/loss"] - results[BASELINE][seed]["val/loss"] for seed, row in seeds.items()]
        error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
        cells = [f"[{name}](../jobs/zoo/{name}.yaml)", f"{mean(seeds, 'val/loss'):.3f}"]
        cells.append("" if name == BASELINE else f"{statistics.mean(differences):+.3f} (s.e. {error:.3f})")
        cells += [f"{mean(seeds, column):.3f}" for column in COLUMNS] + [f"{mean(seeds, 'tokens_per_s'):,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def mean(seeds: dict[int, dict[str, float]], column: str) -> float:
    return statistics.mean(row[column] for row in seeds.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "zoo.md")
    parser.add_argument("--hardware", default=f"{os.cpu_count()} CPU cores")
    arguments = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    names = sorted(path.stem for path in (ROOT / "jobs" / "zoo").glob("*.yaml") if path.stem != "base")
    names = [name for name in names if not arguments.only or name in {*arguments.only, BASELINE}]
    data = str(prepare_data())
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names}
    # DeepSpeed wants a fresh process for every engine.
    with ProcessPoolExecutor(arguments.parallel, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {(name, seed): pool.submit(run, name, seed, data) for seed in arguments.seeds for name in names}
        for (name, seed), future in futures.items():
            results[name][seed] = future.result()
            print(name, seed, json.dumps(results[name][seed]), flush=True)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    text = TEMPLATE.format(
        table="\n".join(table(results)),
        seeds=len(arguments.seeds),
        hardware=arguments.hardware,
        parallel=arguments.parallel,
        commit=git.stdout.strip() or "unknown",
        oracle=oracle(results.get("uneven", {})),
    )
    arguments.out.write_text(text, encoding="utf-8")
    arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1), encoding="utf-8")


def oracle(seeds: dict[int, dict[str, float]]) -> str:
    if not seeds:
        return ""
    names = ("learned", "random", "oracle", "widest", "budget")
    learned, chance, best, widest, budget = (mean(seeds, f"oracle/{name}") for name in names)
    return (
        f"\nOracle gap of `uneven` (27 paths, 8 sequences): the router's {learned:.3f}, a random path of its cost "
        f"{chance:.3f}, the best path of each token at its cost ({budget:.2f} of all-big) {best:.3f}, all-big "
        f"{widest:.3f}.\n"
    )


TEMPLATE = """# The router zoo

Every router of `tidegate list routers` on the demo corpus: 3 layers of 96, 8 experts, 2 a token, 204,800 tokens (100
steps), fp32, one process and one thread a run, {seeds} seeds. What a toy of this size shows is that a router trains,
how it spreads load, and what it costs; **it does not rank routers**. Read the loss differences beside their standard
errors over seeds, and not as more. Load columns are means over layers and the last five records.

{table}
{oracle}
- `expert_choice` reads later tokens: its loss is not a language model's.
- `thor` and `random` route by chance in evaluation too.
- `relu`, `dense_to_sparse`, `comet` and `dselect_k` use more experts than two at first; tokens/s is the median over the
  run.
- `uneven` has other experts than the rest (4, 1 and 0 times the width, one a token).

`python docs/zoo.py --parallel {parallel}`, {hardware}, commit {commit}. Each job is one of
[jobs/zoo](../jobs/zoo).
"""

if __name__ == "__main__":
    main()
