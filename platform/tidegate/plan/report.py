"""`tidegate plan`: the layout to take, what it costs, what limits it, and what of that nobody has measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from tidegate.config import ConfigError, JobFile, flatten
from tidegate.model.moe import MoEConfig
from tidegate.plan.efficiency import measured_efficiency
from tidegate.plan.hardware import Hardware
from tidegate.plan.measurements import measurements
from tidegate.plan.search import Candidate, Plan, make_plan
from tidegate.quantities import count_shown

__all__ = ["bottleneck", "chosen_flags", "extrapolations", "plan_job"]

_PAGE_WIDTH = 110
_SECTIONS = {
    "parallel": ("expert", "zero_stage", "gradients_at_once", "all_to_all"),
    "train": ("micro_batch", "recompute"),
}


def plan_job(
    job: Path, overrides: Sequence[str], hardware: Hardware, tokens: int | None = None, scaling: Path | None = None
) -> Plan:
    """Print the plan of a job, and draw how it scales.

    Args:
        job: the file.
        overrides: of `--set`; those of the layout are kept.
        hardware: what it would run on.
        tokens: None: as many as the job says.
        scaling: a picture to draw, `.html` or `.png`.

    Raises:
        ConfigError: as of `make_plan`, or the picture has another ending or no folder.
    """
    if scaling is not None and scaling.suffix not in (".html", ".png"):
        raise ConfigError(f"--scaling {scaling}: ends neither in .html nor in .png")
    if scaling is not None and not scaling.parent.is_dir():
        raise ConfigError(f"--scaling {scaling}: there is no folder {scaling.parent}")
    held = [override.partition("=")[0] for override in overrides]
    plan = make_plan(JobFile(job, overrides), hardware, tokens, held=held)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = _PAGE_WIDTH  # a pipe has no width; rich would fold the tables at 80
    console.print(f"{plan.base.name} on {hardware}: {count_shown(plan.tokens)} tokens", soft_wrap=True)
    console.print(f"fastest layout: {' '.join(chosen_flags(plan.best))}", soft_wrap=True)
    for table in (_layouts(plan), _memory(plan), _step(plan)):
        console.print(table)
    for line in _summary(plan):
        console.print(line, soft_wrap=True)
    if scaling is not None:
        from tidegate.plan.pictures import draw_scaling

        draw_scaling(scaling, job, overrides, plan)
        console.print(f"scaling: {scaling}", soft_wrap=True)
    return plan


def chosen_flags(candidate: Candidate) -> list[str]:
    """The layout as `tidegate train` takes it."""
    job = candidate.job
    values = {"resources.workers": job.resources.workers, "resources.gpu": True}
    for section, fields in _SECTIONS.items():
        values |= {f"{section}.{field}": getattr(getattr(job, section), field) for field in fields}
    return [f"--set {path}={str(value).lower()}" for path, value in values.items()]


def _layouts(plan: Plan) -> Table:
    table = Table("layout")
    for name in ("micro-batch", "recompute", "at once", "all-to-all", "step, ms", "tokens/s", "GiB"):
        table.add_column(name, justify="right")
    for candidate in (plan.best, *plan.others):
        job = candidate.job
        table.add_row(
            job.layout.partition(", bf16")[0],
            str(job.train.micro_batch),
            "yes" if job.train.recompute else "no",
            str(job.parallel.gradients_at_once),
            job.parallel.all_to_all,
            f"{1e3 * candidate.time.total:,.0f}",
            f"{candidate.tokens_per_s:,.0f}",
            f"{candidate.memory.total / 2**30:.1f}",
        )
    return table


def _memory(plan: Plan) -> Table:
    table = Table(Column("memory of a GPU"), Column("GiB", justify="right"))
    for name, size in plan.best.memory.parts.items():
        if size:
            table.add_row(name.replace("_", " "), f"{size / 2**30:.2f}")
    table.add_section()
    usable = plan.hardware.gpu.usable
    table.add_row(f"peak, of {usable / 2**30:.1f}", f"{plan.best.memory.total / 2**30:.2f}")
    if plan.best.job.parallel.expert > 1:
        verdict = "" if plan.skewed.total <= usable else " (does not fit)"
        table.add_row(f"at twice the mean load{verdict}", f"{plan.skewed.total / 2**30:.2f}")
    return table


def _step(plan: Plan) -> Table:
    table = Table("a step", Column("ms", justify="right"), Column("share", justify="right"))
    whole = plan.best.time.total
    for name, seconds in plan.best.time._asdict().items():
        if seconds:
            table.add_row(name.replace("_", " "), f"{1e3 * seconds:,.1f}", f"{seconds / whole:.1%}")
    table.add_section()
    table.add_row("total", f"{1e3 * whole:,.1f}", "")
    return table


def _summary(plan: Plan) -> Iterator[str]:
    best, gpu, saves = plan.best, plan.hardware.gpu, plan.saves
    each = best.tokens_per_s / plan.hardware.num_gpus
    yield f"speed: {best.tokens_per_s:,.0f} tokens/s, {each:,.0f} of a GPU, MFU {plan.mfu:.1%}"
    yield (
        f"{count_shown(plan.tokens)} tokens: {_duration(plan.wall_s)}, {_number(plan.gpu_hours)} GPU-hours, "
        f"{_number(plan.gpu_kwh)} kWh of GPUs, {_number(plan.machine_kwh)} of whole machines"
    )
    if plan.money is not None:
        price = plan.base.resources.price_per_hour
        yield f"price: {_number(plan.money)} at resources.price_per_hour={price:g}, no storage, no network"
    elif plan.usd:
        prices = ", ".join(
            f"{_number(money)} USD ({name.replace('_', ' ')}, {gpu.usd_per_gpu_hour[name]:.2f} an hour)"
            for name, money in plan.usd.items()
        )
        yield f"price: {prices}; list prices of the dates in plan/hardware.yaml, no storage, no network"
    steps = max(1, round(saves.interval_s / best.time.total))
    yield (
        f"checkpoints: every {_duration(saves.interval_s)}, --set checkpoint.every={steps}; a failure every "
        f"{_duration(saves.mtbf_s)}, a save stops training for {saves.stall_s:.2g} s and is written in "
        f"{_duration(saves.write_s)}; saves and failures take {saves.lost:.2%} of the time"
    )
    yield f"data: {2 * each / 1e6:.2g} MB/s of tokens a GPU"
    yield f"bottleneck: {bottleneck(plan)}"
    for line in extrapolations(plan):
        yield f"not measured: {line}"


def bottleneck(plan: Plan) -> str:
    """One sentence on what takes most of the step."""
    time, whole = plan.best.time, plan.best.time.total
    largest = max(
        ("matrix products and attention take", time.experts + time.projections + time.attention + time.head,
         "the GPUs do what they are for"),
        ("rows on their way to experts and back (all-to-all) take", time.all_to_all,
         "fewer ranks that share experts, or faster links, would help"),
        ("gradients and weights on their way between replicas take", time.gradients_and_weights,
         "more tokens a step, or faster links, would help"),
        ("the host, which launches kernels slower than the GPU runs them, takes", time.waiting_for_host,
         "a larger micro-batch or model would help"),
        ("memory traffic of gradient sums and the optimizer takes", time.gradient_sums + time.optimizer,
         "more tokens a step would help"),
        ("norms, gates and other small kernels take", time.elementwise + time.unlisted,
         "a larger micro-batch or a wider model would help"),
        key=lambda kind: kind[1],
    )  # fmt: skip
    what, seconds, advice = largest
    return f"{what} {seconds / whole:.0%} of the step; {advice}"


def extrapolations(plan: Plan) -> Iterator[str]:
    """Where this plan is outside of what the model was checked against."""
    rows = [row.gpus.partition("x") for row in measurements()]
    kinds, most = {name for _, _, name in rows}, max(int(count) for count, _, _ in rows)
    name, count, best = plan.hardware.name, plan.hardware.num_gpus, plan.best.job
    if name not in kinds:
        yield f"{name}: shares of its peaks are those of {' and '.join(sorted(kinds))}"
    if count > most:
        yield f"{count} GPUs: the largest measurement has {most}"
    if count > plan.hardware.gpu.gpus_per_node:
        yield "the network between nodes: its speed is a data sheet's, and the share that NCCL reaches is assumed"
    if plan.best.time.waiting_for_host:
        yield "the host's speed: one machine's, on which a job took 105 ms that takes 77 ms on another (docs/plan.md)"
    if best.parallel.all_to_all == "hierarchical":
        yield "parallel.all_to_all=hierarchical"
    if best.parallel.zero_stage == 0:
        yield "parallel.zero_stage=0, which sums gradients in bf16: other training than at 1 and 2 (docs/memory.md)"
    values = flatten(best)
    for field, (least, largest) in measured_efficiency().ranges.items():
        if field in values and not least <= values[field] <= largest:
            yield f"{field}={values[field]}: steps were measured from {least} to {largest}"
    d, widths = best.model.attention.head_dim, measured_efficiency().attention
    if d not in widths:
        near = " and ".join(map(str, sorted(widths)))
        yield f"model.attention.head_dim={d}: attention is taken to be as fast as at the nearest of {near}"
    ffn = best.model.ffn
    if isinstance(ffn, MoEConfig) and ffn.capabilities.double_forward:
        yield f"model.ffn.router.kind={ffn.router.kind}: its second forward pass is left out"
    yield "an overlap of communication with work: none is taken, as none was measured"


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds:.3g} s"
