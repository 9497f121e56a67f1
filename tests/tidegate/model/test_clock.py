"""Draws that depend on the step and the place alone.

Letters: N rows, C columns.
"""

from __future__ import annotations

import torch

from tidegate.model.clock import Clock, derive_key, uniform

KEY = Clock(step=7, tokens=0, seed=3).key


def test_a_row_draws_the_same_wherever_it_stands() -> None:
    whole = uniform(torch.arange(1000), 7, KEY)
    order = torch.randperm(1000)
    assert torch.equal(uniform(order, 7, KEY), whole[order])
    assert torch.equal(uniform(torch.arange(500, 563), 7, KEY), whole[500:563])
    assert torch.equal(uniform(torch.arange(1000), 33, KEY)[:, :7], whole), "a wider draw begins like a narrow one"


def test_draws_are_uniform_and_independent() -> None:
    draws = uniform(torch.arange(100_000), 7, KEY)
    assert draws.min() > 0
    assert draws.max() < 1
    counts = torch.histc(draws, bins=64, min=0, max=1)
    expected = draws.numel() / 64
    # Chi-squared of 63 degrees of freedom has mean 63 and deviation 11.2.
    assert ((counts - expected).square() / expected).sum() < 63 + 5 * 11.2
    for lag in (1, 2, 64):
        pairs = torch.stack([draws[:-lag, 0], draws[lag:, 0]])
        assert torch.corrcoef(pairs)[0, 1].abs() < 5 / 100_000**0.5
    between = torch.corrcoef(draws.T) - torch.eye(7)
    assert between.abs().max() < 5 / 100_000**0.5


def test_another_step_seed_or_purpose_draws_otherwise() -> None:
    first = Clock(1, 0, 0)
    clocks = [first, Clock(2, 0, 0), Clock(1, 0, 1), first.other("pass")]
    keys = [*(clock.key for clock in clocks), first.key ^ derive_key("a"), first.key ^ derive_key("b")]
    assert len({int(key) for key in keys}) == 6
    rows = torch.arange(10_000)
    draws = torch.stack([uniform(rows, 1, key)[:, 0] for key in keys])
    assert (torch.corrcoef(draws) - torch.eye(6)).abs().max() < 5 / 10_000**0.5
    assert torch.equal(first.key, Clock(1, 999, 0).key), "tokens take no part"


def test_one_draw_hits_its_probability() -> None:
    hits = sum(Clock(step, 0, 0).draw("branch", 3) < 0.1 for step in range(20_000))
    assert abs(hits - 2000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5
