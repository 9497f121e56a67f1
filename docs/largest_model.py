"""The largest model that fits on one card and on two, by layout, as `tidegate show` predicts memory.

    python docs/largest_model.py [GIB]

The model is that of `jobs/bench/h100.yaml`, made deeper until the next layer would not fit. Two cards hold half of the
experts each.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tidegate.config import load
from tidegate.model.flops import total
from tidegate.train.job import Job
from tidegate.train.memory import predict

JOB = Path(__file__).parent.parent / "jobs" / "bench" / "h100.yaml"
USABLE_GIB = 78.0  # of an H100's 79.2; the CUDA context, and NCCL's buffers of two, take the rest
HOST_GIB = 256.0  # of the host's memory, for each card
ONE, TWO = ["resources.workers=1"], ["resources.workers=2", "parallel.expert=2"]
ROWS = {
    "ZeRO 0, fp32 moments": ["parallel.zero_stage=0", "optimizer.state=fp32"],
    "ZeRO 1, fp32 moments": ["optimizer.state=fp32"],
    "ZeRO 1, bf16 moments": ["optimizer.state=bf16"],
    "ZeRO 2, fp32 moments": ["parallel.zero_stage=2", "optimizer.state=fp32"],
    "ZeRO 2, optimizer on the host": ["parallel.zero_stage=2", "optimizer.state=fp32", "parallel.offload=optimizer"],
    "ZeRO 1, experts on the host": ["optimizer.state=fp32", "parallel.offload=experts"],
}


def deeper(overrides: list[str], layers: int) -> Job:
    job: Job = load(JOB, Job, [*overrides, "parallel.gradients_at_once=1", f"model.num_layers={layers}"]).config
    return job


def largest(overrides: list[str], usable: float) -> int:
    """Layers that fit, 0 if not even one does. Every layer takes the same."""

    def fits(layers: int) -> bool:
        prediction = predict(deeper(overrides, layers))
        return prediction.total <= usable and prediction.host <= HOST_GIB * 2**30

    low, high = 0, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def cell(overrides: list[str], usable: float) -> str:
    layers = largest(overrides, usable)
    if layers == 0:
        return "-"
    job = deeper(overrides, layers)
    host = predict(job).host / 2**30
    parameters = total(job.model, job.data.sequence_length).params / 1e9
    return f"{parameters:.1f} ({layers}{f', {host:.0f} GiB' if host else ''})"


def main() -> None:
    usable = (float(sys.argv[1]) if len(sys.argv) > 1 else USABLE_GIB) * 2**30
    print("| layout | one card | recomputed | two cards, EP 2 | recomputed |\n|---|---|---|---|---|")
    for name, overrides in ROWS.items():
        cells = (
            cell([*cards, *overrides, f"train.recompute={str(recompute).lower()}"], usable)
            for cards in (ONE, TWO)
            for recompute in (False, True)
        )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
