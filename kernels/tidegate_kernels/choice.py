"""Which implementation of an operation runs: Triton or the plain PyTorch reference.

The choice is one of the process, as it is one of a job; nothing falls back silently. Inputs that a Triton kernel does
not take (fp64, a layout that its README excludes) are an error under `triton` and the reference under `auto`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

__all__ = ["Kernels", "choose", "chosen", "interpreted", "takes_triton"]

Kernels = Literal["auto", "triton", "reference"]
"""`auto`: Triton for bf16 and fp32 on CUDA, and on `meta`, which stands for it; else the reference."""

_DTYPES = (torch.bfloat16, torch.float32)
_choice: Kernels = "auto"


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, on the CPU: TRITON_INTERPRET=1 when they are loaded."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def choose(kernels: Kernels) -> None:
    """Set the choice of this process.

    Raises:
        ValueError: `triton` without a CUDA device or the interpreter.
    """
    if kernels == "triton" and not (torch.cuda.is_available() or interpreted()):
        raise ValueError(
            "kernels=triton needs a CUDA device, or the interpreter for a test (TRITON_INTERPRET=1); use kernels=auto"
        )
    global _choice
    _choice = kernels


@contextmanager
def chosen(kernels: Kernels) -> Iterator[None]:
    """The choice inside a `with` block."""
    before = _choice
    choose(kernels)
    try:
        yield
    finally:
        choose(before)


def takes_triton(x: torch.Tensor, *, fits: bool = True) -> bool:
    """Whether the kernel of an operation runs for its main input.

    Args:
        x: the input that decides.
        fits: whether the kernel takes the other inputs.

    Raises:
        ValueError: under `triton`, where the kernel takes no such input.
    """
    if _choice == "reference" or (_choice == "auto" and not (x.is_cuda or x.is_meta)):
        return False
    takes = fits and x.dtype in _DTYPES
    if _choice == "triton" and not takes:
        raise ValueError(
            f"kernels=triton: no kernel takes a {tuple(x.shape)} input of {x.dtype} here; use kernels=auto or reference"
        )
    return takes
