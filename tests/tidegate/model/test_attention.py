"""Attention against its formula, and the properties that a wrong mask, head grouping or rotation would break.

Letters: B batch, T tokens, D width, H query heads, G key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tidegate.model.attention import Attention, AttentionConfig, Rotary, YarnConfig, rotary_table
from tidegate_kernels.choice import Kernels, chosen
from tidegate_kernels.gated_attention import Documents
from tidegate_kernels.qk_norm_rope.reference import rotate

CPU = torch.device("cpu")
THETA = 10_000.0
D = 12

GROUPINGS = [(1, 1), (3, 3), (4, 2), (6, 2), (5, 1)]


@pytest.fixture
def attention(initialise: Callable[..., nn.Module]) -> Callable[..., Attention]:
    """With initial values of 0.3: attention that is far from uniform."""

    def make(**changes: object) -> Attention:
        fields: dict[str, object] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
        module = Attention(AttentionConfig.model_validate(fields | changes), D, norm_eps=1e-6, std=0.3, out_std=0.3)
        initialise(module)
        return module

    return make


def attend(module: Attention, x_BTD: torch.Tensor, documents_BT: torch.Tensor | None = None) -> torch.Tensor:
    documents = None if documents_BT is None else Documents(documents_BT)
    table = rotary_table(x_BTD.shape[1], module.config.head_dim, module.config.rope_theta, CPU)
    return module(x_BTD, table, documents)[0]


def documents(length: int, batch: int = 2) -> torch.Tensor:
    """Sequences cut in three at different places; ids neither start at 0 nor are sorted."""
    ids = torch.empty(batch, length, dtype=torch.int64)
    for row in range(batch):
        first, second = length // 3 + row, 2 * length // 3 + row
        ids[row, :first], ids[row, first:second], ids[row, second:] = 7, 2, 5
    return ids


def assert_exact(module: Attention, length: int, packed: bool, exact_attention: Callable[..., Any]) -> None:
    """Outputs and every gradient are those of the formula in fp64."""
    x, g = torch.randn(2, length, D, requires_grad=True), torch.randn(2, length, D)
    ids = documents(length) if packed else None
    out = attend(module, x, ids)
    out.backward(g)
    exact = exact_attention(module, x, g, ids)
    torch.testing.assert_close(out.double(), exact.out, rtol=1e-4, atol=1e-5)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), exact.x_grad, rtol=1e-4, atol=1e-4)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        # Gradients of weights sum over 2 T tokens; their largest values are near 100.
        torch.testing.assert_close(parameter.grad.double(), exact.grads[name], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("length", [1, 63, 200])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), GROUPINGS)
def test_values_and_gradients(
    num_heads: int,
    num_kv_heads: int,
    qk_norm: bool,
    packed: bool,
    length: int,
    attention: Callable[..., Attention],
    exact_attention: Callable[..., Any],
) -> None:
    module = attention(num_heads=num_heads, num_kv_heads=num_kv_heads, qk_norm=qk_norm)
    assert_exact(module, length, packed, exact_attention)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("changed", [1, 31, 62])
def test_a_later_token_never_changes_an_earlier_output(
    changed: int, packed: bool, attention: Callable[..., Attention]
) -> None:
    module = attention()
    ids = documents(63) if packed else None
    x = torch.randn(2, 63, D)
    other = x.clone()
    other[:, changed:] = 100 * torch.randn(2, 63 - changed, D)
    before, after = attend(module, x, ids), attend(module, other, ids)
    torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=1e-6, atol=1e-6)
    assert (after[:, changed] - before[:, changed]).abs().amax(dim=-1).min() > 1e-2


def test_the_gradient_knows_no_future(attention: Callable[..., Attention]) -> None:
    module = attention()
    for position in (0, 1, 40):
        x = torch.randn(1, 63, D, requires_grad=True)
        attend(module, x)[:, position].sum().backward()
        assert x.grad is not None
        assert not x.grad[:, position + 1 :].any()
        assert x.grad[:, : position + 1].abs().amax(dim=-1).min() > 0


def test_another_document_changes_nothing(attention: Callable[..., Attention]) -> None:
    module, ids = attention(), documents(63)
    x = torch.randn(2, 63, D)
    before = attend(module, x, ids)
    for document in (7, 2, 5):
        own = ids == document
        after = attend(module, torch.where(own.unsqueeze(-1), x, 100 * torch.randn(2, 63, D)), ids)
        torch.testing.assert_close(after[own], before[own], rtol=1e-6, atol=1e-6)
        assert (after[~own] - before[~own]).abs().max() > 1


@pytest.mark.parametrize("cut", [1, 20, 62])
def test_packed_documents_equal_separate_ones(cut: int, attention: Callable[..., Attention]) -> None:
    """The second one starts at position `cut` when packed and at 0 alone: only differences of angles enter."""
    module = attention()
    x = torch.randn(2, 63, D, requires_grad=True)
    ids = (torch.arange(63) >= cut).long().expand(2, -1)
    packed = attend(module, x, ids)
    parts = torch.cat([attend(module, x[:, :cut]), attend(module, x[:, cut:])], dim=1)
    torch.testing.assert_close(packed, parts, rtol=1e-4, atol=1e-5)
    g = torch.randn_like(packed)
    gradients = [torch.autograd.grad(out, [x, *module.parameters()], g) for out in (packed, parts)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_one_document_is_plain_causal_attention(attention: Callable[..., Attention]) -> None:
    module, x = attention(), torch.randn(2, 63, D)
    same = attend(module, x, torch.full((2, 63), 3))
    torch.testing.assert_close(same, attend(module, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("gate", "kernels"),
    [*((gate, "reference") for gate in ("sdpa_output", "value", "key", "query")), ("sdpa_output", "triton")],
)
@pytest.mark.parametrize(("keys", "values"), [(1, 2), (4, 6), (12, 3)])
def test_keys_and_values_of_different_numbers(
    keys: int,
    values: int,
    gate: str,
    kernels: Kernels,
    attention: Callable[..., Attention],
    exact_attention: Callable[..., Any],
) -> None:
    """DiffQKV, head by head: query head h reads key head `h G / H` and value head `h V / H`; 4 and 6 do not nest."""
    module = attention(num_heads=12, num_kv_heads=keys, num_value_heads=values, gate={"kind": gate})
    assert [len(each.weight) for each in (module.wk, module.wv)] == [keys * 6, values * 6]
    with chosen(kernels):
        assert_exact(module, 33, True, exact_attention)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize(("augmented_query", "qk_norm", "gate"), [(7, True, "query"), (40, False, "sdpa_output")])
def test_augmented_queries(
    augmented_query: int,
    qk_norm: bool,
    gate: str,
    kernels: Kernels,
    attention: Callable[..., Attention],
    exact_attention: Callable[..., Any],
) -> None:
    """A SwiGLU over all heads, before norm, gate and positions."""
    module = attention(augmented_query=augmented_query, qk_norm=qk_norm, gate={"kind": gate})
    with chosen(kernels):
        assert_exact(module, 33, True, exact_attention)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_as_many_values_as_keys_is_attention(number: int, attention: Callable[..., Attention]) -> None:
    """To the last bit, gradients too."""
    results = []
    for value_heads in (None, number):
        torch.manual_seed(5)
        module = attention(num_kv_heads=number, num_value_heads=value_heads)
        out = attend(module, torch.randn(2, 63, D), documents(63))
        results.append((out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (6, 2), (5, 1)])
def test_grouped_queries_equal_repeated_heads(
    num_heads: int, num_kv_heads: int, attention: Callable[..., Attention]
) -> None:
    grouped = attention(num_heads=num_heads, num_kv_heads=num_kv_heads)
    repeated = attention(num_heads=num_heads, num_kv_heads=num_heads)
    copies = num_heads // num_kv_heads
    state = grouped.state_dict()
    for name in ("wk.weight", "wv.weight"):
        state[name] = state[name].unflatten(0, (num_kv_heads, -1)).repeat_interleave(copies, dim=0).flatten(0, 1)
    repeated.load_state_dict(state)
    x, g = torch.randn(2, 63, D), torch.randn(2, 63, D)
    out, expected = attend(grouped, x), attend(repeated, x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    out.backward(g)
    expected.backward(g)
    for one, other in ((grouped.wk.weight, repeated.wk.weight), (grouped.wv.weight, repeated.wv.weight)):
        assert one.grad is not None
        assert other.grad is not None
        summed = other.grad.unflatten(0, (num_kv_heads, copies, -1)).sum(dim=1).flatten(0, 1)
        torch.testing.assert_close(one.grad, summed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("length", "head_dim", "theta"), [(1, 2, 10_000.0), (63, 6, 500.0), (1000, 64, 1e6)])
def test_rotary_table(length: int, head_dim: int, theta: float) -> None:
    table = rotary_table(length, head_dim, theta, CPU)
    for t in (0, length // 2, length - 1):
        for i in range(head_dim // 2):
            angle = torch.tensor(t * theta ** (-2 * i / head_dim), dtype=torch.float64)
            # Angles reach 1000; in fp32 they would be off by 6e-5, but they are formed in fp64.
            assert table.cos_Td[t, i].item() == pytest.approx(angle.cos().item(), abs=1e-7)
            assert table.sin_Td[t, i].item() == pytest.approx(angle.sin().item(), abs=1e-7)
    assert table.cos_Td.shape == table.sin_Td.shape == (length, head_dim // 2)
    assert table.cos_Td.dtype == table.sin_Td.dtype == torch.float32


def test_rotation_keeps_the_norm() -> None:
    x = torch.randn(2, 1000, 3, 8)
    turned = rotate(x, *rotary_table(1000, 8, THETA, CPU))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=1e-6)
    assert torch.equal(turned[:, 0], x[:, 0])
    assert (turned[:, 1:] - x[:, 1:]).abs().amax(dim=(0, 2, 3)).min() > 0.1


@pytest.mark.parametrize("shift", [1, 7, 500])
def test_rotated_products_depend_on_the_distance_only(shift: int) -> None:
    q, k = torch.randn(2, 1, 500, 3, 8).unbind()
    near = rotary_table(500, 8, THETA, CPU)
    far = Rotary(*(table[shift : shift + 500] for table in rotary_table(1000, 8, THETA, CPU)))
    products = [
        torch.einsum("bthd,bshd->bhts", rotate(q, *table).double(), rotate(k, *table).double()) for table in (near, far)
    ]
    torch.testing.assert_close(products[0], products[1], rtol=1e-5, atol=1e-5)


def test_rotation_is_fp32_inside() -> None:
    x = torch.randn(1, 63, 3, 8).bfloat16()
    table = rotary_table(63, 8, THETA, CPU)
    turned, exact = rotate(x, *table), rotate(x.double(), *table)
    assert turned.dtype == torch.bfloat16
    assert ((turned.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()  # one rounding, at the end


def test_rotary_angles_survive_a_cast(attention: Callable[..., Attention]) -> None:
    module = attention()
    assert not dict(module.named_buffers())
    module.bfloat16()
    attend(module, torch.randn(1, 63, D).bfloat16())
    assert rotary_table(63, 6, THETA, CPU).cos_Td.dtype == torch.float32


def test_qk_norm_takes_the_length_out(attention: Callable[..., Attention]) -> None:
    x = torch.randn(2, 63, D)
    for qk_norm in (True, False):
        module = attention(qk_norm=qk_norm)
        before = attend(module, x)
        with torch.no_grad():
            module.wq.weight.mul_(7)
            module.wk.weight.mul_(3)
        change = (attend(module, x) - before).abs().max()
        assert (change < 1e-4) == qk_norm
        assert ("q_norm.weight" in module.state_dict()) == qk_norm
        assert ("k_norm.weight" in module.state_dict()) == qk_norm


def test_normed_logits_are_bounded(attention: Callable[..., Attention]) -> None:
    """With QK-norm of weight one, |q k| / sqrt(d) <= sqrt(d), so no weight exceeds e^(2 sqrt d) times another."""
    module = attention(num_heads=1, num_kv_heads=1, gate={"kind": "none"})
    with torch.no_grad():
        module.wq.weight.mul_(1000)
        module.wv.weight.copy_(torch.eye(6, D))
        module.wo.weight.copy_(torch.eye(D, 6))
    x = torch.cat([torch.randn(1, 2, 6), torch.zeros(1, 2, D - 6)], dim=-1)
    x[0, :, :2] = torch.eye(2)  # the output's first two numbers are then the two attention weights
    weights = attend(module, x)[0, 1, :2]
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)
    assert weights.min() / weights.max() >= torch.tensor(-2 * 6**0.5).exp() * (1 - 1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, ("num_kv_heads=3", "num_heads=4")),
        ({"num_heads": 2, "num_kv_heads": 4}, ("num_kv_heads=4", "num_heads=2")),
        ({"num_value_heads": 3}, ("num_value_heads=3", "num_heads=4")),
        ({"head_dim": 5}, ("head_dim=5",)),
    ],
)
def test_impossible_heads_are_refused(changes: dict[str, int], words: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as error:
        AttentionConfig.model_validate({"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, **changes})
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(("theta", "trained_length", "factor"), [(1e4, 2048, 4.0), (5e5, 8192, 16.0), (100.0, 7, 1.5)])
def test_yarn_turns_as_transformers_has_it(theta: float, trained_length: int, factor: float) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained_length}
    config = LlamaConfig(
        head_dim=64, max_position_embeddings=8 * trained_length, rope_parameters={**rope, "rope_theta": theta}
    )
    inverse, scale = ROPE_INIT_FUNCTIONS["yarn"](config, CPU)
    table = rotary_table(300, 64, theta, CPU, YarnConfig(factor=factor, trained_length=trained_length))
    angle = torch.outer(torch.arange(300).double(), inverse.double())
    torch.testing.assert_close(table.cos_Td.double(), angle.cos() * scale, rtol=0, atol=5e-5)
    torch.testing.assert_close(table.sin_Td.double(), angle.sin() * scale, rtol=0, atol=5e-5)


def test_yarn_leaves_what_turns_often_and_stretches_what_turns_rarely() -> None:
    """Of a head of 128 at base 10,000, trained on 4,096 tokens."""
    plain, yarn = (
        rotary_table(2, 128, THETA, CPU, config) for config in (None, YarnConfig(factor=8.0, trained_length=4096))
    )
    angles = torch.atan2(yarn.sin_Td[1], yarn.cos_Td[1]) / torch.atan2(plain.sin_Td[1], plain.cos_Td[1])
    turns = 4096 / (2 * torch.pi) * THETA ** (-torch.arange(64) / 64)
    torch.testing.assert_close(angles[turns > 33], torch.ones_like(angles[turns > 33]))
    torch.testing.assert_close(angles[turns < 0.8], torch.full_like(angles[turns < 0.8], 1 / 8))
    assert (angles.diff() <= 1e-6).all()
