"""`tidegate bench`: time a job's optimizer step on this machine, print and store what it took, compare results."""

from __future__ import annotations

import math
import os
import platform
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Column, Table

from tidegate.config import Config, ConfigError, load, load_stored
from tidegate.data.random_tokens import write_random_tokens
from tidegate.launch.preflight import check_machine, hide_gpus
from tidegate.model.flops import total
from tidegate.parallel.ranks import on_ranks
from tidegate.track.provenance import git_commit, versions
from tidegate.train.instruments import Memory, Split, Trace
from tidegate.train.job import Job

if TYPE_CHECKING:
    from tidegate.train.bench import Measured

__all__ = ["BenchResult", "Hardware", "bench_job", "read_result"]

_PAGE_WIDTH = 110
_SHOWN_KERNELS = 10
_MOST_WINDOWS = 512  # a domain; a batch that is larger reads them again


class Hardware(Config):
    device: str
    """Name of the GPU, or CPU."""
    count: int
    """Devices in use: one a worker."""
    cpu: str
    cores: int


class BenchResult(Config):
    """One measurement of one job. Times are seconds."""

    kind: Literal["tidegate bench"] = "tidegate bench"
    name: str
    """Of the job."""
    overrides: tuple[str, ...]
    commit: str
    hardware: Hardware
    versions: dict[str, str]
    tokens_per_s: float
    tokens_per_s_per_device: float
    model_tflops_per_device: float
    mfu: float | None
    """Of the device's dense bf16 peak; None where there is no data sheet, and in fp32."""
    step_s: float
    """Median."""
    steps_s: tuple[float, ...]
    split: Split
    """Of the first rank."""
    observed_over_plain: float
    data_s: float
    trace: Trace | None
    """Of the first rank; None on a CPU."""
    memory: Memory | None
    """Of the rank that took most; None on a CPU."""
    energy_j_per_token: float | None
    """Of all devices in use; the rest of the machine does not count."""
    energy_missing: str | None
    """Why there is none."""
    losses: tuple[float, ...]
    """Of the warm-up and the steps that count, nats a token: the same work gives the same losses."""
    job: dict[str, Any]
    """Resolved."""


def bench_job(
    job_file: Path,
    overrides: Sequence[str],
    *,
    steps: int,
    out: Path | None,
    against: Sequence[Path],
    commit: str | None,
) -> None:
    """Measure, print, store.

    Args:
        job_file: its corpus is not read.
        overrides: `a.b=c`.
        steps: that count, after a warm-up.
        out: where the result goes as JSON; None: nowhere.
        against: earlier results to compare with.
        commit: what is measured; None: the commit of the working directory.

    Raises:
        ConfigError: a mistake that can be known beforehand, or a loss that is not finite.
    """
    if steps < 1:
        raise ConfigError(f"--steps {steps}: needs at least one")
    job: Job = load(job_file, Job, overrides).config
    earlier = [read_result(path) for path in against]
    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: {out.absolute().parent} is not a folder")
    check_machine(job, local=False, remote=False)
    hide_gpus(job)
    from tidegate.train.bench import measure  # imports DeepSpeed, which takes any GPU it sees

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PAGE_WIDTH  # a pipe has no width; rich would fold the table at 80
    console.print(f"bench {job.name}: {job.resources.workers} workers, {job.layout}", soft_wrap=True, markup=False)
    with tempfile.TemporaryDirectory(prefix="tidegate-") as folder:
        windows = min(job.global_batch, _MOST_WINDOWS)
        write_random_tokens(Path(folder), job.data, vocab_size=job.model.vocab_size, num_windows=windows)
        ranks = on_ranks(job.resources.workers, measure, job, Path(folder), steps)
    if not all(map(math.isfinite, ranks[0].losses)):
        raise ConfigError(f"{job_file}: losses {ranks[0].losses} are not all finite; lower optimizer.schedule.peak")
    result = _result(job, ranks, overrides, commit or git_commit() or "unknown")
    console.print(_table(result, earlier, [path.stem for path in against]))
    if result.energy_missing is not None:
        console.print(f"energy was not measured: {result.energy_missing}", soft_wrap=True, markup=False)
    if result.trace is not None:
        console.print(_kernels(result.trace))
    if out is not None:
        out.write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
        console.print(f"written: {out}", soft_wrap=True, markup=False)


def read_result(path: Path, option: str = "--against") -> BenchResult:
    """A result that `--out` wrote.

    Args:
        path: of the file.
        option: which names it, for errors.

    Raises:
        ConfigError: the file cannot be read or is something else.
    """
    try:
        return load_stored(path.read_text(encoding="utf-8"), BenchResult, str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path}: cannot be read ({error})") from error
    except ConfigError as error:
        raise ConfigError(f"{option} {path}: not a result of tidegate bench ({str(error).splitlines()[0]})") from error


def _result(job: Job, ranks: Sequence[Measured], overrides: Sequence[str], commit: str) -> BenchResult:
    first, step_s = ranks[0], statistics.median(ranks[0].steps_s)
    tokens_per_s = job.train.batch_tokens / step_s
    per_device = tokens_per_s / len(ranks)
    flops = per_device * total(job.model, job.data.sequence_length).flops_per_token
    memories = [rank.memory for rank in ranks if rank.memory is not None]
    energies = [rank.energy_j for rank in ranks if rank.energy_j is not None]
    tokens = job.train.batch_tokens * len(first.steps_s)
    return BenchResult(
        name=job.name,
        overrides=tuple(overrides),
        commit=commit,
        hardware=Hardware(
            device=first.device, count=len(ranks), cpu=platform.machine(), cores=len(os.sched_getaffinity(0))
        ),
        versions=versions(),
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_device=per_device,
        model_tflops_per_device=flops / 1e12,
        mfu=flops / first.peak_flops if first.peak_flops is not None and job.train.precision == "bf16" else None,
        step_s=step_s,
        steps_s=first.steps_s,
        split=first.split,
        observed_over_plain=first.observed_over_plain,
        data_s=first.data_s,
        trace=first.trace,
        memory=max(memories, key=lambda memory: memory.allocated_bytes, default=None),
        energy_j_per_token=sum(energies) / tokens if len(energies) == len(ranks) else None,
        energy_missing=next((rank.energy_missing for rank in ranks if rank.energy_missing is not None), None),
        losses=first.losses,
        job=job.model_dump(mode="json"),
    )


class _Row(NamedTuple):
    name: str
    value: float | None
    text: str
    """With a place for the value."""


def _rows(result: BenchResult) -> list[_Row]:
    """What the table shows, in its order; a value that was not measured is None."""
    split, trace, memory = result.split, result.trace, result.memory

    def ms(name: str, seconds: float | None) -> _Row:
        return _Row(name, None if seconds is None else 1e3 * seconds, "{:,.2f} ms")

    def gib(name: str, size: int | None) -> _Row:
        return _Row(name, None if size is None else size / 2**30, "{:,.2f} GiB")

    return [
        _Row("tokens/s", result.tokens_per_s, "{:,.0f}"),
        _Row("tokens/s a device", result.tokens_per_s_per_device, "{:,.0f}"),
        _Row("model TFLOP/s a device", result.model_tflops_per_device, "{:,.4g}"),
        _Row("MFU", result.mfu, "{:.1%}"),
        ms(f"step, median of {len(result.steps_s)}", result.step_s),
        ms("  shortest", min(result.steps_s)),
        ms("  longest", max(result.steps_s)),
        ms("  counting pass", split.counting_s),
        ms("  forward", split.forward_s),
        ms("  backward", split.backward_s),
        ms("  optimizer", split.optimizer_s),
        ms("  other", split.other_s),
        ms("  waiting for experts", split.experts_s or None),
        _Row("  of the step", split.experts_s / result.step_s or None, "{:.1%}"),
        _Row("observed step over plain", result.observed_over_plain, "{:.3f}"),
        ms("data, host time a batch", result.data_s),
        ms("traced step", trace.step_s if trace else None),
        ms("  device idle: host gaps", trace.gaps_s if trace else None),
        ms("  communication", trace.communication_s if trace else None),
        ms("  of it beside other work", trace.hidden_communication_s if trace else None),
        gib("peak memory, allocated", memory.allocated_bytes if memory else None),
        gib("peak memory, reserved", memory.reserved_bytes if memory else None),
        _Row("energy a token", result.energy_j_per_token and 1e3 * result.energy_j_per_token, "{:.3f} mJ"),
    ]


def _table(result: BenchResult, earlier: Sequence[BenchResult], names: Sequence[str]) -> Table:
    """A row a number; a column an earlier result, with ours over theirs in brackets."""
    hardware = result.hardware
    title = f"{result.name} on {hardware.count} x {hardware.device}, commit {result.commit[:12]}"
    table = Table("", Column(result.name, justify="right"), title=title)
    for name in names:
        table.add_column(f"{name} (ratio)", justify="right", overflow="fold")
    for row, *others in zip(_rows(result), *map(_rows, earlier), strict=True):
        if row.value is None and all(other.value is None for other in others):
            continue
        table.add_row(row.name, _shown(row), *(f"{_shown(other)} ({_ratio(row, other)})" for other in others))
    return table


def _shown(row: _Row) -> str:
    return "-" if row.value is None else row.text.format(row.value)


def _ratio(ours: _Row, theirs: _Row) -> str:
    return f"{ours.value / theirs.value:.3f}" if ours.value is not None and theirs.value else "-"


def _kernels(trace: Trace) -> Table:
    table = Table(Column("kernel", overflow="ellipsis", no_wrap=True), title="device time of the traced step")
    for name in ("ms", "share of busy", "launches"):
        table.add_column(name, justify="right", no_wrap=True, min_width=8)  # names leave them the room
    for kernel in trace.kernels[:_SHOWN_KERNELS]:
        share = kernel.seconds / trace.busy_s
        table.add_row(kernel.name, f"{1e3 * kernel.seconds:.2f}", f"{share:.1%}", f"{kernel.launches:,}")
    return table
