"""The fastest layout of a job that fits: EP x DP x ZeRO x micro-batch x recomputation, and how its gradients are added.

Times come first, for all layouts, because they take microseconds; then memory, from the fastest on, until enough have
been found that fit. What a candidate may be is what `Job` accepts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tidegate.config import ConfigError, JobFile
from tidegate.model.moe import MoEConfig
from tidegate.plan.efficiency import Efficiency, measured_efficiency
from tidegate.plan.failures import Saving, saving
from tidegate.plan.hardware import Gpu, Hardware
from tidegate.plan.step import ModelCosts, StepTime, model_costs, step_time
from tidegate.train.job import Job
from tidegate.train.memory import MemoryPrediction, predict

__all__ = ["MOST_GPUS", "Candidate", "Plan", "make_plan"]

_SHOWN = 6
_LARGEST_MICRO_BATCH = 64
MOST_GPUS = 4096
"""That anything is reckoned for."""
_NEUTRAL: dict[str, Any] = {
    "resources.workers": 1,
    "resources.min_workers": None,
    "resources.gpu": True,
    "parallel.expert": 1,
    "parallel.zero_stage": 1,
    "parallel.gradients_at_once": 1,
    "parallel.all_to_all": "plain",
    "parallel.offload": "none",
    "parallel.offload_folder": None,
    "train.micro_batch": 1,
    "train.recompute": False,
}
"""The layout that any job may have; candidates change it."""


class Candidate(NamedTuple):
    """A layout that fits."""

    job: Job
    time: StepTime
    memory: MemoryPrediction

    @property
    def tokens_per_s(self) -> float:
        return self.job.train.batch_tokens / self.time.total


class Plan(NamedTuple):
    """What the fastest layout takes, and those behind it."""

    base: Job
    """On one GPU."""
    hardware: Hardware
    best: Candidate
    others: Sequence[Candidate]
    """Slower ones, the fastest first."""
    tokens: int
    costs: ModelCosts
    saves: Saving
    skewed: MemoryPrediction
    """Of the best, where a rank's experts get twice the mean."""

    @property
    def mfu(self) -> float:
        flops = self.costs.flops * self.best.tokens_per_s
        return flops / (self.hardware.num_gpus * self.hardware.gpu.peak)

    @property
    def train_s(self) -> float:
        """Of steps alone."""
        return self.tokens / self.best.tokens_per_s

    @property
    def wall_s(self) -> float:
        """With saves and failures; infinite where failures leave no time to train."""
        return self.train_s / (1 - self.saves.lost) if self.saves.lost < 1 else float("inf")

    @property
    def gpu_hours(self) -> float:
        return self.hardware.num_gpus * self.wall_s / 3600

    @property
    def gpu_kwh(self) -> float:
        gpu = self.hardware.gpu
        return (gpu.idle_w + (gpu.load_w - gpu.idle_w) * self.best.time.busy) * self.gpu_hours / 1e3

    @property
    def machine_kwh(self) -> float:
        """Of GPUs and the machines around them; cooling comes on top."""
        return self.gpu_kwh + self.hardware.gpu.machine_w * self.gpu_hours / 1e3

    @property
    def usd(self) -> dict[str, float]:
        """By list price."""
        return {name: price * self.gpu_hours for name, price in self.hardware.gpu.usd_per_gpu_hour.items()}

    @property
    def money(self) -> float | None:
        """At the job's own price, if it has one."""
        price = self.base.resources.price_per_hour
        return None if price is None else price * self.gpu_hours


def make_plan(
    file: JobFile,
    hardware: Hardware,
    tokens: int | None = None,
    *,
    held: Sequence[str] = (),
    efficiency: Efficiency | None = None,
    num: int = _SHOWN,
) -> Plan:
    """Find the fastest layout of a job on so many GPUs.

    Args:
        file: of the job; its own layout does not count, its batch does.
        hardware: what it would run on.
        tokens: to train on; None: what the job says.
        held: fields of the layout that stay as the file has them, such as `parallel.expert`.
        efficiency: None: what was measured.
        num: how many layouts that fit to find, where there are so many.

    Raises:
        ConfigError: the job is not valid, its batch does not divide among the GPUs, or no layout fits.
    """
    # The oracle wants a micro-batch of a size, which is for the candidates to have.
    base: Job = file.load(Job, {**_NEUTRAL, "train.oracle_sequences": 0}).config
    if base.train.precision != "bf16":
        raise ConfigError(
            f"train.precision={base.train.precision}: the plan knows speeds of bf16 only; --set train.precision=bf16"
        )
    if base.kernels == "reference":
        raise ConfigError("kernels=reference: the plan knows speeds of Triton kernels only; --set kernels=auto")
    _refuse_batch(base, hardware)
    efficiency = efficiency or measured_efficiency()
    search = _Search(file, base, _held(file, hardware, held))
    found = list(search.that_fit(hardware, efficiency, num))
    if not found:
        raise ConfigError(search.too_large(hardware))
    best, *others = found
    tokens = tokens or base.train.tokens
    costs = model_costs(base.model, base.data.sequence_length)
    saves = _saving(best, hardware, costs, tokens / best.tokens_per_s)
    return Plan(base, hardware, best, others, tokens, costs, saves, predict(best.job, load_skew=2.0))


# --- candidates -------------------------------------------------------------------------------------------------


def _refuse_batch(base: Job, hardware: Hardware) -> None:
    if base.global_batch % hardware.num_gpus:
        near = min(_divisors(base.global_batch, MOST_GPUS), key=lambda n: abs(n - hardware.num_gpus))
        sequences = max(1, round(base.global_batch / hardware.num_gpus)) * hardware.num_gpus
        raise ConfigError(
            f"train.batch_tokens={base.train.batch_tokens} is {base.global_batch} sequences of "
            f"{base.data.sequence_length} tokens, which {hardware} do not share evenly; --set train.batch_tokens="
            f"{sequences * base.data.sequence_length}, or take {near} GPUs"
        )


def _held(file: JobFile, hardware: Hardware, paths: Sequence[str]) -> dict[str, Any]:
    """Values of the layout that are not searched.

    Raises:
        ConfigError: no layout with them is valid on so many GPUs.
    """
    if "resources.workers" in paths:
        raise ConfigError(f"--set resources.workers and --gpus {hardware} both say how many; leave the first out")
    held = [path for path in _NEUTRAL if path in paths]
    if not held:
        return {}
    others = {path: value for path, value in _NEUTRAL.items() if path not in held}
    job: Job = file.load(Job, {**others, "resources.workers": hardware.num_gpus}).config
    if job.parallel.offload != "none":
        raise ConfigError(
            f"parallel.offload={job.parallel.offload}: the plan keeps everything on the GPU; leave it out"
        )
    return {path: getattr(getattr(job, section), field) for path in held for section, field in [path.split(".")]}


class _Search(NamedTuple):
    file: JobFile
    base: Job
    held: Mapping[str, Any]

    def layouts(self, hardware: Hardware) -> Iterator[dict[str, Any]]:
        """Values by path; most are valid, and those that are not are dropped later."""
        world, ffn = hardware.num_gpus, self.base.model.ffn
        spread = ffn.num_slices if isinstance(ffn, MoEConfig) else 1
        each = self.base.global_batch // world
        node = hardware.gpu.gpus_per_node
        kinds = [(1, 1), (1, 2), (1, 4), (2, 1)]
        if self.held.get("parallel.zero_stage") == 0:  # it sums gradients in bf16: other training
            kinds = [(0, 1)]
        for expert in _divisors(spread, world):
            if world % expert:
                continue
            ways = ["plain", "hierarchical"] if expert > node > 1 and expert % node == 0 else ["plain"]
            for micro_batch in _divisors(each, _LARGEST_MICRO_BATCH):
                for stage, at_once in kinds:
                    if at_once > each // micro_batch:
                        continue
                    for recompute, way in itertools.product((False, True), ways):
                        values = {
                            **_NEUTRAL,
                            "resources.workers": world,
                            "parallel.expert": expert,
                            "parallel.zero_stage": stage,
                            "parallel.gradients_at_once": at_once,
                            "parallel.all_to_all": way,
                            "train.micro_batch": micro_batch,
                            "train.recompute": recompute,
                        }
                        if all(values[path] == value for path, value in self.held.items()):
                            yield values

    def valid(self, values: Mapping[str, Any]) -> Job | None:
        """The job in a layout, if it may have it."""
        try:
            job: Job = self.file.load(Job, values).config
        except ConfigError:
            return None
        return job

    def that_fit(self, hardware: Hardware, efficiency: Efficiency, num: int) -> Iterator[Candidate]:
        """The fastest ones first."""
        timed = [
            (step_time(_with(self.base, values), hardware.gpu, efficiency), values) for values in self.layouts(hardware)
        ]
        too_large: dict[tuple[Any, ...], int] = {}
        for time, values in sorted(timed, key=lambda pair: pair[0].total):
            micro_batch = values["train.micro_batch"]
            # A micro-batch that does not fit tells of the larger ones in an otherwise equal layout.
            kind = tuple(value for path, value in values.items() if path != "train.micro_batch")
            if micro_batch >= too_large.get(kind, micro_batch + 1):
                continue
            job = self.valid(values)
            if job is None:
                continue
            memory = predict(job)
            if memory.total > hardware.gpu.usable:
                too_large[kind] = micro_batch
                continue
            yield Candidate(job, time, memory)
            num -= 1
            if num == 0:
                return

    def too_large(self, hardware: Hardware) -> str:
        """What is short, and what would fit.

        Raises:
            ConfigError: no layout is valid.
        """
        least, job = self.smallest(hardware)
        if least == float("inf"):  # none is valid: one of them says why
            self.file.load(Job, next(self.layouts(hardware)))
        usable = hardware.gpu.usable
        message = (
            f"{self.base.name} does not fit on {hardware}: the smallest layout, {job.layout}, train.micro_batch="
            f"{job.train.micro_batch} and train.recompute={str(job.train.recompute).lower()}, takes "
            f"{least / 2**30:.1f} GiB of a GPU's {usable / 2**30:.1f}, {(least - usable) / 2**30:.1f} GiB too much"
        )
        ways = []
        count = 2 * hardware.num_gpus
        while count <= MOST_GPUS and self.base.global_batch % count == 0:
            if self.smallest(hardware._replace(num_gpus=count))[0] <= usable:
                ways.append(f"{count} GPUs")
                break
            count *= 2
        in_bf16 = {"optimizer.state": "bf16"}
        if self.base.optimizer.state == "fp32" and self.smallest(hardware, in_bf16)[0] <= usable:
            ways.append("--set optimizer.state=bf16")
        if self.held and self._replace(held={}).smallest(hardware)[0] <= usable:
            ways.append(f"the job without {', '.join(f'{path}={value}' for path, value in self.held.items())}")
        return f"{message}; {' or '.join(ways)} would fit" if ways else f"{message}; nothing that the plan knows helps"

    def smallest(self, hardware: Hardware, more: Mapping[str, Any] | None = None) -> tuple[float, Job]:
        """Bytes of the layout that takes least; infinite where none is valid."""
        found: tuple[float, Job] = (float("inf"), self.base)
        # Of layouts that differ in these alone, the first takes least.
        least = {"train.micro_batch": 1, "train.recompute": True, "parallel.gradients_at_once": 1}
        for values in self.layouts(hardware):
            if any(values[path] != value for path, value in least.items() if path not in self.held):
                continue
            job = self.valid({**values, **(more or {})})
            if job is not None:
                found = min(found, (float(predict(job).total), job), key=lambda pair: pair[0])
        return found


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def _with(job: Job, values: Mapping[str, Any]) -> Job:
    """Without validation, for a look at its time."""
    sections: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        section, field = path.split(".")
        sections.setdefault(section, {})[field] = value
    return job.model_copy(
        update={name: getattr(job, name).model_copy(update=fields) for name, fields in sections.items()}
    )


# --- saves ------------------------------------------------------------------------------------------------------


def _saving(best: Candidate, hardware: Hardware, costs: ModelCosts, train_s: float) -> Saving:
    """A save copies each rank's part to the host, where a thread writes it (docs/checkpoints.md)."""
    gpu: Gpu = hardware.gpu
    moment = 2 if best.job.optimizer.state == "bf16" else 4
    size = costs.params * (2 + 4 + 2 * moment)
    nodes = -(-hardware.num_gpus // gpu.gpus_per_node)
    stall_s = (best.memory.weights + best.memory.master_weights + best.memory.moments) / (gpu.host_gb_per_s * 1e9)
    write_s = size / (nodes * gpu.storage_gb_per_s * 1e9)
    return saving(stall_s, write_s, 3600 * gpu.mtbf_gpu_hours / hardware.num_gpus, gpu.restart_s, train_s)
