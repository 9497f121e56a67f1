"""What a step is measured with: a timer of its phases, a trace of its device kernels, memory and energy counters.

On a GPU all of it reads the device's own clocks and counters; on a CPU the timer takes the host's clock and the others
have nothing to read.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from tidegate.config import Config
from tidegate.train.nvml import Gpu

if TYPE_CHECKING:
    from tidegate.parallel.engine import Engine

__all__ = [
    "EnergyMeter",
    "Kernel",
    "Memory",
    "Split",
    "StepTimer",
    "Trace",
    "read_trace",
    "record_trace",
    "synchronize",
    "time_phases",
]

OTHER = "other"
NUM_KERNELS = 20

R = TypeVar("R")


def synchronize(device: torch.device) -> None:
    """Wait for all work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class StepTimer:
    """Says how long each phase of each step took, without waiting for the device in between.

    The phases of a step are the spans between its marks, so they add up to it; between steps nothing is timed. On a GPU
    a mark is an event on the current stream: a span is when the device went through the phase's work, waiting for the
    host included.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps: deque[list[tuple[str, _Moment]]] = deque()
        self._running = False

    def begin_step(self) -> None:
        """The next step begins here, and the last one ends if it has not."""
        self.end_step()
        self._steps.append([])
        self._running = True
        self.begin(OTHER)

    def end_step(self) -> None:
        """The step ends here, if there is one."""
        if self._running:
            self.begin("end")
            self._running = False

    def drop_step(self) -> None:
        """The step does not count: it was undone."""
        if self._running:
            self._steps.pop()
            self._running = False

    def begin(self, phase: str) -> None:
        """The last phase ends here and another begins."""
        self._steps[-1].append((phase, self._now()))

    def during(self, phase: Callable[[], str], function: Callable[..., R]) -> Callable[..., R]:
        """The function, timed as a phase that is named at each call and interrupts the one around it."""

        def timed(*args: Any, **keywords: Any) -> R:
            if not self._running:
                return function(*args, **keywords)
            around = self._steps[-1][-1][0]
            self.begin(phase())
            result = function(*args, **keywords)
            self.begin(around)
            return result

        return timed

    def read(self) -> list[dict[str, float]]:
        """End the last step; seconds of each phase of every step. Waits for the device."""
        self.end_step()
        synchronize(self._device)
        return self.finished()

    def finished(self) -> list[dict[str, float]]:
        """The same of the steps whose end the device has reached, each once. Waits for nothing."""
        steps = []
        while len(self._steps) > self._running and _is_reached(self._steps[0][-1][1]):
            steps.append(_phases(self._steps.popleft()))
        return steps

    def _now(self) -> _Moment:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


_Moment = float | torch.cuda.Event


def _is_reached(moment: _Moment) -> bool:
    return isinstance(moment, float) or moment.query()


def _phases(marks: Sequence[tuple[str, _Moment]]) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    for (phase, begins), (_, ends) in pairwise(marks):
        if isinstance(begins, float):
            assert isinstance(ends, float)
            seconds[phase] += ends - begins
        else:
            assert isinstance(ends, torch.cuda.Event)
            seconds[phase] += begins.elapsed_time(ends) / 1e3
    return dict(seconds)


def time_phases(engine: Engine) -> StepTimer:
    """A timer that sees the engine's calls as phases of the step; each engine has one at most."""
    timer = StepTimer(engine.device)

    def forward_or_counting() -> str:
        return "forward" if torch.is_grad_enabled() else "counting"

    phases = {
        "forward": forward_or_counting,
        "backward": lambda: "backward",
        "step": lambda: "optimizer",
    }
    for method, phase in phases.items():
        setattr(engine, method, timer.during(phase, getattr(engine, method)))
    if engine.store is not None:
        arrivals = engine.store.arrivals
        for method in ("wait",) if engine.device.type == "cuda" else ("copy",):
            setattr(arrivals, method, timer.during(lambda: "experts", getattr(arrivals, method)))
    return timer


class Split(Config):
    """Where a step's time goes, on the device's main stream; medians over steps, so they add up to about the step."""

    counting_s: float
    """The pass that counts before the step, for `balance.counts: exact`."""
    forward_s: float
    backward_s: float
    """With the reduction of gradients as far as it is not hidden, and what `train.recompute` computes again."""
    optimizer_s: float
    """With clipping and the exchange of weights under ZeRO."""
    other_s: float
    """Copying the batch, balance losses, router and unit updates, waiting for data."""
    experts_s: float = 0.0
    """Waiting for what comes from the host with `parallel.offload: experts`."""

    @classmethod
    def median(cls, steps: Sequence[Mapping[str, float]]) -> Split:
        """Of what a `StepTimer` read."""
        of_each = {field: [step.get(field.removesuffix("_s"), 0.0) for step in steps] for field in cls.model_fields}
        return cls(**{field: statistics.median(seconds) for field, seconds in of_each.items()})


class Kernel(Config):
    """All launches of one device kernel in a step."""

    name: str
    seconds: float
    launches: int


class Trace(Config):
    """What the device did during one step under the profiler, which slows the host a little."""

    step_s: float
    """Host clock around the step and a device sync."""
    busy_s: float
    """When at least one kernel or copy ran."""
    communication_s: float
    """When at least one NCCL kernel ran; waiting for other ranks counts."""
    hidden_communication_s: float
    """The part of it when another kernel or a copy ran too."""
    kernels: tuple[Kernel, ...]
    """The 20 that took most time, the longest first; copies and fills among them."""

    @property
    def gaps_s(self) -> float:
        """When the device had nothing to do: it waited for the host."""
        return self.step_s - self.busy_s


class _Interval(NamedTuple):
    begins: float
    ends: float


def read_trace(events: Iterable[Mapping[str, Any]], step_s: float) -> Trace:
    """Sum up a step.

    Args:
        events: of a trace in Chrome's format, times in microseconds; what is no work of a device is passed over.
        step_s: how long the step took.
    """
    communication: list[_Interval] = []
    others: list[_Interval] = []
    seconds: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        name, begins, lasts = event["name"], event["ts"] * 1e-6, event["dur"] * 1e-6
        seconds[name] += lasts
        launches[name] += 1
        (communication if "nccl" in name.lower() else others).append(_Interval(begins, begins + lasts))
    busy, talking, working = (_covered(intervals) for intervals in (communication + others, communication, others))
    top = sorted(seconds, key=lambda name: (-seconds[name], name))[:NUM_KERNELS]
    return Trace(
        step_s=step_s,
        busy_s=busy,
        communication_s=talking,
        hidden_communication_s=talking + working - busy,
        kernels=tuple(Kernel(name=name, seconds=seconds[name], launches=launches[name]) for name in top),
    )


def _covered(intervals: Sequence[_Interval]) -> float:
    """Length of the union."""
    covered, until = 0.0, float("-inf")
    for begins, ends in sorted(intervals):
        covered += max(0.0, ends - max(begins, until))
        until = max(until, ends)
    return covered


def record_trace(step: Callable[[], object], device: torch.device) -> Trace:
    """Take two steps under the profiler and sum up the second; on a CPU there are no kernels in it."""
    cuda = device.type == "cuda"
    # Only the device's side: recording every operator of the host would slow it, and the gaps would be the profiler's.
    activities = [ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
    with tempfile.TemporaryDirectory(prefix="tidegate-") as folder:
        path = Path(folder) / "trace.json"
        with profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
            acc_events=True,  # some versions warn that they keep one cycle only; there is one
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
        ) as profiler:
            step()
            synchronize(device)
            profiler.step()
            began = time.perf_counter()
            step()
            synchronize(device)
            step_s = time.perf_counter() - began
            profiler.step()
        return read_trace(json.loads(path.read_text(encoding="utf-8"))["traceEvents"], step_s)


class Memory(Config):
    """Most device memory that was in use at one moment."""

    allocated_bytes: int
    """By tensors."""
    reserved_bytes: int
    """By PyTorch's allocator, which keeps blocks for later."""

    @staticmethod
    def restart(device: torch.device) -> None:
        """Forget the peak so far."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @classmethod
    def peak(cls, device: torch.device) -> Memory | None:
        """Since `restart`; None on a CPU."""
        if device.type != "cuda":
            return None
        return cls(
            allocated_bytes=torch.cuda.max_memory_allocated(device),
            reserved_bytes=torch.cuda.max_memory_reserved(device),
        )


class EnergyMeter:
    """The device's own count of the energy that it took.

    Args:
        device: of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self.missing: str | None = None
        """Why there is no count, or None."""
        if device.type != "cuda":
            self.missing = "a CPU has no counter"
            return
        try:
            self._gpu = Gpu(str(torch.cuda.get_device_properties(device).uuid))
            self.read_j()
        except (OSError, RuntimeError) as error:
            self.missing = f"NVML: {error}"

    def read_j(self) -> float:
        """Joules since the driver was loaded; NaN where there is no count."""
        return self._gpu.energy_j() if self.missing is None else float("nan")
