"""qk_norm_rope against its formulas in fp64.

Letters: B batch, T tokens, H query heads, G key heads, d head width; tables are (T, d/2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from tidegate_kernels.choice import chosen
from tidegate_kernels.qk_norm_rope import qk_norm_rope
from tidegate_kernels.qk_norm_rope.reference import rotate

EPS = 1e-3
SHAPES = [(1, 1, 1, 1, 2), (2, 63, 3, 1, 6), (1, 1000, 2, 1, 8), (2, 70, 4, 2, 128), (1, 5, 2, 0, 16), (0, 5, 2, 1, 16)]
with_both_kernels = pytest.mark.usefixtures("kernels")
in_every_shape = pytest.mark.parametrize(("B", "T", "H", "G", "d"), SHAPES)
with_and_without_norm = pytest.mark.parametrize("norm", [True, False], ids=["norm", "rotation-only"])


class Results(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dq_weight: torch.Tensor
    dk_weight: torch.Tensor


class Inputs(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    q_weight: torch.Tensor
    k_weight: torch.Tensor
    angle_Td: torch.Tensor
    gq: torch.Tensor
    gk: torch.Tensor


def inputs(B: int, T: int, H: int, G: int, d: int) -> Inputs:
    """fp64 numbers that bf16 can hold, and angles."""
    shapes = [(B, T, H, d), (B, T, G, d), (d,), (d,), (B, T, H, d), (B, T, G, d)]
    q, k, q_weight, k_weight, gq, gk = (torch.randn(shape).bfloat16().double() for shape in shapes)
    return Inputs(q, k, q_weight, k_weight, 10 * torch.rand(T, d // 2, dtype=torch.float64), gq, gk)


def turned(x: torch.Tensor, angle_Td: torch.Tensor) -> torch.Tensor:
    """Pairs (x_i, x_{i + d/2}) as complex numbers, turned."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.exp(1j * angle_Td)[:, None, :]
    return torch.cat([turned.real, turned.imag], dim=-1)


def by_formula(i: Inputs, norm: bool) -> Results:
    """Outputs and gradients in closed form; no autograd."""
    outs, gradients, dweights = [], [], []
    for x, weight, g in ((i.q, i.q_weight, i.gq), (i.k, i.k_weight, i.gk)):
        g = turned(g, -i.angle_Td)
        if not norm:
            outs.append(turned(x, i.angle_Td))
            gradients.append(g)
            dweights.append(torch.zeros_like(weight))
            continue
        rstd = (x.square().mean(dim=-1, keepdim=True) + EPS) ** -0.5
        y, dy = x * rstd, g * weight
        outs.append(turned(y * weight, i.angle_Td))
        gradients.append(rstd * (dy - y * (dy * y).mean(dim=-1, keepdim=True)))
        dweights.append((g * y).sum(dim=(0, 1, 2)))
    return Results(*outs, *gradients, *dweights)


def in_pytorch(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    cos, sin = cos.to(q.dtype)[:, None], sin.to(q.dtype)[:, None]
    outs = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        if weight is not None:
            x = x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight
        first, second = x.chunk(2, dim=-1)
        outs.append(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1))
    return tuple(outs)


def run(op: Callable[..., tuple[torch.Tensor, ...]], i: Inputs, norm: bool, dtype: torch.dtype) -> Results:
    q, k, q_weight, k_weight = (t.to(dtype).requires_grad_() for t in i[:4])
    weights = (q_weight, k_weight) if norm else (None, None)
    outs = op(q, k, *weights, i.angle_Td.cos().float(), i.angle_Td.sin().float(), EPS)
    upstream = i.gq.to(dtype), i.gk.to(dtype)
    gradients = torch.autograd.grad(outs, (q, k, q_weight, k_weight), upstream, allow_unused=True)
    dweights = (torch.zeros_like(q_weight) if g is None else g for g in gradients[2:])
    return Results(*(out.detach() for out in outs), *gradients[:2], *dweights)


def assert_all_close(actual: Results, expected: Results) -> None:
    # fp32 inside: roundings of 6e-8 of terms up to 10, 2000 of them in a gradient of a weight.
    for name, one, other in zip(Results._fields, actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=5e-5, msg=lambda m, name=name: f"{name}: {m}")


@with_both_kernels
@with_and_without_norm
@in_every_shape
def test_values_and_gradients(B: int, T: int, H: int, G: int, d: int, norm: bool) -> None:
    i = inputs(B, T, H, G, d)
    assert_all_close(run(qk_norm_rope, i, norm, torch.float32), by_formula(i, norm))


@with_both_kernels
@with_and_without_norm
def test_a_rotation_the_other_way_is_noticed(norm: bool) -> None:
    i = inputs(2, 63, 3, 1, 6)
    actual = run(qk_norm_rope, i, norm, torch.float32)
    with pytest.raises(AssertionError):
        assert_all_close(actual, by_formula(i._replace(angle_Td=-i.angle_Td), norm))


@with_both_kernels
def test_neighbours_as_pairs_are_noticed() -> None:
    """The other rotary convention turns (x_0, x_1), (x_2, x_3) and so on."""
    i = inputs(2, 63, 3, 1, 6)
    order = torch.tensor([0, 2, 4, 1, 3, 5])
    other = by_formula(i._replace(q=i.q[..., order], k=i.k[..., order]), norm=False)
    actual = run(qk_norm_rope, i, False, torch.float32)
    assert not torch.allclose(actual.q.double()[..., order], other.q, rtol=1e-2, atol=1e-2)


@with_both_kernels
@with_and_without_norm
@pytest.mark.parametrize(("B", "T", "H", "G", "d"), [(2, 63, 3, 1, 6), (1, 1000, 2, 1, 8), (2, 70, 4, 2, 128)])
def test_bf16_error(B: int, T: int, H: int, G: int, d: int, norm: bool) -> None:
    """At most twice the error of the same expression in bf16 PyTorch, for outputs and gradients."""
    i = inputs(B, T, H, G, d)
    truth = by_formula(i, norm)
    actual, plain = (run(op, i, norm, torch.bfloat16) for op in (qk_norm_rope, in_pytorch))
    for name, one, other, exact in zip(Results._fields, actual, plain, truth, strict=True):
        assert one.dtype == torch.bfloat16, name
        error, allowed = ((t.double() - exact).square().mean().sqrt() for t in (one, other))
        # Where PyTorch happens to be exact, half a bf16 step of the largest value is still fine.
        assert error <= max(2 * allowed, 2**-9 * exact.abs().max()), name


@with_both_kernels
def test_a_rotation_keeps_lengths_and_relative_positions() -> None:
    angle = torch.arange(63)[:, None] * torch.tensor([1.0, 0.1, 0.01])
    q, k = torch.randn(6).expand(1, 63, 1, 6), torch.randn(6).expand(1, 63, 1, 6)
    q_turned, k_turned = qk_norm_rope(q, k, None, None, angle.cos(), angle.sin(), EPS)
    torch.testing.assert_close(q_turned.norm(dim=-1), q.norm(dim=-1))
    products = torch.einsum("thd,shd->ts", q_turned[0], k_turned[0])
    for distance in (0, 1, 62):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-4)


@with_both_kernels
@with_and_without_norm
def test_views_of_a_fused_projection(norm: bool) -> None:
    i = inputs(2, 63, 3, 1, 6)
    expected = run(qk_norm_rope, i, norm, torch.float32)
    fused = torch.cat([i.q, torch.randn(2, 63, 1, 6), i.k], dim=2).float().requires_grad_()
    weights = (i.q_weight.float(), i.k_weight.float()) if norm else (None, None)
    q, k = fused[:, :, :3], fused[:, :, 4:]
    assert not q.is_contiguous()
    outs = qk_norm_rope(q, k, *weights, i.angle_Td.cos().float(), i.angle_Td.sin().float(), EPS)
    # As attention's backward leaves them: heads before tokens in memory.
    upstream = tuple(g.float().transpose(1, 2).contiguous().transpose(1, 2) for g in (i.gq, i.gk))
    (gradient,) = torch.autograd.grad(tuple(outs), fused, upstream)
    for one, other in ((outs.q_BTHd, expected.q), (outs.k_BTGd, expected.k)):
        torch.testing.assert_close(one.detach(), other, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient[:, :, :3], expected.dq, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient[:, :, 4:], expected.dk, rtol=1e-6, atol=1e-6)
    assert not gradient[:, :, 3].any()


@with_both_kernels
def test_inputs_are_left_alone() -> None:
    i = inputs(2, 63, 3, 1, 6)
    given = [t.float() for t in (*i[:4], i.angle_Td.cos(), i.angle_Td.sin(), i.gq, i.gk)]
    kept = [t.clone() for t in given]
    leaves = [t.requires_grad_() for t in given[:4]]
    torch.autograd.grad(tuple(qk_norm_rope(*leaves, given[4], given[5], EPS)), leaves, tuple(given[6:]))
    for one, other in zip(given, kept, strict=True):
        assert torch.equal(one, other)


@with_both_kernels
@with_and_without_norm
def test_compiles_in_one_graph(norm: bool) -> None:
    i = inputs(2, 63, 3, 1, 6)
    compiled = torch.compile(qk_norm_rope, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        run(compiled, i, norm, torch.float32), run(qk_norm_rope, i, norm, torch.float32), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@with_and_without_norm
def test_registered_operation(norm: bool) -> None:
    """Schema, fake and autograd registration agree with what the kernels do."""
    i = inputs(1, 3, 2, 1, 6)
    q, k, q_weight, k_weight = (t.float().requires_grad_() for t in i[:4])
    weights = (q_weight, k_weight) if norm else (None, None)
    arguments = (q, k, *weights, i.angle_Td.cos().float(), i.angle_Td.sin().float(), EPS)
    torch.library.opcheck(torch.ops.tidegate.qk_norm_rope.default, arguments)


def test_the_reference_rotates_what_it_is_given() -> None:
    i = inputs(2, 63, 3, 1, 6)
    out = rotate(i.q.float(), i.angle_Td.cos().float(), i.angle_Td.sin().float())
    torch.testing.assert_close(out.double(), turned(i.q, i.angle_Td), rtol=1e-5, atol=1e-6)


def test_what_it_does_not_take() -> None:
    q, weight, table = torch.randn(1, 3, 2, 4), torch.ones(4), torch.ones(3, 2)
    with pytest.raises(ValueError, match="give both, or none for rotation only"):
        qk_norm_rope(q, q, weight, None, table, table, EPS)
    with chosen("triton"), pytest.raises(ValueError, match=r"no kernel takes a \(1, 3, 2, 4\) input of torch.float32"):
        qk_norm_rope(q, q, weight.bfloat16(), weight.bfloat16(), table, table, EPS)
