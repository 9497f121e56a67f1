"""Folders of safetensors: nothing is lost in one, and one that is not whole is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tidegate.config import ConfigError
from tidegate.model.decoder import Decoder, ModelConfig, materialize
from tidegate.model.weights import ALL, Spec, Weights, load_weights, specs_of
from tidegate.train.export import Origin, compare, open_export, write_export

SIZES: dict[str, Any] = {"vocab_size": 63, "width": 24, "num_layers": 2}
ATTENTION = {"num_heads": 3, "num_kv_heads": 1, "head_dim": 6}
MOE = {"kind": "moe", "num_experts": 5, "top_k": 2, "expert_dim": 8}
UNITS = {"over": ["experts"], "keep": 0.6, "method": {"kind": "hard_concrete"}, "freeze_tokens": 100}


class Held(Weights):
    """Tensors in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor], trained: dict[str, Spec]) -> None:
        self.tensors = tensors
        self._specs = {name: Spec(tuple(t.shape), t.dtype, trained[name].trained) for name, t in tensors.items()}

    @property
    def specs(self) -> dict[str, Spec]:
        return self._specs

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        return self.tensors[name].clone() if rows == ALL else self.tensors[name][rows].clone()


def model_of(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({**SIZES, "attention": ATTENTION, "ffn": MOE, **changes})


def held_by(config: ModelConfig, seed: int = 0) -> Held:
    """A new model's weights; controllers and masks away from where they begin."""
    model = materialize(lambda: Decoder(config), torch.device("cpu"), seed).to(torch.bfloat16)
    specs = specs_of(config)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name in specs}
    for name, tensor in tensors.items():
        if not specs[name].trained:
            tensor.copy_(tensor + 1 if tensor.dtype != torch.bool else ~tensor)
    return Held(tensors, specs)


def write(folder: Path, weights: Weights, config: ModelConfig, **settings: Any) -> Any:
    origin = Origin(run="r", checkpoint="c", step=1, tokens=2)
    fixed: dict[str, Any] = {"format": "tidegate", "origin": origin, "version": "0", "max_positions": 9}
    return write_export(folder, weights, config, **(fixed | settings))


CONTROLLED: list[dict[str, Any]] = [
    {},
    {"units": UNITS},
    {"ffn": {**MOE, "router": {"kind": "relu"}, "activation": "relu2"}},
    {"ffn": {**MOE, "router": {"kind": "expert_threshold"}, "activation": "poly_norm"}},
    {"ffn": {**MOE, "router": {"kind": "comet", "search": {"tokens": 50}}}},
    {"ffn": {**MOE, "router": {"kind": "decoupled"}}, "tie_embeddings": True},
    {"ffn": {**MOE, "router": {"kind": "hash"}}, "norm": {"kind": "gated"}},
]


@pytest.mark.parametrize("changes", CONTROLLED, ids=lambda changes: str(list(changes)))
def test_controllers_and_masks_come_back_to_the_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    config = model_of(**changes)
    weights = held_by(config)
    manifest = write(tmp_path / "out", weights, config, shard_bytes=2_000)
    read, again = open_export(tmp_path / "out")
    assert read == config
    assert manifest.parameters == sum(t.numel() for n, t in weights.tensors.items() if weights.specs[n].trained)
    model = materialize(lambda: Decoder(read), torch.device("cpu"), seed=9).to(torch.bfloat16)
    load_weights(model, again)
    state = model.state_dict()
    for name, tensor in weights.tensors.items():
        assert torch.equal(state[name], tensor), name
        assert state[name].dtype == tensor.dtype, name


def test_an_expert_in_anothers_place_is_noticed() -> None:
    weights = held_by(model_of())
    weights.tensors["norm.weight"][3] = torch.nan  # a run that diverged can be exported, and looked at
    weights.tensors["blocks.0.ffn.experts.w1"][3, 1] = torch.nan
    swapped = dict(weights.tensors)
    swapped["blocks.1.ffn.experts.w2"] = weights.tensors["blocks.1.ffn.experts.w2"][[1, 0, 2, 3, 4]]
    compare(weights, weights)
    with pytest.raises(AssertionError, match=r"blocks.1.ffn.experts.w2 has other values"):
        compare(Held(swapped, weights.specs), weights)


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    config = model_of()
    folder = tmp_path / "out"
    write(folder, held_by(config), config, shard_bytes=2_000)
    index, manifest = folder / "model.safetensors.index.json", folder / "manifest.json"
    document = json.loads(index.read_text())

    def refused(match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            open_export(folder)

    for name, file, match in (
        ("norm.weight", "../model.safetensors", "names '../model.safetensors', which is not a file of the folder"),
        ("norm.weight", document["weight_map"]["head.weight"], "norm.weight is not in model-"),
        ("norm.weight", "model-9.safetensors", "model-9.safetensors: cannot be read as safetensors"),
    ):
        index.write_text(json.dumps({"weight_map": document["weight_map"] | {name: file}}))
        refused(match)
    del document["weight_map"]["norm.weight"]
    index.write_text(json.dumps(document))
    refused("not the model of its manifest.json: norm.weight is missing")
    index.write_text("[1]")
    refused("index.json: is not a JSON object")
    index.unlink()
    refused("has neither model.safetensors nor model.safetensors.index.json")
    manifest.write_bytes(manifest.read_bytes().replace(b'"step": 1', b'"step": 2'))
    refused("manifest.json: is damaged: its content is not what was written")
    manifest.unlink()
    refused("has neither manifest.json nor config.json")
    with pytest.raises(ConfigError, match="there is no such folder"):
        open_export(tmp_path / "other")


def test_a_disk_that_refuses_leaves_nothing(tmp_path: Path) -> None:
    config = model_of()
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match=r"--out .*file/out: cannot be written"):
        write(blocked / "out", held_by(config), config)
    assert list(tmp_path.iterdir()) == [blocked]
