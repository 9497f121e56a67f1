"""Poisoned memory, initial values large enough to matter, and attention written out in fp64.

Letters: B batch, T tokens, D width, H query heads, G key heads, V value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytest
import torch
from torch import nn

from tidegate.model.attention import AttentionConfig
from tidegate.model.decoder import Decoder, ModelConfig
from tidegate.model.gates import NoGate
from tidegate.model.initialisation import Draw
from tidegate_kernels.gated_output import ACTIVATIONS
from tidegate_kernels.rms_norm import AddedNorm


@pytest.fixture(autouse=True)
def _numerics(poisoned_memory: None, seeded_single_thread: None) -> None:
    pass


def _initialise(module: nn.Module, seed: int = 0) -> nn.Module:
    for name, child in module.named_modules():
        if hasattr(child, "init_weights") and not isinstance(child, Decoder):
            child.init_weights(Draw(seed, name))
    return module


@pytest.fixture
def initialise() -> Callable[..., nn.Module]:
    """Fill a module that is not a whole decoder, as the decoder would."""
    return _initialise


@pytest.fixture
def last_norm() -> Callable[[Decoder], list[AddedNorm]]:
    """What the last norm of a decoder returns from now on, pass by pass."""

    def watch(model: Decoder) -> list[AddedNorm]:
        seen: list[AddedNorm] = []
        add = model.norm.add

        def watched(x: torch.Tensor, residual: torch.Tensor) -> AddedNorm:
            seen.append(add(x, residual))
            return seen[-1]

        model.norm.add = watched
        return seen

    return watch


@pytest.fixture
def model_config() -> Callable[..., ModelConfig]:
    """A two-layer MoE model of odd sizes (expert widths in multiples of 16 bytes); keywords replace whole fields."""

    def make(**changes: object) -> ModelConfig:
        fields: dict[str, object] = {
            "vocab_size": 101,
            "width": 24,
            "num_layers": 2,
            "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6},
            "ffn": {"kind": "moe", "num_experts": 7, "top_k": 3, "expert_dim": 8},
        }
        return ModelConfig.model_validate(fields | changes)

    return make


def _attention_formula(
    config: AttentionConfig,
    parameters: Mapping[str, torch.Tensor],
    x_BTD: torch.Tensor,
    documents_BT: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> torch.Tensor:
    H, G, V, d = config.num_heads, config.num_kv_heads, config.num_value_heads or config.num_kv_heads, config.head_dim
    B, T, _ = x_BTD.shape

    def gated(position: str, y_BTHd: torch.Tensor) -> torch.Tensor:
        gate = config.gate
        if isinstance(gate, NoGate) or gate.kind != position:
            return y_BTHd
        if gate.input == "constant":
            scores = parameters["gate.constant"].expand(B, T, -1)
        else:
            scores = x_BTD @ parameters["gate.projection.weight"].T
        scores_BTHs = scores.reshape(B, T, y_BTHd.shape[2], -1)
        activated = ACTIVATIONS[gate.activation](scores_BTHs)
        if gate.heads == "shared":
            activated = activated.mean(dim=2, keepdim=True)
        return y_BTHd * activated if gate.form == "multiplicative" else y_BTHd + activated

    def normed(y: torch.Tensor, weight: str) -> torch.Tensor:
        return y * (y.square().mean(dim=-1, keepdim=True) + norm_eps).rsqrt() * parameters[weight]

    def rotated(y_BTHd: torch.Tensor) -> torch.Tensor:
        frequency = config.rope_theta ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
        angle = torch.arange(T, dtype=torch.float64)[:, None, None] * frequency
        first, second = y_BTHd.double().chunk(2, dim=-1)
        turned = torch.complex(first, second) * torch.exp(1j * angle)
        return torch.cat([turned.real, turned.imag], dim=-1).to(y_BTHd.dtype)

    q = x_BTD @ parameters["wq.weight"].T
    if config.augmented_query is not None:
        w1, w2, w3 = (parameters[f"augment.{name}.weight"] for name in ("w1", "w2", "w3"))
        up = q @ w1.T
        q = (up * up.sigmoid() * (q @ w3.T)) @ w2.T
    q = q.view(B, T, H, d)
    k = (x_BTD @ parameters["wk.weight"].T).view(B, T, G, d)
    v = gated("value", (x_BTD @ parameters["wv.weight"].T).view(B, T, V, d))
    if config.qk_norm:
        q, k = normed(q, "q_norm.weight"), normed(k, "k_norm.weight")
    q, k = rotated(gated("query", q)), rotated(gated("key", k))
    visible = torch.arange(T)[:, None] >= torch.arange(T)
    visible_BTT = visible.expand(B, T, T)
    if documents_BT is not None:
        visible_BTT = visible_BTT & (documents_BT[:, :, None] == documents_BT[:, None, :])
    heads = []
    for head in range(H):
        scores_BTT = q[:, :, head] @ k[:, :, head * G // H].transpose(1, 2) / d**0.5
        scores_BTT = scores_BTT.masked_fill(~visible_BTT, -torch.inf)
        if config.softmax != "plain":
            sink = parameters["sink"][head] if config.softmax == "learnable_sink" else scores_BTT.new_zeros(())
            scores_BTT = torch.cat([scores_BTT, sink.expand(B, T, 1)], dim=-1)
        heads.append(scores_BTT.softmax(dim=-1)[..., :T] @ v[:, :, head * V // H])
    y_BTHd = gated("sdpa_output", torch.stack(heads, dim=2))
    out_BTD = y_BTHd.flatten(2) @ parameters["wo.weight"].T
    return gated("dense_output", out_BTD.unsqueeze(2)).squeeze(2)


class Exact(NamedTuple):
    """What fp64 says: the output, and the gradients of the input and of every parameter."""

    out: torch.Tensor
    x_grad: torch.Tensor | None
    grads: dict[str, torch.Tensor | None]


@pytest.fixture
def exact_attention() -> Callable[..., Exact]:
    """`(module, x_BTD, upstream gradient, documents_BT) -> Exact`, by the formula written out in this file."""

    def run(module: nn.Module, x: torch.Tensor, g: torch.Tensor, ids: torch.Tensor | None = None) -> Exact:
        exact = {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
        exact_x = x.detach().double().requires_grad_()
        out = _attention_formula(module.config, exact, exact_x, ids)
        out.backward(g.double())
        return Exact(out, exact_x.grad, {name: p.grad for name, p in exact.items()})

    return run


@pytest.fixture
def attention_formula() -> Callable[..., torch.Tensor]:
    """`(config, parameters by name, x_BTD, documents_BT) -> (B, T, D)`, in the dtype of its arguments."""
    return _attention_formula
