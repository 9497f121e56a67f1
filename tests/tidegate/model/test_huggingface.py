"""Models give the same logits in Hugging Face transformers, from our files and from those that it writes itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tidegate.config import ConfigError
from tidegate.model.decoder import Decoder, ModelConfig, materialize
from tidegate.model.huggingface import FromHuggingFace, ToHuggingFace, architecture_of, config_of, model_of
from tidegate.model.routers import RouterContext
from tidegate.model.weights import ALL, Spec, Weights, load_weights, specs_of
from tidegate.train.export import Origin, open_export, write_export

pytestmark = [
    pytest.mark.usefixtures("seeded_single_thread"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning"),  # no shared experts
]

GATED = {"num_heads": 6, "num_kv_heads": 3, "head_dim": 10, "rope_theta": 5000.0}
PLAIN = {**GATED, "gate": {"kind": "none"}}
NO_NORM = {**PLAIN, "qk_norm": False}
HEADWISE = {"kind": "sdpa_output", "granularity": "headwise"}
MOE: dict[str, Any] = {"kind": "moe", "num_experts": 5, "top_k": 2, "expert_dim": 24}
DENSE = {"kind": "dense", "hidden_dim": 41}
GROUPS = {"kind": "sigmoid_top_k", "scale": 1.5, "groups": {"num": 3, "keep": 2}}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gated": ("Qwen3NextForCausalLM", GATED, {**MOE, "shared": {"num": 2, "gate": True}}),
    "gated, yarn": ("Qwen3NextForCausalLM", {**GATED, "yarn": {"factor": 4.0, "trained_length": 8}}, MOE),
    "gated, shared experts without gate": ("Qwen3NextForCausalLM", GATED, {**MOE, "shared": {"num": 1}}),
    "gated, no shared experts": ("Qwen3NextForCausalLM", GATED, MOE),
    "gated, dense": ("Qwen3NextForCausalLM", GATED, DENSE),
    "plain": ("Qwen3MoeForCausalLM", PLAIN, {**MOE, "router": {"kind": "softmax_top_k", "renormalize": False}}),
    "plain, no norm": ("MixtralForCausalLM", NO_NORM, MOE),
    "sigmoid": ("Glm4MoeForCausalLM", PLAIN, {**MOE, "num_experts": 6, "router": GROUPS, "shared": {"num": 2}}),
    "sigmoid, no norm": ("Glm4MoeForCausalLM", NO_NORM, {**MOE, "router": {"kind": "sigmoid_top_k"}}),
    "dense": ("Qwen3ForCausalLM", PLAIN, DENSE),
    "dense, no norm": ("LlamaForCausalLM", NO_NORM, DENSE),
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
TIED = ("plain, no norm", "dense")


class OfModel(Weights):
    """The tensors of a model in memory."""

    def __init__(self, model: Decoder) -> None:
        self.tensors = model.state_dict()

        def spec(name: str, wanted: Spec) -> Spec:
            return wanted._replace(dtype=self.tensors[name].dtype)

        self._specs = {name: spec(name, wanted) for name, wanted in specs_of(model.config).items()}

    @property
    def specs(self) -> dict[str, Spec]:
        return self._specs

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        tensor = self.tensors[name]
        return tensor.clone() if rows == ALL else tensor[rows].clone()


def config_for(attention: dict[str, Any], ffn: dict[str, Any], **changes: Any) -> ModelConfig:
    sizes = {"vocab_size": 97, "width": 48, "num_layers": 3, "init_std": 0.2}
    return ModelConfig.model_validate({**sizes, "attention": attention, "ffn": ffn, **changes})


def model_for(config: ModelConfig) -> Decoder:
    """Random weights; norms and selection biases too."""
    model = materialize(lambda: Decoder(config), torch.device("cpu"), seed=1).eval()
    with torch.no_grad():
        for vector in (p for p in model.parameters() if p.ndim == 1):
            vector.add_(0.3 * torch.randn_like(vector))
        if getattr(getattr(config.ffn, "router", None), "kind", "") == "sigmoid_top_k":
            for name, bias in model.named_buffers():
                if name.endswith("expert_bias"):
                    bias.add_(0.1 * torch.randn_like(bias))
    return model


def restored(folder: Path) -> Decoder:
    config, weights = open_export(folder)
    model = materialize(lambda: Decoder(config), torch.device("cpu"), seed=2).eval()
    load_weights(model, weights)
    return model


@torch.no_grad()
def logits(model: Decoder, tokens_BT: torch.Tensor) -> torch.Tensor:
    context = RouterContext.alone(torch.ones_like(tokens_BT, dtype=torch.bool), tokens_BT)
    return F.linear(model._run(context).x_BTD, model._head())


@torch.no_grad()
def logits_there(folder: Path, tokens_BT: torch.Tensor) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info  # missing, unexpected, mismatched
    found: torch.Tensor = model.eval()(tokens_BT).logits
    return found


def export(folder: Path, weights: Weights, config: ModelConfig, **changes: Any) -> Any:
    origin = Origin(run="r", checkpoint="c", step=1, tokens=2)
    settings: dict[str, Any] = {"format": "hf", "origin": origin, "version": "0", "max_positions": 64, **changes}
    return write_export(folder, weights, config, **settings)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_same_there_and_back(case: str, tmp_path: Path) -> None:
    architecture, attention, ffn = CASES[case]
    config = config_for(attention, ffn, tie_embeddings=case in TIED)
    model = model_for(config)
    manifest = export(tmp_path / "ours", OfModel(model), config, shard_bytes=100_000)
    assert manifest.architecture == architecture
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    tokens_BT = torch.randint(0, 97, (2, 33))
    here = logits(model, tokens_BT)
    torch.testing.assert_close(logits_there(tmp_path / "ours", tokens_BT), here, rtol=1e-5, atol=1e-5)

    torch.testing.assert_close(logits(restored(tmp_path / "ours"), tokens_BT), here, rtol=0, atol=1e-6)
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(logits(restored(tmp_path / "theirs"), tokens_BT), here, rtol=0, atol=1e-6)


def test_bf16_norms_less_one_lose_nothing(tmp_path: Path) -> None:
    _, attention, ffn = CASES["gated"]
    model = model_for(config_for(attention, ffn)).to(torch.bfloat16)
    export(tmp_path / "ours", OfModel(model), model.config)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"
    _, weights = open_export(tmp_path / "ours")
    for name, tensor in OfModel(model).tensors.items():
        assert torch.equal(weights.read(name).to(tensor.dtype), tensor), name
    rows = weights.read("blocks.1.ffn.experts.w2", slice(1, 4))
    assert torch.equal(rows, model.state_dict()["blocks.1.ffn.experts.w2"][1:4])


@pytest.mark.parametrize(
    ("attention", "ffn", "named"),
    [
        ({"gate": HEADWISE}, {}, "Qwen3NextForCausalLM .* model.attention.gate.granularity is headwise"),
        ({"num_value_heads": 6}, {}, "model.attention.num_value_heads is 6, not None"),
        ({"augmented_query": 9}, {}, "model.attention.augmented_query is 9, not None"),
        ({"softmax": "learnable_sink"}, {}, "model.attention.softmax is learnable_sink, not plain"),
        ({}, {"activation": "geglu"}, "model.ffn.activation is geglu, not swiglu"),
        ({}, {"router": {"kind": "relu"}}, "model.ffn.router.kind is relu, not softmax_top_k"),
        ({}, {"num_experts": 4, "sizes": [{"num": 2, "times": 1}, {"num": 2, "times": 2}]}, "model.ffn.sizes is "),
    ],
)
def test_what_does_not_fit_is_named(attention: Any, ffn: Any, named: str) -> None:
    config = config_for({**GATED, **attention}, {**MOE, **ffn})
    with pytest.raises(ConfigError, match=named):
        architecture_of(config)


def test_a_hybrid_is_no_architecture() -> None:
    mixers = {"kda": {"kind": "kda", "num_heads": 2, "key_dim": 4, "value_dim": 4}}
    whole = config_for(GATED, MOE).model_dump() | {"layers": "kda", "mixers": mixers}
    with pytest.raises(ConfigError, match=r"but model\.layers is kda, not None; use --format tidegate"):
        architecture_of(ModelConfig.model_validate(whole))


def test_a_bias_that_an_architecture_lacks_is_not_dropped(tmp_path: Path) -> None:
    _, attention, ffn = CASES["plain, no norm"]
    model = model_for(config_for(attention, ffn))
    model.state_dict()["blocks.2.ffn.router.expert_bias"][3] = 1e-4
    with pytest.raises(ConfigError, match=r"blocks.2.ffn.router.expert_bias is not zero .* MixtralForCausalLM selects"):
        export(tmp_path / "ours", OfModel(model), model.config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("case", "changes", "named"),
    [
        ("plain", {"model_type": "gpt2"}, "model_type=gpt2; only qwen3_next, "),
        ("plain", {"hidden_act": "gelu"}, "hidden_act=gelu cannot be read, only silu"),
        ("plain", {"sliding_window": 128}, "sliding_window=128 cannot be read"),
        ("plain", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] cannot be read"),
        ("plain", {"norm_topk_prob": ...}, "norm_topk_prob is missing"),
        ("plain", {"moe_intermediate_size": 10}, "model.ffn.moe.expert_dim=10"),
        ("gated", {"layer_types": ["linear_attention", "full_attention"]}, "layer_types has linear_attention"),
        ("gated", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "partial_rotary_factor=0.25"),
        ("gated", {"shared_expert_intermediate_size": 25}, "25 is not a multiple of moe_intermediate_size=24"),
        ("sigmoid", {"first_k_dense_replace": 1}, "first_k_dense_replace=1 cannot be read, only 0"),
        ("dense, no norm", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3"}}, "rope_type=llama3"),
        ("gated, yarn", {"rope_parameters": {**YARN, "mscale": 2.0}}, r"mscale=2\.0 of rope_type=yarn cannot be read"),
        ("gated, yarn", {"rope_parameters": {**YARN, "factor": None}}, "rope_type=yarn without factor"),
    ],
)
def test_a_config_that_means_something_else_is_refused(
    case: str, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    _, attention, ffn = CASES[case]
    model = model_for(config_for(attention, ffn))
    export(tmp_path / "ours", OfModel(model), model.config)
    document = {**json.loads((tmp_path / "ours" / "config.json").read_text()), **changes}
    document = {field: value for field, value in document.items() if value is not ...}
    with pytest.raises(ConfigError, match=f"^config.json: .*{named}"):
        model_of(document, "config.json")


def test_files_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    _, attention, ffn = CASES["plain"]
    model = model_for(config_for(attention, ffn))
    folder = tmp_path / "ours"
    export(folder, OfModel(model), model.config)
    config = folder / "config.json"
    more = json.loads(config.read_text()) | {"num_experts": 6}
    config.write_text(json.dumps(more))
    with pytest.raises(ConfigError, match=r"not a whole Qwen3MoeForCausalLM .*experts.5.* and 6 more is missing"):
        open_export(folder)


class Drawn(Weights):
    """Numbers for any specs."""

    def __init__(self, specs: dict[str, Spec]) -> None:
        generator = torch.Generator().manual_seed(0)
        self._specs = specs
        self.tensors = {n: 1 + torch.randint(0, 9, s.shape, generator=generator) / 16 for n, s in specs.items()}

    @property
    def specs(self) -> dict[str, Spec]:
        return self._specs

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        return self.tensors[name].clone()[rows if rows != ALL else ...]


@st.composite
def fitting(draw: st.DrawFn) -> ModelConfig:
    """Any sizes of any model that an architecture fits."""
    _, attention, ffn = CASES[draw(st.sampled_from(list(CASES)))]
    kv_heads = draw(st.integers(1, 3))
    heads = {"num_heads": kv_heads * draw(st.integers(1, 3)), "num_kv_heads": kv_heads}
    if ffn["kind"] == "dense":
        ffn = {**ffn, "hidden_dim": draw(st.integers(1, 70))}
    elif "groups" not in ffn.get("router", {}):
        num = draw(st.integers(2, 7))
        ffn = {**ffn, "num_experts": num, "top_k": draw(st.integers(1, num)), "expert_dim": 8 * draw(st.integers(1, 3))}
    attention = {**attention, **heads, "head_dim": 2 * draw(st.integers(1, 7))}
    sizes = {"vocab_size": draw(st.integers(2, 63)), "width": 8 * draw(st.integers(1, 4)), "num_layers": 2}
    return config_for(attention, ffn, **sizes, tie_embeddings=draw(st.booleans()))


@settings(max_examples=40, deadline=None)
@given(config=fitting())
def test_layouts_of_any_size_go_there_and_back_to_the_bit(config: ModelConfig) -> None:
    architecture = architecture_of(config)
    weights = Drawn(specs_of(config))
    for name, tensor in weights.tensors.items():
        if name.endswith("expert_bias") and not architecture.bias:
            tensor.zero_()
    there = ToHuggingFace(weights, config, architecture)
    back = FromHuggingFace(there, config, architecture, "files")
    for name in there.specs:
        assert tuple(there.read(name).shape) == there.specs[name].shape, name
    for name in weights.specs:
        assert torch.equal(back.read(name), weights.read(name)), name
    document = config_of(config, "float32", 64, None)
    _, read = model_of(document, "config.json")
    shared = {"gate"} if config.ffn.kind == "moe" and architecture.shared_gate else set()
    assert read.attention == config.attention
    assert read.ffn.model_dump(exclude={"shared": shared}) == config.ffn.model_dump(exclude={"shared": shared})
