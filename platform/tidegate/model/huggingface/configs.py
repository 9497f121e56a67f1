"""config.json: written for a model, and read as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from tidegate.config import ConfigError
from tidegate.model.decoder import DenseConfig, ModelConfig
from tidegate.model.huggingface.architectures import ARCHITECTURES, Architecture, architecture_of
from tidegate.model.moe import MoEConfig

__all__ = ["config_of", "model_of"]

_PARTIAL_ROTARY = {"qwen3_next": 0.25, "glm4_moe": 0.5}
"""What transformers takes where the file says nothing."""
_YARN = {"factor": "factor", "trained_length": "original_max_position_embeddings"}
"""Fields of `YarnConfig`, and what transformers calls them; all else of it is the default in both."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "router_jitter_noise": (0.0, None),
    "decoder_sparse_step": (1, None),
    "first_k_dense_replace": (0,),
    "quantization_config": (None,),
}
"""What a file may say, if it says anything."""


def config_of(model: ModelConfig, dtype: str, max_positions: int, end_of_text: int | None) -> dict[str, Any]:
    """config.json of a model that an architecture fits.

    Args:
        model: the model.
        dtype: of its weights, e.g. `bfloat16`.
        max_positions: longest sequence that it was trained on.
        end_of_text: the token that ends a document, if it is known.
    """
    architecture, attention = architecture_of(model), model.attention
    partial = {"partial_rotary_factor": 1.0} if architecture.model_type in _PARTIAL_ROTARY else {}
    rope: dict[str, Any] = {"rope_type": "default"}
    if attention.yarn is not None:
        rope = {"rope_type": "yarn", **{theirs: getattr(attention.yarn, ours) for ours, theirs in _YARN.items()}}
    config: dict[str, Any] = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {**rope, "rope_theta": attention.rope_theta, **partial},
        "max_position_embeddings": max_positions,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "use_cache": True,
    }
    if isinstance(model.ffn, DenseConfig):
        config["intermediate_size"] = model.ffn.hidden_dim
        if architecture.model_type == "qwen3_next":
            every = list(range(model.num_layers))
            config |= {"mlp_only_layers": every, "layer_types": ["full_attention"] * model.num_layers}
        return config
    return config | _mixture(model, model.ffn)


def _mixture(model: ModelConfig, ffn: MoEConfig) -> dict[str, Any]:
    router: Any = ffn.router
    common: dict[str, Any] = {
        "num_experts_per_tok": ffn.top_k,
        "intermediate_size": ffn.expert_dim,
        "output_router_logits": False,
    }
    match architecture_of(model).model_type:
        case "mixtral":
            return common | {"num_local_experts": ffn.num_experts, "sliding_window": None}
        case "glm4_moe":
            groups = router.groups
            return common | {
                "moe_intermediate_size": ffn.expert_dim,
                "n_routed_experts": ffn.num_experts,
                "n_shared_experts": ffn.shared.num,
                "n_group": groups.num if groups else 1,
                "topk_group": groups.keep if groups else 1,
                "routed_scaling_factor": router.scale,
                "norm_topk_prob": router.renormalize,
                "first_k_dense_replace": 0,
                "use_qk_norm": model.attention.qk_norm,
                "num_nextn_predict_layers": 0,
            }
        case "qwen3_next":
            common |= {
                "shared_expert_intermediate_size": ffn.shared.num * ffn.expert_dim,
                "layer_types": ["full_attention"] * model.num_layers,
            }
    return common | {
        "moe_intermediate_size": ffn.expert_dim,
        "num_experts": ffn.num_experts,
        "norm_topk_prob": router.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def model_of(config: Mapping[str, Any], where: str) -> tuple[Architecture, ModelConfig]:
    """The model that a config.json means, and its architecture.

    Args:
        config: the document.
        where: names it in errors.

    Raises:
        ConfigError: it is of another architecture, or uses something that a decoder here does not have.
    """
    try:
        return _model_of(config, where)
    except (TypeError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(f"{where}: a field has a value of a kind that no model has ({error})") from error


def _model_of(config: Mapping[str, Any], where: str) -> tuple[Architecture, ModelConfig]:
    known = dict.fromkeys(architecture.model_type for architecture in ARCHITECTURES)
    read = _Fields(config, where)
    model_type = read("model_type")
    if model_type not in known:
        raise ConfigError(f"{where}: model_type={model_type}; only {', '.join(known)} can be read")
    for field, allowed in _ONLY.items():
        if field in config:
            read.only(field, allowed)
    _check_attention(read, config)
    width, heads = read("hidden_size"), read("num_attention_heads")
    gate = {"kind": "sdpa_output"} if model_type == "qwen3_next" else {"kind": "none"}
    mapping = {
        "vocab_size": read("vocab_size"),
        "width": width,
        "num_layers": read("num_hidden_layers"),
        "attention": {
            "num_heads": heads,
            "num_kv_heads": read("num_key_value_heads"),
            "head_dim": config.get("head_dim") or width // heads,
            **_positions(read, config),
            "qk_norm": config.get("use_qk_norm", False) if model_type == "glm4_moe" else "qwen3" in model_type,
            "gate": gate,
        },
        "ffn": _feed_forward(read, config, model_type),
        "norm_eps": read("rms_norm_eps"),
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }
    try:
        model = ModelConfig.model_validate(mapping)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{where}: as a job it would be model.{field}={first.get('input')}: {first['msg']}"
        ) from error
    architecture = architecture_of(model)
    assert architecture.model_type == model_type, (architecture, model_type)
    return architecture, model


class _Fields:
    """Reads a config.json; whatever is missing or cannot be is the user's to know."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config, self.where = config, where

    def __call__(self, field: str) -> Any:
        if field not in self._config:
            raise ConfigError(f"{self.where}: {field} is missing")
        return self._config[field]

    def only(self, field: str, allowed: tuple[Any, ...], why: str = "") -> None:
        if self(field) not in allowed:
            raise ConfigError(f"{self.where}: {field}={self(field)} cannot be read, only {allowed[0]}{why}")


def _check_attention(read: _Fields, config: Mapping[str, Any]) -> None:
    if config.get("use_sliding_window", True) and "sliding_window" in config:
        read.only("sliding_window", (None,), ": attention is over all tokens here")
    if config["model_type"] == "qwen3_next":
        read("layer_types")
    kinds = set(config.get("layer_types") or ["full_attention"]) - {"full_attention"}
    if kinds:
        raise ConfigError(f"{read.where}: layer_types has {', '.join(sorted(kinds))}; only full_attention can be read")


def _positions(read: _Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    """The base of rotary positions and how they are stretched, from where transformers 5 or earlier versions put it."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    yarn = None
    if kind == "yarn":
        known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_YARN.values()}
        if others := sorted(name for name, value in rope.items() if name not in known and value is not None):
            raise ConfigError(f"{read.where}: {others[0]}={rope[others[0]]} of rope_type=yarn cannot be read")
        if missing := [theirs for theirs in _YARN.values() if rope.get(theirs) is None]:
            raise ConfigError(f"{read.where}: rope_type=yarn without {missing[0]} cannot be read")
        yarn = {ours: rope[theirs] for ours, theirs in _YARN.items()}
    elif kind != "default":
        raise ConfigError(f"{read.where}: rope_type={kind} cannot be read, only default and yarn")
    default = _PARTIAL_ROTARY.get(config["model_type"], 1.0)
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", default))
    if partial != 1:
        raise ConfigError(f"{read.where}: partial_rotary_factor={partial} cannot be read, only 1")
    return {"rope_theta": rope["rope_theta"] if "rope_theta" in rope else read("rope_theta"), "yarn": yarn}


def _feed_forward(read: _Fields, config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    dense_layers, num_layers = config.get("mlp_only_layers") or [], read("num_hidden_layers")
    if model_type in ("qwen3", "llama") or (model_type == "qwen3_next" and len(set(dense_layers)) == num_layers):
        return {"kind": "dense", "hidden_dim": read("intermediate_size")}
    if dense_layers:
        raise ConfigError(f"{read.where}: mlp_only_layers={dense_layers} cannot be read, only none or all of them")
    expert_dim = read("intermediate_size" if model_type == "mixtral" else "moe_intermediate_size")
    router: dict[str, Any] = {"kind": "softmax_top_k", "renormalize": config.get("norm_topk_prob", True)}
    shared: dict[str, Any] = {}
    if model_type == "qwen3_moe":
        router["renormalize"] = read("norm_topk_prob")
    if model_type == "qwen3_next":
        shared_dim = read("shared_expert_intermediate_size")
        if shared_dim % expert_dim:
            raise ConfigError(
                f"{read.where}: shared_expert_intermediate_size={shared_dim} is not a multiple of "
                f"moe_intermediate_size={expert_dim}, as shared experts are here"
            )
        shared = {"num": shared_dim // expert_dim, "gate": shared_dim > 0}
    if model_type == "glm4_moe":
        router |= {"kind": "sigmoid_top_k", "scale": read("routed_scaling_factor")}
        if read("n_group") > 1:
            router["groups"] = {"num": read("n_group"), "keep": read("topk_group")}
        shared = {"num": read("n_shared_experts")}
        read("first_k_dense_replace")  # 1 where it is missing, which `_ONLY` does not allow
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    num_experts = next((config[count] for count in counts if count in config), None)
    return {
        "kind": "moe",
        "num_experts": read("num_experts") if num_experts is None else num_experts,
        "top_k": read("num_experts_per_tok"),
        "expert_dim": expert_dim,
        "router": router,
        "shared": shared,
    }
