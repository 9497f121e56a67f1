"""AdamW on the device over numbers that live on the host: chunk by chunk up, moved, and down again.

Going up and coming down are at the same time, and a chunk is moved while its neighbours travel, so a step takes as long
as its bytes take in the busier direction. The cores of the host, which would take three times as long (jobs/bench), do
nothing, and the numbers are those of training on the device to the bit.

Letters: N numbers; n of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tidegate.parallel.prefetch import PAST, Lane, Mark
from tidegate_kernels.adamw import Rates, StepFactors, adamw

__all__ = ["CHUNK", "SLOTS", "Moved", "StreamedAdamW"]

CHUNK = 1 << 23
"""Numbers at a time."""
SLOTS = 3
"""Chunks on the device at a time: one on its way up, one that is moved, one on its way down."""


class Moved(NamedTuple):
    """What a step reads and, but for the gradients, writes: each (N,), on the host or a chunk of it on the device."""

    weights_N: torch.Tensor
    """fp32."""
    in_use_N: torch.Tensor
    """The dtype that the model computes with; written only."""
    gradients_N: torch.Tensor
    """fp32; read only."""
    mean_N: torch.Tensor
    """fp32 or bf16; so is the other."""
    square_N: torch.Tensor

    def part(self, start: int, stop: int) -> Moved:
        return Moved(*(tensor_N[start:stop] for tensor_N in self))


class StreamedAdamW:
    """The moves of one step; `finish` waits for the last of them.

    Args:
        device: that computes.
        largest: of what will be moved, the most numbers; gives the dtypes too.
    """

    def __init__(self, device: torch.device, largest: Moved) -> None:
        self._up, self._down = Lane(device), Lane(device)
        self._slots = [
            Moved(*(torch.empty_like(host_N[:CHUNK], device=device) for host_N in largest)) for _ in range(SLOTS)
        ]
        self._emptied: list[Mark] = [PAST] * SLOTS
        self._turn = 0
        self._up.after_compute()  # which may still use the memory of the slots

    def move(self, host: Moved, factors: StepFactors, rates: Rates, place: int) -> None:
        """Queue one step, in place.

        Args:
            host: pinned, or everything takes turns.
            factors: on the device; their `skip` is 0.
            rates: hyperparameters.
            place: of the first number among all, as `tidegate_kernels.adamw` has it.
        """
        for start in range(0, len(host.weights_N), CHUNK):
            there = host.part(start, start + CHUNK)
            here = self._slots[self._turn].part(0, len(there.weights_N))
            self._up.after(self._emptied[self._turn])
            for name in ("weights_N", "gradients_N", "mean_N", "square_N"):
                self._up.copy(getattr(here, name), getattr(there, name))
            self._up.wait(self._up.mark())
            adamw(*here, factors, rates, place=place + start)
            self._down.after_compute()
            for name in ("weights_N", "in_use_N", "mean_N", "square_N"):
                self._down.copy(getattr(there, name), getattr(here, name))
            self._emptied[self._turn] = self._down.mark()
            self._turn = (self._turn + 1) % SLOTS

    def finish(self) -> None:
        """The host waits until everything is down; the slots' memory is free then."""
        self._down.finish()
