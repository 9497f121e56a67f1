"""An exchange in real gloo processes, against one process that has all rows and all experts.

Letters: N rows of a rank, K experts a row, D width, E experts, R ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from tidegate.config import ConfigError
from tidegate.model.dispatch import Dispatch
from tidegate.parallel import collectives
from tidegate.parallel.all_to_all import AllToAll, Finish, HierarchicalAllToAll, Way, node_groups
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
    "even": [Case([3] * length, 0) for length in (7, 5, 1, 11, 2, 3)],
    "ragged": [Case(lengths, 0) for lengths in ([0, 12, 1, 0, 4], [2, 2], [0], [1] * 6, [5], [3, 0, 9])],
    "to_the_last_rank": [Case([3] * 7, 9), Case([2] * 5, 9), Case([1] * 3, 9), Case([0, 0], 0), *[Case([2], 10)] * 2],
    "no_rows": [Case([], 0), Case([2] * 5, 0), Case([], 0), Case([2], 0), Case([], 0), Case([1, 4], 0)],
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
    return {
        (name, choice): exchanged(cases, choice, AllToAll(None)) for name, cases in CASES.items() for choice in kernels
    }


def both_ways(node_size: int) -> dict[str, tuple[Result, Result]]:
    os.environ["LOCAL_WORLD_SIZE"] = str(node_size)
    nodes = node_groups(collectives.world_size())
    assert nodes is not None
    ways = AllToAll(None), HierarchicalAllToAll(nodes)
    plain, by_node = ({name: exchanged(cases, "reference", way) for name, cases in CASES.items()} for way in ways)
    return {name: (plain[name], by_node[name]) for name in CASES}


def exchanged(cases: list[Case], kernels: Kernels, all_to_all: AllToAll) -> Result:
    rank, ranks = collectives.rank(), collectives.world_size()
    with chosen(kernels):
        dispatch, x, upstream = rows_of(cases[rank], seed=rank)
        exchange = Exchange(dispatch, ranks, all_to_all)
        rows = exchange.send(x)()
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


def test_rows_that_travel_by_node_give_the_same_bits(on_ranks: Callable[..., list[Any]]) -> None:
    """Three nodes of two ranks; what the launcher says of nodes is all that is known of real ones too."""
    for results in on_ranks(6, both_ways, 2):
        for name, (plain, by_node) in results.items():
            for one, other in zip(plain, by_node, strict=True):
                assert torch.equal(torch.as_tensor(one), torch.as_tensor(other)), name


def groups_of(cases: list[tuple[int, list[int]]]) -> list[Any]:
    found: list[Any] = []
    for group_size, node_sizes in cases:
        os.environ["LOCAL_WORLD_SIZE"] = str(node_sizes[collectives.rank()])
        try:
            nodes = node_groups(group_size)
        except ConfigError as error:
            found.append(str(error))
        else:
            found.append(None if nodes is None else (nodes.num_nodes, nodes.node_size))
    return found


def test_nodes_are_what_the_launcher_says(on_ranks: Callable[..., list[Any]]) -> None:
    within_a_node, ranks_alone = (2, [2] * 4), (4, [1] * 4)
    for found in on_ranks(4, groups_of, [(4, [2] * 4), within_a_node, ranks_alone, (4, [3, 3, 3, 1])]):
        assert found == [
            (2, 2),
            None,
            None,
            "parallel.all_to_all=hierarchical needs nodes with equal numbers of workers that divide parallel.expert=4, "
            "but they have [1, 3]; use parallel.all_to_all=plain",
        ]


class _Logged(Way):
    """Says when rows leave and when they are waited for."""

    log: list[str]

    def begin(self, x: torch.Tensor, *, there: bool) -> Finish:
        finish = super().begin(x, there=there)
        self.log.append("leave")

        def logged() -> torch.Tensor:
            self.log.append("arrive")
            return finish()

        return logged


class _Work(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, log: list[str]) -> torch.Tensor:
        ctx.log = log
        log.append("work")
        return x * 3

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.log.append("work")
        return g * 3, None


def while_rows_travel() -> tuple[list[str], torch.Tensor]:
    way = _Logged([1, 2], [[1, 1], [2, 2]][collectives.rank()], None)
    way.log = []
    x = torch.randn(3, 4, requires_grad=True)
    rows = way.set_out(x)
    beside = _Work.apply(x, way.log)
    out = way.back(rows() * 2) + beside
    (dx,) = torch.autograd.grad(out.sum(), x)
    return way.log, dx


def test_what_is_done_meanwhile_and_its_backward_pass_run_while_rows_travel(on_ranks: Callable[..., list[Any]]) -> None:
    for log, dx in on_ranks(2, while_rows_travel):
        there, back = ["leave", "work", "arrive"], ["leave", "arrive"]
        assert log == [*there, *back, *back, *there]
        assert torch.equal(dx, torch.full((3, 4), 5.0))
