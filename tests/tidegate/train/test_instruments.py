"""The timer's phases, and what is read from a trace."""

from __future__ import annotations

import math
import random
import time

import pytest
import torch

from tidegate.train.instruments import EnergyMeter, Memory, Split, StepTimer, read_trace, record_trace
from tidegate.train.record import read_times

CPU = torch.device("cpu")


def event(name: str, begins: float, lasts: float, cat: str = "kernel") -> dict[str, object]:
    return {"ph": "X", "cat": cat, "name": name, "ts": begins, "dur": lasts}


def test_a_trace_is_summed_up() -> None:
    trace = read_trace(
        [
            {"ph": "M", "name": "process_name"},
            event("cudaLaunchKernel", 0, 50, cat="cuda_runtime"),
            event("matmul", 10, 20),
            event("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 25, 10),  # 5 beside the product, 5 alone
            event("Memcpy HtoD", 50, 5, cat="gpu_memcpy"),
            event("Memset", 52, 1, cat="gpu_memset"),  # inside the copy
            event("matmul", 60, 10),
            event("nccl:all_reduce", 20, 40, cat="gpu_user_annotation"),
        ],
        step_s=100e-6,
    )
    assert trace.busy_s == pytest.approx(40e-6)
    assert trace.gaps_s == pytest.approx(60e-6)
    assert trace.communication_s == pytest.approx(10e-6)
    assert trace.hidden_communication_s == pytest.approx(5e-6)
    assert [(k.name, k.launches) for k in trace.kernels] == [
        ("matmul", 2),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 1),
        ("Memcpy HtoD", 1),
        ("Memset", 1),
    ]
    assert trace.kernels[0].seconds == pytest.approx(30e-6)


@pytest.mark.parametrize("seed", range(5))
def test_busy_time_is_the_union_of_intervals(seed: int) -> None:
    """Against a grid of whole microseconds."""
    draw = random.Random(seed)
    events, grid = [], {"nccl": set(), "other": set()}
    for _ in range(63):
        name, begins, lasts = draw.choice(["nccl", "other"]), draw.randrange(200), draw.randrange(8)
        events.append(event(name, begins, lasts))
        grid[name].update(range(begins, begins + lasts))
    trace = read_trace(events, step_s=1e-3)
    assert trace.busy_s == pytest.approx(len(grid["nccl"] | grid["other"]) * 1e-6)
    assert trace.communication_s == pytest.approx(len(grid["nccl"]) * 1e-6)
    assert trace.hidden_communication_s == pytest.approx(len(grid["nccl"] & grid["other"]) * 1e-6)


def test_only_the_twenty_longest_kernels_are_kept() -> None:
    trace = read_trace([event(f"k{number}", 0, number) for number in range(63)], step_s=1e-3)
    assert [kernel.name for kernel in trace.kernels] == [f"k{number}" for number in range(62, 42, -1)]


def test_a_cpu_step_is_traced_and_has_no_kernels() -> None:
    taken = []

    def step() -> None:
        taken.append(torch.ones(63, 63) @ torch.ones(63, 63))
        time.sleep(0.01)

    trace = record_trace(step, CPU)
    assert len(taken) == 2
    assert trace.kernels == ()
    assert trace.busy_s == trace.communication_s == trace.hidden_communication_s == 0
    assert 0.01 <= trace.gaps_s == trace.step_s < 1


def test_phases_add_up_to_the_step() -> None:
    timer = StepTimer(CPU)
    sleep = timer.during(lambda: "forward", time.sleep)
    sleep(0.01)  # before the first step: not timed
    began = time.perf_counter()
    for naps in (1, 2, 3):
        timer.begin_step()
        for _ in range(naps):
            sleep(0.02)
        time.sleep(0.01)
    steps = timer.read()
    assert 0.15 <= sum(sum(step.values()) for step in steps) <= time.perf_counter() - began
    for naps, step in zip((1, 2, 3), steps, strict=True):
        assert set(step) == {"forward", "other"}
        assert step["forward"] >= 0.02 * naps
        assert step["other"] >= 0.01
    sleep(0.01)  # after reading: not timed
    assert timer.read() == []
    split = Split.median(steps)
    assert (split.forward_s, split.backward_s) == (steps[1]["forward"], 0.0)


def test_a_cpu_says_why_it_has_no_counters() -> None:
    meter = EnergyMeter(CPU)
    assert meter.missing == "a CPU has no counter"
    assert math.isnan(meter.read_j())
    Memory.restart(CPU)
    assert Memory.peak(CPU) is None


def test_a_phase_interrupts_the_one_around_it() -> None:
    timer = StepTimer(CPU)
    inner = timer.during(lambda: "inner", lambda: time.sleep(0.02))

    def outer() -> None:
        time.sleep(0.01)
        inner()
        time.sleep(0.01)

    timer.begin_step()
    timer.during(lambda: "outer", outer)()
    (step,) = timer.read()
    assert step["inner"] == pytest.approx(0.02, rel=0.5)
    assert step["outer"] == pytest.approx(0.02, rel=0.5)
    assert step["other"] < 0.01


def test_between_steps_nothing_is_timed_and_an_undone_step_is_dropped() -> None:
    timer = StepTimer(CPU)
    sleep = timer.during(lambda: "forward", time.sleep)
    timer.begin_step()
    sleep(0.01)
    timer.end_step()
    sleep(0.1)  # an evaluation
    timer.begin_step()
    sleep(0.1)
    timer.drop_step()
    timer.begin_step()
    sleep(0.02)
    (first,) = timer.finished()
    assert first["forward"] == pytest.approx(0.01, rel=0.9)
    timer.end_step()
    (second,) = timer.finished()
    assert second["forward"] == pytest.approx(0.02, rel=0.9)
    assert timer.finished() == []


class DeviceEvent:
    """A CUDA event of a device that has come as far as `reached`, a second of work before each."""

    made = 0
    reached = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        DeviceEvent.made += 1
        self.place = DeviceEvent.made

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return self.place <= DeviceEvent.reached

    def elapsed_time(self, end: DeviceEvent) -> float:
        assert end.query(), "reading it would raise"
        return 1e3 * (end.place - self.place)


def test_steps_are_read_when_the_device_has_passed_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step here is three events: its beginning, its forward pass, its end."""
    monkeypatch.setattr(torch.cuda, "Event", DeviceEvent)
    timer = StepTimer(torch.device("cuda"))
    for _ in range(3):
        timer.begin_step()
        timer.begin("forward")
        timer.end_step()
    assert timer.finished() == []
    DeviceEvent.reached = 7  # two steps, and the beginning of the third
    assert timer.finished() == [{"other": 1.0, "forward": 1.0}] * 2
    assert timer.finished() == []
    DeviceEvent.reached = 9
    assert len(timer.finished()) == 1


def test_means_of_phases_add_up_to_the_mean_step() -> None:
    times = read_times([{"forward": 0.002, "other": 0.001}, {"forward": 0.004, "other": 0.001, "counting": 0.002}])
    assert times == pytest.approx({"time/forward_ms": 3.0, "time/other_ms": 1.0, "time/counting_ms": 1.0})
