"""Block sides, warps and stages of the kernels that are bound by compute: read from `tuned/`, or measured anew.

A file holds one architecture (`sm90.json` is compute capability 9.0), all others and the interpreter take
`default.json`. A file names every kernel and size class, and what it was tuned with.

Letters: B batch, T tokens, H query heads, G key/value heads, d head width, A rows sorted by expert, E experts, D width,
F expert width; m, n and k the sides of a block.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from datetime import date
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["KERNELS", "Blocks", "Table", "TuningError", "attention_size", "blocks_of", "file_of", "load", "tune"]

TUNED = Path(__file__).parent / "tuned"

_ATTENTION = ("64", "128", "256", "fp32")
KERNELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "gated_attention.forward": ("mn", _ATTENTION),
    "gated_attention.keys": ("mn", _ATTENTION),
    "gated_attention.queries": ("mn", _ATTENTION),
    "moe_experts.two_products": ("mnk", ("all",)),
}
"""The letters of a block's sides, and the size classes: of attention the widest head in bf16, or fp32 of any width."""

_TUNED_WITH = ("how", "device", "torch", "triton", "date", "commit")
_GAIN = 0.02
"""Of its time that a candidate must save: repeated measurements differ by less than that."""
_CLOSE = 2e-2
"""Norm of the difference from the present result over that result's norm: a few roundings to bf16 are below it."""


class TuningError(ValueError):
    """What a user can mend: a file, a name, a device."""


class Blocks(NamedTuple):
    """How a kernel cuts up its work."""

    block: tuple[int, ...]
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{' x '.join(map(str, self.block))}, {self.warps} warps, {self.stages} stages"


class Table(NamedTuple):
    """A file of `tuned/`."""

    tuned_with: dict[str, str]
    """`_TUNED_WITH`."""
    kernels: dict[str, dict[str, Blocks]]
    """By kernel and size class."""


def attention_size(d: int, dtype: torch.dtype) -> str:
    """The size class of a head width up to 256; fp32 has no tensor cores here, and twice the bytes."""
    return "fp32" if dtype == torch.float32 else str(max(64, 1 << (d - 1).bit_length()))


@lru_cache
def blocks_of(kernel: str, size: str, device: torch.device) -> Blocks:
    """The blocks of a kernel on a device; the device and the file are asked once."""
    return _loaded(file_of(device)).kernels[kernel][size]


def file_of(device: torch.device) -> Path:
    """The file for a device's architecture: its own if there is one, else the default."""
    own = _own_file(device) if device.type == "cuda" else None
    return own if own is not None and own.exists() else TUNED / "default.json"


def _own_file(device: torch.device) -> Path:
    major, minor = torch.cuda.get_device_capability(device)
    return TUNED / f"sm{major}{minor}.json"


def load(path: Path) -> Table:
    """Read and check a file.

    Raises:
        TuningError: it cannot be read, or names an unknown kernel or size, lacks one, or has a value that is none.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TuningError(
            f"{path}: cannot be read ({error}); restore it, or make it with tidegate kernels tune"
        ) from error
    document = _fields(path, "", document, ("tuned_with", "kernels"))
    sections = _fields(path, "kernels", document["kernels"], tuple(KERNELS))
    kernels = {}
    for kernel, (sides, sizes) in KERNELS.items():
        entries = _fields(path, f"kernels.{kernel}", sections[kernel], sizes)
        kernels[kernel] = {size: _blocks(path, f"kernels.{kernel}.{size}", entries[size], sides) for size in sizes}
    return Table(_fields(path, "tuned_with", document["tuned_with"], _TUNED_WITH), kernels)


_loaded = lru_cache(load)


def _fields(path: Path, where: str, value: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TuningError(f"{path}: {where or 'the file'}={value!r} is no object with {', '.join(names)}")
    for name in [*value, *names]:
        if name not in names or name not in value:
            problem = f"unknown, it is {value[name]!r}" if name in value else "missing"
            raise TuningError(f"{path}: {f'{where}.{name}'.lstrip('.')}: {problem}; there must be {', '.join(names)}")
    return value


def _blocks(path: Path, where: str, value: Any, sides: str) -> Blocks:
    entry = _fields(path, where, value, Blocks._fields)
    block = entry["block"]
    if not isinstance(block, list) or len(block) != len(sides):
        raise TuningError(f"{path}: {where}.block={block!r}: give its {len(sides)} sides, {', '.join(sides)}")
    for name, number, low in [*(("block", side, 16) for side in block), ("warps", entry["warps"], 1)]:
        if type(number) is not int or number < low or number & (number - 1):
            raise TuningError(f"{path}: {where}.{name}={number!r} must be a power of two, at least {low}")
    if type(entry["stages"]) is not int or entry["stages"] < 1:
        raise TuningError(f"{path}: {where}.stages={entry['stages']!r} must be an integer, at least 1")
    return Blocks(tuple(block), entry["warps"], entry["stages"])


def save(path: Path, table: Table) -> None:
    """Write a file whole or not at all, a line an entry."""
    sections = []
    for kernel, entries in table.kernels.items():
        lines = [f"   {json.dumps(size)}: {json.dumps(blocks._asdict())}" for size, blocks in entries.items()]
        sections.append(f"  {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n  }")
    head = json.dumps(table.tuned_with, indent=2).replace("\n}", "\n }")
    text = f'{{\n "tuned_with": {head},\n "kernels": {{\n' + ",\n".join(sections) + "\n }\n}\n"
    partial_file = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        partial_file.write_text(text, encoding="utf-8")
        partial_file.replace(path)
    finally:
        partial_file.unlink(missing_ok=True)


Outputs = Sequence[torch.Tensor]
Trial = Callable[[Blocks], Outputs]
"""A kernel at one shape, with some blocks."""
Measure = Callable[[Callable[[], object]], float]
"""Time of a call, in any unit."""


def _grid(blocks: Sequence[tuple[int, ...]], warps: Sequence[int], stages: Sequence[int]) -> list[Blocks]:
    return [Blocks(*choice) for choice in product(blocks, warps, stages)]


def candidates(kernel: str, size: str) -> list[Blocks]:
    """What is measured; fp32 is for checks and stays as it is."""
    if size == "fp32":
        return []
    if kernel == "moe_experts.two_products":
        return [
            *_grid([(128, 256, 64), (256, 128, 64)], [8], [2, 3]),
            *_grid([(128, 128, 64)], [4, 8], [3, 4]),
            *_grid([(128, 256, 32), (128, 128, 128)], [8], [2, 4]),
        ]
    if size == "256":
        return _grid([(32, 32), (64, 32), (32, 64), (64, 64)], [4, 8], [1, 2])
    return [*_grid([(64, 64)], [4], [2, 3]), *_grid([(64, 128), (128, 64)], [4, 8], [2, 3]), Blocks((128, 128), 8, 2)]


def tune(
    kernels: Sequence[str] | None,
    out: Path | None,
    report: Callable[[str], None],
    *,
    commit: str,
    measure: Measure | None = None,
) -> Path:
    """Measure the candidates of kernels on the CUDA device of this process and write what is fastest.

    Args:
        kernels: of `KERNELS`; None for all. The others keep their entries.
        out: None for the file that this device's architecture reads.
        report: takes a line at a time.
        commit: for the file.
        measure: median milliseconds by default.

    Returns:
        The file.

    Raises:
        TuningError: no such kernel, no CUDA device, or a file that cannot be written.
    """
    for kernel in kernels or ():
        if kernel not in KERNELS:
            raise TuningError(f"kernel {kernel}: unknown, one of {', '.join(KERNELS)}")
    if not torch.cuda.is_available():
        raise TuningError("tuning needs a CUDA device, this machine has none")
    device = torch.device("cuda", torch.cuda.current_device())
    out = out or _own_file(device)
    table = load(file_of(device))
    for kernel in kernels or KERNELS:
        for size in KERNELS[kernel][1]:
            report(f"{kernel} {size}")
            if choices := candidates(kernel, size):
                present = table.kernels[kernel][size]
                trials = _trials(kernel, size, device)
                table.kernels[kernel][size] = fastest(present, choices, trials, measure or _median_ms, report)
        try:  # after each kernel: it took minutes
            save(out, Table(_environment(device, commit), table.kernels))
        except OSError as error:
            raise TuningError(f"{out}: cannot be written ({error}); choose another file with --out") from error
    return out


def fastest(
    present: Blocks, choices: Sequence[Blocks], trials: Sequence[Trial], measure: Measure, report: Callable[[str], None]
) -> Blocks:
    """The candidate with the least mean time relative to the present one's, if it is `_GAIN` faster, else that one.

    A candidate that takes too much shared memory, or whose result differs, is left out and reported.
    """
    from triton.runtime.errors import OutOfResources

    expected = [trial(present) for trial in trials]
    times = [measure(partial(trial, present)) for trial in trials]
    shares = {present: 1.0}
    report(f"  {present}: {', '.join(f'{t:.4f}' for t in times)} ms, the present one")
    for choice in choices:
        if choice == present:
            continue
        try:
            error = max(_difference(trial(choice), truth) for trial, truth in zip(trials, expected, strict=True))
        except OutOfResources as problem:
            report(f"  {choice}: left out, {problem}")
            continue
        if not error <= _CLOSE:  # nor NaN
            report(f"  {choice}: left out, its result differs by {error:.1e}")
            continue
        measured = [measure(partial(trial, choice)) for trial in trials]
        shares[choice] = sum(new / old for new, old in zip(measured, times, strict=True)) / len(times)
        report(f"  {choice}: {', '.join(f'{t:.4f}' for t in measured)} ms, {shares[choice]:.3f} of the present one")
    best = min(shares, key=shares.__getitem__)
    if shares[best] > 1 - _GAIN:
        best = present
    report(f"  -> {best}")
    return best


def _difference(actual: Outputs, expected: Outputs) -> float:
    pairs = zip(actual, expected, strict=True)
    errors = [torch.linalg.vector_norm(a.float() - b.float()) / torch.linalg.vector_norm(b.float()) for a, b in pairs]
    return float(torch.stack(errors).max())


def _median_ms(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=50, rep=200, return_mode="median"))


def _environment(device: torch.device, commit: str) -> dict[str, str]:
    import triton

    return {
        "how": "tidegate kernels tune",
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": date.today().isoformat(),
        "commit": commit,
    }


def _trials(kernel: str, size: str, device: torch.device) -> list[Trial]:
    """Two representative shapes in bf16."""
    if kernel == "moe_experts.two_products":
        return [_products(*shape, device) for shape in ((16384, 2048, 1024, 64, 8), (16384, 2048, 768, 128, 8))]
    return [_attention(kernel, 4, 4096, int(size), device, mean_length) for mean_length in (300, None)]


def _normal(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def _attention(kernel: str, B: int, T: int, d: int, device: torch.device, mean_length: int | None) -> Trial:
    """Heads to a width of 2048, four query heads a key head, a sigmoid gate; with documents, their mean length."""
    from tidegate_kernels.gated_attention import Documents, triton

    H, G = 2048 // d, 512 // d
    q, k, v, scores, g = (_normal(device, B, T, heads, d) for heads in (H, G, G, H, H))
    gate, spans = triton.Gate(scores, "sigmoid"), None
    if mean_length is not None:
        documents = Documents((torch.rand(B, T, device=device) < 1 / mean_length).long().cumsum(dim=1))
        spans = triton.Spans(documents.first_BT, documents.end_BT)
    if kernel == "gated_attention.forward":
        return lambda blocks: triton.forward(q, k, v, spans, None, gate, blocks)
    y, _, lse = triton.forward(q, k, v, spans, None, gate)
    keys = kernel == "gated_attention.keys"
    return lambda blocks: triton.backward(
        g, q, k, v, y, lse, spans, gate, keys=blocks if keys else None, queries=None if keys else blocks
    )[:3]


def _products(T: int, D: int, F: int, E: int, K: int, device: torch.device) -> Trial:
    """The gradient of the experts' input, of T tokens with K experts each."""
    from tidegate_kernels.moe_experts import triton

    ends_E = torch.randint(E, (T * K,), device=device).bincount(minlength=E).cumsum(0).int()
    a, a2 = (_normal(device, T * K, F) for _ in range(2))
    b, b2 = (_normal(device, E, F, D) for _ in range(2))
    return lambda blocks: [triton.two_products(a, b, a2, b2, ends_E, blocks)]
