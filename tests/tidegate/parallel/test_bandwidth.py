"""Bandwidth between ranks: who meets whom, and that a rank which is late is seen to be."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tidegate.parallel import bandwidth
from tidegate.parallel.bandwidth import Bandwidth, measure, rounds


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 16, 63])
def test_all_meet_once(size: int) -> None:
    schedule = rounds(size)
    met = [(rank, partner) for partner_W in schedule for rank, partner in enumerate(partner_W) if rank != partner]
    assert len(met) == len(set(met)), "nobody twice"
    for partner_W in schedule:
        assert [partner_W[partner] for partner in partner_W] == [*range(size)], "both know of each other"
        assert sum(partner == rank for rank, partner in enumerate(partner_W)) in (size % 2, size)
    if size <= 8:
        assert len(met) == size * (size - 1), "everybody"


def three(num_bytes: int, late: int) -> Bandwidth:
    """With one rank that is 50 ms late at every swap."""
    import torch.distributed as dist

    if dist.get_rank() == late:
        swap = bandwidth.dist.batch_isend_irecv

        def slowly(operations: Any) -> Any:
            time.sleep(0.05)
            return swap(operations)

        bandwidth.dist.batch_isend_irecv = slowly
    return measure(num_bytes, torch.device("cpu"))


def test_a_late_rank_is_slow_to_all(on_ranks: Callable[..., list[Any]]) -> None:
    seen_W = on_ranks(3, three, 1_000_001, 1)
    for rank, seen in enumerate(seen_W):
        assert seen.pairs.keys() == {0, 1, 2} - {rank}
        assert 0 < seen.all_reduce < 1000
        assert 0 < seen.all_to_all < 1000
    assert seen_W[1].pairs[0] <= 1e-3 / 0.05
    assert seen_W[0].pairs[1] <= 1.5e-3 / 0.05, "its partner waits"
    assert seen_W[0].pairs[2] > 3 * seen_W[0].pairs[1]
