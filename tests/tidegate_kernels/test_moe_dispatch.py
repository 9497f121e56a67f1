"""Sorting assignments by expert, and rows on the way there and back.

Letters: N rows, A assignments, D width, E experts.
"""

from __future__ import annotations

import pytest
import torch

from tidegate_kernels.choice import Kernels
from tidegate_kernels.moe_dispatch import Slots, combine, fan_in, fan_out, place

D = 24
LENGTHS = {
    "two_a_row": [2] * 63,
    "one_a_row": [1] * 1000,
    "ragged": [3, 0, 1, 5, 0, 2, 1, 1, 0, 4] * 7,
    "one_row": [3],
    "rows_without_experts": [0, 0],
}
with_every_length = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())


def assignments(lengths: list[int], num_experts: int = 5) -> tuple[torch.Tensor, Slots]:
    """Experts of each assignment; expert 3 gets none."""
    expert_A = torch.randint(0, num_experts, (sum(lengths),))
    expert_A[expert_A == 3] = 0
    starts_N1 = None
    if len(set(lengths)) > 1 or lengths[0] == 0:
        starts_N1 = torch.tensor([0, *lengths]).cumsum(0)
    return expert_A, place(expert_A, num_experts, per_row=lengths[0], starts_N1=starts_N1)


@with_every_length
@pytest.mark.parametrize("num_experts", [5, 130])
def test_place_is_a_stable_sort(kernels: Kernels, lengths: list[int], num_experts: int) -> None:
    expert_A, slots = assignments(lengths, num_experts)
    order = sorted(range(len(expert_A)), key=lambda a: int(expert_A[a]))
    assert slots.slot_A[order].tolist() == list(range(len(expert_A)))
    assert slots.counts_E.tolist() == torch.bincount(expert_A, minlength=num_experts).tolist()
    assert slots.slot_A.dtype == slots.ends_E.dtype == torch.int32


@with_every_length
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(kernels: Kernels, lengths: list[int], dtype: torch.dtype) -> None:
    """Against loops in fp64: rows to slots, slots to rows."""
    expert_A, slots = assignments(lengths)
    A, N = len(expert_A), len(lengths)
    row_A = torch.tensor([n for n, length in enumerate(lengths) for _ in range(length)], dtype=torch.int64)
    slot_A = slots.slot_A.long()
    x = torch.randn(N, D, dtype=dtype, requires_grad=True)
    g_AD, g_ND = torch.randn(A, D, dtype=dtype), torch.randn(N, D, dtype=dtype)
    y = torch.randn(A, D, dtype=dtype, requires_grad=True)
    weights = torch.rand(A, requires_grad=True)

    out = fan_out(x, slots)
    (dx,) = torch.autograd.grad(out, x, g_AD)
    total = combine(y, weights, slots)
    dy, dweights = torch.autograd.grad(total, (y, weights), g_ND)
    plain = fan_in(y, slots)
    (dplain,) = torch.autograd.grad(plain, y, g_ND)

    expected = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in
                (("out", (A, D)), ("dx", (N, D)), ("total", (N, D)), ("dy", (A, D)), ("dweights", (A,)),
                 ("plain", (N, D)), ("dplain", (A, D)))}  # fmt: skip
    for a in range(A):
        n, slot, weight = row_A[a], slot_A[a], weights[a].detach().double()
        expected["out"][slot] = x[n].detach().double()
        expected["dx"][n] += g_AD[slot].double()
        expected["total"][n] += weight * y[slot].detach().double()
        expected["dy"][slot] = weight * g_ND[n].double()
        expected["dweights"][a] = g_ND[n].double() @ y[slot].detach().double()
        expected["plain"][n] += y[slot].detach().double()
        expected["dplain"][slot] = g_ND[n].double()
    # fp32 inside, one rounding to the dtype at the end.
    step = torch.finfo(dtype).eps
    for name, actual in zip(expected, (out, dx, total, dy, dweights, plain, dplain), strict=True):
        assert actual.dtype == (torch.float32 if name == "dweights" else dtype)
        tolerance = 1e-5 if name == "dweights" else step
        torch.testing.assert_close(actual.double(), expected[name], rtol=tolerance, atol=1e-5, msg=name)


def test_there_and_back_is_a_factor(kernels: Kernels) -> None:
    """Weights that sum to one bring every row back."""
    _, slots = assignments([2] * 63)
    x = torch.randn(63, D)
    weights = torch.rand(63, 2)
    back = combine(fan_out(x, slots), (weights / weights.sum(dim=1, keepdim=True)).flatten(), slots)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)


def test_strided_rows(kernels: Kernels) -> None:
    _, slots = assignments([2] * 9)
    wide = torch.randn(9, 2 * D)
    assert torch.equal(fan_out(wide[:, D:], slots), fan_out(wide[:, D:].contiguous(), slots))


@pytest.mark.parametrize("lengths", [LENGTHS["two_a_row"], LENGTHS["ragged"]], ids=["even", "ragged"])
def test_registered_operations(lengths: list[int]) -> None:
    expert_A, slots = assignments(lengths)
    indices = slots.slot_A, slots.starts_N1, slots.per_row
    x, y = torch.randn(len(lengths), D, requires_grad=True), torch.randn(len(expert_A), D, requires_grad=True)
    weights = torch.rand(len(expert_A), requires_grad=True)
    ops = torch.ops.tidegate
    torch.library.opcheck(ops.place.default, (expert_A, 5))
    torch.library.opcheck(ops.fan_out.default, (x, *indices))
    torch.library.opcheck(ops.fan_in.default, (y, *indices))
    torch.library.opcheck(ops.combine.default, (y, weights, *indices))
