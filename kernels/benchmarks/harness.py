"""How an operation is checked, timed and written down.

A case is an operation at one shape: what it must move and compute (its floor), and several implementations of it, ours
first. Before anything is timed, ours is compared with the plain one in fp64. Times are medians over input sets that
together do not fit in the L2 cache; calls below a millisecond are captured in a CUDA graph, so that the time to launch
them is not in the number.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["BANDWIDTH", "COMPUTE", "Case", "Floor", "Result", "check", "environment", "gradients", "run_case", "write"]

BANDWIDTH = 3.0e12
"""Bytes/s that a device copy reaches on one H100, reads and writes together (measured)."""
COMPUTE = 744e12
"""FLOP/s of an 8192^3 bf16 matrix product on one H100 (measured)."""

_LONG = 500.0
"""Milliseconds after which five runs are enough."""
_HEAD_START = 20_000_000
"""Cycles, about 10 ms, that the device waits before timed work, so that launches queue up."""

Tensors = tuple[Any, ...]
"""Tensors, and last perhaps a tuple of them."""
Implementation = Callable[..., Any]


@dataclass(frozen=True)
class Floor:
    """What a case must move through device memory and compute, each input read and each output written once."""

    bytes: float
    flops: float = 0.0
    rate: float = COMPUTE
    """FLOP/s that are to be had: less than a plain product's where something else is known to be the limit."""

    @property
    def ms(self) -> float:
        return 1e3 * max(self.bytes / BANDWIDTH, self.flops / self.rate)


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Args:
        op: name of its folder.
        shape: letters and sizes, for the record.
        floor: of forward and backward together.
        inputs: makes one set of fresh random inputs, the differentiable ones requiring gradients, and last the gradient
            of the output; of several outputs, a tuple of those of the first ones.
        implementations: name to function of the inputs without the last; ours is the first.
        target: times the floor that is aimed at, or None.
        graph: time in a CUDA graph; by default if the floor is below a millisecond.
        check_inputs: a smaller set for the check in fp64, where that takes too much memory.
    """

    op: str
    shape: dict[str, Any]
    floor: Floor
    inputs: Callable[[], Tensors]
    implementations: dict[str, Implementation]
    target: float | None = None
    graph: bool | None = None
    check_inputs: Callable[[], Tensors] | None = None


@dataclass
class Result:
    op: str
    shape: dict[str, Any]
    implementation: str
    floor_ms: float
    bytes: float
    flops: float
    target: float | None
    ms: float | None = None
    """Forward and backward; None if it did not run."""
    forward_ms: float | None = None
    peak_mib: float | None = None
    """Memory that forward and backward take above their inputs, gradients among it."""
    saved_mib: float | None = None
    """Memory that is held between forward and backward, the output among it."""
    error: str | None = None
    checked: dict[str, float] = field(default_factory=dict)
    """Error against fp64 over that of the plain implementation, output and gradients."""

    @property
    def over_floor(self) -> float | None:
        return None if self.ms is None else self.ms / self.floor_ms


def gradients(function: Implementation, inputs: Tensors) -> Tensors:
    """Outputs that are differentiated, as many as the last input has gradients, and gradients of the inputs."""
    *arguments, upstream = inputs
    upstreams = upstream if isinstance(upstream, tuple) else (upstream,)
    out = function(*arguments)
    outs = (out if isinstance(out, tuple) else (out,))[: len(upstreams)]
    # A peer may leave out part of the work, and so have no use for an input.
    found = torch.autograd.grad(outs, _wanted(function, arguments), upstreams, allow_unused=True)
    return *(x.detach() for x in outs), *found


def _wanted(function: Implementation, arguments: Sequence[Any]) -> list[torch.Tensor]:
    """The inputs that want a gradient; a peer that is a module has its own `weights` in place of ours."""
    own = getattr(function, "weights", None)
    if own is not None:
        return [arguments[0], *own]
    return [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]


def check(ours: Implementation, plain: Implementation, inputs: Tensors, *, allowed: float = 2.0) -> dict[str, float]:
    """Compare with the plain implementation in fp64: our error over that of the plain one in the inputs' dtype.

    Errors are root mean squares. Where the plain one is exact, half a step of the dtype of the largest value is fine,
    two of fp32.

    Raises:
        AssertionError: more than `allowed` times the error, or a value that is not finite.
    """

    def cast(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(cast, x))
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return x.detach().double().requires_grad_(x.requires_grad)

    truths = gradients(plain, tuple(map(cast, inputs)))
    num_outputs = len(inputs[-1]) if isinstance(inputs[-1], tuple) else 1
    ratios = {}
    for index, (mine, other, truth) in enumerate(
        zip(gradients(ours, inputs), gradients(plain, inputs), truths, strict=True)
    ):
        name = f"output {index + 1}" if index < num_outputs else f"gradient {index - num_outputs + 1}"
        assert mine.isfinite().all(), f"{name} is not finite"
        assert mine.dtype == other.dtype, f"{name} is {mine.dtype}, not {other.dtype}"
        error, expected = ((x.double() - truth).square().mean().sqrt() for x in (mine, other))
        # In fp32 the order of a long sum and a fast exponential are a step or two.
        steps = 2 if mine.dtype == torch.float32 else 0.5
        fine = steps * torch.finfo(mine.dtype).eps * truth.abs().max()
        assert error <= torch.maximum(allowed * expected, fine), (
            f"{name}: error {error:.3e}, of the plain one {expected:.3e}, values up to {truth.abs().max():.3e}"
        )
        ratios[name] = float(error / expected) if expected > 0 else 0.0
    return ratios


def run_case(case: Case, *, repeats: int = 20, skip: Sequence[str] = ()) -> list[Result]:
    """Check ours, then time every implementation; one that raises is recorded with its error."""
    plain = case.implementations["reference"]
    ours = next(iter(case.implementations))
    checked = check(case.implementations[ours], plain, (case.check_inputs or case.inputs)())
    results = []
    for name, function in case.implementations.items():
        if any(part in name for part in skip):
            continue
        result = Result(
            case.op, case.shape, name, case.floor.ms, case.floor.bytes, case.floor.flops, case.target,
            checked=checked if name == ours else {},
        )  # fmt: skip
        try:
            _time(case, function, result, repeats)
        except Exception as error:  # a peer that does not run is a result
            if name == ours:
                raise
            result.error = f"{type(error).__name__}: {str(error)[:300]}"
        torch.cuda.empty_cache()
        results.append(result)
    return results


def _time(case: Case, function: Implementation, result: Result, repeats: int) -> None:
    result.peak_mib, result.saved_mib = _memory(function, case.inputs())
    graph = case.floor.ms < 1 if case.graph is None else case.graph
    sets = [case.inputs() for _ in range(max(2, min(8, int(150e6 / case.floor.bytes) + 1)) if graph else 2)]

    def both(inputs: Tensors) -> Callable[[], object]:
        return lambda: gradients(function, inputs)

    def forward(inputs: Tensors) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return function(*inputs[:-1])

        return call

    result.ms = _median_ms([both(inputs) for inputs in sets], graph=graph, repeats=repeats)
    result.forward_ms = _median_ms([forward(inputs) for inputs in sets], graph=graph, repeats=repeats)


def _memory(function: Implementation, inputs: Tensors) -> tuple[float, float]:
    gradients(function, inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = function(*inputs[:-1])
    saved = torch.cuda.memory_allocated() - before
    del out
    gradients(function, inputs)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20, saved / 2**20


def _median_ms(calls: Sequence[Callable[[], object]], *, graph: bool, repeats: int) -> float:
    for call in calls:  # compile, allocate
        call()
    torch.cuda.synchronize()
    replay, each = _each_once(calls), len(calls)
    if graph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for call in calls:
                call()
        replay = captured.replay
    times: list[float] = []
    while len(times) < (repeats if sum(times) < _LONG else 5):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START)  # the host gets ahead, as it does in training
        start.record()
        replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / each)
    return statistics.median(times)


def _each_once(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def replay() -> None:
        for call in calls:
            call()

    return replay


def environment(commit: str | None = None) -> dict[str, str]:
    """Hardware, versions and commit of a measurement; the commit is git's unless it is given."""
    import triton

    try:
        commit = (
            commit
            or subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        )
    except (OSError, subprocess.CalledProcessError):
        commit = commit or "unknown"
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "python": platform.python_version(),
        "commit": commit,
    }


def write(folder: Path, op: str, results: Sequence[Result], commit: str | None = None) -> Path:
    """Write `<op>.json`, with what it ran on."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{op}.json"
    rows = [asdict(result) | {"over_floor": result.over_floor} for result in results]
    path.write_text(
        json.dumps({"environment": environment(commit), "results": rows}, indent=1) + "\n", encoding="utf-8"
    )
    return path
