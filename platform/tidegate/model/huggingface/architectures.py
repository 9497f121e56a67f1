"""Which of transformers' architectures computes what a decoder computes. A new one is an entry of `ARCHITECTURES`.

Two have the gate of gated attention as jobs have it by default (elementwise sigmoid after SDPA, every head its own):
Qwen3-Next with a mixture and with a dense feed-forward, all of whose layers are then softmax attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tidegate.config import ConfigError
from tidegate.model.decoder import ModelConfig

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of"]


class Architecture(NamedTuple):
    """One of transformers' causal language models."""

    name: str
    model_type: str
    needs: Mapping[str, tuple[Any, ...]]
    """Fields of `model` and the values that it can express; what is not here, it takes as it comes."""
    centred_norms: bool = False
    """Norms multiply by 1 + weight."""
    gated: bool = False
    """The query projection holds the gate's too, head by head."""
    router: str = "mlp.gate"
    """Module of a layer; so are the next two."""
    experts: str = "mlp.experts"
    shared: str = ""
    """Empty: the architecture has no shared experts."""
    shared_gate: str = ""
    matrices: tuple[str, str, str] = ("gate_proj", "down_proj", "up_proj")
    """What `w1`, `w2`, `w3` of an expert are called."""
    bias: str = ""
    """The router's selection bias; empty: it selects by scores alone."""


_PLAIN: dict[str, tuple[Any, ...]] = {
    "norm.kind": ("rms",),
    "units": (None,),
    "self_tune": (None,),
    "layers": (None,),
    "attention.softmax": ("plain",),
    "attention.num_value_heads": (None,),
    "attention.augmented_query": (None,),
    "ffn.activation": ("swiglu",),
}
_UNGATED = {**_PLAIN, "attention.gate.kind": ("none",)}
_GATED = {
    **_PLAIN,
    "attention.qk_norm": (True,),
    "attention.gate.kind": ("sdpa_output",),
    "attention.gate.granularity": ("elementwise",),
    "attention.gate.heads": ("specific",),
    "attention.gate.form": ("multiplicative",),
    "attention.gate.activation": ("sigmoid",),
    "attention.gate.input": ("hidden",),
}
_DENSE = {"ffn.kind": ("dense",)}
_EXPERTS = {"ffn.kind": ("moe",), "ffn.sizes": ((),), "ffn.router.reads": ("own",)}
_SOFTMAX = {**_EXPERTS, "ffn.router.kind": ("softmax_top_k",), "ffn.router.groups": (None,)}
_SIGMOID = {**_EXPERTS, "ffn.router.kind": ("sigmoid_top_k",)}
_NO_SHARED = {"ffn.shared.num": (0,)}

ARCHITECTURES = (
    Architecture(
        "Qwen3NextForCausalLM",
        "qwen3_next",
        {**_GATED, **_SOFTMAX},
        centred_norms=True,
        gated=True,
        shared="mlp.shared_expert",
        shared_gate="mlp.shared_expert_gate",
    ),
    Architecture("Qwen3NextForCausalLM", "qwen3_next", {**_GATED, **_DENSE}, centred_norms=True, gated=True),
    Architecture(
        "Qwen3MoeForCausalLM", "qwen3_moe", {**_UNGATED, "attention.qk_norm": (True,), **_SOFTMAX, **_NO_SHARED}
    ),
    Architecture(
        "MixtralForCausalLM",
        "mixtral",
        {
            **_UNGATED,
            "attention.qk_norm": (False,),
            **_SOFTMAX,
            **_NO_SHARED,
            "ffn.router.renormalize": (True,),
        },
        router="block_sparse_moe.gate",
        experts="block_sparse_moe.experts",
        matrices=("w1", "w2", "w3"),
    ),
    Architecture(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        {**_UNGATED, **_SIGMOID, "ffn.shared.gate": (False,)},
        shared="mlp.shared_experts",
        bias="e_score_correction_bias",
    ),
    Architecture("Qwen3ForCausalLM", "qwen3", {**_UNGATED, "attention.qk_norm": (True,), **_DENSE}),
    Architecture("LlamaForCausalLM", "llama", {**_UNGATED, "attention.qk_norm": (False,), **_DENSE}),
)


def architecture_of(model: ModelConfig) -> Architecture:
    """The architecture that computes what the model does.

    Raises:
        ConfigError: there is none; the message names what stands in the way of the one that comes nearest.
    """
    alike = [architecture for architecture in ARCHITECTURES if model.ffn.kind in architecture.needs["ffn.kind"]]
    found = [(_obstacles(architecture, model), architecture) for architecture in alike]
    obstacles, nearest = min(found, key=lambda pair: len(pair[0]))
    if obstacles:
        raise ConfigError(
            f"no architecture of Hugging Face transformers computes this model; {nearest.name} comes nearest, but "
            f"{', '.join(obstacles)}; use --format tidegate"
        )
    return nearest


def _obstacles(architecture: Architecture, model: ModelConfig) -> list[str]:
    """Fields whose values the architecture cannot express, in words."""
    obstacles = []
    for field, allowed in architecture.needs.items():
        value: Any = model
        for part in field.split("."):
            value = getattr(value, part, ...)
        if value is not ... and value not in allowed:  # what another kind does not have, its kind says
            shown = value if isinstance(value, (str, int, float, tuple)) else "set" if value is not None else None
            obstacles.append(f"model.{field} is {shown}, not {allowed[0]}")
    return obstacles + _few_in_a_group(architecture, model)


def _few_in_a_group(architecture: Architecture, model: ModelConfig) -> list[str]:
    ffn: Any = model.ffn
    groups = getattr(getattr(ffn, "router", None), "groups", None)
    size = None if ffn.kind == "dense" else ffn.num_experts // (groups.num if groups else 1)
    if architecture.bias and size == 1:
        return ["a group has one expert, and its two best are added up there"]
    return []
