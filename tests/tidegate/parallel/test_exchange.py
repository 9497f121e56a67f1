"""An exchange in real gloo processes, against one process that has all rows and all experts.

Letters: N rows of a rank, K experts a row, D width, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from tidegate.model.dispatch import Dispatch
from tidegate.parallel import collectives
from tidegate.parallel.exchange import Exchange
from tidegate_kernels.choice import Kernels, chosen

D, E = 9, 12


class Case(NamedTuple):
    """Assignments of one rank's rows."""

    lengths: list[int]
    """Experts of each row."""
    first: int
    """Experts are drawn from here on."""


CASES = {
    "even": [Case([3] * 7, 0), Case([3] * 5, 0), Case([3] * 1, 0), Case([3] * 11, 0)],
    "ragged": [Case([0, 12, 1, 0, 4], 0), Case([2, 2], 0), Case([0], 0), Case([1] * 6, 0)],
    "to_the_last_rank": [Case([3] * 7, 9), Case([2] * 5, 9), Case([1] * 3, 9), Case([0, 0], 0)],
    "no_rows": [Case([], 0), Case([2] * 5, 0), Case([], 0), Case([2], 0)],
}


class Result(NamedTuple):
    out: torch.Tensor
    dx: torch.Tensor
    dweights: torch.Tensor
    rows_that_came: int
    assignments_that_came: int


def rows_of(case: Case, seed: int) -> tuple[Dispatch, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    choices = [case.first + torch.randperm(E - case.first, generator=generator)[:k] for k in case.lengths]
    slice_A = torch.cat([torch.empty(0, dtype=torch.int64), *choices])
    weights_A = torch.rand(len(slice_A), generator=generator).requires_grad_()
    starts_N1 = torch.tensor([0, *case.lengths]).cumsum(0)
    even = len(set(case.lengths)) == 1 and case.lengths[0] > 0
    x = torch.randn(len(case.lengths), D, generator=generator).requires_grad_()
    upstream = torch.randn(len(case.lengths), D, generator=generator)
    per_row = case.lengths[0] if even else 0
    return Dispatch(slice_A, weights_A, None if even else starts_N1, per_row, E), x, upstream


def mixed(rows: torch.Tensor, dispatch: Dispatch, first: int) -> torch.Tensor:
    """Expert e multiplies a row by sin(e + 1): a mixture whose every term can be told."""
    factor_A = dispatch.weights_A * torch.sin(dispatch.slice_A + first + 1.0)
    return torch.zeros_like(rows).index_add(0, dispatch.row_A(), rows[dispatch.row_A()] * factor_A[:, None])


def on_a_rank(kernels: list[Kernels]) -> dict[tuple[str, Kernels], Result]:
    return {(name, choice): exchanged(cases, choice) for name, cases in CASES.items() for choice in kernels}


def exchanged(cases: list[Case], kernels: Kernels) -> Result:
    rank, ranks = collectives.rank(), collectives.world_size()
    with chosen(kernels):
        dispatch, x, upstream = rows_of(cases[rank], seed=rank)
        exchange = Exchange(dispatch, ranks, None)
        rows = exchange.send(x)
        local = exchange.received
        assert local.num_rows == len(rows)
        assert local.num_slices == E // ranks
        out = exchange.send_back(mixed(rows, local, rank * local.num_slices))
        dx, dweights = torch.autograd.grad(out, (x, dispatch.weights_A), upstream)
    return Result(out.detach(), dx, dweights, len(rows), len(local.slice_A))


@pytest.mark.parametrize("ranks", [2, 4])
def test_an_exchange_is_a_mixture_in_one_process(on_ranks: Callable[..., list[Any]], ranks: int) -> None:
    by_rank = on_ranks(ranks, on_a_rank, ["reference", "triton"])
    for key in by_rank[0]:
        check(CASES[key[0]][:ranks], [results[key] for results in by_rank])


def check(cases: list[Case], results: list[Result]) -> None:
    ranks = len(cases)
    pairs, assignments = [0] * ranks, [0] * ranks
    for rank, (case, result) in enumerate(zip(cases, results, strict=True)):
        dispatch, x, upstream = rows_of(case, seed=rank)
        out = mixed(x, dispatch, 0)
        dx, dweights = torch.autograd.grad(out, (x, dispatch.weights_A), upstream)
        torch.testing.assert_close(result.out, out.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result.dx, dx, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result.dweights, dweights, rtol=1e-5, atol=1e-6)
        to_A = dispatch.slice_A // (E // ranks)
        for to in range(ranks):
            pairs[to] += len(dispatch.row_A()[to_A == to].unique())
            assignments[to] += int((to_A == to).sum())
    # A row goes once to a rank, whatever number of its experts is there.
    assert [result.rows_that_came for result in results] == pairs
    assert [result.assignments_that_came for result in results] == assignments
