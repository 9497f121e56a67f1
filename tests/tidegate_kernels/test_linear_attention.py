"""Linear attention in chunks against its recurrence, and what each of its recurrences promises."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from tidegate_kernels.choice import chosen
from tidegate_kernels.gated_attention import Documents
from tidegate_kernels.linear_attention import fla, linear_attention, reference


class Inputs(NamedTuple):
    q_BTHK: torch.Tensor
    k_BTHK: torch.Tensor
    v_BTHV: torch.Tensor
    log_decay_BTHk: torch.Tensor
    beta_BTH: torch.Tensor | None

    def cut(self, start: int, stop: int) -> Inputs:
        return Inputs(*(None if x is None else x[:, start:stop] for x in self))


def inputs(
    T: int,
    *,
    delta: bool,
    by_head: bool,
    B: int = 2,
    H: int = 3,
    K: int = 5,
    V: int = 7,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    q, k = torch.randn(2, B, T, H, K, dtype=dtype).unbind()
    k = torch.nn.functional.normalize(k, dim=-1) if delta else k
    decay = -torch.rand(B, T, H, 1 if by_head else K, dtype=dtype)
    beta = torch.rand(B, T, H, dtype=dtype) if delta else None
    return Inputs(q, k, torch.randn(B, T, H, V, dtype=dtype), decay, beta)


KINDS = [(False, False), (False, True), (True, False), (True, True)]
with_both_kernels = pytest.mark.usefixtures("kernels")  # of four kinds one has Triton kernels
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


@with_both_kernels
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


@pytest.mark.parametrize("begins", [False, True], ids=["from nothing", "from a state"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize(("T", "K", "V"), [(1, 20, 40), (33, 64, 16), (130, 20, 40), (40, 130, 12), (40, 12, 130)])
def test_kernels_in_fp32(T: int, K: int, V: int, packed: bool, begins: bool) -> None:
    """Widths of one tile, of several, and none a power of two; against fp64."""
    given = inputs(T, delta=False, by_head=True, K=K, V=V)
    state = torch.randn(2, 3, K, V) if begins else None
    weights = torch.randn(2, T, 3, V), torch.randn(2, 3, K, V)
    documents = documents_of(T) if packed else None
    with chosen("triton"):
        ours = gradients(linear_attention, given, weights, documents, state)
    double = Inputs(*(None if x is None else x.double() for x in given))
    truth = gradients(reference.linear_attention, double, weights, documents, None if state is None else state.double())
    assert len(ours) == len(truth) == 6 + begins
    for name, mine, true in zip(["y", "state", "q", "k", "v", "decay", "state given"], ours, truth, strict=False):
        assert mine.dtype == torch.float32
        assert (mine - true).norm() / true.norm().clamp(min=1e-6) < 3e-6, name


def test_what_kernels_begin_with_has_no_decay() -> None:
    """A document's first decay decays nothing; one that goes on from a state does."""
    given = inputs(70, delta=False, by_head=True)
    weights = torch.randn(2, 70, 3, 7), torch.randn(2, 3, 5, 7)
    documents, state = documents_of(70), torch.randn(2, 3, 5, 7)
    with chosen("triton"):
        alone = gradients(linear_attention, given, weights, documents)[5]
        after = gradients(linear_attention, given, weights, documents, state)[5]
    begins = documents.first_BT == torch.arange(70)
    assert alone[begins].eq(0).all()
    assert alone[~begins].ne(0).all()
    assert after[:, 0].ne(0).all()
    assert after[:, 1:][begins[:, 1:]].eq(0).all()


def test_kernels_take_views_and_go_without_gradients_of_rows() -> None:
    """Heads cut out of one projection, heads before tokens in memory, and a loss of the state alone."""
    given = inputs(40, delta=False, by_head=True, V=5)
    fused = torch.cat([given.q_BTHK, given.k_BTHK, given.v_BTHV], dim=-1)
    views = Inputs(*fused.split(5, dim=-1), given.log_decay_BTHk.transpose(1, 2).contiguous().transpose(1, 2), None)
    assert not views.q_BTHK.is_contiguous()
    with chosen("triton"):
        for mine, other in zip(linear_attention(*views), linear_attention(*given), strict=True):
            assert mine.equal(other)
        leaf = given.v_BTHV.clone().requires_grad_()
        linear_attention(*given._replace(v_BTHV=leaf)).state_BHKV.sum().backward()
    expected = given.v_BTHV.clone().requires_grad_()
    reference.linear_attention(*given._replace(v_BTHV=expected)).state_BHKV.sum().backward()
    torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-5, atol=1e-6)


def test_the_op_is_one_of_torch() -> None:
    q, k, v, decay, _ = inputs(20, delta=False, by_head=True)
    arguments = [x.requires_grad_() for x in (q, k, v, decay)]
    for state in (None, torch.randn(2, 3, 5, 7, requires_grad=True)):
        rest = documents_of(20).first_BT, state
        torch.library.opcheck(torch.ops.tidegate.linear_attention.default, (*arguments, *rest))
    compiled = torch.compile(linear_attention, fullgraph=True, backend="aot_eager")
    with chosen("triton"):
        for mine, other in zip(compiled(q, k, v, decay), linear_attention(q, k, v, decay), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)


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


@with_both_kernels
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


@with_both_kernels
@by_kind
@pytest.mark.parametrize("cut", [1, 30, 64])
def test_a_state_goes_on(cut: int, delta: bool, by_head: bool) -> None:
    given = inputs(100, delta=delta, by_head=by_head)
    whole = linear_attention(*given)
    begin = linear_attention(*given.cut(0, cut))
    rest = linear_attention(*given.cut(cut, 100), None, begin.state_BHKV)
    torch.testing.assert_close(torch.cat([begin.y_BTHV, rest.y_BTHV], dim=1), whole.y_BTHV, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rest.state_BHKV, whole.state_BHKV, rtol=1e-5, atol=1e-5)


@with_both_kernels
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
    with chosen("reference"):
        y, state = linear_attention(*low)
    true = reference.linear_attention(*(x.float() for x in low))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(state, true.state_BHKV, rtol=1e-5, atol=1e-5)
    assert y.equal(true.y_BTHV.bfloat16()) or (y.float() - true.y_BTHV).abs().max() < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("closing", [0.0, 0.05, 1.0, 5.0, 1e4])
@pytest.mark.parametrize(
    ("T", "K", "V"),
    [
        *((1, 64, 64), (63, 128, 128), (64, 64, 128), (65, 128, 64), (1000, 128, 128), (999, 96, 200)),
        *((300, 16, 64), (300, 64, 16), (200, 16, 16), (130, 8, 40), (65, 32, 32), (130, 128, 32)),
    ],
)
def test_kernels_in_bf16(T: int, K: int, V: int, closing: float, packed: bool) -> None:
    """Within 5e-3 of fp64, outputs, states and every gradient, however far gates close."""
    given = inputs(T, delta=False, by_head=True, K=K, V=V, dtype=torch.bfloat16)
    given = given._replace(log_decay_BTHk=closing * given.log_decay_BTHk.float())
    state, weights = torch.randn(2, 3, K, V), (torch.randn(2, T, 3, V).bfloat16(), torch.randn(2, 3, K, V))
    documents = documents_of(T) if packed else None
    ours = gradients(linear_attention, given, weights, documents, state)
    double = Inputs(*(None if x is None else x.double() for x in given))
    truth = gradients(reference.linear_attention, double, weights, documents, state.double())
    for name, mine, true in zip(["y", "state", "q", "k", "v", "decay", "state given"], ours, truth, strict=True):
        # What a shut gate leaves, exp(-40), is 0 in the kernels' place.
        assert (mine - true).norm() <= 5e-3 * true.norm() + 1e-3, (name, float((mine - true).norm() / true.norm()))


class FlaLike:
    """The signature of fla's kernels, on the recurrence; `wrong` spoils the gradient of one input."""

    def __init__(self, kernel: fla.Kernel, wrong: int | None = None) -> None:
        self.kernel, self.wrong = kernel, wrong

    def __call__(self, q, k, v, decay, beta=None, *, initial_state, output_final_state, cu_seqlens=None):
        assert decay.dtype == torch.float32
        assert decay.shape == (q.shape[:3] if self.kernel == "gated_delta_rule" else q.shape)
        assert initial_state is None or initial_state.dtype == torch.float32
        if self.kernel == "gated_delta_rule":
            decay = decay.unsqueeze(-1)
        given = [x if at != self.wrong else _Spoiled.apply(x) for at, x in enumerate((q, k, v, decay, beta))]
        if cu_seqlens is None:
            return tuple(reference.linear_attention(*given, None, initial_state))
        assert len(q) == 1
        spans = list(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True))
        assert initial_state is None or len(initial_state) == len(spans)
        parts = [
            reference.linear_attention(
                *(None if x is None else x[:, begin:end] for x in given),
                None,
                None if initial_state is None else initial_state[index, None],
            )
            for index, (begin, end) in enumerate(spans)
        ]
        return torch.cat([part.y_BTHV for part in parts], dim=1), torch.cat([part.state_BHKV for part in parts])


class _Spoiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 1.05 * g


KERNELS: dict[fla.Kernel, tuple[bool, bool]] = {
    "gla": (False, False),
    "kda": (True, False),
    "gated_delta_rule": (True, True),
}


@pytest.mark.parametrize(("kernel", "by_head"), [(k, by_head) for k, (_, by_head) in KERNELS.items()] + [("kda", True)])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("begins", [False, True], ids=["from nothing", "from a state"])
def test_fla_gets_documents_and_states_as_it_wants_them(
    monkeypatch: pytest.MonkeyPatch, kernel: fla.Kernel, by_head: bool, packed: bool, begins: bool
) -> None:
    given = inputs(70, delta=KERNELS[kernel][0], by_head=by_head)
    monkeypatch.setattr(fla, "_operation", FlaLike)
    state = torch.randn(2, 3, 5, 7) if begins else None
    weights = torch.randn(2, 70, 3, 7), torch.randn(2, 3, 5, 7)
    documents = documents_of(70) if packed else None
    ours = gradients(lambda *x: fla.linear_attention(kernel, *x), given, weights, documents, state)
    for mine, true in zip(ours, gradients(reference.linear_attention, given, weights, documents, state), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_fla_is_not_used_where_one_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch, kernel: fla.Kernel) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    passes, device = fla._passes.__wrapped__, torch.device("cpu")
    monkeypatch.setattr(fla, "_operation", FlaLike)
    assert passes(kernel, 4, 6, device)
    names = ["q", "k", "v", "decay", "beta"][: 4 if kernel == "gla" else 5]
    for wrong, name in enumerate(names):
        monkeypatch.setattr(fla, "_operation", lambda kernel, wrong=wrong: FlaLike(kernel, wrong))
        with pytest.warns(UserWarning, match=f"fla's {kernel} is not used here: its gradient of {name} differs"):
            assert not passes(kernel, 4, 6, device)


def test_fla_that_refuses_a_pair_is_said_so_and_gdn_goes_through_kda(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(kernel: fla.Kernel) -> object:
        if kernel == "gated_delta_rule":
            raise RuntimeError("incorrect results on Hopper")
        return FlaLike(kernel)

    monkeypatch.setattr(fla, "_operation", refuses)
    with pytest.warns(UserWarning, match="gated_delta_rule is not used here: RuntimeError: incorrect results"):
        assert not fla._passes.__wrapped__("gated_delta_rule", 4, 6, torch.device("cpu"))

    monkeypatch.setattr(fla, "_installed", lambda: True)
    monkeypatch.setattr(fla, "_passes", lambda kernel, *_: kernel != "gated_delta_rule")
    values = torch.empty(1, 1, 1, 8, dtype=torch.bfloat16, device="meta")
    assert fla.kernel_for(values, 8, delta=True, by_head=True) is None  # no CUDA device
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert fla.kernel_for(values, 8, delta=True, by_head=True) == "kda"
    assert fla.kernel_for(values, 8, delta=False, by_head=False) == "gla"
    assert fla.kernel_for(values.float(), 8, delta=True, by_head=False) is None
    assert fla.kernel_for(values, 257, delta=True, by_head=False) is None
    with chosen("reference"):
        assert fla.kernel_for(values, 8, delta=True, by_head=False) is None


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and fla._installed()), reason="no CUDA device with fla-core")
@pytest.mark.filterwarnings("default")
@by_kind
@pytest.mark.parametrize("closing", [0.1, 5.0])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("T", [63, 64, 65, 1000])
def test_fla_in_bf16(T: int, closing: float, packed: bool, delta: bool, by_head: bool) -> None:
    """With as many heads as its own test has: it is tuned for minutes at each other number."""
    H = 16
    given = inputs(T, delta=delta, by_head=by_head, H=H, K=128, V=128, dtype=torch.bfloat16)
    given = given._replace(log_decay_BTHk=closing * given.log_decay_BTHk.float())
    if not (by_head and not delta):
        assert fla.kernel_for(given.v_BTHV, 128, delta=delta, by_head=by_head) is not None
    state, weights = torch.randn(2, H, 128, 128), (torch.randn(2, T, H, 128).bfloat16(), torch.randn(2, H, 128, 128))
    documents = documents_of(T) if packed else None
    ours = gradients(linear_attention, given, weights, documents, state)
    double = Inputs(*(None if x is None else x.double() for x in given))
    truth = gradients(reference.linear_attention, double, weights, documents, state.double())
    for index, (mine, true) in enumerate(zip(ours, truth, strict=True)):
        assert (mine - true).norm() <= 5e-3 * true.norm() + 1e-3, (index, float((mine - true).norm() / true.norm()))
