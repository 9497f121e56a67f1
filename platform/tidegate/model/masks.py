"""Masks over single weights: which matrices may be pruned, which of their weights go, and keeping those at zero.

A weight that is zero and gets no gradient stays exactly zero under AdamW, at every ZeRO stage: its moments stay zero,
and decay scales zero. So the gradient is all that has to be masked, on whatever rank and in whatever precision.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch

from tidegate.model.activations import has_coefficients
from tidegate.model.decoder import Decoder, ModelConfig
from tidegate.model.moe import Experts
from tidegate.model.weights import Weights, specs_of

__all__ = ["Held", "Prunable", "hold_gradients", "masks_here", "prunable", "prune_smallest", "set_to_zero"]

Prunable = Literal["attention", "ffn", "experts"]

_NAMES: Mapping[Prunable, str] = {
    "attention": r"blocks\.\d+\.attention\.(w[qkvo]|augment\.w[123])\.weight",
    "ffn": r"blocks\.\d+\.ffn\.(shared_experts\.)?w[123]\.weight",
    "experts": r"blocks\.\d+\.ffn\.experts\.w[123]",
}


def prunable(config: ModelConfig, over: Iterable[Prunable]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the matrices of these kinds, in the model's order; experts whole.

    Embeddings, head, norms, routers, gates and coefficients of activations are never among them.
    """
    pattern = re.compile("|".join(_NAMES[kind] for kind in over))
    found = {name: spec.shape for name, spec in specs_of(config).items() if spec.trained and pattern.fullmatch(name)}
    if has_coefficients(config.ffn.activation):
        found = {name: shape for name, shape in found.items() if not name.endswith(".experts.w3")}
    return found


def prune_smallest(
    weights: Weights, shapes: Mapping[str, tuple[int, ...]], before: Weights | None, keep: int
) -> dict[str, torch.Tensor]:
    """Masks that keep exactly `keep` weights, the largest in magnitude of those that `before` keeps, over all matrices.

    Of equal ones the earlier go. Source: Frankle & Carbin 2019 (arXiv 1803.03635), global pruning.

    Args:
        weights: after training.
        shapes: what is pruned.
        before: masks to prune further; None: everything is there.
        keep: at most as many as `before` keeps.

    Returns:
        bool by name, in the order of `shapes`.
    """
    there = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    if before is not None:
        there = {name: before.read(name) for name in shapes}
    magnitudes = torch.cat([weights.read(name)[mask].float().abs() for name, mask in there.items()])
    assert 0 < keep <= len(magnitudes), (keep, len(magnitudes))
    stays = torch.ones(len(magnitudes), dtype=torch.bool)
    stays[magnitudes.argsort(stable=True)[: len(magnitudes) - keep]] = False
    parts = stays.split([int(mask.sum()) for mask in there.values()])
    return {name: mask.masked_scatter(mask, part) for (name, mask), part in zip(there.items(), parts, strict=True)}


class Held(NamedTuple):
    """A parameter of this process and which of its weights are trained."""

    parameter: torch.nn.Parameter
    mask: torch.Tensor
    """bool, of its shape and on its device."""


def masks_here(model: Decoder, masks: Weights) -> dict[str, Held]:
    """The masks of the parameters that this process holds, by name; of experts its own rows."""
    experts = {path: module for path, module in model.named_modules() if isinstance(module, Experts)}
    held = {}
    for name, parameter in model.named_parameters():
        if name not in masks.specs:
            continue
        module = experts.get(name.rpartition(".")[0])
        rows = slice(None) if module is None else slice(module.first, module.first + module.num_experts)
        held[name] = Held(parameter, masks.read(name, rows).to(parameter.device))
    assert len(held) == len(masks.specs), "a mask is of a tensor that the model does not have"
    return held


@torch.no_grad()
def set_to_zero(held: Iterable[Held]) -> None:
    """What is masked, before an optimizer copies the weights."""
    for parameter, mask in held:
        parameter.masked_fill_(~mask, 0.0)


def hold_gradients(held: Iterable[Held]) -> None:
    """Mask every gradient from now on, before it is summed anywhere. One that is not finite stays so: it is a mistake
    that the step must see."""
    for parameter, mask in held:
        parameter.register_hook(mask.mul)
