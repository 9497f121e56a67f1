"""Whether ranks that should hold the same bits do: what broken memory or a miscompiled kernel changes silently.

Every rank adds up the bits of its weights in use and of its routers' state; ranks then compare sums. A wrong bit
anywhere changes a sum. Dense weights and routers are the same on all ranks, experts on the ranks that hold the same.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Mapping

from tidegate.parallel import collectives
from tidegate.parallel.engine import Engine

__all__ = ["ReplicasDiffer", "compare_replicas", "odd_ones"]


class ReplicasDiffer(Exception):
    """Ranks that should hold the same bits do not; the message names them."""


def compare_replicas(engine: Engine, expert: int, step: int, values: Mapping[str, float]) -> None:
    """Compare this step's state over ranks; every rank calls it.

    Args:
        engine: of this rank.
        expert: ranks that share one copy of the experts.
        step: for the message.
        values: of the step, that every rank should have in the same bits: loss, gradient norm, learning rate.

    Raises:
        ReplicasDiffer: on every rank, if any two differ.
    """
    mine = engine.bit_sums() | {
        name: struct.unpack("<q", struct.pack("<d", value))[0] for name, value in values.items()
    }
    by_rank = collectives.gather(mine)
    found = []
    for what in mine:
        copies = expert if what == "experts" else 1
        for first in range(copies):
            ranks = range(first, len(by_rank), copies)
            odd = odd_ones([by_rank[rank][what] for rank in ranks])
            if odd:
                found.append(f"{what} of {_ranks(ranks[place] for place in odd)}")
    if found:
        raise ReplicasDiffer(f"step {step}: not the bits that other ranks have: {'; '.join(found)}")


def odd_ones(sums: list[int]) -> list[int]:
    """Places of the sums that are not what most are; all places, if no value is held by more than half."""
    (most, times), *_ = Counter(sums).most_common(1)
    if times == len(sums):
        return []
    return [place for place, value in enumerate(sums) if value != most or times * 2 <= len(sums)]


def _ranks(ranks: Iterable[int]) -> str:
    numbers = list(ranks)
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
