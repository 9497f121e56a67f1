"""Parameters, active parameters and FLOPs per token, from the config alone.

Counting conventions: a multiply-add is 2 FLOPs; training costs 3 times the forward pass (backward is twice it);
causal attention counts half of the score matrix; embedding look-ups are free; the expert share counts the K chosen
experts and the shared ones. `flops_per_token` is "model FLOPs": recomputed activations and counting passes do not
count, so MFU falls when they are used. Unit gates mask, they do not skip: a masked model costs what the whole one does,
and what a mask saves shows in the exported model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tidegate.model.activations import NUM_COEFFICIENTS, ActivationName, has_coefficients, num_matrices
from tidegate.model.attention import AttentionConfig
from tidegate.model.decoder import ModelConfig, unit_gates_on_meta
from tidegate.model.gates import NoGate
from tidegate.model.mixers import DynamicMaskConfig, GAMConfig, GMUConfig, LinearMixerConfig, Place
from tidegate.model.moe import MoEConfig
from tidegate.model.norms import GatedNormConfig, PreAffineNormConfig
from tidegate.model.routers import RouterShape
from tidegate.model.routers.decoupled import DecoupledRouter

__all__ = ["PEAK_BF16_FLOPS", "Cost", "costs", "kv_cache_bytes", "state_bytes", "total"]

PEAK_BF16_FLOPS = {
    "NVIDIA H100 80GB HBM3": 989.4e12,  # SXM
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA A100": 312e12,
}
"""Dense bf16 peak of a device by the beginning of its name, FLOP/s (data sheets); what MFU is measured against."""


class Cost(NamedTuple):
    """What one field of the model config costs."""

    field: str
    params: int
    active_params: int
    """Parameters that one token multiplies with."""
    flops_per_token: float
    """Training FLOPs (forward and backward) per token at the given sequence length."""


def costs(config: ModelConfig, sequence_length: int) -> list[Cost]:
    """One row a field, summed over layers."""
    L, D, V = config.num_layers, config.width, config.vocab_size
    rows = [Cost("vocab_size (embedding)", V * D, 0, 0.0)]
    rows += _attention(config, sequence_length)
    rows += [row for name, mixer in _linear_mixers(config) for row in _linear(config, name, mixer)]
    rows += [_bank(config, name, mixer) for name, mixer in _banks(config)]
    rows += [_memory_units(config, name) for name, mixer in config.mixers.items() if isinstance(mixer, GMUConfig)]
    rows += [_biases(config, name) for name, _ in _masks(config)]
    rows += _norms(config)
    if isinstance(config.ffn, MoEConfig):
        rows += _routers(config, sequence_length)
        rows += [_scaled(row, L) for row in _moe(config.ffn, D)]
    else:
        rows.append(_scaled(_feed_forward("ffn.hidden_dim", config.ffn.activation, D, config.ffn.hidden_dim), L))
    head = _matrix("tie_embeddings (head)", V * D)
    rows.append(head._replace(params=0) if config.tie_embeddings else head)
    if config.units is not None:
        gates = sum(parameter.numel() for parameter in unit_gates_on_meta(config).parameters())
        rows.append(Cost(f"units ({config.units.method.kind})", gates, 0, 0.0))
    return rows


def total(config: ModelConfig, sequence_length: int) -> Cost:
    """The sum of `costs`."""
    rows = costs(config, sequence_length)
    return Cost(
        "total",
        sum(row.params for row in rows),
        sum(row.active_params for row in rows),
        sum(row.flops_per_token for row in rows),
    )


def kv_cache_bytes(config: ModelConfig) -> int:
    """Of keys and values a token of context at inference, in bf16; cross attention has none of its own."""
    whole = sum(window is None for window in config.windows.values())
    return _kv_bytes(config) * (whole - len(config.cross_attention))


def state_bytes(config: ModelConfig) -> int:
    """A sequence at inference, whatever its length: states of linear mixers, keys and values of windows in bf16.

    A dynamic mask keeps its best keys alone: what a query does not see, no later one does; their biases are fp32.
    """
    states = sum(config.schedule.count(name) * mixer.state_bytes() for name, mixer in _linear_mixers(config))
    states += sum(config.schedule.count(name) * mixer.state_bytes(config.width) for name, mixer in _banks(config))
    keeps = (config.schedule.count(name) * mixer.keep for name, mixer in _masks(config))
    states += 4 * config.attention.value_heads * sum(keeps)
    return states + _kv_bytes(config) * sum(window or 0 for window in config.windows.values())


def _kv_bytes(config: ModelConfig) -> int:
    """Of a token and block, in bf16."""
    return 2 * (config.attention.num_kv_heads + config.attention.value_heads) * config.attention.head_dim


def _matrix(field: str, params: int) -> Cost:
    return Cost(field, params, params, 6.0 * params)


def _scaled(row: Cost, times: int) -> Cost:
    return Cost(row.field, row.params * times, row.active_params * times, row.flops_per_token * times)


def _norms(config: ModelConfig) -> list[Cost]:
    num, D = 2 * config.num_layers + 1, config.width
    vectors = num * D * (2 if isinstance(config.norm, PreAffineNormConfig) else 1)
    if config.attention.qk_norm:
        vectors += (2 * len(config.windows) - len(config.cross_attention)) * config.attention.head_dim
    rows = [Cost("norms", vectors, vectors, 0.0)]
    if isinstance(config.norm, GatedNormConfig):
        rows.append(_matrix("norm.rank", num * 2 * D * config.norm.rank))
    return rows


def _feed_forward(field: str, activation: ActivationName, D: int, hidden_dim: int) -> Cost:
    row = _matrix(field, num_matrices(activation) * D * hidden_dim)
    coefficients = NUM_COEFFICIENTS if has_coefficients(activation) else 0
    return row._replace(params=row.params + coefficients, active_params=row.active_params + coefficients)


def _attention(config: ModelConfig, sequence_length: int) -> list[Cost]:
    """All blocks that attend; of a window only the keys that a query sees count."""
    windows, H, d = config.windows.values(), config.attention.num_heads, config.attention.head_dim
    nearest = (min(window or sequence_length, sequence_length) for window in windows)
    # 2 products of 2 FLOPs and 3 passes for each key: half of T in the mean, or a window less its first half.
    keys = sum(window * (1 - window / (2 * sequence_length)) for window in nearest)
    queries, own, *rest = _projections(config.attention, config.width)
    scores = Cost("attention (scores)", 0, 0, 12.0 * keys * H * d)
    own = _scaled(own, len(windows) - len(config.cross_attention))
    return [_scaled(queries, len(windows)), own, scores, *(_scaled(row, len(windows)) for row in rest)]


def _projections(config: AttentionConfig, D: int) -> list[Cost]:
    """A block's, and what else of it has parameters."""
    H, G, V, d = config.num_heads, config.num_kv_heads, config.value_heads, config.head_dim
    rows = [
        _matrix("attention.num_heads (query, output)", 2 * D * H * d),
        _matrix("attention.num_kv_heads (key, value)", D * (G + V) * d),
    ]
    if config.augmented_query is not None:
        rows.append(_feed_forward("attention.augmented_query", "swiglu", H * d, config.augmented_query))
    if config.softmax == "learnable_sink":
        rows.append(Cost("attention.softmax (sinks)", H, H, 0.0))
    gate = config.gate
    if isinstance(gate, NoGate):
        return rows
    heads, dim = config.gated_shape(D)
    out_dim = heads * (dim if gate.granularity == "elementwise" else 1)
    label = f"attention.gate ({gate.kind}, {gate.granularity})"
    return [*rows, Cost(label, out_dim, out_dim, 0.0) if gate.input == "constant" else _matrix(label, D * out_dim)]


def _linear_mixers(config: ModelConfig) -> list[tuple[str, LinearMixerConfig]]:
    return [(name, mixer) for name, mixer in config.mixers.items() if isinstance(mixer, LinearMixerConfig)]


def _banks(config: ModelConfig) -> list[tuple[str, GAMConfig]]:
    return [(name, mixer) for name, mixer in config.mixers.items() if isinstance(mixer, GAMConfig)]


def _bank(config: ModelConfig, name: str, mixer: GAMConfig) -> Cost:
    """All blocks of one GAM: its convolution, gates, and the bank, which a token multiplies with twice."""
    layers, D = config.schedule.count(name), config.width
    with torch.device("meta"):
        parameters = mixer.build(Place(D, config.norm_eps, 1.0, 1.0)).parameters()
    row = _matrix(f"mixers.{name} (gam)", sum(parameter.numel() for parameter in parameters))
    return _scaled(row._replace(flops_per_token=row.flops_per_token + 6.0 * mixer.slots * D), layers)


def _masks(config: ModelConfig) -> list[tuple[str, DynamicMaskConfig]]:
    return [(name, mixer) for name, mixer in config.mixers.items() if isinstance(mixer, DynamicMaskConfig)]


def _biases(config: ModelConfig, name: str) -> Cost:
    """All blocks of one dynamic mask: a bias of each key, from its values."""
    layers, V = config.schedule.count(name), config.attention.value_heads
    row = _matrix(f"mixers.{name} (dynamic_mask)", V * config.attention.head_dim * V)
    return _scaled(row._replace(params=row.params + V, active_params=row.active_params + V), layers)


def _memory_units(config: ModelConfig, name: str) -> Cost:
    """All blocks of one name; each has the width of the memory that it reads."""
    blocks = [block for block, each in enumerate(config.schedule) if each == name]
    sources = (config.publisher(block) for block in blocks)
    channels = sum(config.memory_channels(source) for source in sources if source is not None)
    row = _matrix(f"mixers.{name} (gmu)", 2 * config.width * channels)
    return row._replace(params=row.params + channels, active_params=row.active_params + channels)


def _linear(config: ModelConfig, name: str, mixer: LinearMixerConfig) -> list[Cost]:
    """All blocks of one linear mixer: what its matrices say, convolutions among them, and its state."""
    layers = config.schedule.count(name)
    with torch.device("meta"):
        parameters = list(mixer.build(Place(config.width, config.norm_eps, 1.0, 1.0)).parameters())
    vectors = sum(parameter.numel() for parameter in parameters if parameter.ndim < 2)
    row = _matrix(f"mixers.{name} ({mixer.kind})", sum(parameter.numel() for parameter in parameters) - vectors)
    row = row._replace(params=row.params + vectors, active_params=row.active_params + vectors)
    return [_scaled(row, layers), Cost(f"mixers.{name} (state)", 0, 0, layers * mixer.state_flops())]


def _moe(config: MoEConfig, D: int) -> list[Cost]:
    """Routed experts at an even choice among them; a ragged router holds top_k on average, once its budget is met."""
    unit = _feed_forward("ffn.num_experts, top_k", config.activation, D, config.expert_dim)
    per_token = config.top_k * config.num_slices / config.num_experts
    rows = [
        unit._replace(
            params=config.num_slices * unit.params,
            active_params=round(per_token * unit.active_params),
            flops_per_token=per_token * unit.flops_per_token,
        )
    ]
    if config.shared.num:
        rows.append(_feed_forward("ffn.shared", config.activation, D, config.shared.num * config.expert_dim))
        if config.shared.gate:
            rows.append(_matrix("ffn.shared.gate", D))
    return rows


def _routers(config: ModelConfig, sequence_length: int) -> list[Cost]:
    """The routers of all layers: what their parameters say, and for a router with attention its scores too."""
    assert isinstance(config.ffn, MoEConfig)
    with torch.device("meta"):
        shape = RouterShape(config.width, config.ffn.num_experts, config.ffn.top_k, 1.0, 0, config.vocab_size)
        router = config.ffn.router.build(shape)
    params = sum(parameter.numel() for parameter in router.parameters())
    layers = config.num_layers if config.ffn.capabilities.source_layer == "own" else 1
    row = _scaled(_matrix("ffn.router", params), layers)
    if isinstance(router, DecoupledRouter):
        scores = 6.0 * sequence_length * router.attention.config.num_heads * router.attention.config.head_dim
        row = row._replace(flops_per_token=row.flops_per_token + scores)
    return [row]
