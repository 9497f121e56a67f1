"""Parameters, active parameters and FLOPs per token, from the config alone.

Counting conventions: a multiply-add is 2 FLOPs; training costs 3 times the forward pass (backward is twice it);
causal attention counts half of the score matrix; embedding look-ups are free; the expert share counts the K chosen
experts and the shared ones. `flops_per_token` is "model FLOPs": recomputed activations and counting passes do not
count, so MFU falls when they are used.
"""

from __future__ import annotations

from typing import NamedTuple

from tidegate.model.attention import AttentionConfig
from tidegate.model.decoder import ModelConfig
from tidegate.model.gates import NoGate
from tidegate.model.moe import MoEConfig

__all__ = ["PEAK_BF16_FLOPS", "Cost", "costs", "total"]

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
    rows += [_scaled(row, L) for row in _attention(config.attention, D, sequence_length)]
    norms = 2 * L * D + D + (2 * L * config.attention.head_dim if config.attention.qk_norm else 0)
    rows.append(Cost("norms", norms, norms, 0.0))
    if isinstance(config.ffn, MoEConfig):
        rows += [_scaled(row, L) for row in _moe(config.ffn, D)]
    else:
        rows.append(_scaled(_matrix("ffn.hidden_dim", 3 * D * config.ffn.hidden_dim), L))
    head = _matrix("tie_embeddings (head)", V * D)
    rows.append(head._replace(params=0) if config.tie_embeddings else head)
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


def _matrix(field: str, params: int) -> Cost:
    return Cost(field, params, params, 6.0 * params)


def _scaled(row: Cost, layers: int) -> Cost:
    return Cost(row.field, row.params * layers, row.active_params * layers, row.flops_per_token * layers)


def _attention(config: AttentionConfig, D: int, sequence_length: int) -> list[Cost]:
    H, G, d = config.num_heads, config.num_kv_heads, config.head_dim
    scores = 6.0 * sequence_length * H * d  # 2 products, half of T^2 each, times 2 FLOPs and 3 passes
    rows = [
        _matrix("attention.num_heads (query, output)", 2 * D * H * d),
        _matrix("attention.num_kv_heads (key, value)", 2 * D * G * d),
        Cost("attention (scores)", 0, 0, scores),
    ]
    gate = config.gate
    if isinstance(gate, NoGate):
        return rows
    heads, dim = gate.gated_shape(D, H, G, d)
    out_dim = heads * (dim if gate.granularity == "elementwise" else 1)
    label = f"attention.gate ({gate.kind}, {gate.granularity})"
    return [*rows, Cost(label, out_dim, out_dim, 0.0) if gate.input == "constant" else _matrix(label, D * out_dim)]


def _moe(config: MoEConfig, D: int) -> list[Cost]:
    expert = 3 * D * config.expert_dim
    rows = [
        _matrix("ffn.router", D * config.num_experts),
        Cost("ffn.num_experts, top_k", config.num_experts * expert, config.top_k * expert, 6.0 * config.top_k * expert),
    ]
    if config.shared.num:
        rows.append(_matrix("ffn.shared", config.shared.num * expert + (D if config.shared.gate else 0)))
    return rows
