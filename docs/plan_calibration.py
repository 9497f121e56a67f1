"""Fits what `tidegate plan` assumes of our kernels to what was measured, and writes the tables of docs/plan.md.

python docs/plan_calibration.py fit      # kernels/benchmarks/results, plan/measured.yaml -> plan/efficiency.yaml
python docs/plan_calibration.py tables   # predictions beside measurements -> docs/plan.md
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from scipy.optimize import least_squares

from tidegate.config import flatten, load
from tidegate.plan.efficiency import Efficiency, measured_efficiency
from tidegate.plan.hardware import load_gpus, parse_gpus
from tidegate.plan.measurements import Measurement, measurements
from tidegate.plan.step import StepTime, step_time
from tidegate.train.job import Job
from tidegate.train.memory import predict

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "kernels" / "benchmarks" / "results"
JOBS = ROOT / "jobs" / "bench"
EFFICIENCY = ROOT / "platform" / "tidegate" / "plan" / "efficiency.yaml"
PAGE = ROOT / "docs" / "plan.md"
RANGES = (
    "model.width",
    "model.ffn.num_experts",
    "model.ffn.expert_dim",
    "model.ffn.top_k",
    "data.sequence_length",
)
ASSUMED = {"network": 0.8, "load_skew": 1.1}
MOVERS = ("rms_norm", "qk_norm_rope", "gated_output", "swiglu", "moe_dispatch", "ep_permute")
FEWEST_ROWS = 16_000  # of a shape that says something about a training step
H100 = load_gpus()["H100"]


def job_of(row: Measurement) -> Job:
    job: Job = load(JOBS / row.job, Job, row.set).config
    return job


def timed(row: Measurement, efficiency: Efficiency) -> StepTime:
    return step_time(job_of(row), parse_gpus(row.gpus).gpu, efficiency)


# --- fit --------------------------------------------------------------------------------------------------------


def results(op: str, implementation: str = "triton") -> Iterator[dict[str, Any]]:
    stored = json.loads((RESULTS / f"{op}.json").read_text(encoding="utf-8"))["results"]
    return (result for result in stored if result["implementation"] == implementation)


def of_kernels() -> dict[str, Any]:
    """Shares of an H100 that single kernels reach."""
    bandwidth = H100.memory_tb_per_s * 1e12
    moved = [row["bytes"] / (row["ms"] / 1e3) / bandwidth for op in MOVERS for row in results(op)]
    memory = statistics.median(moved)

    def expert_s(shape: dict[str, Any], share: float) -> float:
        """As `plan/step.py` has it, of one layer: products, then rows and weights."""
        A, D, F, E = shape["T"] * shape["K"], shape["D"], shape["F"], shape["E"]
        rows, weights = 2 * A * (8 * D + 12 * F), 3 * 2 * E * 3 * D * F
        return 6 * A * 3 * D * F / (share * H100.peak) + (rows + weights) / (memory * bandwidth)

    experts = list(results("moe_experts"))
    fitted = least_squares(lambda x: [expert_s(row["shape"], x[0]) / (row["ms"] / 1e3) - 1 for row in experts], [0.7])
    head = [row["flops"] / (row["ms"] / 1e3) / H100.peak for row in results("linear_cross_entropy")]
    return {
        "memory": memory,
        "head": statistics.median(head),
        "experts": float(fitted.x[0]),
        "attention": attention(None),
        "attention_isolated": attention(1500),
    }


def attention(document: int | None) -> dict[int, float]:
    """By head width. The FLOPs are the model's, three times those of the forward pass."""
    shares: dict[int, list[float]] = {}
    for row in results("gated_attention", "chosen"):
        shape = row["shape"]
        if shape.get("document") == document and shape["B"] * shape["T"] >= FEWEST_ROWS:
            flops = 6 * shape["B"] * shape["T"] ** 2 * shape["H"] * shape["d"]
            shares.setdefault(shape["d"], []).append(flops / (row["ms"] / 1e3) / H100.peak)
    return {d: statistics.median(found) for d, found in shares.items()}


def ranges() -> dict[str, tuple[int, int]]:
    """Of the jobs whose steps were measured, dense ones aside where the field is the experts'."""
    values = [flatten(job_of(row)) for row in measurements()]
    found = {field: [each[field] for each in values if field in each] for field in RANGES}
    return {field: (min(numbers), max(numbers)) for field, numbers in found.items()}


def fit() -> Efficiency:
    """What kernels say, and what is left to whole steps."""
    known = of_kernels() | ASSUMED | {"ranges": ranges()}
    rows = {what: [row for row in measurements() if (row.fit or "").startswith(what)] for what in FITTED}
    (late,), (links,), (zero2,) = rows["host_s_per_layer"], rows["nvlink"], rows["zero2_bytes"]
    job = job_of(late)
    known["host_s_per_layer"] = late.step_s / (job.model.num_layers * job.accumulation)

    def at(**values: float) -> Efficiency:
        begin = {"nvlink": 1.0, "zero2_bytes": 0.0, "projections": 1.0, "unlisted": 0.0}
        return Efficiency.model_validate(begin | known | values)

    assert links.communication_s is not None
    known["nvlink"] = timed(links, at()).gradients_and_weights / links.communication_s

    def misses(x: Any) -> list[float]:
        guess = at(projections=x[0], unlisted=x[1])
        return [timed(row, guess).total / row.step_s - 1 for row in rows["projections"]]

    fitted = least_squares(misses, [0.65, 0.04], bounds=([0.1, 0.0], [1.0, 0.5]))
    known |= {"projections": float(fitted.x[0]), "unlisted": float(fitted.x[1])}
    without, one = (timed(zero2, at(zero2_bytes=value)).total for value in (0.0, 1.0))
    return at(zero2_bytes=(zero2.step_s - without) / (one - without))


FITTED = ("projections", "host_s_per_layer", "nvlink", "zero2_bytes")


def written(efficiency: Efficiency) -> str:
    """The file, three digits each."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(each) for key, each in value.items()}
        return list(value) if isinstance(value, tuple) else float(f"{value:.3g}")

    head = "# Written by `python docs/plan_calibration.py fit`; fields are explained in efficiency.py.\n"
    return head + yaml.dump(rounded(efficiency.model_dump()), sort_keys=False, default_flow_style=None)


# --- tables -----------------------------------------------------------------------------------------------------


def calibration() -> Iterator[str]:
    yield "| job | GPUs | step, ms | predicted | over | peak, GiB | predicted | over | fitted |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in measurements():
        job, seconds = job_of(row), timed(row, measured_efficiency()).total
        name = ", ".join([f"`{row.job}`", *(f"`{value}`" for value in row.set)])
        cells = [name, row.gpus, f"{1e3 * row.step_s:,.0f}", f"{1e3 * seconds:,.0f}", f"{seconds / row.step_s:.2f}"]
        if row.peak_gib is None:
            cells += ["", "", ""]
        else:
            peak = predict(job).total / 2**30
            cells += [f"{row.peak_gib:.1f}", f"{peak:.1f}", f"{peak / row.peak_gib:.2f}"]
        yield "| " + " | ".join([*cells, row.fit or ""]) + " |"


class Published(NamedTuple):
    """What others say of their systems."""

    system: str
    job: str
    """In `MODELS`."""
    set: tuple[str, ...]
    tokens_per_s: float
    """Of a GPU."""
    forced: bool
    """Whether every expert got as many tokens."""
    source: str


MODELS = {
    "Qwen3-30B-A3B": (
        "model.num_layers=48", "model.vocab_size=151936", "model.attention.num_heads=32", "model.ffn.num_experts=128",
        "model.ffn.expert_dim=768", "model.attention.gate.kind=none",
    ),
    # Attention is multi-head latent attention there and ordinary attention of as many heads here.
    "Moonlight-16B-A3B": (
        "model.num_layers=27", "model.vocab_size=163840", "model.attention.num_kv_heads=16", "model.ffn.top_k=6",
        "model.ffn.expert_dim=1408", "model.ffn.shared.num=2", "model.attention.gate.kind=none",
    ),
}  # fmt: skip
_AT_4096 = ("train.batch_tokens=4194304", "resources.workers=16", "train.keep_rows=false", "optimizer.state=fp32")
PUBLISHED = (
    Published(
        "Megatron-Bridge, 16 H100", "Qwen3-30B-A3B", (*_AT_4096, "parallel.expert=16", "train.micro_batch=1"),
        13_011, True, "Megatron-Bridge PR 5123",
    ),
    Published(
        "Megatron-Bridge, 16 H100", "Qwen3-30B-A3B", (*_AT_4096, "parallel.expert=16", "train.micro_batch=1"),
        8_654.6, False, "its verification card qwen3-30b-a3b",
    ),
    Published(
        "Megatron-Bridge, 16 H100", "Moonlight-16B-A3B", (*_AT_4096, "parallel.expert=8", "train.micro_batch=2"),
        22_528, False, "its verification card moonlight-16b-a3b",
    ),
    Published(
        "NeMo AutoModel, 8 H100, recomputed", "Qwen3-30B-A3B",
        ("train.batch_tokens=2097152", "resources.workers=8", "parallel.expert=8", "train.micro_batch=4",
         "train.recompute=true", "train.keep_rows=false", "optimizer.state=fp32"),
        12_040, True, "Automodel docs/performance-summary.mdx",
    ),
    Published(
        "transformers with expert parallelism, 64 H100, 16,384 tokens a sequence", "Qwen3-30B-A3B",
        ("data.sequence_length=16384", "train.batch_tokens=16777216", "resources.workers=64", "parallel.expert=8",
         "train.micro_batch=1", "train.keep_rows=false", "optimizer.state=fp32"),
        3_602, False, "transformers PR 45436; its batch and layout are guesses",
    ),
)  # fmt: skip


def published() -> Iterator[str]:
    yield "| system | model | experts | tokens/s of a GPU | Tidegate, predicted | over | source |"
    yield "|---|---|---|---|---|---|---|"
    for row in PUBLISHED:
        sets = (*MODELS[row.job], "parallel.gradients_at_once=1", *row.set)
        job: Job = load(JOBS / "h100.yaml", Job, sets).config
        efficiency = measured_efficiency()
        if row.forced:
            efficiency = efficiency.model_copy(update={"load_skew": 1.0})
        seconds = step_time(job, H100, efficiency).total
        predicted = job.train.batch_tokens / seconds / job.resources.workers
        cells = [row.system, row.job, "forced" if row.forced else "as routed", f"{row.tokens_per_s:,.0f}"]
        yield "| " + " | ".join([*cells, f"{predicted:,.0f}", f"{predicted / row.tokens_per_s:.2f}", row.source]) + " |"


def replaced(page: str, name: str, lines: Iterator[str]) -> str:
    """The page with what stands between two comments replaced."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = page.partition(begin)
    assert found, name
    assert end in rest, name
    return before + begin + "".join(f"{line}\n" for line in lines) + end + rest.partition(end)[2]


def tables(page: str) -> str:
    for name, lines in {"calibration": calibration(), "published": published()}.items():
        page = replaced(page, name, lines)
    return page


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["fit"]:
            EFFICIENCY.write_text(written(fit()), encoding="utf-8")
        case ["tables"]:
            PAGE.write_text(tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        case _:
            raise SystemExit(__doc__)
