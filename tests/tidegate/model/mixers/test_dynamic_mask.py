"""Attention with a dynamic mask: which keys are kept, that later tokens have no say in it, and recall that is learned.

Letters: B batch, T tokens, D width, G key/value heads, S keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tidegate.model.attention import Attention, AttentionConfig, AttentionOutput, rotary_table
from tidegate.model.decoder import Decoder, ModelConfig, materialize
from tidegate.model.memory import model_on_meta, pass_memory
from tidegate.model.mixers import DynamicMaskAttention, dynamic_mask
from tidegate.model.mixers.dynamic_mask import ranks, selected
from tidegate.model.observations import AttentionWatch
from tidegate_kernels.gated_attention import Documents

B, T, D, G = 2, 40, 24, 2
CPU = torch.device("cpu")
HEADS: dict[str, Any] = {"num_heads": 4, "num_kv_heads": G, "head_dim": 6}
Initialise = Callable[..., Any]


@pytest.fixture
def attention(initialise: Initialise) -> Callable[..., Any]:
    """`(keep, fields of the config) -> module`; plain attention without `keep`."""

    def make(keep: int | None, **changes: Any) -> Any:
        given = AttentionConfig.model_validate(HEADS | changes), D, 1e-6, 0.3, 0.3
        return initialise(Attention(*given) if keep is None else DynamicMaskAttention(*given, keep))

    return make


def run(module: Any, x: torch.Tensor, documents: Documents | None = None, **options: Any) -> AttentionOutput:
    rotary = rotary_table(x.shape[1], 6, 10_000.0, CPU)
    output: AttentionOutput = module(x, rotary, documents, **options)
    return output


def kept(bias: torch.Tensor, keep: int, first: torch.Tensor | None = None) -> torch.Tensor:
    return selected(ranks(bias), torch.arange(bias.shape[1]), first, keep)


@pytest.mark.parametrize("keep", [1, 7, 39, 40, 90])
def test_every_query_keeps_the_best_keys_of_those_it_may_see(keep: int) -> None:
    """As many as there are, or `keep`; of equal ones the later. What a query does not see, no later one does."""
    bias = torch.randn(B, T, G).mul(3).round()
    documents = Documents(torch.tensor([[0] * 9 + [1] * 31, [0] * 1 + [1] * 39]))
    for first in (None, documents.first_BT):
        found = kept(bias, keep, first)
        for b, g, t in torch.cartesian_prod(torch.arange(B), torch.arange(G), torch.arange(T)).tolist():
            start = 0 if first is None else int(first[b, t])
            best = sorted(range(start, t + 1), key=lambda s: (-float(bias[b, s, g]), -s))[:keep]
            assert found[b, g, t].nonzero().flatten().tolist() == sorted(best)
    found = kept(bias, keep)
    assert (found.sum(dim=-1) == (torch.arange(T) + 1).clamp(max=keep)).all()
    assert not (found[:, :, 1:] & ~found[:, :, :-1]).tril(0).any()


@pytest.mark.parametrize("chunk", [512, 7])
@pytest.mark.parametrize("changes", [{}, {"softmax": "learnable_sink"}, {"gate": {"kind": "value"}, "qk_norm": False}])
def test_it_is_a_softmax_over_kept_keys_with_the_bias(
    changes: dict[str, Any], chunk: int, attention: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand in fp64, head by head, with gradients of all; documents too, in chunks of any size."""
    monkeypatch.setattr(dynamic_mask, "_CHUNK", chunk)
    module = attention(5, **changes).double()
    documents = Documents((torch.arange(T) // 17).expand(B, -1))
    x = torch.randn(B, T, D, dtype=torch.float64)
    (q, k, v), scores = module._projected(x, module.wq, module.wk, module.wv)
    v = module._gated("value", v, scores)
    q, k = module._positioned(q, k, scores, rotary_table(T, 6, 10_000.0, CPU))
    bias = module.bias_scale * torch.nn.functional.softplus(v.flatten(-2) @ module.w_bias.weight.T)
    mask = kept(bias, 5, documents.first_BT)
    heads = []
    for head in range(4):
        group = head // 2
        logits = q[:, :, head] @ k[:, :, group].mT / 6**0.5 + bias[:, None, :, group]
        logits = logits.masked_fill(~mask[:, group], -torch.inf)
        if module.sink is not None:
            logits = torch.cat([logits, module.sink[head].expand(B, T, 1)], dim=-1)
        heads.append(logits.softmax(dim=-1)[..., :T] @ v[:, :, group])
    expected = module.wo(module._gated("sdpa_output", torch.stack(heads, dim=2), scores).flatten(-2))
    found = run(module, x, documents).y_BTD
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # angles are fp32
    g = torch.randn_like(found)
    gradients = [torch.autograd.grad(y, list(module.parameters()), g) for y in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_with_room_for_all_it_is_attention(attention: Callable[..., Any]) -> None:
    """Without the bias the one of `model.attention`; with it not."""
    module, plain = attention(T), attention(None)
    plain.load_state_dict(module.state_dict(), strict=False)
    x = torch.randn(B, T, D)
    assert not torch.allclose(run(module, x).y_BTD, run(plain, x).y_BTD, atol=1e-3)
    nn.init.zeros_(module.bias_scale)
    torch.testing.assert_close(run(module, x).y_BTD, run(plain, x).y_BTD, rtol=1e-4, atol=1e-5)


def test_documents_are_apart(attention: Callable[..., Any]) -> None:
    module, x = attention(4), torch.randn(1, T, D, requires_grad=True)
    y = run(module, x, Documents((torch.arange(T) >= 13).long()[None])).y_BTD
    alone = run(module, x[:, :13]).y_BTD
    torch.testing.assert_close(y[:, :13], alone, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(y[:, 13:].sum(), x)
    assert gradient[:, :13].eq(0).all()
    # Rotary angles are relative, so that a document may begin anywhere.
    torch.testing.assert_close(y[:, 13:], run(module, x[:, 13:]).y_BTD, rtol=1e-3, atol=1e-4)


def test_the_published_mask_leaks_the_future(attention: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One selection for a whole row, as the authors' code makes it, changes what earlier queries see; ours does not."""
    module, cut = attention(6), 25
    x = torch.randn(B, T, D)
    other = torch.cat([x[:, :cut], torch.randn(B, T - cut, D)], dim=1)
    before, after = (run(module, each).y_BTD[:, :cut] for each in (x, other))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-6)
    assert not torch.allclose(*(run(module, each).y_BTD[:, cut] for each in (x, other)))

    def published(ranks_BSG: torch.Tensor, at_c: torch.Tensor, first_Bc: object, keep: int) -> torch.Tensor:
        place_S = torch.arange(ranks_BSG.shape[1])
        own = place_S == at_c[:, None]  # or a query may have no key at all, and its output no value
        return ((ranks_BSG.mT < keep).unsqueeze(2) | own) & (place_S <= at_c[:, None])

    monkeypatch.setattr(dynamic_mask, "selected", published)
    before, after = (run(module, each).y_BTD[:, :cut] for each in (x, other))
    assert ((before - after).abs().amax(dim=-1) > 1e-3).float().mean() > 0.3


def test_a_bias_in_bf16_keeps_tokens_apart(attention: Callable[..., Any]) -> None:
    with torch.device("meta"):
        given = AttentionConfig.model_validate(HEADS), D, 1e-6, 0.3, 0.3
        assert DynamicMaskAttention(*given, 4).w_bias.weight.is_meta
    module = attention(4).bfloat16()
    x = torch.randn(B, T, D).bfloat16()
    y = run(module, x).y_BTD
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    bias = module._bias(torch.randn(1, 2000, G, 6).bfloat16())
    assert bias.dtype == torch.float32
    assert len(bias[0, :, 0].unique()) > 1990


def test_telemetry_sees_the_kept_keys(attention: Callable[..., Any]) -> None:
    """Entropy is at most log of the number of kept keys, and with one kept key nothing; plain blocks do not mix in."""
    x, tokens = torch.randn(B, T, D), torch.zeros(B, T, dtype=torch.long)
    documents = Documents((torch.arange(T) // 17).expand(B, -1))
    modules = [attention(1), attention(3), attention(None)]
    watch = AttentionWatch(modules[0].config.gate, tokens, documents, copies=False)
    for module in modules:
        sample = run(module, x, documents, observe=True).sample
        assert sample is not None
        watch.see(sample)
    seen = watch.read()
    assert seen.entropy_AH[0].abs().max() < 1e-6
    assert 0.1 < seen.entropy_AH[1].min() <= seen.entropy_AH[1].max() < torch.tensor(3.0).log()
    alone = AttentionWatch(modules[0].config.gate, tokens, documents, copies=False)
    sample = run(modules[2], x, documents, observe=True).sample
    assert sample is not None
    alone.see(sample)
    assert torch.equal(alone.read().entropy_AH[0], seen.entropy_AH[2])
    expected = run(modules[1], x, documents, observe=True).sample
    assert expected is not None
    assert expected.bias_BGST is not None
    assert (expected.bias_BGST.isfinite().sum(dim=-1) <= 3).all()


def test_recomputing_changes_nothing(model_config: Callable[..., ModelConfig]) -> None:
    mixers = {"best": {"kind": "dynamic_mask", "keep": 5}}
    config = model_config(layers="best, attention", mixers=mixers, init_std=0.3)
    tokens, labels = torch.randint(101, (2, B, T)).unbind()
    given = tokens, labels, torch.rand(B, T) < 0.7, (torch.arange(T) // 17).expand(B, -1)
    results = []
    for recompute in (False, True):
        model = materialize(lambda again=recompute: Decoder(config, recompute=again), CPU, seed=1)
        nll = model(*given, observe="all").nll
        results.append((nll, *torch.autograd.grad(nll, list(model.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_memory_grows_with_the_length_and_not_its_square(model_config: Callable[..., ModelConfig]) -> None:
    """Logits of one chunk of queries at a time, forward and backward."""
    config = model_config(layers="best", mixers={"best": {"kind": "dynamic_mask", "keep": 64}})
    found = [
        pass_memory(
            model_on_meta(config, torch.bfloat16), micro_batch=1, sequence_length=length, isolate=True, kernels="auto"
        )
        for length in (2048, 4096, 8192)
    ]
    for short, middle, long in zip(*found, strict=True):
        assert long - middle < 2.1 * (middle - short)


class Positioned(nn.Module):
    """Attention with its angles, as a layer alone."""

    def __init__(self, initialise: Initialise, number: int, keep: int) -> None:
        super().__init__()
        config = AttentionConfig.model_validate(
            {"num_heads": 2, "num_kv_heads": 2, "head_dim": 32, "gate": {"kind": "none"}}
        )
        self.attention = initialise(DynamicMaskAttention(config, 64, 1e-6, 0.02, 0.02, keep), number)

    def forward(self, x_BTD: torch.Tensor) -> AttentionOutput:
        output: AttentionOutput = self.attention(x_BTD, rotary_table(x_BTD.shape[1], 32, 10_000.0, CPU), None)
        return output


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "steps", "least", "most"), [(24, 1000, 0.99, 1.0), (6, 600, 0.1, 0.3)])
def test_recall_wants_room_for_all_pairs(
    keep: int, steps: int, least: float, most: float, learned_recall: Callable[..., float], initialise: Initialise
) -> None:
    """6 pairs are 12 tokens of 48. With room for 24 recall is learned, by 500 or 600 steps; with room for half of the
    pairs at most which values there are."""
    assert least <= learned_recall(lambda number: Positioned(initialise, number, keep), steps) <= most
