"""How fast the ranks of a process group reach each other: all together, and two by two.

Letters: W ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from tidegate.parallel.collectives import default_device

__all__ = ["Bandwidth", "measure", "measure_as", "rounds"]

_REPEATS = 3
_MAX_ROUNDS = 8
"""Partners of a rank; NCCL opens a connection for each."""


class Bandwidth(NamedTuple):
    """Seen by one rank, in GB/s (10^9) of one direction; the best of three."""

    all_reduce: float
    """Bytes that a ring sends from each rank, 2 (W - 1) / W of the message, in its time."""
    all_to_all: float
    """(W - 1) / W of the message."""
    pairs: dict[int, float]
    """Sending and receiving at once, by the partner's rank."""


def measure_as(rank: int, size: int, store: str, num_bytes: int, timeout_s: float) -> Bandwidth:
    """`measure` in a group that is made for it, NCCL on GPUs and gloo elsewhere.

    Args:
        store: `host:port` where rank 0 listens.
        timeout_s: of one collective.

    Raises:
        RuntimeError: a rank did not come, or was lost.
    """
    device = default_device()
    backend, timeout = ("nccl" if device.type == "cuda" else "gloo"), timedelta(seconds=timeout_s)
    dist.init_process_group(backend, init_method=f"tcp://{store}", rank=rank, world_size=size, timeout=timeout)
    try:
        return measure(num_bytes, device)
    finally:
        dist.destroy_process_group()


def measure(num_bytes: int, device: torch.device) -> Bandwidth:
    """Measure in the process group that there is; all ranks call it.

    Args:
        num_bytes: of a message; rounded to what W ranks share.
        device: of this rank.
    """
    size, me = dist.get_world_size(), dist.get_rank()
    message = torch.zeros(max(num_bytes // 4 // size, 1) * size, device=device)
    into = torch.empty_like(message)
    gigabytes = message.numel() * message.element_size() / 1e9
    reduce_s = _best_s(lambda: dist.all_reduce(message), device)
    exchange_s = _best_s(lambda: dist.all_to_all_single(into, message), device)
    pairs = {}
    for partner_W in rounds(size):
        partner = partner_W[me]

        def swap(partner: int = partner) -> None:
            if partner == me:
                return
            both = [dist.P2POp(dist.isend, message, partner), dist.P2POp(dist.irecv, into, partner)]
            for work in dist.batch_isend_irecv(both):
                work.wait()

        seconds = _best_s(swap, device)
        if partner != me:
            pairs[partner] = gigabytes / seconds
    share = (size - 1) / size
    return Bandwidth(2 * share * gigabytes / reduce_s, share * gigabytes / exchange_s, pairs)


def rounds(size: int) -> list[list[int]]:
    """Each rank's partner, round by round: all meet, or the first eight; itself is a pause.

    Args:
        size: ranks.
    """
    seats = size + size % 2  # the last one of an odd number plays against an empty seat
    schedule = []
    for turn in range(min(seats - 1, _MAX_ROUNDS)):
        circle = [0, *(1 + (turn + seat) % (seats - 1) for seat in range(seats - 1))]
        partner_W = list(range(size))
        for first, second in zip(circle[: seats // 2], reversed(circle[seats // 2 :]), strict=True):
            if max(first, second) < size:
                partner_W[first], partner_W[second] = second, first
        schedule.append(partner_W)
    return schedule


def _best_s(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of the fastest of a few, after one that opens connections."""
    best = float("inf")
    for _ in range(1 + _REPEATS):
        dist.barrier()
        _wait(device)
        begun = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - begun)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
