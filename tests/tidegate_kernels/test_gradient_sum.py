"""add_gradients and add_rows against sums in fp64."""

from __future__ import annotations

import pytest
import torch

from tidegate_kernels.gradient_sum import MOST_AT_ONCE, add_gradients, add_rows


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("N", [0, 1, 63, 1000, 2048, 5000])
def test_sums_are_those_of_fp64_to_the_last_bit_but_one(N: int, dtype: torch.dtype) -> None:
    around = torch.full((N + 2,), 7.0)  # neighbours in the flat buffer
    total = around[1:-1].fill_(torch.nan)  # the first gradient overwrites
    gradients = [torch.randn(N).to(dtype) for _ in range(5)]
    for index, gradient in enumerate(gradients):
        add_gradients(total, [gradient], first=index == 0)
    truth = torch.stack(gradients).double().sum(dim=0)
    size = torch.stack(gradients).abs().double().sum(dim=0)
    assert ((total - truth).abs() <= 4 * torch.finfo(torch.float32).eps * size).all()
    assert around[0] == around[-1] == 7.0


@pytest.mark.usefixtures("kernels")
def test_the_first_one_is_exact() -> None:
    gradient = torch.randn(777).bfloat16()
    total = torch.full((777,), torch.inf)
    add_gradients(total, [gradient], first=True)
    assert torch.equal(total, gradient.float())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("num", range(1, MOST_AT_ONCE + 1))
def test_several_at_once_are_one_after_the_other(num: int, first: bool) -> None:
    gradients = list(torch.randn(num, 3001).bfloat16())
    together = torch.randn(3001)
    singly = together.clone()
    add_gradients(together, gradients, first=first)
    for index, gradient in enumerate(gradients):
        add_gradients(singly, [gradient], first=first and index == 0)
    assert torch.equal(together, singly)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("V", "D", "places"),
    [
        (5, 3, [4]),
        (5, 64, [1, 1, 1, 3, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),  # 15 to one place, more than two loads
        (9, 520, [8, 0, 8, 0, 3, 3, 3, 3, 3, 3, 3, 3]),  # exactly one load to place 3, and two blocks of columns
        (4, 8, []),
        (2, 0, [1, 1]),
    ],
)
def test_rows_go_to_their_places_and_nowhere_else(V: int, D: int, places: list[int], dtype: torch.dtype) -> None:
    around = torch.randn(V + 2, D)
    before, total = around.clone(), around[1:-1]
    place_N = torch.tensor(places, dtype=torch.int64)
    gradient_ND = torch.randn(len(places), D).to(dtype)
    add_rows(total, place_N, gradient_ND)
    truth = before[1:-1].double().index_add(0, place_N, gradient_ND.double())
    size = before[1:-1].double().abs().index_add(0, place_N, gradient_ND.double().abs())
    assert ((total - truth).abs() <= 16 * torch.finfo(torch.float32).eps * size).all()
    untouched = sorted(set(range(V)) - set(places))
    assert torch.equal(total[untouched], before[1:-1][untouched])
    assert torch.equal(around[[0, -1]], before[[0, -1]])
