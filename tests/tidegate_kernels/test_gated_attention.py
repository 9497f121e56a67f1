"""gated_attention against an explicit softmax in fp64.

Letters: B batch, T tokens, H query heads, G key/value heads, d head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from tidegate_kernels.choice import Kernels, chosen, interpreted
from tidegate_kernels.gated_attention import Documents, Visible, gated_attention, nearest, reference

B, H, G = 2, 4, 2
NAMES = ("out", "dq", "dk", "dv", "dscores", "dsink")
IDS = {
    "one": lambda T: torch.zeros(B, T, dtype=torch.int64),
    "short": lambda T: torch.arange(T).div(5, rounding_mode="floor").expand(B, -1),
    "uneven": lambda T: torch.stack([(torch.arange(T) > 7).long() + (torch.arange(T) > T - 3), torch.arange(T) // 70]),
    "alone": lambda T: torch.arange(T).expand(B, -1),
}


class Inputs(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scores: torch.Tensor | None
    sink: torch.Tensor | None
    upstream: torch.Tensor


def inputs(T: int, d: int, *, headwise: bool | None = False, sink: bool = True) -> Inputs:
    """fp64 numbers that bf16 can hold; `headwise` None is no gate."""
    q, k, v, g = (torch.randn(B, T, heads, d).bfloat16().double() for heads in (H, G, G, H))
    scores = None if headwise is None else torch.randn(B, T, H, 1 if headwise else d).bfloat16().double()
    return Inputs(2 * q, k, v, scores, torch.randn(H).double() if sink else None, g)


def run(op: Any, case: Inputs, dtype: torch.dtype, documents: Visible | None) -> list[torch.Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in (case.q, case.k, case.v)]
    scores = None if case.scores is None else case.scores.to(dtype).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    sink = None if case.sink is None else case.sink.to(wide).requires_grad_()
    out = op(*leaves, scores, activation="sigmoid", documents=documents, sink_H=sink)
    wanted = [*leaves, *(x for x in (scores, sink) if x is not None)]
    return [out.detach(), *torch.autograd.grad(out, wanted, case.upstream.to(dtype))]


def names(case: Inputs) -> list[str]:
    there = {"dscores": case.scores is not None, "dsink": case.sink is not None}
    return [name for name in NAMES if there.get(name, True)]


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
@pytest.mark.parametrize("T", [1, 63, 150])
def test_values_and_gradients(kernels: Kernels, T: int, ids: Any) -> None:
    case, documents = inputs(T, 24), Documents(ids(T))
    exact = run(reference.gated_attention, case, torch.float64, documents)
    for name, actual, truth in zip(
        names(case), run(gated_attention, case, torch.float32, documents), exact, strict=True
    ):
        torch.testing.assert_close(
            actual.double(), truth, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("sink", [True, False], ids=["sink", "plain"])
@pytest.mark.parametrize("headwise", [None, True, False], ids=["ungated", "headwise", "elementwise"])
def test_every_gate_and_sink(headwise: bool | None, sink: bool) -> None:
    case, documents = inputs(63, 16, headwise=headwise, sink=sink), Documents(IDS["uneven"](63))
    exact = run(reference.gated_attention, case, torch.float64, documents)
    with chosen("triton"):
        actual = run(gated_attention, case, torch.float32, documents)
    for name, one, truth in zip(names(case), actual, exact, strict=True):
        torch.testing.assert_close(one.double(), truth, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("d", [24, 128])
def test_bf16_error(d: int) -> None:
    """At most twice the error of the other path in bf16.

    The interpreter truncates to bf16: that doubles an error, and adds up in a sum over all rows, the sink's gradient.
    """
    case, documents = inputs(130, d, sink=not interpreted()), Documents(IDS["uneven"](130))
    exact = run(reference.gated_attention, case, torch.float64, documents)
    with chosen("reference"):
        plain = run(gated_attention, case, torch.bfloat16, documents)
    with chosen("triton"):
        ours = run(gated_attention, case, torch.bfloat16, documents)
    for name, one, other, truth in zip(names(case), ours, plain, exact, strict=True):
        error, allowed = ((x.double() - truth).square().mean().sqrt() for x in (one, other))
        assert error <= (4 if interpreted() else 2) * allowed, f"{name}: {error} against {allowed}"


def test_nothing_crosses_a_document(kernels: Kernels) -> None:
    """Changing one document's keys and values changes no other's output."""
    case = inputs(150, 16)
    documents = Documents((torch.arange(150) // 40).expand(B, -1))
    q, k, v = (x.float() for x in (case.q, case.k, case.v))
    before = gated_attention(q, k, v, None, documents=documents)
    k[:, 40:80] += 1
    v[:, 40:80] += 1
    changed = (gated_attention(q, k, v, None, documents=documents) != before).any(dim=(0, 2, 3))
    assert changed.tolist() == [40 <= t < 80 for t in range(150)]


@pytest.mark.parametrize("window", [1, 16, 65, 200])
@pytest.mark.parametrize("ids", ["one", "uneven"])
def test_a_window(kernels: Kernels, ids: str, window: int) -> None:
    """Of the same document the last tokens, and gradients reach no further."""
    T = 130
    documents, place = Documents(IDS[ids](T)), torch.arange(T)
    visible = documents.nearest(window)
    assert documents.nearest(window) is visible
    far = place <= place[:, None] - window
    assert torch.equal(visible.mask, documents.mask & ~far)
    if ids == "one":
        alone = nearest(B, T, window, torch.device("cpu"))
        assert torch.equal(alone.first_BT, visible.first_BT)
        assert torch.equal(alone.end_BT, visible.end_BT)
    case = inputs(T, 16)
    exact = run(reference.gated_attention, case, torch.float64, visible)
    for name, one, truth in zip(names(case), run(gated_attention, case, torch.float32, visible), exact, strict=True):
        torch.testing.assert_close(one.double(), truth, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_views_of_a_fused_projection() -> None:
    case, documents = inputs(63, 16), Documents(IDS["short"](63))
    parts = [x.float() for x in (case.q, case.k, case.v)]
    fused = torch.cat(parts, dim=2)
    views = fused.split([H, G, G], dim=2)
    assert not views[1].is_contiguous()
    with chosen("triton"):
        apart, together = (gated_attention(*x, None, documents=documents) for x in (parts, views))
    assert torch.equal(apart, together)


def test_documents_by_hand() -> None:
    documents = Documents(torch.tensor([[4, 4, 1, 4]]))
    assert documents.first_BT.tolist() == [[0, 0, 2, 3]]
    assert documents.end_BT.tolist() == [[2, 2, 3, 4]]
    assert documents.mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_registered_operation() -> None:
    case, documents = inputs(17, 16), Documents(IDS["short"](17))
    q, k, v, scores, sink = (x.float().requires_grad_() for x in case[:5] if x is not None)
    arguments = (q, k, v, scores, "sigmoid", documents.first_BT, documents.end_BT, sink)
    torch.library.opcheck(torch.ops.tidegate.gated_attention.default, arguments)


def test_compiles_in_one_graph() -> None:
    case = inputs(40, 16)
    ids = IDS["short"](40)

    def attend(q, k, v, scores, **options):  # type: ignore[no-untyped-def]
        return gated_attention(q, k, v, scores, **options)

    with chosen("triton"):
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        one, other = (run(op, case, torch.float32, Documents(ids)) for op in (compiled, gated_attention))
    for actual, expected in zip(one, other, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_gradients_keep_the_dtype_of_their_input() -> None:
    """bf16 queries with fp32 scores and sink, also where a compiler plans the backward pass."""
    case, documents = inputs(17, 16), Documents(IDS["short"](17))
    q, k, v = (x.bfloat16() for x in (case.q, case.k, case.v))
    assert case.scores is not None
    assert case.sink is not None
    scores, sink = case.scores.float(), case.sink.float()
    forward = (q, k, v, scores, "sigmoid", documents.first_BT, documents.end_BT, sink)
    _, y, lse = torch.ops.tidegate.gated_attention(*forward)
    arguments = (y, q, k, v, y, lse, *forward[3:])
    torch.library.opcheck(
        torch.ops.tidegate.gated_attention_backward.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
