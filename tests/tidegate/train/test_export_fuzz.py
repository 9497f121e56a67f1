"""Models from strangers: a folder is the model that it says it is, or refused with a ConfigError."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tidegate.config import ConfigError
from tidegate.model.decoder import ModelConfig
from tidegate.model.weights import Weights, specs_of
from tidegate.train.checkpoint_store import seal, unseal
from tidegate.train.export import Origin, damaged_files, open_export, write_export

fuzzed = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=120,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example changes a copy
)
SCALARS = st.none() | st.booleans() | st.integers(-2, 9) | st.sampled_from([1.5, float("nan"), "", "a", "../x"])
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
ATTENTION = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "gate": {"kind": "none"}}
MOE = {"kind": "moe", "num_experts": 3, "top_k": 2, "expert_dim": 8, "router": {"kind": "softmax_top_k"}}


class Zeros(Weights):
    """Of any model."""

    def __init__(self, model: ModelConfig) -> None:
        self._specs = specs_of(model)

    @property
    def specs(self) -> Any:
        return self._specs

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        return torch.zeros(self._specs[name].shape, dtype=self._specs[name].dtype)[rows]


@pytest.fixture(scope="module", params=["tidegate", "hf"])
def exported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"vocab_size": 11, "width": 8, "num_layers": 1}
    model = ModelConfig.model_validate({**sizes, "attention": ATTENTION, "ffn": MOE})
    folder = tmp_path_factory.mktemp("export") / "out"
    origin = Origin(run="r", checkpoint="c", step=1, tokens=2)
    settings: dict[str, Any] = {"format": request.param, "origin": origin, "version": "0", "max_positions": 9}
    write_export(folder, Zeros(model), model, shard_bytes=1000, **settings)
    return folder


def opened(source: Path, folder: Path, change: Callable[[Path], None]) -> bool:
    """Whether a changed copy is still taken for a model."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    change(folder)
    try:
        damaged_files(folder)
        model, weights = open_export(folder)
        for name in weights.specs:
            weights.read(name)
    except ConfigError:
        return False
    assert weights.specs.keys() >= specs_of(model).keys()
    return True


def changed(document: Any, data: st.DataObject) -> Any:
    """The document with another value in one place."""
    here = document
    while True:
        key = data.draw(st.sampled_from(sorted(here) if isinstance(here, dict) else list(range(len(here)))))
        if not isinstance(here[key], dict | list) or not here[key] or data.draw(st.integers(0, 3)) == 0:
            here[key] = data.draw(JSON)
            return document
        here = here[key]


@fuzzed
@given(st.data())
def test_any_value_in_any_of_its_documents(exported: Path, tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(path.name for path in exported.glob("*.json"))))

    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        if name == "manifest.json":
            (folder / name).write_bytes(seal(changed(unseal(content), data)))
        else:
            (folder / name).write_text(json.dumps(changed(json.loads(content), data)), encoding="utf-8")

    opened(exported, tmp_path / "copy", change)


@fuzzed
@given(st.data())
def test_any_byte_of_any_file(exported: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(path.name for path in exported.iterdir())))

    def change(folder: Path) -> None:
        content = bytearray((folder / path).read_bytes())
        place = data.draw(st.integers(0, min(len(content) - 1, 2000)))
        content[place] ^= data.draw(st.integers(1, 255))
        (folder / path).write_bytes(content[: data.draw(st.sampled_from([place, len(content)]))])
        if data.draw(st.booleans()):
            (folder / "manifest.json").unlink()  # nothing to compare with, as in a folder of transformers

    opened(exported, tmp_path / "copy", change)
    assert opened(exported, tmp_path / "copy", lambda folder: None)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "manifest.json"])
def test_deep_json(exported: Path, tmp_path: Path, name: str) -> None:
    def change(folder: Path) -> None:
        (folder / "manifest.json").unlink()
        (folder / name).write_text("[" * 100_000, encoding="utf-8")

    assert not opened(exported, tmp_path / "copy", change)
