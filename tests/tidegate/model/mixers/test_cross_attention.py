"""Cross attention of a decoder-hybrid-decoder: by hand, and across the blocks of a model.

Letters: B sequences, T tokens, D width, H query heads, G key heads, V value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tidegate.model import flops
from tidegate.model.attention import Attention, KeysValues, rotary_table
from tidegate.model.clock import Clock
from tidegate.model.decoder import Decoder, ModelConfig, materialize
from tidegate.model.memory import model_on_meta, pass_memory
from tidegate.model.mixers import CrossAttention
from tidegate.train.generate import continued
from tidegate_kernels.gated_attention import Documents

B, T, D = 2, 21, 24
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
KDA = {"kind": "kda", "num_heads": 2, "key_dim": 6, "value_dim": 10}
MIXERS = {
    "kda": KDA,
    "local": {"kind": "sliding_window", "window": 3},
    "unit": {"kind": "gmu"},
    "shared": {"kind": "cross_attention"},
}
DENSE = {"kind": "dense", "hidden_dim": 13}
HYBRID = "kda, local, kda, attention, [unit, shared] x 2"
CPU = torch.device("cpu")
MakeConfig = Callable[..., ModelConfig]


def build(layers: str, model_config: MakeConfig, recompute: bool = False, **changes: Any) -> Decoder:
    used = {name: mixer for name, mixer in MIXERS.items() if name in layers}
    num = 8 if layers == HYBRID else layers.count(",") + 1
    fields = {"num_layers": num, "layers": layers, "mixers": used, "init_std": 0.3, "ffn": DENSE, **changes}
    return materialize(partial(Decoder, model_config(**fields), recompute=recompute), CPU, seed=1)


def documents() -> torch.Tensor:
    return torch.tensor([[0] * 9 + [1] * 12, [3] * 21])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gate": {"kind": "none"}, "qk_norm": False},
        {"gate": {"kind": "query"}},
        {"gate": {"kind": "dense_output"}, "softmax": "learnable_sink"},
        {"gate": {"kind": "sdpa_output", "granularity": "headwise"}, "num_value_heads": 4},
        {"augmented_query": 20},
        {"num_heads": 1, "num_kv_heads": 1},
    ],
)
def test_it_is_attention_with_the_keys_and_values_of_another(
    changes: dict[str, Any], packed: bool, model_config: MakeConfig, attention_formula: Callable[..., torch.Tensor]
) -> None:
    """Against the formula in fp64, where keys and values come from another block's input by its matrices."""
    decoder = build("attention, shared", model_config, attention=HEADS | changes)
    publisher, reader = (block.attention for block in decoder.blocks)
    assert isinstance(reader, CrossAttention)
    below, x = torch.randn(2, B, T, D).unbind()
    ids = documents() if packed else None
    given = rotary_table(T, 6, 10_000.0, CPU), None if ids is None else Documents(ids)
    keys = publisher(below, *given).keys
    actual = reader(x, *given, below=keys).y_BTD

    # The formula has one input: twice as wide, matrices of queries and keys read a half each.
    exact = {name: p.detach().double() for name, p in reader.named_parameters()}
    exact |= {f"k_norm.{n}": p.double() for n, p in publisher.k_norm.named_parameters()} if publisher.k_norm else {}
    for name in ("wq.weight", "gate.projection.weight"):
        if name in exact:
            exact[name] = F.pad(exact[name], (0, D))
    for name in ("wk.weight", "wv.weight"):
        exact[name] = F.pad(publisher.get_parameter(name).detach().double(), (D, 0))
    expected = attention_formula(reader.config, exact, torch.cat([x, below], dim=-1).double(), ids)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def watched(decoder: Decoder) -> tuple[dict[int, KeysValues], dict[int, KeysValues]]:
    """What each block that attends has been given, and what it has computed, in the passes to come."""
    given: dict[int, KeysValues] = {}
    made: dict[int, KeysValues] = {}

    def see(at: int, _: Attention, arguments: Any, output: Any) -> None:
        given[at], made[at] = arguments[5], output.keys

    for place, block in enumerate(decoder.blocks):
        if block.attention is not None:
            block.attention.register_forward_hook(partial(see, place))
    return given, made


def test_blocks_read_the_nearest_full_attention_before_them(model_config: MakeConfig) -> None:
    """Windows and cross attention itself publish nothing."""
    decoder = build("attention, shared, local, shared, attention, kda, shared, unit", model_config)
    assert decoder.config.publishing == {0, 4, 5}
    given, made = watched(decoder)
    tokens = torch.randint(101, (B, T))
    decoder(tokens, tokens, torch.ones(B, T, dtype=torch.bool))
    for reader, source in ((1, 0), (3, 0), (6, 4)):
        for theirs, ours in zip(given[reader], made[source], strict=True):
            assert torch.equal(theirs, ours)
    # A view would hold on to queries and scores too.
    values = given[6].v_BTVd
    assert values.untyped_storage().nbytes() == values.nbytes


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_reach_the_publisher_from_every_reader(recompute: bool, model_config: MakeConfig) -> None:
    """By finite differences in fp64, along the gradient, of all that keys and values are made of."""
    decoder = build("attention, shared, shared", model_config, recompute).double()
    tokens, labels = torch.randint(101, (2, B, T)).unbind()

    def loss() -> torch.Tensor:
        nll: torch.Tensor = decoder(tokens, labels, torch.ones(B, T, dtype=torch.bool), documents()).nll
        return nll

    loss().backward()
    publisher = decoder.blocks[0].attention
    for weight in (publisher.wk.weight, publisher.wv.weight, publisher.k_norm.weight):
        direction, step = weight.grad / weight.grad.norm(), 1e-3  # rotation is in fp32
        with torch.no_grad():
            before, values = weight.clone(), []
            for sign in (1, -1):
                weight.copy_(before + sign * step * direction)
                values.append(float(loss()))
            weight.copy_(before)
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(weight.grad.norm()), rel=1e-3)


def test_recomputation_changes_nothing(model_config: MakeConfig) -> None:
    tokens, labels = torch.randint(101, (2, B, T)).unbind()
    results = []
    for recompute in (False, True):
        decoder = build(HYBRID, model_config, recompute)
        nll = decoder(tokens, labels, torch.ones(B, T, dtype=torch.bool), documents()).nll
        results.append([nll, *torch.autograd.grad(nll, list(decoder.parameters()))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_later_tokens_and_other_documents_have_no_say(model_config: MakeConfig) -> None:
    decoder, counted = build(HYBRID, model_config), torch.ones(B, T, dtype=torch.bool)
    tokens = torch.randint(101, (B, T))
    later, before = tokens.clone(), tokens.clone()
    later[:, 9:] = (later[:, 9:] + 1) % 101
    before[0, :9] = (before[0, :9] + 1) % 101
    plain, of_later, of_before = (decoder(x, tokens, counted, documents()).nll_BT for x in (tokens, later, before))
    torch.testing.assert_close(plain[:, :9], of_later[:, :9], rtol=0, atol=1e-6)
    torch.testing.assert_close(plain[0, 9:], of_before[0, 9:], rtol=0, atol=1e-6)
    assert (plain[0, 9:] != of_later[0, 9:]).all()


def test_it_costs_no_keys_and_values_and_all_of_the_scores(model_config: MakeConfig) -> None:
    """Of four blocks that attend, two have keys and values: half of the cache, and of those matrices."""
    config = build("attention, shared, attention, shared", model_config).config
    plain = model_config(num_layers=4, init_std=0.3, ffn=DENSE)
    built = sum(parameter.numel() for parameter in materialize(partial(Decoder, config), CPU, 0).parameters())
    assert built == flops.total(config, T).params
    one, other = ({row.field: row for row in flops.costs(each, T)} for each in (config, plain))
    keys = "attention.num_kv_heads (key, value)"
    assert one[keys].params * 2 == other[keys].params == 4 * D * 2 * 2 * 6
    assert other["norms"].params - one["norms"].params == 2 * 6
    assert {field: row for field, row in one.items() if field not in (keys, "norms")} == {
        field: row for field, row in other.items() if field not in (keys, "norms")
    }
    assert flops.kv_cache_bytes(config) * 2 == flops.kv_cache_bytes(plain) == 4 * 2 * 2 * 2 * 6
    assert flops.state_bytes(config) == 0


def test_recomputation_holds_one_copy_of_keys_and_values(model_config: MakeConfig) -> None:
    """What a pass holds on top of plain blocks: keys and values of one block, whatever the number of readers."""
    saved = []
    for readers in (0, 1, 5):
        layers = ", ".join(["attention"] * (6 - readers) + ["shared"] * readers)
        mixers = {"shared": MIXERS["shared"]} if readers else {}
        config = model_config(num_layers=6, layers=layers, mixers=mixers, ffn=DENSE)
        model = model_on_meta(config, torch.float32, recompute=True)
        saved.append(pass_memory(model, micro_batch=B, sequence_length=T, isolate=False, kernels="reference").saved)
    assert [each - saved[0] for each in saved] == [0, B * T * 2 * 2 * 6 * 4, B * T * 2 * 2 * 6 * 4]


def test_it_is_observed_and_goes_on_writing(model_config: MakeConfig) -> None:
    decoder = build(HYBRID, model_config).eval()
    tokens = torch.randint(101, (B, T))
    output = decoder(tokens, tokens, torch.ones(B, T, dtype=torch.bool), observe="all")
    assert list(decoder.config.windows) == [1, 3, 5, 7]
    assert output.attention.entropy_AH.shape == output.attention.gate_mean_AH.shape == (4, 4)
    assert output.attention.entropy_AH.isfinite().all()
    new = continued(decoder, tokens[:, :5], 4, torch.zeros(B), Clock(0, 0, 0))
    whole = torch.cat([tokens[:, :5], new], dim=1)
    for place in range(5, 9):
        logits = decoder.logits(whole[:, :place], torch.ones(B, place, dtype=torch.bool), place - 1)
        assert torch.equal(logits.argmax(dim=1), whole[:, place])


@pytest.mark.parametrize(
    ("layers", "attention", "problem"),
    [
        ("shared, attention", {}, "block 0 is 'shared', cross attention, and no block before it is 'attention'"),
        ("local, shared", {}, "block 1 is 'shared', cross attention, and no block before it is 'attention'"),
        ("attention, shared", {"gate": {"kind": "value"}}, "gate.kind=value .* have no keys and values to gate"),
        ("attention, shared", {"gate": {"kind": "key"}}, "gate.kind=key .* have no keys and values to gate"),
        ("attention, shared", {"qk_norm": False, "qk_clip": 50}, "qk_clip=50 .* cross attention has not"),
    ],
)
def test_what_does_not_fit_is_refused(
    layers: str, attention: dict[str, Any], problem: str, model_config: MakeConfig
) -> None:
    with pytest.raises(ValueError, match=problem):
        build(layers, model_config, attention=HEADS | attention)
