"""A model's tensors by name, wherever they are: what is exported, imported and upcycled.

A `Weights` gives any tensor alone, and of a tensor of experts any rows alone, so that no process holds more than it
needs. The views of it (Hugging Face's names, experts made of a dense feed-forward) are `Weights` again.

Letters: E experts (slices, where their sizes differ), F expert width, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch

from tidegate.model.decoder import Decoder, ModelConfig
from tidegate.model.moe import Experts

__all__ = ["ALL", "Spec", "Weights", "load_weights", "misfits", "num_parameters", "specs_of"]

ALL = slice(None)
_LISTED = 3


class Spec(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool = True
    """Whether it is a parameter; else it is what a controller moves."""


class Weights(ABC):
    """Tensors by name."""

    fresh: frozenset[str] = frozenset()
    """Tensors of the model that are not here: they begin as in a new model."""

    @property
    @abstractmethod
    def specs(self) -> Mapping[str, Spec]:
        """All there are, in the model's order."""

    @abstractmethod
    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        """A tensor on the CPU, or some of its first dimension; the caller may change it."""


def specs_of(config: ModelConfig) -> dict[str, Spec]:
    """What a model of this architecture consists of, as fp32: all parameters, experts whole, and controllers."""
    with torch.device("meta"):
        model = Decoder(config)
    trained = {name for name, _ in model.named_parameters()}
    found = {}
    for name, tensor in model.state_dict().items():
        # Experts without a third matrix have a buffer in its place, which means nothing.
        if name in trained or not name.endswith(".experts.w3"):
            found[name] = Spec(tuple(tensor.shape), tensor.dtype, name in trained)
    return found


def num_parameters(specs: Mapping[str, Spec]) -> int:
    """Numbers that are trained."""
    return sum(prod(spec.shape) for spec in specs.values() if spec.trained)


def misfits(found: Mapping[str, Spec], wanted: Mapping[str, Spec]) -> list[str]:
    """What is missing, too much or of another shape, in words; empty if the names and shapes are the same."""
    problems = []
    for what, names in (("is missing", wanted.keys() - found.keys()), ("is not known", found.keys() - wanted.keys())):
        if names:
            shown = ", ".join(sorted(names)[:_LISTED])
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            problems.append(f"{shown}{more} {what}")
    for name in wanted.keys() & found.keys():
        if found[name].shape != wanted[name].shape:
            problems.append(f"{name} has shape {list(found[name].shape)}, not {list(wanted[name].shape)}")
    return problems


@torch.no_grad()
def load_weights(model: Decoder, weights: Weights) -> None:
    """Fill a model, of whose experts this process may hold a share, in place and in the model's dtypes.

    What is `fresh` stays as it is.
    """
    shared = dict(model.state_dict(keep_vars=True))
    for path, module in model.named_modules():
        if not isinstance(module, Experts):
            continue
        rows = slice(module.first, module.first + module.num_experts)
        names = [name for name in ("w1", "w2", "w3") if f"{path}.{name}" in weights.specs]
        module.fill({name: weights.read(f"{path}.{name}", rows) for name in names})
        for name in ("w1", "w2", "w3"):
            shared.pop(f"{path}.{name}", None)
    for name, tensor in shared.items():
        if name not in weights.fresh:
            tensor.copy_(weights.read(name))
