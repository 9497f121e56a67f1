"""`tidegate kernels`: the block sizes that the kernels take here, and measuring them on this device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tidegate.config import ConfigError

__all__ = ["show_kernels", "tune_kernels"]


def tune_kernels(kernels: Sequence[str], out: Path | None) -> None:
    """Measure the blocks of kernels, all if none is named, and write them; a line for each that is tried.

    Raises:
        ConfigError: no such kernel, no CUDA device, or a file that cannot be read or written.
    """
    from tidegate.track.provenance import git_commit
    from tidegate_kernels.tuning import TuningError, tune

    try:
        written = tune(kernels or None, out, lambda line: print(line, flush=True), commit=git_commit() or "unknown")
    except TuningError as error:
        raise ConfigError(str(error)) from error
    print(f"written: {written}")


def show_kernels() -> None:
    """Print which file this machine's kernels take their blocks from, and its entries.

    Raises:
        ConfigError: the file cannot be read.
    """
    import torch

    from tidegate_kernels.tuning import TuningError, file_of, load

    path = file_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        table = load(path)
    except TuningError as error:
        raise ConfigError(str(error)) from error
    print(path)
    for name, value in table.tuned_with.items():
        print(f"  {name}: {value}")
    for kernel, entries in table.kernels.items():
        print(kernel)
        for size, blocks in entries.items():
            print(f"  {size:<4} {blocks}")
