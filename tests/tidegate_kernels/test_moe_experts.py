"""moe_experts against every expert applied to every one of its rows, in fp64.

Letters: N rows, K experts a row, D width, E experts, F expert width. D and F are multiples of 8.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from tidegate_kernels.choice import Kernels, chosen
from tidegate_kernels.moe_dispatch import place
from tidegate_kernels.moe_experts import moe_experts
from tidegate_kernels.moe_experts import triton as kernels_of

E, D, F = 5, 24, 40
NAMES = ("out", "dx", "dweights", "dw1", "dw3", "dw2")


class Inputs(NamedTuple):
    expert_A: torch.Tensor
    lengths_N: list[int]
    x: torch.Tensor
    weights: torch.Tensor
    w1: torch.Tensor
    w3: torch.Tensor
    w2: torch.Tensor
    upstream: torch.Tensor


def inputs(lengths_N: list[int]) -> Inputs:
    """fp64 numbers that bf16 can hold; expert 3 gets no row and expert 0 most."""
    A, N = sum(lengths_N), len(lengths_N)
    expert_A = torch.cat([torch.tensor([0, 4, 1, 2])[: int(k)] for k in lengths_N]) if A else torch.empty(0).long()
    shapes = [(N, D), (E, F, D), (E, F, D), (E, D, F), (N, D)]
    x, w1, w3, w2, upstream = (torch.randn(shape).bfloat16().double() for shape in shapes)
    w1, w3, w2 = (w.mul(0.3).bfloat16().double() for w in (w1, w3, w2))
    return Inputs(expert_A, lengths_N, x, torch.rand(A).double(), w1, w3, w2, upstream)


def by_formula(case: Inputs) -> list[torch.Tensor]:
    """One assignment after the other, with autograd in fp64."""
    leaves = [t.clone().requires_grad_() for t in (case.x, case.weights, case.w1, case.w3, case.w2)]
    x, weights, w1, w3, w2 = leaves
    rows, a = [], 0
    for n, length in enumerate(case.lengths_N):
        total = x[n] * 0
        for _ in range(length):
            e = case.expert_A[a]
            gate = w1[e] @ x[n]
            total = total + weights[a] * (w2[e] @ (gate * torch.sigmoid(gate) * (w3[e] @ x[n])))
            a += 1
        rows.append(total)
    out = torch.stack(rows)
    return [out.detach(), *torch.autograd.grad(out, leaves, case.upstream, materialize_grads=True)]


def run(case: Inputs, dtype: torch.dtype, op: Callable[..., torch.Tensor] = moe_experts) -> list[torch.Tensor]:
    leaves = [t.to(dtype).requires_grad_() for t in (case.x, case.w1, case.w3, case.w2)]
    weights = case.weights.float().requires_grad_()
    even = len(set(case.lengths_N)) == 1
    starts = None if even else torch.tensor([0, *case.lengths_N]).cumsum(0)
    slots = place(case.expert_A, E, per_row=case.lengths_N[0], starts_N1=starts)
    out = op(leaves[0], weights, slots, *leaves[1:])
    dx, dw1, dw3, dw2, dweights = torch.autograd.grad(out, [*leaves, weights], case.upstream.to(dtype))
    return [out.detach(), dx, dweights, dw1, dw3, dw2]


LENGTHS = {"even": [3] * 63, "one": [1] * 7, "ragged": [2, 0, 1, 4, 0, 3] * 5, "many_tiles": [2] * 150}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_values_and_gradients(kernels: Kernels, lengths: list[int]) -> None:
    case = inputs(lengths)
    for name, actual, exact in zip(NAMES, run(case, torch.float32), by_formula(case), strict=True):
        # Sums of up to 450 products of numbers up to about 10, in fp32.
        torch.testing.assert_close(
            actual.double(), exact, rtol=1e-4, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_bf16_error(lengths: list[int]) -> None:
    """At most twice the error of the plain form in bf16, for the output and every gradient."""
    case = inputs(lengths)
    with chosen("reference"):
        plain = run(case, torch.bfloat16)
    with chosen("triton"):
        ours = run(case, torch.bfloat16)
    for name, one, other, exact in zip(NAMES, ours, plain, by_formula(case), strict=True):
        error, allowed = ((t.double() - exact).square().mean().sqrt() for t in (one, other))
        assert error <= 2 * allowed, f"{name}: {error} against {allowed}"


def test_an_expert_without_rows_gets_no_gradient(kernels: Kernels) -> None:
    *_, dw1, dw3, dw2 = run(inputs(LENGTHS["even"]), torch.float32)
    for dw in (dw1, dw3, dw2):
        assert not dw[3].any()
        assert dw[0].any()


def test_no_rows(kernels: Kernels) -> None:
    slots = place(torch.empty(0, dtype=torch.int64), E, per_row=2)
    x = torch.empty(0, D, requires_grad=True)
    w1 = torch.randn(E, F, D, requires_grad=True)
    out = moe_experts(x, torch.empty(0), slots, w1, torch.randn(E, F, D), torch.randn(E, D, F))
    dx, dw1 = torch.autograd.grad(out.sum(), (x, w1))
    assert out.shape == dx.shape == (0, D)
    assert not dw1.any()


def test_a_wrong_activation_is_noticed() -> None:
    """The error that is allowed is far below that of gelu in place of silu."""
    case = inputs([2] * 20)

    def with_gelu(x, weights, slots, w1, w3, w2):  # type: ignore[no-untyped-def]
        assert slots.starts_N1 is None
        outs = []
        for n in range(x.shape[0]):
            pair = []
            for k in range(slots.per_row):
                e = case.expert_A[n * slots.per_row + k]
                hidden = torch.nn.functional.gelu(w1[e] @ x[n]) * (w3[e] @ x[n])
                pair.append(weights[n * slots.per_row + k] * (w2[e] @ hidden))
            outs.append(sum(pair))
        return torch.stack(outs)

    wrong, exact = run(case, torch.float32, with_gelu)[0], by_formula(case)[0]
    assert not torch.allclose(wrong.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_kept_rows_change_nothing_but_what_is_kept(lengths: list[int]) -> None:
    case = inputs(lengths)
    held: list[int] = []
    results = []
    with chosen("triton"):
        for keep_rows in (False, True):
            sizes: list[int] = []

            def pack(t: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
                sizes.append(t.numel())
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                results.append(run(case, torch.bfloat16, functools.partial(moe_experts, keep_rows=keep_rows)))
            held.append(sum(sizes))
    assert all(map(torch.equal, *results))
    assert held[1] - held[0] == sum(lengths) * D


@pytest.mark.parametrize("counts", [[1, 0, 300, 0, 128], [0, 0, 0], [129], [127, 1]])
def test_two_products(counts: list[int]) -> None:
    """Rows of any expert, tiles that straddle two of them, sides that are no multiple of a tile."""
    A, ends = sum(counts), torch.tensor(counts).cumsum(0).int()
    K, N = 72, 264
    a, a2 = (torch.randn(A, K).bfloat16() for _ in range(2))
    b, b2 = (torch.randn(len(counts), K, N).bfloat16() for _ in range(2))
    actual = kernels_of.two_products(a, b, a2, b2, ends)
    expert = [e for e, count in enumerate(counts) for _ in range(count)]
    exact = torch.einsum("ak,akn->an", a.double(), b[expert].double())
    exact = exact + torch.einsum("ak,akn->an", a2.double(), b2[expert].double())
    # One step of bf16: the interpreter truncates.
    torch.testing.assert_close(actual.double(), exact, rtol=2**-7, atol=1e-3)


def test_registered_operation() -> None:
    case = inputs([2, 0, 1])
    slots = place(case.expert_A, E, per_row=0, starts_N1=torch.tensor([0, 2, 2, 3]))
    x, weights, w1, w3, w2 = (t.float().requires_grad_() for t in (case.x, case.weights, case.w1, case.w3, case.w2))
    arguments = (x, weights, slots.slot_A, slots.ends_E, slots.starts_N1, 0, w1, w3, w2)
    for keep_rows in (False, True):
        torch.library.opcheck(torch.ops.tidegate.moe_experts.default, (*arguments, keep_rows))


def test_compiles_in_one_graph() -> None:
    case = inputs([2] * 9)
    compiled = torch.compile(moe_experts, fullgraph=True, backend="aot_eager")
    with chosen("triton"):
        for actual, expected in zip(run(case, torch.float32, compiled), run(case, torch.float32), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
