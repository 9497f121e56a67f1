"""Linear attention in chunks against its recurrence, and what each of its recurrences promises."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from tidegate_kernels.gated_attention import Documents
from tidegate_kernels.linear_attention import linear_attention, reference


class Inputs(NamedTuple):
    q_BTHK: torch.Tensor
    k_BTHK: torch.Tensor
    v_BTHV: torch.Tensor
    log_decay_BTHk: torch.Tensor
    beta_BTH: torch.Tensor | None

    def cut(self, start: int, stop: int) -> Inputs:
        return Inputs(*(None if x is None else x[:, start:stop] for x in self))


def inputs(T: int, *, delta: bool, by_head: bool, B: int = 2, dtype: torch.dtype = torch.float32) -> Inputs:
    H, K, V = 3, 5, 7
    q, k = torch.randn(2, B, T, H, K, dtype=dtype).unbind()
    k = torch.nn.functional.normalize(k, dim=-1) if delta else k
    decay = -torch.rand(B, T, H, 1 if by_head else K, dtype=dtype)
    beta = torch.rand(B, T, H, dtype=dtype) if delta else None
    return Inputs(q, k, torch.randn(B, T, H, V, dtype=dtype), decay, beta)


KINDS = [(False, False), (False, True), (True, False), (True, True)]
by_kind = pytest.mark.parametrize(("delta", "by_head"), KINDS, ids=["gla", "scalar", "kda", "gdn"])


def documents_of(T: int, B: int = 2) -> Documents:
    """Some of one token, some that end with a chunk or in the middle of it."""
    ids = torch.zeros(B, T, dtype=torch.int64)
    for row, begins in enumerate(([1, 15, 16, 40, 64, 65], [7, 48, 49, 130])[:B]):
        for begin in begins:
            ids[row, begin:] += 1
    return Documents(ids)


def gradients(operation, given: Inputs, weights, documents=None, state=None) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (*given, state) if x is not None]
    rest = iter(leaves)
    arguments = [None if x is None else next(rest) for x in given]
    entering = None if state is None else next(rest)
    y, final = operation(*arguments, documents, entering)
    ((y * weights[0]).sum() + (final * weights[1]).sum()).backward()
    return [y.detach(), final.detach(), *(leaf.grad for leaf in leaves)]


@by_kind
@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65, 200])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_chunks_are_the_recurrence(T: int, delta: bool, by_head: bool, packed: bool) -> None:
    given = inputs(T, delta=delta, by_head=by_head)
    state = torch.randn(2, 3, 5, 7)
    weights = torch.randn(2, T, 3, 7), torch.randn(2, 3, 5, 7)
    documents = documents_of(T) if packed else None
    ours = gradients(linear_attention, given, weights, documents, state)
    truth = gradients(reference.linear_attention, given, weights, documents, state)
    for name, mine, true in zip(
        ["y", "state", "q", "k", "v", "decay", "beta or state", "state"], ours, truth, strict=False
    ):
        error = (mine - true).norm() / true.norm().clamp(min=1e-6)
        assert error < (1e-5 if name in ("y", "state") else 1e-4), (name, float(error))


@by_kind
def test_gates_that_close_and_keys_that_repeat(delta: bool, by_head: bool) -> None:
    """Decays of exp(-50) a token underflow, and their inverses overflow; a state that is kept for 300 tokens, too."""
    given = inputs(300, delta=delta, by_head=by_head)
    strong = torch.where(torch.rand_like(given.log_decay_BTHk) < 0.3, -50.0, 0.0)
    same = given.k_BTHK[:, :1].expand_as(given.k_BTHK)
    given = given._replace(log_decay_BTHk=strong, k_BTHK=same if delta else given.k_BTHK)
    weights = torch.randn(2, 300, 3, 7), torch.randn(2, 3, 5, 7)
    ours = gradients(linear_attention, given, weights)
    truth = gradients(reference.linear_attention, given, weights)
    for mine, true in zip(ours, truth, strict=True):
        assert mine.isfinite().all()
        assert (mine - true).norm() / true.norm().clamp(min=1e-6) < 1e-4


@by_kind
def test_fp64_gradients_are_finite_differences(delta: bool, by_head: bool) -> None:
    given = inputs(18, delta=delta, by_head=by_head, B=1, dtype=torch.float64)
    ids = torch.tensor([[0] * 5 + [1] * 13])
    leaves = [x.requires_grad_() for x in given if x is not None]

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(linear_attention(*values[:4], values[4] if delta else None, Documents(ids)))

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@by_kind
def test_documents_are_apart(delta: bool, by_head: bool) -> None:
    given = inputs(70, delta=delta, by_head=by_head, B=1)
    documents = Documents(torch.tensor([[0] * 21 + [1] * 1 + [2] * 48]))
    y, state = linear_attention(*given, documents)
    for begin, end in ((0, 21), (21, 22), (22, 70)):
        alone = linear_attention(*given.cut(begin, end))
        torch.testing.assert_close(y[:, begin:end], alone.y_BTHV, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, alone.state_BHKV, rtol=1e-5, atol=1e-5)
    leaf = given.v_BTHV.detach().clone().requires_grad_()
    linear_attention(*given._replace(v_BTHV=leaf), documents).y_BTHV[:, 22:].sum().backward()
    assert leaf.grad[:, :22].eq(0).all()
    assert leaf.grad[:, 22:].ne(0).any()


@by_kind
@pytest.mark.parametrize("cut", [1, 30, 64])
def test_a_state_goes_on(cut: int, delta: bool, by_head: bool) -> None:
    given = inputs(100, delta=delta, by_head=by_head)
    whole = linear_attention(*given)
    begin = linear_attention(*given.cut(0, cut))
    rest = linear_attention(*given.cut(cut, 100), None, begin.state_BHKV)
    torch.testing.assert_close(torch.cat([begin.y_BTHV, rest.y_BTHV], dim=1), whole.y_BTHV, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rest.state_BHKV, whole.state_BHKV, rtol=1e-5, atol=1e-5)


@by_kind
def test_no_token_sees_a_later_one(delta: bool, by_head: bool) -> None:
    given, other = (inputs(90, delta=delta, by_head=by_head) for _ in range(2))
    for cut in (1, 16, 50, 64, 89):
        mixed = Inputs(
            *(None if a is None else torch.cat([a[:, :cut], b[:, cut:]], 1) for a, b in zip(given, other, strict=True))
        )
        assert linear_attention(*mixed).y_BTHV[:, :cut].equal(linear_attention(*given).y_BTHV[:, :cut])


@pytest.mark.parametrize("delta", [False, True])
def test_one_decay_a_head_is_as_many_equal_ones(delta: bool) -> None:
    given = inputs(77, delta=delta, by_head=True)
    each = given._replace(log_decay_BTHk=given.log_decay_BTHk.expand_as(given.k_BTHK))
    for one, many in zip(linear_attention(*given), linear_attention(*each), strict=True):
        torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5)


def test_the_delta_rule_replaces_what_a_key_held() -> None:
    """Orthonormal keys: read back what was written last, and beta = 0 leaves all as it is (arXiv 2412.06464)."""
    K = V = 8
    keys = torch.eye(K)[None, :, None].repeat(1, 2, 1, 1)  # each written twice
    values = torch.randn(1, 2 * K, 1, V)
    none, all_of_it = torch.zeros(1, 2 * K, 1, 1), torch.ones(1, 2 * K, 1)
    _, state = linear_attention(keys, keys, values, none, all_of_it)
    torch.testing.assert_close(state[0, 0], values[0, K:, 0])
    y, kept = linear_attention(keys, keys, torch.randn_like(values), none, 0 * all_of_it, None, state)
    torch.testing.assert_close(kept, state)
    torch.testing.assert_close(y[0, :K, 0] * K**0.5, values[0, K:, 0])


def test_bf16_is_fp32_rounded() -> None:
    given = inputs(80, delta=True, by_head=False)
    low = Inputs(*(x.bfloat16() for x in given))
    y, state = linear_attention(*low)
    true = reference.linear_attention(*(x.float() for x in low))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(state, true.state_BHKV, rtol=1e-5, atol=1e-5)
    assert y.equal(true.y_BTHV.bfloat16()) or (y.float() - true.y_BTHV).abs().max() < 0.02
