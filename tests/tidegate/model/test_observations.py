"""What attention says of itself, against an explicit fp64 computation.

Letters: L layers, B batch, T tokens, D width, H query heads, G key/value heads, d head width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tidegate.model import observations
from tidegate.model.attention import Attention, AttentionConfig, AttentionOutput, rotary_table
from tidegate.model.clock import Clock
from tidegate.model.decoder import Decoder, ModelConfig, materialize
from tidegate.model.initialisation import Draw
from tidegate.model.moe import MoEConfig, routing_stats
from tidegate.model.observations import (
    MAX_QUERIES,
    MAX_SEQUENCES,
    AttentionObservations,
    AttentionWatch,
    sampled_positions,
)
from tidegate.model.routers import RouterContext, RouterShape
from tidegate.model.unit_gates.export import export
from tidegate.train.telemetry import Observer
from tidegate_kernels.choice import chosen
from tidegate_kernels.gated_attention import Documents
from tidegate_kernels.qk_norm_rope.reference import rotate

CPU = torch.device("cpu")
D, H = 12, 4


@pytest.fixture
def attention(initialise: Callable[..., nn.Module]) -> Callable[..., Attention]:
    def make(window: int | None = None, **changes: object) -> Attention:
        fields: dict[str, object] = {"num_heads": H, "num_kv_heads": 2, "head_dim": 6}
        config = AttentionConfig.model_validate(fields | changes)
        module = Attention(config, D, norm_eps=1e-6, std=0.5, out_std=0.5, window=window)
        initialise(module)
        if module.sink is not None:
            nn.init.normal_(module.sink)
        return module

    return make


class Layer(NamedTuple):
    """What is told of one layer."""

    entropy: torch.Tensor
    first_token: torch.Tensor
    first_token_uniform: torch.Tensor
    first_token_importance: torch.Tensor
    gate_mean: torch.Tensor | None
    gate_closed: torch.Tensor | None
    gate_bins: torch.Tensor | None


def layer_of(seen: AttentionObservations, layer: int) -> Layer:
    gates = (
        None if gate is None else gate[layer] for gate in (seen.gate_mean_AH, seen.gate_closed_AH, seen.gate_bins_AN)
    )
    of_heads = (seen.first_token_AH[layer], seen.first_token_uniform_A[layer], seen.first_token_importance_AH[layer])
    return Layer(seen.entropy_AH[layer], *of_heads, *gates)


def observe(module: Attention, x: torch.Tensor, ids: torch.Tensor | None) -> Layer:
    """One layer, watched alone."""
    packed = None if ids is None else Documents(ids)
    output = module(x, rotary_table(x.shape[1], 6, 10_000.0, CPU), packed, observe=True)
    assert output.sample is not None
    watch = AttentionWatch(module.config.gate, x[..., 0], packed, copies=False)
    watch.see(output.sample)
    seen = watch.read()
    assert all(field is None or (field.dtype == torch.float32 and not field.requires_grad) for field in seen)
    return layer_of(seen, 0)


def probabilities(module: Attention, x: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    """(B, H, T, T or T + 1) fp64; the last column is the sink, if there is one."""
    B, T, _ = x.shape
    table = rotary_table(T, 6, 10_000.0, CPU)
    q, k = (x @ module.wq.weight.T).view(B, T, H, 6), (x @ module.wk.weight.T).view(B, T, 2, 6)
    if module.q_norm is not None and module.k_norm is not None:
        q, k = module.q_norm(q), module.k_norm(k)
    q, k = rotate(q, *table).double(), rotate(k, *table).double().repeat_interleave(2, dim=2)
    logits = torch.einsum("bthd,bshd->bhts", q, k) / 6**0.5
    for b in range(B):
        for t in range(T):
            for s in range(T):
                far = module.window is not None and s <= t - module.window
                if s > t or far or (ids is not None and ids[b, s] != ids[b, t]):
                    logits[b, :, t, s] = -torch.inf
    if module.sink is not None:
        logits = torch.cat([logits, module.sink.double()[:, None, None].expand(B, H, T, 1)], dim=-1)
    return logits.softmax(dim=-1)


def documents(length: int, batch: int) -> torch.Tensor:
    """A long first document, one of a single token, and one whose id comes again at the end."""
    ids = torch.full((batch, length), 3)
    for b in range(batch):
        first = [length // 2, 1, length // 3][b % 3]
        ids[b, :first] = 7 + b
    ids[2:, -2:] = ids[2:, :1]
    return ids


@pytest.mark.parametrize("window", [None, 5, 31])
@pytest.mark.parametrize("softmax", ["plain", "learnable_sink"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_softmax_fields(
    qk_norm: bool, packed: bool, softmax: str, window: int | None, attention: Callable[..., Attention]
) -> None:
    """Short enough that every query is sampled: the definitions, one query at a time."""
    module, x = attention(window, qk_norm=qk_norm, softmax=softmax), torch.randn(2, 31, D)
    ids = documents(31, 2) if packed else None
    seen, p = observe(module, x, ids), probabilities(module, x, ids).detach()
    entropy = -torch.where(p > 0, p * p.log(), 0.0).sum(dim=-1).mean(dim=(0, 2))
    torch.testing.assert_close(seen.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    later, own, uniform = [], [], []
    for b in range(2):
        own.append(p[b, :, 0, 0])
        for t in range(1, 31):
            if ids is None or ids[b, t] == ids[b, 0]:
                later.append(p[b, :, t, 0])
                visible = t + 1 if ids is None else int((ids[b, : t + 1] == ids[b, t]).sum())
                uniform.append(1 / visible if window is None or t < window else 0)
    torch.testing.assert_close(seen.first_token.double(), torch.stack(later).mean(dim=0), rtol=1e-5, atol=1e-6)
    importance = torch.stack([*own, *later]).mean(dim=0)
    torch.testing.assert_close(seen.first_token_importance.double(), importance, rtol=1e-5, atol=1e-6)
    assert seen.first_token_uniform.item() == pytest.approx(sum(uniform) / len(uniform), rel=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_long_batches_are_sampled(packed: bool, attention: Callable[..., Attention]) -> None:
    """The same numbers from the sampled queries of the first sequences; the others have no say."""
    length, batch = MAX_QUERIES * 2 - 5, MAX_SEQUENCES + 2
    module, x = attention(), torch.randn(batch, length, D)
    ids = documents(length, batch) if packed else None
    at = torch.arange(0, length, 2)
    seen = observe(module, x, ids)
    kept = None if ids is None else ids[:MAX_SEQUENCES]
    p = probabilities(module, x[:MAX_SEQUENCES], kept).detach()
    entropy = -torch.where(p > 0, p * p.log(), 0.0).sum(dim=-1)[..., at].mean(dim=(0, 2))
    torch.testing.assert_close(seen.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    same = torch.ones(MAX_SEQUENCES, length, dtype=torch.bool) if kept is None else kept == kept[:, :1]
    picked = same[:, at] & (at > 0)
    first = (p[:, :, at, 0] * picked[:, None]).sum(dim=(0, 2)) / picked.sum()
    torch.testing.assert_close(seen.first_token.double(), first, rtol=1e-5, atol=1e-6)
    num_later = same[:, 1:].sum()
    importance = (MAX_SEQUENCES + num_later * first) / (MAX_SEQUENCES + num_later)
    torch.testing.assert_close(seen.first_token_importance.double(), importance, rtol=1e-5, atol=1e-6)
    x[MAX_SEQUENCES:] = 0
    again = observe(module, x, ids)
    assert all(torch.equal(one, other) for one, other in zip(seen, again, strict=True))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 1000, 2048, 2049])
def test_sampled_positions_are_even_and_reach_the_end(length: int) -> None:
    at = torch.arange(length)[sampled_positions(length)]
    gaps = at.diff(append=torch.tensor([length]))
    assert at[0] == 0
    assert (gaps[:-1] == gaps[:1]).all()
    assert gaps[-1] <= gaps[0]
    assert min(length, MAX_QUERIES / 2) <= at.numel() <= MAX_QUERIES


def test_the_means_of_ranks_are_those_of_all_their_sequences(attention: Callable[..., Attention]) -> None:
    """Documents of unequal lengths; one rank's sample has no later query."""
    module, x = attention(softmax="learnable_sink"), torch.randn(2, 70, D)
    ids = torch.stack([torch.arange(70) // 40, (torch.arange(70) > 1).long()])
    p = probabilities(module, x, ids).detach()
    watches = []
    for rank in range(2):
        packed = Documents(ids[rank : rank + 1])
        output = module(x[rank : rank + 1], rotary_table(70, 6, 10_000.0, CPU), packed, observe=True)
        watches.append(AttentionWatch(module.config.gate, x[rank : rank + 1, :, 0], packed, copies=False))
        watches[-1].see(output.sample)
    each = [watch.read() for watch in watches]
    assert each[1].first_token_AH.isnan().all()
    both = AttentionObservations._make(torch.stack(field).mean(dim=0) for field in zip(*each, strict=True))
    at = torch.arange(3, 40, 3)
    assert int(both.num_sampled * 2) == len(at)
    first = p[0, :, at, 0].mean(dim=1)
    torch.testing.assert_close(both.first_token_AH[0].double(), first, rtol=1e-5, atol=1e-6)
    importance = (p[:, :, 0, 0].sum(dim=0) + 40 * first) / (2 + 40)
    torch.testing.assert_close(both.first_token_importance_AH[0].double(), importance, rtol=1e-5, atol=1e-6)
    assert both.first_token_uniform_A.unique().item() == pytest.approx(float((1 / (at + 1)).mean()), rel=1e-6)


def test_views_are_kept_or_copies(attention: Callable[..., Attention]) -> None:
    """A copy lets go of the batch."""
    module, x = attention(), torch.randn(5, 70, D)
    sample = module(x, rotary_table(70, 6, 10_000.0, CPU), None, observe=True).sample
    for copies in (False, True):
        watch = AttentionWatch(module.config.gate, x[..., 0], None, copies=copies)
        watch.see(sample)
        (kept,) = watch._pending
        for part, whole in zip(kept, sample, strict=True):
            if part is not None:
                shared = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
                assert shared != copies


def test_uniform_attention_is_the_floor(attention: Callable[..., Attention]) -> None:
    """Keys of zero: F-Attn is (H_T - 1) / (T - 1) with H_T the harmonic number, entropy the mean of ln(t + 1)."""
    module = attention(qk_norm=False, gate={"kind": "none"})
    nn.init.zeros_(module.wk.weight)
    seen = observe(module, torch.randn(2, 31, D), None)
    harmonic = sum(1 / t for t in range(1, 32))
    expected = torch.full((H,), (harmonic - 1) / 30)
    torch.testing.assert_close(seen.first_token, expected)
    assert seen.first_token_uniform.item() == pytest.approx((harmonic - 1) / 30)
    torch.testing.assert_close(seen.first_token_importance, torch.full((H,), harmonic / 31))
    torch.testing.assert_close(seen.entropy, torch.arange(1, 32).float().log().mean().expand(H))
    assert seen.gate_mean is None


@pytest.mark.parametrize("length", [1, 63])
def test_without_later_queries_there_is_no_first_token_share(length: int, attention: Callable[..., Attention]) -> None:
    seen = observe(attention(), torch.randn(2, length, D), torch.arange(length).expand(2, -1))
    assert seen.first_token.isnan().all()
    assert seen.first_token_uniform.isnan()
    assert torch.equal(seen.entropy, torch.zeros(H))


GATES: dict[str, dict[str, Any]] = {
    "elementwise": {"kind": "sdpa_output"},
    "headwise": {"kind": "sdpa_output", "granularity": "headwise"},
    "value": {"kind": "value"},
    "shared": {"kind": "query", "heads": "shared"},
    "dense_output": {"kind": "dense_output"},
    "silu": {"kind": "sdpa_output", "activation": "silu"},
    "constant": {"kind": "sdpa_output", "input": "constant"},
    "ns_sigmoid": {"kind": "sdpa_output", "activation": "ns_sigmoid"},
    "identity": {"kind": "sdpa_output", "activation": "identity"},
}
VALUES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": lambda z: z * z.sigmoid(),
    "ns_sigmoid": lambda z: (1 + z.sigmoid()) / 2,
    "identity": lambda z: z,
}


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES.keys())
def test_gate_fields(gate: dict[str, Any], attention: Callable[..., Attention]) -> None:
    module, x = attention(gate=gate), 3 * torch.randn(2, 31, D)
    assert module.gate is not None
    if module.gate.constant is not None:
        nn.init.normal_(module.gate.constant, -1.0, 2.0)
        scores = module.gate.constant.expand(2, 31, -1)
    else:
        scores = x @ module.gate.projection.weight.T
    values = scores.double().view(2, 31, module.gate.num_heads, -1)
    values = VALUES[gate.get("activation", "sigmoid")](values)
    if gate.get("heads") == "shared":
        values = values.mean(dim=2, keepdim=True)
    seen = observe(module, x, None)
    torch.testing.assert_close(seen.gate_mean.double(), values.mean(dim=(0, 1, 3)), rtol=1e-5, atol=1e-6)
    closed = (values < 0.1).double().mean(dim=(0, 1, 3))
    torch.testing.assert_close(seen.gate_closed.double(), closed, rtol=1e-5, atol=1e-6)
    assert gate.get("heads") == "shared" or (closed > 0).any() or gate.get("activation") == "ns_sigmoid"
    assert seen.gate_bins is not None
    low, high = (-2.0, 2.0) if gate.get("activation") in ("silu", "identity") else (0.0, 1.0)
    inside = values.detach().clamp(low, high)  # the outer bins have no end
    counts, _ = np.histogram(inside.numpy(), bins=20, range=(low, high))
    np.testing.assert_allclose(seen.gate_bins, counts / counts.sum(), atol=1e-6)
    if low == 0:
        assert seen.gate_bins[:2].sum() == pytest.approx(float(closed.mean()), abs=1e-6)


def test_additive_gates_have_no_opening(attention: Callable[..., Attention]) -> None:
    seen = observe(attention(gate={"kind": "sdpa_output", "form": "additive"}), torch.randn(2, 31, D), None)
    assert seen.gate_mean is None
    assert seen.gate_closed is None
    assert seen.gate_bins is None
    assert seen.entropy.isfinite().all()


def hidden_states(model: Decoder, tokens: torch.Tensor, packed: Documents | None) -> list[torch.Tensor]:
    """What each block reads."""
    context = RouterContext.alone(torch.ones_like(tokens, dtype=torch.bool))._replace(documents=packed)
    states = [model.embedding.weight[tokens]]
    for block in model.blocks:
        table = rotary_table(tokens.shape[1], block.attention.config.head_dim, 10_000.0, CPU)
        out = block(states[-1], None, table, context)
        states.append(out.h_BTD + out.y_BTD)
    return states


@pytest.mark.parametrize("softmax", ["plain", "off_by_one", "learnable_sink"])
@pytest.mark.parametrize("layers_at_once", [1, 2, 5])
def test_chunks_of_layers_are_layers_alone(
    layers_at_once: int, softmax: str, model_config: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_logits = MAX_SEQUENCES * 4 * MAX_QUERIES * 63
    monkeypatch.setattr(observations, "MAX_LOGIT_BYTES", 4 * num_logits * layers_at_once + 3)
    sizes = []

    def counted(samples: list[Any], *rest: Any, observe_layers: Any = observations._observe) -> Any:
        sizes.append(len(samples))
        return observe_layers(samples, *rest)

    monkeypatch.setattr(observations, "_observe", counted)
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "softmax": softmax}
    model = materialize(partial(Decoder, model_config(num_layers=5, init_std=0.3, attention=heads)), CPU, seed=3)
    if softmax == "learnable_sink":
        for block in model.blocks:
            nn.init.normal_(block.attention.sink)
    tokens, labels = torch.randint(101, (2, 3, 63)).unbind()
    seen = model(tokens, labels, torch.ones(3, 63, dtype=torch.bool), documents(63, 3), observe="all").attention
    assert sizes == {1: [1] * 5, 2: [2, 2, 1], 5: [5]}[layers_at_once]
    states = hidden_states(model, tokens, Documents(documents(63, 3)))
    for layer, block in enumerate(model.blocks):
        alone = observe(block.attention, block.attention_norm(states[layer]), documents(63, 3))
        for name, one, stacked in zip(Layer._fields, alone, layer_of(seen, layer), strict=True):
            torch.testing.assert_close(stacked, one, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["sdpa_output", "value"])
def test_exported_layers_may_have_different_heads(kind: str, model_config: Callable[..., ModelConfig]) -> None:
    """Layers of equal shapes join, the others stand alone; missing heads are NaN."""
    fields = {
        "num_layers": 4,
        "init_std": 0.3,
        "attention": {"num_heads": 6, "num_kv_heads": 3, "head_dim": 6, "gate": {"kind": kind}},
        "units": {"over": ["heads"], "keep": 0.5, "method": {"kind": "random"}},
    }
    model = materialize(partial(Decoder, model_config(**fields)), CPU, seed=3)
    assert model.units is not None
    kept = ((0,), (0, 1, 5), (0, 1, 5), (0, 2, 4))
    mask_LH = torch.zeros(4, 6)
    for layer, heads in enumerate(kept):
        mask_LH[layer, list(heads)] = 1
    smaller = export(model, mask_LH.flatten())
    tokens, labels = torch.randint(101, (2, 2, 63)).unbind()
    seen = smaller(tokens, labels, torch.ones(2, 63, dtype=torch.bool), observe="all").attention
    states = hidden_states(smaller, tokens, None)
    for layer, block in enumerate(smaller.blocks):
        alone = observe(block.attention, block.attention_norm(states[layer]), None)
        assert len(alone.entropy) == len(kept[layer])
        for one, stacked in zip(alone, layer_of(seen, layer), strict=True):
            torch.testing.assert_close(stacked[: one.numel()] if one.ndim else stacked, one)
            assert one.ndim == 0 or stacked[one.numel() :].isnan().all()


def test_of_two_passes_the_first_is_observed_and_the_largest_logit_is_of_both(
    model_config: Callable[..., ModelConfig],
) -> None:
    ffn = {"kind": "moe", "num_experts": 7, "top_k": 1, "expert_dim": 8, "router": {"kind": "thor"}}
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "qk_clip": 5.0, "qk_norm": False}
    model = materialize(partial(Decoder, model_config(attention=heads, ffn=ffn, init_std=0.5)), CPU, seed=3)
    outputs: list[AttentionOutput] = []
    for block in model.blocks:
        block.attention.register_forward_hook(lambda module, args, output: outputs.append(output))
    tokens, labels = torch.randint(101, (2, 2, 63)).unbind()
    counted = torch.ones(2, 63, dtype=torch.bool)
    seen = model(tokens, labels, counted, clock=Clock(3, 400, 0), observe="all")
    assert [output.sample is not None for output in outputs] == [True, True, False, False]
    largest = torch.stack([output.max_logit_H for output in outputs]).view(2, 2, 4).amax(dim=0)
    assert torch.equal(seen.max_logit_AH, largest)
    assert not torch.equal(largest[1], outputs[1].max_logit_H), "the second pass has a say"
    assert seen.attention is not None
    plain = model(tokens, labels, counted, clock=Clock(3, 400, 0))
    assert torch.equal(plain.max_logit_AH, largest)
    assert plain.attention is None, "was not asked for"


@pytest.mark.parametrize("router", ["softmax_top_k", "sigmoid_top_k", "relu", "expert_threshold"])
def test_router_signals(router: str) -> None:
    """By their formulas; the second expert is closed where the router knows unit gates."""
    config = MoEConfig.model_validate({"num_experts": 7, "top_k": 2, "expert_dim": 8, "router": {"kind": router}})
    module = config.router.build(RouterShape(24, 7, 2, std=0.5))
    module.init_weights(Draw(0, "router"))
    counted, x = torch.rand(3, 21) < 0.7, torch.randn(63, 24)
    context = RouterContext.alone(counted)._replace(observe="routing")
    if config.capabilities.selection_bias:
        context = context._replace(log_experts=torch.where(torch.arange(7) == 1, -torch.inf, 0.0))
    routing = module(x, context)
    probs = routing.probs_NE.detach().double()
    probs = probs / probs.sum(dim=1, keepdim=True).clamp(min=1e-20)
    logits = x.double() @ module.weight.detach().double().T
    if config.capabilities.selection_bias:
        logits[:, 1] = 0
    chosen = probs.gather(1, routing.experts_NS)
    if routing.chosen_NS is not None:
        chosen = chosen.where(routing.chosen_NS, 0.0)
    entropy = -torch.where(probs > 0, probs * probs.log(), 0.0).sum(dim=1)
    expected = torch.stack([entropy, logits.square().sum(dim=1).sqrt(), chosen.sum(dim=1)], dim=1).view(3, 21, 3)
    expected = torch.where(counted.unsqueeze(-1), expected, 0.0).sum(dim=1)
    seen = routing_stats(routing, context, config.capabilities).signals_B3
    torch.testing.assert_close(seen.double(), expected, rtol=1e-5, atol=1e-5)


WAITS = {"_local_scalar_dense", "lift_fresh", "lift_fresh_copy", "nonzero", "scalar_tensor", "equal", "is_nonzero"}
"""Reads on the host, or tensors made of host numbers: on a GPU one waits for the other."""


class Dispatched(TorchDispatchMode):
    """Names of the operations that run, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in WAITS or not func.is_view:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


SINKS = {"softmax": "learnable_sink", "qk_clip": 5.0, "qk_norm": False}


@pytest.mark.parametrize(
    ("kernels", "attention", "packed", "of_a_router"),
    [
        ("triton", {}, True, 0),
        ("reference", {}, True, 9),
        ("reference", {}, False, 9),
        ("reference", SINKS, True, 9),
        ("reference", SINKS, False, 9),
    ],
)
def test_observing_a_step_is_few_operations_and_no_wait(
    kernels: Any, attention: dict[str, Any], packed: bool, of_a_router: int, model_config: Callable[..., ModelConfig]
) -> None:
    """On a GPU an operation of this size costs its launch, and one that the host waits for costs the queue."""
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6} | attention
    tokens, labels = torch.randint(101, (2, 1, 15)).unbind()
    counted, ids = torch.ones(1, 15, dtype=torch.bool), documents(15, 1) if packed else None
    domains, weights = torch.zeros(1, dtype=torch.int64), counted.float().sum(dim=1)

    def step(model: Decoder, micro_batches: int, observer: Observer | None) -> Counter[str]:
        with chosen(kernels), Dispatched() as seen:
            for index in range(micro_batches):
                observe: Any = None if observer is None else ("routing" if index else "all")
                output = model(tokens, labels, counted, ids, observe=observe)
                if observer is not None:
                    observer.add(output, weights, domains)
            if observer is not None:
                observer.vector()
        return Counter(seen.names)

    added: dict[tuple[int, int], int] = {}
    for layers, micro_batches in ((1, 1), (1, 2), (3, 1)):
        model = materialize(partial(Decoder, model_config(num_layers=layers, attention=heads)), CPU, seed=3)
        step(model, 1, Observer(("a", "b"), 3, range(layers), 0, 1))  # fills the caches
        observer = Observer(("a", "b"), 3, range(layers), 0, 1)
        plain, observed = (step(model, micro_batches, o) for o in (None, observer))
        more = observed - plain  # on a CPU the experts' counts are read in every pass
        assert WAITS.isdisjoint(more), more
        added[layers, micro_batches] = more.total()
    # The stream after a block is not at hand otherwise: the next norm adds it up. Its largest is one more.
    assert added[3, 1] - added[1, 1] <= 2 * (2 + of_a_router), "of a layer"
    assert added[1, 2] - added[1, 1] <= 2 + of_a_router, "of a later micro-batch"
    assert added[1, 1] <= 62 + of_a_router, "of a step"


@pytest.mark.parametrize("qk_clip", [None, 1e9])
@pytest.mark.parametrize("blocks", [(1, 2, 3), ()])
def test_blocks_of_a_hybrid_keep_their_numbers(
    blocks: tuple[int, ...], qk_clip: float | None, model_config: Callable[..., ModelConfig]
) -> None:
    heads = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "num_value_heads": 4,
        "head_dim": 6,
        "qk_norm": False,
        "qk_clip": qk_clip,
    }
    local = {"kind": "sliding_window", "window": 3}
    mixers: dict[str, Any] = {"kda": {"kind": "kda", "num_heads": 2, "key_dim": 6, "value_dim": 10}}
    mixers |= {"local": local, "best": {"kind": "dynamic_mask", "keep": 3}} if blocks else {}
    layers = ", ".join(
        {1: "attention", 2: "local", 3: "best"}[block] if block in blocks else "kda" for block in range(4)
    )
    config = model_config(num_layers=4, attention=heads, mixers=mixers, layers=layers)
    assert tuple(config.windows) == blocks
    model = materialize(partial(Decoder, config), CPU, seed=3)
    tokens, counted = torch.randint(101, (2, 20)), torch.ones(2, 20, dtype=torch.bool)
    observer = Observer(("a",), 3, blocks, 0, 1)
    observer.add(model(tokens, tokens, counted, observe="all"), torch.ones(2), torch.zeros(2, dtype=torch.int64))
    metrics = observer.metrics(observer.vector())
    assert {name for name in metrics if name.endswith("/entropy")} == {f"attention/{b}/entropy" for b in blocks}
    clipped = {f"attention/{b}/max_logit" for b in blocks} if qk_clip else set()
    assert {name for name in metrics if name.endswith("max_logit")} == clipped
    assert {name for name in metrics if name.startswith("hidden/")} == {
        *(f"hidden/{block}/max" for block in range(4)),
        "hidden/max_mean",
    }
    assert ("attention/sink_heads" in metrics) == bool(blocks)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_decoder_stacks_layers_and_observing_changes_nothing(
    recompute: bool, model_config: Callable[..., ModelConfig]
) -> None:
    config = model_config(init_std=0.3, attention={"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "qk_norm": False})
    model = materialize(partial(Decoder, config, recompute=recompute), CPU, seed=3)
    tokens, labels = torch.randint(101, (2, 2, 63)).unbind()
    counted, ids = torch.rand(2, 63) < 0.7, documents(63, 2)
    plain, seen = model(tokens, labels, counted, ids), model(tokens, labels, counted, ids, observe="all")
    assert plain.attention is None
    assert seen.attention is not None
    assert torch.equal(plain.nll_B, seen.nll_B)
    gradients = [torch.autograd.grad(o.nll, list(model.parameters())) for o in (plain, seen)]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    states = hidden_states(model, tokens, Documents(ids))
    for layer, block in enumerate(model.blocks):
        alone = observe(block.attention, block.attention_norm(states[layer]), ids)
        for one, stacked in zip(alone, layer_of(seen.attention, layer), strict=True):
            torch.testing.assert_close(stacked, one, rtol=1e-5, atol=1e-6)
    largest = torch.stack([h.abs().amax() for h in states[1:]])
    assert torch.equal(seen.max_hidden_A, largest)
    routing = model(tokens, labels, counted, ids, observe="routing")
    assert torch.equal(routing.stats.signals_B3, seen.stats.signals_B3)
    assert routing.attention is None
    assert routing.max_hidden_A is None
    assert plain.stats.signals_B3 is None
