"""QK-clip: the largest logits, and what the factors do to them.

Letters: B batch, T tokens, D width, H query heads, G key heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tidegate.model.attention import Attention, AttentionConfig, rotary_table
from tidegate.model.qk_clip import clip_factors, max_logits
from tidegate_kernels.gated_attention import Documents

GROUPINGS = [(1, 1), (3, 3), (4, 2), (5, 1)]


@pytest.mark.parametrize("length", [1, 63, 700])  # 700: more than a chunk
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), GROUPINGS)
def test_max_logits_are_those_of_visible_pairs(num_heads: int, num_kv_heads: int, packed: bool, length: int) -> None:
    q, k = torch.randn(2, length, num_heads, 6), torch.randn(2, length, num_kv_heads, 6)
    k[:, -1] *= 10  # a key that only the last query sees
    documents = Documents((torch.arange(length) // 9).expand(2, -1)) if packed else None
    seen = torch.ones(length, length, dtype=torch.bool).tril() if documents is None else documents.mask
    keys = k.repeat_interleave(num_heads // num_kv_heads, dim=2)
    logits = torch.einsum("bthd,bshd->bhts", q.double(), keys.double()) / 6**0.5
    expected = logits.masked_fill(~seen, -torch.inf).amax(dim=(0, 2, 3))
    actual = max_logits(q, k, documents)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    assert length == 1 or (logits.amax(dim=(0, 2, 3)) > expected + 1).any(), "a mask that is left out shows"


def test_factors_by_hand() -> None:
    """Two query heads a key head; heads at 400, 50, 100 and 25 with a threshold of 100."""
    query, key = clip_factors(torch.tensor([400.0, 50, 100, 25]), 100.0, 2)
    assert torch.equal(key, torch.tensor([0.5, 1.0]))
    assert torch.equal(query, torch.tensor([0.5, 2.0, 1.0, 1.0]))


def test_with_one_query_head_a_key_head_it_is_the_rule_of_the_paper() -> None:
    largest = torch.tensor([400.0, 50, 101])
    query, key = clip_factors(largest, 100.0, 3)
    expected = (100 / largest).clamp(max=1).sqrt()
    torch.testing.assert_close(query, expected)
    torch.testing.assert_close(key, expected)


@pytest.mark.parametrize("gate", ["none", "query", "key", "sdpa_output"])
@pytest.mark.parametrize("augmented_query", [None, 20])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), GROUPINGS)
def test_every_head_shrinks_to_the_threshold_and_no_other_moves(
    num_heads: int, num_kv_heads: int, augmented_query: int | None, gate: str, initialise: Callable[..., nn.Module]
) -> None:
    config = AttentionConfig.model_validate(
        {
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": 6,
            "qk_norm": False,
            "qk_clip": 4.0,
            "augmented_query": augmented_query,
            "gate": {"kind": gate},
        }
    )
    module = Attention(config, 12, norm_eps=1e-6, std=0.3, out_std=0.3)
    initialise(module)
    with torch.no_grad():  # heads of very different sizes
        module.makes_queries.weight.mul_(torch.linspace(8, 0.1, num_heads).repeat_interleave(6)[:, None])
    x, table = torch.randn(2, 63, 12), rotary_table(63, 6, 10_000.0, torch.device("cpu"))

    def largest() -> torch.Tensor:
        output = module(x, table, None)
        assert output.max_logit_H is not None
        assert output.sample is None, "was not asked for"
        return output.max_logit_H

    before = largest()
    query, key = clip_factors(before, 4.0, num_kv_heads)
    with torch.no_grad():
        module.makes_queries.weight.mul_(query.repeat_interleave(6)[:, None])
        module.wk.weight.mul_(key.repeat_interleave(6)[:, None])
    torch.testing.assert_close(largest(), before.clamp(max=4.0), rtol=1e-5, atol=1e-5)
    assert (before > 4.0).any()
    assert num_heads == 1 or (before < 4.0).any()
    with torch.no_grad():
        assert module(x, table, None).max_logit_H is None, "only a pass that trains pays"
    module.eval()
    assert module(x, table, None).max_logit_H is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qk_norm": True}, ("qk_clip=100", "sqrt(head_dim) = 2.4", "qk_norm=false")),
        ({"gate": {"kind": "key", "form": "additive"}}, ("qk_clip=100", "gate.kind=key", "gate.form=multiplicative")),
        ({"qk_clip": 0}, ("greater than 0",)),
    ],
)
def test_clips_that_cannot_act_are_refused(changes: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as error:
        AttentionConfig.model_validate(
            {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "qk_norm": False, "qk_clip": 100.0, **changes}
        )
    for word in words:
        assert word in str(error.value)
