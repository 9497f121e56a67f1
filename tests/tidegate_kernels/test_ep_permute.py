"""ep_unpack and ep_pack against a walk over the blocks.

Letters: A rows, D width, R source ranks, e experts.
"""

from __future__ import annotations

import pytest
import torch

from tidegate_kernels.choice import chosen
from tidegate_kernels.ep_permute import ep_pack, ep_unpack

COUNTS = {
    "one_row": [[0, 1, 0], [0, 0, 0]],
    "one_block": [[63]],
    "one_rank": [[5, 0, 8, 1]],
    "one_expert": [[5], [0], [8]],
    "uneven": [[0, 7, 1], [20, 0, 0], [0, 0, 0], [3, 30, 2]],
    "thousand": [[100, 0, 50, 1, 149], [0, 333, 17, 0, 350]],
    "empty": [[0, 0], [0, 0]],
}
with_both_kernels = pytest.mark.usefixtures("kernels")
in_every_split = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
in_both_directions = pytest.mark.parametrize("op", [ep_unpack, ep_pack])


def by_walking(counts: list[list[int]]) -> list[int]:
    """For each row by (expert, source rank), its place by (source rank, expert)."""
    first, starts = 0, {}
    for rank, row in enumerate(counts):
        for expert, count in enumerate(row):
            starts[expert, rank] = range(first, first + count)
            first += count
    return [place for key in sorted(starts) for place in starts[key]]


def expected(op, rows: torch.Tensor, counts: list[list[int]]) -> torch.Tensor:  # type: ignore[no-untyped-def]
    order = torch.tensor(by_walking(counts), dtype=torch.int64)
    if op is ep_unpack:
        return rows[order]
    out = torch.empty_like(rows)
    out[order] = rows
    return out


def rows_of(counts: list[list[int]], D: int) -> torch.Tensor:
    return torch.randn(sum(map(sum, counts)), D)


@with_both_kernels
@in_every_split
@in_both_directions
@pytest.mark.parametrize(("D", "dtype"), [(1, torch.float32), (63, torch.bfloat16), (1000, torch.float32)])
def test_values_and_gradients(op, counts: list[list[int]], D: int, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    rows = rows_of(counts, D).to(dtype).requires_grad_()
    out = op(rows, torch.tensor(counts))
    assert torch.equal(out, expected(op, rows.detach(), counts))
    g = torch.randn_like(out)
    out.backward(g)
    other = ep_pack if op is ep_unpack else ep_unpack
    assert rows.grad is not None
    assert torch.equal(rows.grad, expected(other, g, counts))


@with_both_kernels
@in_every_split
def test_one_undoes_the_other(counts: list[list[int]]) -> None:
    rows, table = rows_of(counts, 24), torch.tensor(counts)
    assert torch.equal(ep_pack(ep_unpack(rows, table), table), rows)
    assert torch.equal(ep_unpack(ep_pack(rows, table), table), rows)


@with_both_kernels
def test_another_order_of_blocks_is_noticed() -> None:
    counts = COUNTS["uneven"]
    rows = rows_of(counts, 24)
    transposed = torch.tensor(counts).t()
    assert not torch.equal(ep_unpack(rows, transposed.reshape(4, 3)), expected(ep_unpack, rows, counts))
    assert not torch.equal(ep_pack(rows, torch.tensor(counts)), expected(ep_unpack, rows, counts))


@with_both_kernels
@in_both_directions
def test_strided_views(op) -> None:  # type: ignore[no-untyped-def]
    counts = COUNTS["uneven"]
    rows = rows_of(counts, 24)
    table = torch.tensor(counts).t().contiguous().t()
    for view in (torch.cat([rows, rows], dim=1)[:, :24], rows.t().contiguous().t()):
        assert not view.is_contiguous()
        assert torch.equal(op(view, table), expected(op, rows, counts))


@with_both_kernels
def test_many_blocks() -> None:
    """More of them than rows a program, most of them empty."""
    table = torch.randint(0, 3, (16, 65)) * (torch.rand(16, 65) > 0.8)
    counts = table.tolist()
    rows = rows_of(counts, 8)
    assert torch.equal(ep_unpack(rows, table), expected(ep_unpack, rows, counts))


def test_counts_that_do_not_add_up_read_nothing_outside() -> None:
    rows = torch.randn(5, 8)
    with chosen("triton"):
        out = ep_unpack(rows, torch.tensor([[3, 4], [5, 6]]))
        assert torch.equal(out[:3], rows[:3])
        assert not out[3:].any(), "rows 7 and on of 5"
        assert torch.equal(ep_unpack(rows, torch.tensor([[2, 1]]))[:3], rows[:3])


@with_both_kernels
@in_both_directions
def test_compiles_in_one_graph(op) -> None:  # type: ignore[no-untyped-def]
    counts = COUNTS["uneven"]
    rows = rows_of(counts, 24).requires_grad_()
    out = torch.compile(op, fullgraph=True, backend="aot_eager")(rows, torch.tensor(counts))
    assert torch.equal(out, expected(op, rows, counts))
    (gradient,) = torch.autograd.grad(out.square().sum(), rows)
    assert torch.equal(gradient, 2 * rows)


def test_registered_operation() -> None:
    """Schema, fake and autograd registration agree with what the kernel does."""
    counts = torch.tensor(COUNTS["uneven"])
    rows = torch.randn(63, 24, requires_grad=True)
    for table in (counts, counts.t()):
        torch.library.opcheck(torch.ops.tidegate.swap_blocks.default, (rows, table))


def test_no_silent_fallback() -> None:
    with chosen("triton"), pytest.raises(ValueError, match=r"no kernel takes a \(1, 8\) input of torch.float64"):
        ep_unpack(torch.zeros(1, 8, dtype=torch.float64), torch.ones(1, 1, dtype=torch.int64))
