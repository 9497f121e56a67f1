"""The whole model on Triton kernels against the model on plain PyTorch: losses, telemetry and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tidegate.model.decoder import Decoder, DecoderOutput, ModelConfig, materialize
from tidegate_kernels.choice import Kernels, chosen

CONFIG: dict[str, Any] = {
    "vocab_size": 99,
    "width": 24,
    "num_layers": 2,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "ffn": {"kind": "moe", "num_experts": 5, "top_k": 2, "expert_dim": 16, "shared": {"num": 1}},
}
EXPERTS = {"place", "moe_experts"}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the interpreter's
ALWAYS = {"rms_norm", "linear_cross_entropy"}
CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "default": ({}, {"router_topk", "gated_attention", "qk_norm_rope", *EXPERTS}),
    "sigmoid_and_sink": (
        {"ffn": {"router": {"kind": "sigmoid_top_k"}}, "attention": {"softmax": "learnable_sink"}},
        {"router_topk", "gated_attention", *EXPERTS},
    ),
    "headwise_without_norm": (
        {"attention": {"gate": {"kind": "sdpa_output", "granularity": "headwise"}, "qk_norm": False}},
        {"router_topk", "gated_attention", "qk_norm_rope", *EXPERTS},
    ),
    "additive_value_gate": (
        {"attention": {"gate": {"kind": "value", "form": "additive", "activation": "silu"}}},
        {"gated_output", "gated_attention"},
    ),
    "ragged": ({"ffn": {"router": {"kind": "top_p"}}}, {"gated_attention", *EXPERTS}),
    "poly_norm": ({"ffn": {"activation": "poly_norm"}}, {"place", "fan_out", "combine", "poly_norm"}),
    "uneven": ({"ffn": {"sizes": [{"num": 1, "times": 2}, {"num": 3, "times": 1}, {"num": 1, "times": 0}]}}, EXPERTS),
    "dense": ({"ffn": {"kind": "dense", "hidden_dim": 40}}, {"swiglu"}),
    "gated_norm": ({"norm": {"kind": "gated"}}, {"gated_output", "router_topk"}),
}


class Operations(TorchDispatchMode):
    """Names of our operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "tidegate":
            self.seen.add(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {**base}
    for name, value in changes.items():
        replaces = isinstance(value, dict) and value.get("kind", base.get(name, {}).get("kind")) == base.get(
            name, {}
        ).get("kind")
        both[name] = merged(base.get(name, {}), value) if replaces else value
    return both


def run(model: Decoder, kernels: Kernels) -> tuple[DecoderOutput, dict[str, torch.Tensor], set[str]]:
    tokens = torch.arange(2 * 64, device=DEVICE).view(2, 64) * 7 % 99
    counted = torch.ones(2, 63, dtype=torch.bool, device=DEVICE)
    counted[0, 40:] = False
    documents = torch.arange(63, device=DEVICE).div(20, rounding_mode="floor").expand(2, -1)
    model.zero_grad()
    with chosen(kernels), Operations() as operations:
        output = model(tokens[:, :-1], tokens[:, 1:], counted, documents, observe="all")
        loss = output.nll
        if output.stats is not None:
            stats = output.stats
            loss = loss + stats.prob_sums_BE.square().sum() + 1e-3 * (stats.z_sums_B.sum() + stats.penalty_sums_B.sum())
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output, gradients, operations.seen


@pytest.mark.parametrize(("changes", "operations"), CASES.values(), ids=CASES.keys())
def test_both_kernels_agree(changes: dict[str, Any], operations: set[str]) -> None:
    config = ModelConfig.model_validate(merged(CONFIG, changes))
    model = materialize(lambda: Decoder(config), DEVICE, 0)
    plain, expected, none = run(model, "reference")
    ours, actual, seen = run(model, "triton")
    assert not none, "the reference runs no kernel"
    assert operations | ALWAYS <= seen, f"not taken: {(operations | ALWAYS) - seen}"
    # fp32 everywhere; sums in another order.
    torch.testing.assert_close(ours.nll_B, plain.nll_B, rtol=1e-5, atol=1e-4)
    if plain.stats is not None:
        assert ours.stats is not None
        assert torch.equal(ours.stats.counts_BE, plain.stats.counts_BE)
        torch.testing.assert_close(ours.stats.prob_sums_BE, plain.stats.prob_sums_BE, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.stats.z_sums_B, plain.stats.z_sums_B, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(ours.stats.signals_B3, plain.stats.signals_B3, rtol=1e-5, atol=1e-4)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-3, atol=1e-5 * scale + 1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
