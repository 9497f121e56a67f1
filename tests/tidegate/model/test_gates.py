"""Attention gates: the paper's parameter counts, every variant against the formula, and the limits it names.

Letters: B batch, T tokens, D width, H heads, G key/value heads, d head width.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tidegate.config import ConfigError, load_stored
from tidegate.model import flops
from tidegate.model.attention import Attention, AttentionConfig, rotary_table
from tidegate.model.decoder import Decoder, ModelConfig, materialize
from tidegate.model.gates import AttentionGate, Gate, NoGate
from tidegate.model.initialisation import Draw
from tidegate.model.layers import Linear
from tidegate_kernels.gated_output import ACTIVATIONS

CPU = torch.device("cpu")
B, T, D = 2, 9, 12
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}

CHOICES = {name: get_args(field.annotation) for name, field in AttentionGate.model_fields.items()}


def is_allowed(choice: dict[str, str]) -> bool:
    return choice["kind"] != "dense_output" or (choice["granularity"], choice["heads"]) == ("elementwise", "specific")


ALL_CHOICES = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]
GATES = [AttentionGate.model_validate(choice) for choice in ALL_CHOICES if is_allowed(choice)]


def gate_id(gate: AttentionGate) -> str:
    return "-".join(gate.model_dump().values())


def attention(gate: AttentionGate | NoGate, **changes: object) -> Attention:
    """With initial values of 0.3, so that scores reach the bent parts of the activations."""
    config = AttentionConfig.model_validate({**HEADS, "gate": gate, **changes})
    return Attention(config, D, norm_eps=1e-6, std=0.3, out_std=0.3)


def attend(module: Attention, x_BTD: torch.Tensor) -> torch.Tensor:
    return module(x_BTD, rotary_table(x_BTD.shape[1], module.config.head_dim, 10_000.0, CPU), None)[0]


def paper_moe(gate: dict[str, str]) -> ModelConfig:
    """The 15A2B model of the paper (24 layers, 32 query and 4 key/value heads of 128)."""
    return ModelConfig.model_validate(
        {
            "vocab_size": 151_936,
            "width": 2048,
            "num_layers": 24,
            "attention": {"num_heads": 32, "num_kv_heads": 4, "head_dim": 128, "gate": gate},
            "ffn": {"kind": "moe", "num_experts": 128, "top_k": 8, "expert_dim": 768},
        }
    )


@pytest.mark.parametrize(
    ("gate", "added"),
    [
        ({"kind": "sdpa_output"}, 201_326_592),
        ({"kind": "sdpa_output", "granularity": "headwise"}, 1_572_864),
        ({"kind": "sdpa_output", "heads": "shared"}, 201_326_592),
        ({"kind": "value"}, 25_165_824),
        ({"kind": "value", "granularity": "headwise"}, 196_608),
        ({"kind": "value", "heads": "shared"}, 25_165_824),
        ({"kind": "key"}, 25_165_824),
        ({"kind": "query"}, 201_326_592),
        ({"kind": "dense_output"}, 100_663_296),
        ({"kind": "sdpa_output", "input": "constant"}, 24 * 32 * 128),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else str(value),
)
def test_parameters_of_the_papers_table(gate: dict[str, str], added: int) -> None:
    """Table 1 of arXiv 2505.06708, column "added parameters", before it was rounded to millions."""
    config, plain = paper_moe(gate), paper_moe({"kind": "none"})
    rows = [row for row in flops.costs(config, 4096) if row.field.startswith("attention.gate")]
    assert [row.params for row in rows] == [added]
    assert flops.total(config, 4096).params - flops.total(plain, 4096).params == added
    with torch.device("meta"):
        gated, ungated = Decoder(config), Decoder(plain)
    assert sum(p.numel() for p in gated.parameters()) - sum(p.numel() for p in ungated.parameters()) == added
    gates = [module for module in gated.modules() if isinstance(module, Gate)]
    assert len(gates) == 24
    assert sum(p.numel() for module in gates for p in module.parameters()) == added


def test_no_gate_costs_nothing() -> None:
    config = paper_moe({"kind": "none"})
    assert not [row for row in flops.costs(config, 4096) if "gate" in row.field]
    with torch.device("meta"):
        assert not [module for module in Decoder(config).modules() if isinstance(module, Gate)]


def test_choices_are_those_of_the_code() -> None:
    assert CHOICES["kind"] == ("sdpa_output", "value", "key", "query", "dense_output")
    assert set(CHOICES["activation"]) == ACTIVATIONS.keys()
    assert len(GATES) == 4 * 2 * 2 * 2 * len(ACTIVATIONS) * 2 + 2 * len(ACTIVATIONS) * 2


@pytest.mark.parametrize("gate", GATES, ids=gate_id)
def test_every_gate(
    gate: AttentionGate, initialise: Callable[..., nn.Module], exact_attention: Callable[..., Any]
) -> None:
    """Output and every gradient equal the fp64 formula, and the gate does something."""
    module = attention(gate)
    initialise(module)
    assert module.gate is not None
    if module.gate.constant is not None:
        nn.init.normal_(module.gate.constant)  # additive identity and SiLU do nothing at the initial zero
    x, g = torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D)
    out = attend(module, x)
    out.backward(g)

    exact = exact_attention(module, x, g)
    # fp32 against fp64: rounding of 6e-8 through some 50 additions of numbers up to 30.
    torch.testing.assert_close(out.double(), exact.out, rtol=1e-4, atol=1e-5)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), exact.x_grad, rtol=1e-4, atol=1e-4)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        torch.testing.assert_close(parameter.grad.double(), exact.grads[name], rtol=1e-3, atol=1e-4)
    for name, parameter in module.gate.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-3, f"the gate's {name} gets no gradient"

    plain = attention(NoGate())
    plain.load_state_dict({name: t for name, t in module.state_dict().items() if not name.startswith("gate.")})
    assert (attend(plain, x) - out).abs().max() > 1e-2


@pytest.mark.parametrize("granularity", CHOICES["granularity"])
@pytest.mark.parametrize("heads", CHOICES["heads"])
def test_zero_projection_halves_attention(heads: str, granularity: str, initialise: Callable[..., nn.Module]) -> None:
    gated = attention(AttentionGate.model_validate({"heads": heads, "granularity": granularity}))
    plain = attention(NoGate())
    initialise(gated)
    initialise(plain)
    assert gated.gate is not None
    assert gated.gate.projection is not None
    nn.init.zeros_(gated.gate.projection.weight)
    x = torch.randn(B, 63, D)
    assert torch.equal(attend(gated, x), 0.5 * attend(plain, x))
    with torch.no_grad():
        gated.wo.weight.mul_(2)
    assert torch.equal(attend(gated, x), attend(plain, x))


def test_half_open_gate_with_doubled_output_is_the_ungated_model(model_config: Callable[..., ModelConfig]) -> None:
    """Powers of two round nothing, so loss, statistics and gradients are equal to the last bit."""
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
    gated = materialize(lambda: Decoder(model_config(attention=heads)), CPU, seed=5)
    plain = materialize(lambda: Decoder(model_config(attention={**heads, "gate": {"kind": "none"}})), CPU, seed=5)
    with torch.no_grad():
        for block in gated.blocks:
            block.attention.gate.projection.weight.zero_()
            block.attention.wo.weight.mul_(2)
    tokens = torch.randint(101, (2, 63))
    results = [model(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool)) for model in (gated, plain)]
    assert torch.equal(results[0].nll_B, results[1].nll_B)
    for one, other in zip(results[0].stats[:4], results[1].stats[:4], strict=True):
        assert torch.equal(one, other)
    for result in results:
        result.nll.backward()
    assert torch.equal(gated.embedding.weight.grad, plain.embedding.weight.grad)


@pytest.mark.parametrize("kind", ["sdpa_output", "value", "key", "query"])
@pytest.mark.parametrize("source", CHOICES["input"])
def test_headwise_is_elementwise_with_tied_columns(
    source: str, kind: str, initialise: Callable[..., nn.Module]
) -> None:
    one = attention(AttentionGate.model_validate({"kind": kind, "input": source, "granularity": "headwise"}))
    each = attention(AttentionGate.model_validate({"kind": kind, "input": source}))
    initialise(one)
    d = HEADS["head_dim"]
    state = one.state_dict()
    name = "gate.projection.weight" if source == "hidden" else "gate.constant"
    one.load_state_dict(state | {name: torch.randn_like(state[name])})
    each.load_state_dict(one.state_dict() | {name: one.state_dict()[name].repeat_interleave(d, dim=0)})
    x = torch.randn(B, T, D)
    torch.testing.assert_close(attend(each, x), attend(one, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", CHOICES["granularity"])
def test_shared_gate_is_the_mean_over_heads(granularity: str) -> None:
    H, d = 3, 5
    gates = [
        Gate(AttentionGate.model_validate({"heads": heads, "granularity": granularity}), D, H, d, std=0.3)
        for heads in ("specific", "shared")
    ]
    assert gates[0].projection is not None
    gates[0].projection.init_weights(Draw(0, "gate"))
    gates[1].load_state_dict(gates[0].state_dict())
    x, ones = torch.randn(B, 63, D), torch.ones(B, 63, H, d)
    specific, shared = (gate(ones, gate.scores(x)) for gate in gates)
    torch.testing.assert_close(shared, specific.mean(dim=2, keepdim=True).expand_as(shared), rtol=1e-6, atol=1e-7)
    assert (specific.amax(dim=2) - specific.amin(dim=2)).max() > 0.1


@pytest.mark.parametrize("granularity", CHOICES["granularity"])
def test_constant_gate_starts_half_open_whatever_the_input(granularity: str) -> None:
    gate = Gate(AttentionGate.model_validate({"input": "constant", "granularity": granularity}), D, 3, 5, std=0.3)
    gate.init_weights(Draw(0, "gate"))
    y = torch.randn(B, 63, 3, 5)
    for scale in (0.0, 1.0, 100.0):
        assert torch.equal(gate(y, gate.scores(scale * torch.randn(B, 63, D))), 0.5 * y)
    assert [parameter.numel() for parameter in gate.parameters()] == [15 if granularity == "elementwise" else 3]


def test_a_hidden_gate_starts_near_half_open() -> None:
    gate = Gate(AttentionGate(), 256, 4, 16, std=0.02)
    assert isinstance(gate.projection, Linear)
    gate.projection.init_weights(Draw(0, "gate.projection"))
    open_by = gate(torch.ones(1, 1000, 4, 16), gate.scores(torch.randn(1, 1000, 256)))
    # Scores are N(0, 256 * 0.02^2): 0.32 wide, of which the sigmoid makes a quarter.
    assert abs(open_by.mean() - 0.5) < 0.005
    assert open_by.std().item() == pytest.approx(0.08, abs=0.01)


@pytest.mark.parametrize(
    "choice", [c for c in ALL_CHOICES if not is_allowed(c)][::8], ids=lambda c: "-".join(c.values())
)
def test_dense_output_takes_no_heads(choice: dict[str, str]) -> None:
    named = [f"granularity={choice['granularity']}", f"heads={choice['heads']}", "kind=dense_output"]
    with pytest.raises(ValidationError) as invalid:
        AttentionGate.model_validate(choice)
    config = {**HEADS, "gate": choice}
    with pytest.raises(ConfigError) as user_error:
        load_stored(json.dumps(config), AttentionConfig, "job.yaml")
    for words in named:
        assert words in str(invalid.value)
        assert words in str(user_error.value)
    assert "gate" in str(user_error.value)


@pytest.mark.parametrize("gate", [AttentionGate(), AttentionGate(kind="value", granularity="headwise")], ids=gate_id)
def test_bf16_attention_gates_in_fp32(
    gate: AttentionGate, initialise: Callable[..., nn.Module], attention_formula: Callable[..., torch.Tensor]
) -> None:
    """bf16 in, bf16 out, at most twice the error of the whole formula in bf16."""
    module = attention(gate)
    initialise(module)
    module.bfloat16()
    x = torch.randn(B, 63, D).bfloat16()
    exact = attention_formula(module.config, {n: p.double() for n, p in module.named_parameters()}, x.double())
    out = attend(module, x)
    assert out.dtype == torch.bfloat16
    reference = attention_formula(module.config, dict(module.named_parameters()), x)
    error, allowed = ((t.double() - exact).square().mean().sqrt() for t in (out, reference))
    assert error <= 2 * allowed
