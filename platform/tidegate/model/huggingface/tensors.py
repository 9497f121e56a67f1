"""A model's tensors under Hugging Face's names and layouts, and back. Both views read one tensor at a time.

Where layouts differ: experts are files' tensors one by one and one tensor here; Qwen3-Next's query projection holds
each head's query rows and then its gate's (per head [q | gate], not per key/value group); its norms multiply by
1 + weight, which are fp32 in the files so that nothing is lost.

Letters: H heads, d head width, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import torch

from tidegate.config import ConfigError
from tidegate.model.decoder import ModelConfig
from tidegate.model.huggingface.architectures import Architecture
from tidegate.model.moe import MoEConfig
from tidegate.model.weights import ALL, Spec, Weights, misfits, specs_of

__all__ = ["FromHuggingFace", "ToHuggingFace"]

_ATTENTION = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
_MATRICES = ("w1", "w2", "w3")
_IGNORED = (".rotary_emb.inv_freq",)
"""Ends of names in old checkpoints that follow from the config."""


class _Part(NamedTuple):
    """A tensor here, or one row of it."""

    name: str
    row: int | None = None


class _Link(NamedTuple):
    """One tensor there, and what it is made of here."""

    theirs: str
    ours: tuple[_Part, ...]
    how: Literal["same", "centred", "gated", "doubled", "zeros"] = "same"
    shape: tuple[int, ...] = ()
    """Of zeros, which are nothing here."""


def _links(model: ModelConfig, architecture: Architecture) -> Iterator[_Link]:
    """In the order of the model."""
    norm: Literal["same", "centred"] = "centred" if architecture.centred_norms else "same"
    yield _Link("model.embed_tokens.weight", (_Part("embedding.weight"),))
    for layer in range(model.num_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        yield _Link(f"{theirs}.input_layernorm.weight", (_Part(f"{ours}.attention_norm.weight"),), norm)
        for mine, other in _ATTENTION.items():
            parts: tuple[_Part, ...] = (_Part(f"{ours}.attention.{mine}.weight"),)
            gated = architecture.gated and mine == "wq"
            if gated:
                parts += (_Part(f"{ours}.attention.gate.projection.weight"),)
            yield _Link(f"{theirs}.self_attn.{other}.weight", parts, "gated" if gated else "same")
        if model.attention.qk_norm:
            for name in ("q_norm", "k_norm"):
                yield _Link(f"{theirs}.self_attn.{name}.weight", (_Part(f"{ours}.attention.{name}.weight"),), norm)
        yield _Link(f"{theirs}.post_attention_layernorm.weight", (_Part(f"{ours}.ffn_norm.weight"),), norm)
        yield from _feed_forward(model, architecture, f"{ours}.ffn", theirs)
    yield _Link("model.norm.weight", (_Part("norm.weight"),), norm)
    if not model.tie_embeddings:
        yield _Link("lm_head.weight", (_Part("head.weight"),))


def _feed_forward(model: ModelConfig, architecture: Architecture, ours: str, theirs: str) -> Iterator[_Link]:
    ffn, names = model.ffn, dict(zip(_MATRICES, architecture.matrices, strict=True))
    if not isinstance(ffn, MoEConfig):
        for mine, other in names.items():
            yield _Link(f"{theirs}.mlp.{other}.weight", (_Part(f"{ours}.{mine}.weight"),))
        return
    yield _Link(f"{theirs}.{architecture.router}.weight", (_Part(f"{ours}.router.weight"),))
    if architecture.bias:
        yield _Link(f"{theirs}.{architecture.router}.{architecture.bias}", (_Part(f"{ours}.router.expert_bias"),))
    for expert in range(ffn.num_experts):
        for mine, other in names.items():
            part = _Part(f"{ours}.experts.{mine}", expert)
            yield _Link(f"{theirs}.{architecture.experts}.{expert}.{other}.weight", (part,))
    if not architecture.shared:
        return
    # Where the architecture has a gate and the model none, half of twice the output is exactly the output; where the
    # model has no shared experts, they are zero wide.
    gated, always_gated, width = ffn.shared.gate and ffn.shared.num > 0, bool(architecture.shared_gate), model.width
    for mine, other in names.items():
        their_name = f"{theirs}.{architecture.shared}.{other}.weight"
        if ffn.shared.num == 0:
            yield _Link(their_name, (), "zeros", (width, 0) if mine == "w2" else (0, width))
        else:
            doubled = mine == "w2" and always_gated and not gated
            part = _Part(f"{ours}.shared_experts.{mine}.weight")
            yield _Link(their_name, (part,), "doubled" if doubled else "same")
    if always_gated:
        gate_name = f"{theirs}.{architecture.shared_gate}.weight"
        if gated:
            yield _Link(gate_name, (_Part(f"{ours}.shared_experts_gate.weight"),))
        else:
            yield _Link(gate_name, (), "zeros", (1, width))


class ToHuggingFace(Weights):
    """A model's tensors as an architecture's.

    Args:
        weights: of the model.
        model: its config.
        architecture: one that fits.

    Raises:
        ConfigError: the router has a selection bias, and the architecture none.
    """

    def __init__(self, weights: Weights, model: ModelConfig, architecture: Architecture) -> None:
        self._weights, self._num_heads = weights, model.attention.num_heads
        self._links = {link.theirs: link for link in _links(model, architecture)}
        used = {part.name for link in self._links.values() for part in link.ours}
        for name in weights.specs.keys() - used:
            assert name.endswith(".router.expert_bias"), name  # `needs` lets nothing else through
            if weights.read(name).any():
                raise ConfigError(
                    f"{name} is not zero (balance.bias_rate or model.ffn.router.quantile moved it), but "
                    f"{architecture.name} selects experts by their scores alone; use --format tidegate"
                )
        self._dtype = weights.specs["embedding.weight"].dtype

    @property
    def specs(self) -> Mapping[str, Spec]:
        return {theirs: self._spec(link) for theirs, link in self._links.items()}

    def _spec(self, link: _Link) -> Spec:
        if link.how == "zeros":
            return Spec(link.shape, self._dtype)
        first = self._weights.specs[link.ours[0].name]
        shape = first.shape if link.ours[0].row is None else first.shape[1:]
        if link.how == "gated":
            shape = (2 * shape[0], *shape[1:])
        return Spec(shape, torch.float32 if link.how == "centred" else first.dtype, first.trained)

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        link = self._links[name]
        parts = [self._part(part) for part in link.ours]
        match link.how:
            case "zeros":
                tensor = torch.zeros(link.shape, dtype=self._dtype)
            case "centred":
                tensor = parts[0].float() - 1
            case "gated":
                tensor = torch.cat([part.unflatten(0, (self._num_heads, -1)) for part in parts], dim=1).flatten(0, 1)
            case "doubled":
                tensor = 2 * parts[0]
            case _:
                tensor = parts[0]
        return tensor[rows] if rows != ALL else tensor

    def _part(self, part: _Part) -> torch.Tensor:
        if part.row is None:
            return self._weights.read(part.name)
        return self._weights.read(part.name, slice(part.row, part.row + 1))[0]


class FromHuggingFace(Weights):
    """An architecture's tensors as a model's.

    Args:
        weights: what the files hold.
        model: the model's config.
        architecture: of the files; one that fits the model.
        where: names the files in errors.

    Raises:
        ConfigError: a tensor is missing, too much, or of another shape.
    """

    def __init__(self, weights: Weights, model: ModelConfig, architecture: Architecture, where: str) -> None:
        self._weights, self._num_heads = weights, model.attention.num_heads
        wanted, found = specs_of(model), weights.specs
        self._sources: dict[_Part, tuple[_Link, int]] = {}
        shapes: dict[str, Spec] = {}
        for link in _links(model, architecture):
            shape = link.shape
            for place, part in enumerate(link.ours):
                self._sources[part] = link, place
                shape = wanted[part.name].shape if part.row is None else wanted[part.name].shape[1:]
            shapes[link.theirs] = Spec((2 * shape[0], *shape[1:]) if link.how == "gated" else shape, torch.float32)
        problems = misfits({name: spec for name, spec in found.items() if not name.endswith(_IGNORED)}, shapes)
        if problems:
            raise ConfigError(f"{where}: not a whole {architecture.name} of its config.json: {'; '.join(problems)}")
        self._specs = {name: spec._replace(dtype=self._dtype(name, spec)) for name, spec in wanted.items()}

    def _dtype(self, name: str, spec: Spec) -> torch.dtype:
        for part in (_Part(name), _Part(name, 0)):
            if part in self._sources:
                return self._weights.specs[self._sources[part][0].theirs].dtype
        return spec.dtype

    @property
    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        spec = self._specs[name]
        if _Part(name, 0) in self._sources:
            return torch.stack([self._part(_Part(name, row)) for row in range(*rows.indices(spec.shape[0]))])
        if _Part(name) not in self._sources:  # the selection bias, where the architecture has none
            return torch.zeros(spec.shape, dtype=spec.dtype)[rows]
        tensor = self._part(_Part(name))
        return tensor[rows] if rows != ALL else tensor

    def _part(self, part: _Part) -> torch.Tensor:
        link, place = self._sources[part]
        tensor = self._weights.read(link.theirs)
        match link.how:
            case "centred":
                return tensor.float() + 1
            case "gated":
                return tensor.unflatten(0, (self._num_heads, 2, -1))[:, place].flatten(0, 1)
            case "doubled":
                return tensor / 2
            case _:
                return tensor
