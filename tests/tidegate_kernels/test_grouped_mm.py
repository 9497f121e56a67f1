"""grouped_mm against a loop over groups in fp64.

Letters: N rows, E groups, D inner and F outer width. D and F are multiples of 8: rows must start on 16 bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from tidegate_kernels.grouped_mm import grouped_mm, reference

D, F = 24, 40
COUNTS = {
    "one_row": [1],
    "one_row_of_three_groups": [0, 1, 0],
    "odd": [7, 1, 0, 13, 42],
    "empty_first_and_last": [0, 0, 63, 0],
    "uneven": [333, 0, 1, 599, 3, 0, 64],
    "no_rows": [0, 0, 0],
}
in_every_split = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())


class Results(NamedTuple):
    out: torch.Tensor
    dx: torch.Tensor
    dw: torch.Tensor


def inputs(counts: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (N, D), w (E, D, F) and the gradient of the product (N, F): fp64 numbers that bf16 can hold."""
    N, E = sum(counts), len(counts)
    x, w, g = (torch.randn(shape).bfloat16().double() for shape in [(N, D), (E, D, F), (N, F)])
    return x, w, g


def by_formula(x: torch.Tensor, w: torch.Tensor, g: torch.Tensor, counts: list[int]) -> Results:
    """Row by row: out = x w, dx = g w^T, dw = sum of x^T g over the group's rows."""
    out, dx, dw = torch.zeros_like(g), torch.zeros_like(x), torch.zeros_like(w)
    groups = [group for group, count in enumerate(counts) for _ in range(count)]
    for row, group in enumerate(groups):
        out[row] = x[row] @ w[group]
        dx[row] = w[group] @ g[row]
        dw[group] += torch.outer(x[row], g[row])
    return Results(out, dx, dw)


def run(op, x: torch.Tensor, w: torch.Tensor, g: torch.Tensor, counts: list[int], transposed: bool) -> Results:  # type: ignore[no-untyped-def]
    """With `transposed`, w is kept as (E, F, D), as the experts keep it, and passed as a view."""
    x = x.detach().clone().requires_grad_()
    kept = (w.transpose(1, 2) if transposed else w).detach().clone(memory_format=torch.contiguous_format)
    kept.requires_grad_()
    out = op(x, kept.transpose(1, 2) if transposed else kept, torch.tensor(counts))
    out.backward(g)
    assert x.grad is not None
    assert kept.grad is not None
    return Results(out.detach(), x.grad, kept.grad.transpose(1, 2) if transposed else kept.grad)


@pytest.mark.parametrize("op", [grouped_mm, reference.grouped_mm], ids=["op", "reference"])
@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", "plain"])
@in_every_split
def test_values_and_gradients(op, counts: list[int], transposed: bool) -> None:  # type: ignore[no-untyped-def]
    x, w, g = inputs(counts)
    actual = run(op, x.float(), w.float(), g.float(), counts, transposed)
    for one, exact in zip(actual, by_formula(x, w, g, counts), strict=True):
        # Sums of at most 599 products of size one: sqrt(599) roundings of 6e-8 of numbers near 30.
        torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@in_every_split
def test_empty_groups_get_a_gradient_of_exactly_zero(counts: list[int], dtype: torch.dtype) -> None:
    x, w, g = (t.to(dtype) for t in inputs(counts))
    dw = run(grouped_mm, x, w, g, counts, transposed=True).dw
    for group, count in enumerate(counts):
        assert dw[group].any() == (count > 0), f"group {group} of {counts}"
    assert dw.isfinite().all()


@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", "plain"])
@in_every_split
def test_bf16_error(counts: list[int], transposed: bool) -> None:
    """At most twice the error of a bf16 loop, for the product and both gradients."""
    x, w, g = inputs(counts)
    low = [t.bfloat16() for t in (x, w, g)]
    actual = run(grouped_mm, *low, counts, transposed)
    loop = run(reference.grouped_mm, *low, counts, transposed)
    for name, one, other, exact in zip(Results._fields, actual, loop, by_formula(x, w, g, counts), strict=True):
        assert one.dtype == torch.bfloat16, name
        if exact.numel():
            error, allowed = ((t.double() - exact).abs().max() for t in (one, other))
            assert error <= 2 * allowed, name


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_counts_may_be_any_integers(dtype: torch.dtype) -> None:
    counts = [3, 0, 60]
    x, w, g = inputs(counts)
    out = grouped_mm(x.float(), w.float(), torch.tensor(counts, dtype=dtype))
    torch.testing.assert_close(out.double(), by_formula(x, w, g, counts).out, rtol=1e-5, atol=1e-4)


def test_a_row_meets_its_own_group_only() -> None:
    """Changing one group's matrix changes that group's rows and no other."""
    counts = [5, 0, 9, 1]
    x, w, _ = (t.float() for t in inputs(counts))
    before = grouped_mm(x, w, torch.tensor(counts))
    w[2] += 1
    changed = (grouped_mm(x, w, torch.tensor(counts)) != before).any(dim=1)
    assert changed.tolist() == [False] * 5 + [True] * 9 + [False]


def test_inputs_are_left_alone() -> None:
    counts = [2, 0, 61]
    x, w, _ = (t.float() for t in inputs(counts))
    kept = x.clone(), w.clone()
    grouped_mm(x, w, torch.tensor(counts))
    assert torch.equal(x, kept[0])
    assert torch.equal(w, kept[1])
