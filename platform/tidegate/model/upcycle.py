"""Experts made of a dense feed-forward: every expert begins as a copy of it.

If the weights of a token's experts sum to 1, K equal experts are the dense feed-forward, and training goes on where the
dense model stood. The router is new and begins as in any new model; it, and noise if wanted, tell the copies apart.
Source: Komatsuzaki et al. 2023, "Sparse Upcycling" (arXiv 2212.05055); noise as in Qwen1.5-MoE.

Letters: E experts, F hidden width, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from tidegate.model.decoder import DenseConfig, ModelConfig
from tidegate.model.initialisation import Draw
from tidegate.model.moe import MoEConfig
from tidegate.model.weights import ALL, Spec, Weights, specs_of

__all__ = ["Upcycled", "upcycling_problem"]

_EXPERTS = re.compile(r"(blocks\.\d+\.ffn)\.experts\.(w[123])")
_ROUTER = re.compile(r"(blocks\.\d+\.ffn\.)?router\..+")


def upcycling_problem(dense: DenseConfig, moe: MoEConfig) -> str | None:
    """Why a mixture of copies would not compute what the dense feed-forward does, with the fix; None if it would."""
    if moe.expert_dim != dense.hidden_dim:
        return f"model.ffn.expert_dim={moe.expert_dim} is not the dense hidden_dim={dense.hidden_dim}; make them equal"
    if moe.activation != dense.activation:
        return f"model.ffn.activation={moe.activation} is not the dense model's {dense.activation}; make them equal"
    if moe.sizes:
        return "model.ffn.sizes makes experts of other widths than the dense feed-forward; leave it out"
    if moe.shared.num:
        return (
            f"model.ffn.shared.num={moe.shared.num} adds to experts that are the whole feed-forward already; set it "
            "to 0"
        )
    if not moe.weights_sum_to_one:
        router, kind = moe.router, moe.router.kind
        scale, renormalize = getattr(router, "scale", 1.0), getattr(router, "renormalize", None)
        if scale != 1:
            return f"model.ffn.router.scale={scale}: weights sum to it, not to 1; set it to 1"
        if renormalize is False:
            return "model.ffn.router.renormalize=False: a token's weights do not sum to 1; set it to true"
        return (
            f"model.ffn.router.kind={kind}: a token's weights do not sum to 1; use one whose do, such as softmax_top_k"
        )
    return None


class Upcycled(Weights):
    """The weights of a mixture, made of a dense model's.

    Args:
        dense: of the dense model.
        model: of the mixture; `upcycling_problem` has none.
        noise: standard deviation of what is added to each matrix of each expert, in units of the matrix's own.
        seed: of the noise, which depends on it, on the name and on the expert, not on the number of ranks.
    """

    def __init__(self, dense: Weights, model: ModelConfig, noise: float, seed: int) -> None:
        self._dense, self._noise, self._seed = dense, noise, seed
        wanted = specs_of(model)
        self.fresh = frozenset(name for name in wanted if _ROUTER.fullmatch(name))
        self._specs = {}
        for name, spec in wanted.items():
            if name not in self.fresh:
                self._specs[name] = spec._replace(dtype=dense.specs[self._source(name)].dtype)

    @property
    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    def _source(self, name: str) -> str:
        """The dense model's tensor that one is made of."""
        match = _EXPERTS.fullmatch(name)
        if match is None:
            return name
        matrix = f"{match[1]}.{match[2]}.weight"
        return matrix if matrix in self._dense.specs else f"{match[1]}.coefficients"

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        source, spec = self._source(name), self._specs[name]
        tensor = self._dense.read(source)
        if source == name:
            return tensor[rows] if rows != ALL else tensor
        experts = range(*rows.indices(spec.shape[0]))
        copies = tensor.expand(len(experts), *spec.shape[1:]).clone()
        if self._noise > 0 and source.endswith(".weight"):
            std, draw = float(tensor.float().std()) * self._noise, Draw(self._seed, f"upcycled.{name}")
            for place, expert in enumerate(experts):
                added = torch.empty_like(tensor, dtype=torch.float32)
                draw.normal_(added, std, "noise", row=expert)
                copies[place] += added.to(copies.dtype)
        return copies
