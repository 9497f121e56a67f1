"""add_gradients against sums in fp64."""

from __future__ import annotations

import pytest
import torch

from tidegate_kernels.gradient_sum import add_gradients


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("N", [0, 1, 63, 1000, 2048, 5000])
def test_sums_are_those_of_fp64_to_the_last_bit_but_one(N: int, dtype: torch.dtype) -> None:
    around = torch.full((N + 2,), 7.0)  # neighbours in the flat buffer
    total = around[1:-1].fill_(torch.nan)  # the first gradient overwrites
    gradients = [torch.randn(N).to(dtype) for _ in range(5)]
    for index, gradient in enumerate(gradients):
        add_gradients(total, gradient, first=index == 0)
    truth = torch.stack(gradients).double().sum(dim=0)
    size = torch.stack(gradients).abs().double().sum(dim=0)
    assert ((total - truth).abs() <= 4 * torch.finfo(torch.float32).eps * size).all()
    assert around[0] == around[-1] == 7.0


@pytest.mark.usefixtures("kernels")
def test_the_first_one_is_exact() -> None:
    gradient = torch.randn(777).bfloat16()
    total = torch.full((777,), torch.inf)
    add_gradients(total, gradient, first=True)
    assert torch.equal(total, gradient.float())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("first", [True, False])
def test_a_pair_is_one_after_the_other(first: bool) -> None:
    one, other = torch.randn(2, 3001).bfloat16()
    pair = torch.randn(3001)
    alone = pair.clone()
    add_gradients(pair, one, other, first=first)
    add_gradients(alone, one, first=first)
    add_gradients(alone, other, first=False)
    assert torch.equal(pair, alone)
