"""When a forward pass happens, and random numbers that depend on nothing but that.

Routers and unit gates anneal, draw noise and take random branches. None of it may depend on how a batch is cut into
ranks and micro-batches, on whether activations are recomputed, or on a restart. So there is no generator to advance:
a draw is a hash of (seed, step, purpose, place), with the place a row's position in the global batch.

Letters: N rows, C columns.
"""

from __future__ import annotations

import dataclasses
import hashlib

import torch

__all__ = ["STILL", "Clock", "derive_key", "uniform"]

_MASK = 0xFFFFFFFF


def derive_key(*parts: int | str) -> int:
    """A 62-bit key from anything that names a purpose, e.g. `derive_key("sinkhorn noise", layer)`."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2


@dataclasses.dataclass(frozen=True)
class Clock:
    """The optimizer step that a forward pass belongs to; the same on every rank and in every pass of the step."""

    step: int
    """Number of this step; the first is 1. 0 means no step: evaluation."""
    tokens: int
    """Tokens trained on when this step is over, as learning-rate schedules count."""
    seed: int
    """Of the run."""
    key: torch.Tensor = dataclasses.field(init=False, repr=False)
    """() int64 on the CPU: what every draw of this step hangs on. A tensor, so that a compiled model takes a new one
    without being compiled again; `clock.key ^ derive_key(purpose)` is the key of a purpose."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", torch.tensor(derive_key(self.seed, self.step), device="cpu"))

    def draw(self, *purpose: int | str) -> float:
        """One uniform number in (0, 1), on the host: for decisions that all ranks share."""
        return (derive_key(self.seed, self.step, *purpose) + 0.5) / 2**62

    def other(self, purpose: str) -> Clock:
        """The same moment with other draws."""
        return Clock(self.step, self.tokens, derive_key(self.seed, purpose))


STILL = Clock(0, 0, 0)
"""Evaluation: fixed draws, no schedule."""


def uniform(rows_N: torch.Tensor, columns: int, key: int | torch.Tensor) -> torch.Tensor:
    """Uniform numbers in (0, 1), a function of (key, row, column) alone.

    Args:
        rows_N: (N,) int64, which row of the global batch each is; below 2^32.
        columns: C.
        key: of the purpose, see `derive_key`; 62 bits.

    Returns:
        (N, C) fp32, never 0 and never 1.
    """
    columns_C = torch.arange(columns, device=rows_N.device, dtype=torch.int64)
    hashed_N = _mix((rows_N & _MASK) ^ (key & _MASK))
    hashed_NC = _mix((hashed_N[:, None] + 0x9E3779B9 * columns_C + (key >> 32)) & _MASK)
    return ((hashed_NC >> 9).float() + 0.5) / 2**23


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit numbers, held in int64, that spreads every bit (the finaliser of MurmurHash3)."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)
