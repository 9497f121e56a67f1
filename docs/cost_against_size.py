"""Tokens a second against experts, experts a token and sequence length, one axis at a time around a job.

    python docs/cost_against_size.py measure jobs/bench/sizes.yaml FOLDER
    python docs/cost_against_size.py plot FOLDER OUT.png

Each size is a `tidegate bench` of its own, and FOLDER holds their results; those that are there are not measured again.
A size that does not run leaves what it printed, and the others go on. Tokens a micro-batch stay those of the job as far
as whole sequences allow.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tidegate.config import load
from tidegate.launch.bench import read_result
from tidegate.train.job import Job

AXES = {
    "experts": [8, 16, 32, 64, 128, 256],
    "experts a token": [1, 2, 4, 8, 16],
    "sequence length": [2048, 4096, 8192, 16384, 32768],
}
FIELDS = {"experts": "num_experts", "experts a token": "top_k"}
STEPS = 4


def overrides(job: Job, axis: str, size: int) -> list[str]:
    """Of a job, for one size on one axis."""
    if axis in FIELDS:
        # The one weight of a token, divided by itself, would teach the router nothing.
        alone = ["model.ffn.router.renormalize=false"] if (axis, size) == ("experts a token", 1) else []
        return [f"model.ffn.{FIELDS[axis]}={size}", *alone]
    micro_batch = max(1, job.train.micro_batch * job.data.sequence_length // size)
    return [f"data.sequence_length={size}", f"train.micro_batch={micro_batch}"]


def measure(job_file: str, folder: Path) -> None:
    job = load(job_file, Job).config
    folder.mkdir(parents=True, exist_ok=True)
    for axis, sizes in AXES.items():
        for size in sizes:
            out = place(folder, axis, size)
            if out.exists():
                continue
            sets = [part for override in overrides(job, axis, size) for part in ("--set", override)]
            command = [sys.executable, "-m", "tidegate.cli", "bench", job_file, *sets, "--steps", str(STEPS)]
            done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False)
            if out.exists():
                print(f"{axis} {size}: {read_result(out).tokens_per_s_per_device:,.0f} tokens/s", flush=True)
            else:
                out.with_suffix(".txt").write_text(done.stdout + done.stderr, encoding="utf-8")
                print(f"{axis} {size}: failed, see {out.with_suffix('.txt')}", flush=True)


def place(folder: Path, axis: str, size: int) -> Path:
    return folder / f"{axis.replace(' ', '_')}_{size}.json"


def plot(folder: Path, out: str) -> None:
    figure, panels = plt.subplots(1, len(AXES), figsize=(15, 4.2), constrained_layout=True)
    results = []
    for (axis, sizes), panel in zip(AXES.items(), panels, strict=True):
        found = [(size, read_result(place(folder, axis, size))) for size in sizes if place(folder, axis, size).exists()]
        results += [result for _, result in found]
        panel.plot([s for s, _ in found], [r.tokens_per_s_per_device / 1e3 for _, r in found], "o-", color="black")
        panel.set_xscale("log", base=2)
        panel.set(title=f"against {axis}", xlabel=axis, xticks=sizes, xticklabels=sizes)
        panel.set_ylim(0, 1.15 * panel.get_ylim()[1])
        for size, result in found:
            if result.mfu is not None:
                where = (size, result.tokens_per_s_per_device / 1e3)
                panel.annotate(
                    f"{100 * result.mfu:.0f} %", where, textcoords="offset points", xytext=(0, 7), ha="center"
                )
    if not results:
        raise SystemExit(f"{folder}: holds no results; measure first")
    panels[0].set_ylabel("1,000 tokens/s a device")
    first = results[0]
    figure.suptitle(f"{first.name} on {first.hardware.device}, commit {first.commit[:12]}; numbers are MFU in %")
    figure.savefig(out, dpi=80)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["measure", job_file, folder]:
            measure(job_file, Path(folder))
        case ["plot", folder, out]:
            plot(Path(folder), out)
        case _:
            raise SystemExit(__doc__)
