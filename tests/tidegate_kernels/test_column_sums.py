"""Column sums against fp64."""

from __future__ import annotations

import pytest
import torch

from tidegate_kernels.column_sums import column_sums


@pytest.mark.parametrize(("P", "X"), [(1, 1), (3, 63), (512, 8), (513, 1000), (1300, 9)])
def test_sums(P: int, X: int) -> None:
    x_PX = torch.randn(P, X)
    torch.testing.assert_close(column_sums(x_PX, torch.float32), x_PX.double().sum(dim=0).float(), rtol=1e-5, atol=1e-4)
    whole = torch.randint(-9, 10, (P, X)).float()  # sums that bf16 rounds, whichever way, to their neighbours
    expected = whole.sum(dim=0)
    assert column_sums(whole, torch.float32).equal(expected)
    torch.testing.assert_close(column_sums(whole, torch.bfloat16).float(), expected, rtol=2**-7, atol=0)
