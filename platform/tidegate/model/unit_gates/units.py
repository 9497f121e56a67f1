"""The units that gates may drop, what each costs, and the masks that meet a budget exactly.

All units of a model stand in one flat vector, group after group. A group is what lies in one tensor: the query heads
of a layer, the hidden channels of its feed-forward, its experts; the blocks are one group over all layers. The cost of
a unit is its parameters, one currency for all kinds.

A *bundle* is the least that can be dropped at a time: one unit, except for the channels of routed experts. Those are
one tensor for all experts of a layer, so every expert keeps the same number of channels, a multiple of 8: there a
bundle is the channels of ranks 8j .. 8j + 7 of every expert. Bundles of a group are taken in the order of their rank,
so a mask is settled by how many bundles of each cost are kept (`counts`), and the best of those is exact: a knapsack
over few distinct weights.

Letters: U units, R rows (experts that keep the same number of units, else 1), n units of a row, Q bundles,
C distinct bundle costs, V count vectors, L layers, B sequences, T tokens, H heads, F hidden width, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from tidegate.model.activations import num_matrices

if TYPE_CHECKING:
    from tidegate.model.decoder import Block, ModelConfig

__all__ = ["NO_MASKS", "TOLERANCE", "Bundles", "Group", "Kind", "LayerMasks", "Units", "groups_of"]

Kind = Literal["heads", "channels", "experts", "blocks"]

TOLERANCE = 0.01
"""How far the kept share of the gated units' cost may be from `keep`."""

_MOST_VECTORS = 2**18  # of counts; beyond it (three distinct costs in a large model) the dearer ones are thinned out
_SMALLEST = 1e-30  # below it the logarithm would have an infinite gradient
_BUNDLE = 8  # rows of whole 16 bytes for the grouped product, see MoEConfig.expert_dim


class LayerMasks(NamedTuple):
    """Factors of one layer's units, fp32; None where a kind is not gated. Leading (B, T) where gates are a token's."""

    heads: torch.Tensor | None = None
    """(..., H), of the heads before the output projection."""
    channels: torch.Tensor | None = None
    """(..., F), of the hidden channels of the dense feed-forward or of the shared experts."""
    expert_channels: torch.Tensor | None = None
    """(E, F), of the hidden channels of every routed expert of the model."""
    experts: torch.Tensor | None = None
    """(..., E), whose logarithm is added to the router's logits."""
    block: torch.Tensor | None = None
    """(..., 1), of both residual branches."""

    def log_experts(self) -> torch.Tensor | None:
        """(E,) or (B T, E), to be added to the router's logits; -inf without a gradient where the factor is 0."""
        if self.experts is None:
            return None
        mask = self.experts.flatten(0, -2) if self.experts.ndim > 1 else self.experts
        return torch.where(mask > 0, mask.clamp(min=_SMALLEST).log(), -torch.inf)


NO_MASKS = LayerMasks()


Place = Literal["heads", "channels", "expert_channels", "experts", "block"]


class Group(NamedTuple):
    layer: int
    """Of all layers for `block`: 0."""
    place: Place
    rows: int
    num: int
    """n; the group holds rows * num units."""
    cost: int
    """Parameters of one unit."""
    shape: tuple[int, ...]
    """Of the tensor that the units are slices of; what ERK densities follow from."""
    minimum: int = 1
    """Units of each row that always stay."""
    bundle: int = 1
    """Units of each row that are dropped at a time."""

    @property
    def size(self) -> int:
        return self.rows * self.num


class Bundles(NamedTuple):
    """Bundles of all groups; within a group from the best to the worst."""

    scores_Q: torch.Tensor
    """Mean score of the units."""
    bundle_of_unit_U: torch.Tensor
    costs_Q: torch.Tensor
    mandatory_Q: torch.Tensor
    class_Q: torch.Tensor
    """Which of the distinct costs."""


def groups_of(config: ModelConfig, block: Block, over: Sequence[Kind]) -> tuple[Group, ...]:
    """The groups of the named kinds; costs are counted in `block`, a block of the model with all its experts."""
    D, F, attention = config.width, config.ffn, config.attention
    matrices = num_matrices(F.activation)

    def params(module: Any) -> int:
        return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())

    groups = []
    for layer in range(config.num_layers):
        if "heads" in over:
            H, d = attention.num_heads, attention.head_dim
            assert block.attention is not None  # in a model with unit gates all blocks attend
            gate = block.attention.gate if attention.gate.kind in ("sdpa_output", "query") else None
            # Query rows, output columns; keys and values belong to several heads and are not counted.
            cost = ((attention.augmented_query or D) + D) * d + params(gate) // H
            groups.append(Group(layer, "heads", 1, H, cost, (D, H * d)))
        if "channels" in over and F.kind == "dense":
            groups.append(Group(layer, "channels", 1, F.hidden_dim, matrices * D, (D, F.hidden_dim)))
        if "channels" in over and F.kind == "moe":
            E, hidden = F.num_experts, F.expert_dim
            groups.append(Group(layer, "expert_channels", E, hidden, matrices * D, (E, D, hidden), _BUNDLE, _BUNDLE))
            if F.shared.num:
                shared = F.shared.num * hidden
                groups.append(Group(layer, "channels", 1, shared, matrices * D, (D, shared)))
        if "experts" in over and F.kind == "moe":
            E, ffn = F.num_experts, block.ffn
            cost = (params(ffn.experts) + params(ffn.router)) // E
            groups.append(Group(layer, "experts", 1, E, cost, (E, D, F.expert_dim), F.top_k))
    if "blocks" in over:
        groups.append(Group(0, "block", 1, config.num_layers, params(block), (config.num_layers, D, D)))
    return tuple(groups)


class Units:
    """Groups side by side; splits flat vectors into layers and chooses what to keep.

    Args:
        groups: not empty.
        num_layers: L.
    """

    def __init__(self, groups: Sequence[Group], num_layers: int) -> None:
        self.groups, self.num_layers = tuple(groups), num_layers
        self.num = sum(group.size for group in groups)
        self.total_cost = sum(group.size * group.cost for group in groups)
        self._bundle_costs = sorted({group.rows * group.bundle * group.cost for group in groups}, reverse=True)
        self._cpu = torch.device("cpu")
        # `with torch.device("meta")` must not reach these: they are constants and not weights.
        self._costs_U = torch.cat([torch.full((g.size,), float(g.cost), device=self._cpu) for g in groups])
        per_bundle = [(g.num // g.bundle, g) for g in groups]
        self._bundle_class = torch.cat(
            [
                torch.full((n,), self._bundle_costs.index(g.rows * g.bundle * g.cost), device=self._cpu)
                for n, g in per_bundle
            ]
        )
        self._mandatory = torch.cat(
            [torch.arange(n, device=self._cpu) < math.ceil(g.minimum / g.bundle) for n, g in per_bundle]
        )
        self._counts: dict[float, torch.Tensor] = {}

    def costs(self, device: torch.device) -> torch.Tensor:
        """(U,) fp32, parameters of each unit."""
        return self._costs_U.to(device)

    def parts(self, vector_U: torch.Tensor) -> list[torch.Tensor]:
        """(..., U) as one (..., R, n) view a group."""
        parts = vector_U.split([group.size for group in self.groups], dim=-1)
        return [part.unflatten(-1, (g.rows, g.num)) for part, g in zip(parts, self.groups, strict=True)]

    def split(self, mask_U: torch.Tensor) -> list[LayerMasks]:
        """(..., U) as what each layer takes."""
        layers: list[dict[str, torch.Tensor]] = [{} for _ in range(self.num_layers)]
        for group, part in zip(self.groups, self.parts(mask_U), strict=True):
            if group.place == "block":
                for layer, fields in enumerate(layers):
                    fields["block"] = part[..., 0, layer : layer + 1]
            else:
                layers[group.layer][group.place] = part if group.place == "expert_channels" else part[..., 0, :]
        return [LayerMasks(**fields) for fields in layers]

    def with_needed_experts(self, mask_U: torch.Tensor, scores_U: torch.Tensor) -> torch.Tensor:
        """(..., U) with the top_k best experts of each layer at 1: a token must be able to choose that many."""
        if all(group.place != "experts" for group in self.groups):
            return mask_U
        floors = []
        for group, scores in zip(self.groups, self.parts(scores_U.detach().expand_as(mask_U)), strict=True):
            floor = torch.zeros_like(scores)
            if group.place == "experts":
                floor.scatter_(-1, scores.topk(group.minimum, dim=-1).indices, 1.0)
            floors.append(floor.flatten(-2))
        floor_U = torch.cat(floors, dim=-1)
        return mask_U + floor_U * (1 - mask_U).detach()

    def bundles(self, scores_U: torch.Tensor) -> Bundles:
        """Rank the units of every row by score (ties by position) and bundle equal ranks."""
        scores, owner, first = [], [], 0
        for group, part_Rn in zip(self.groups, self.parts(scores_U.detach().double()), strict=True):
            ordered_Rn, order_Rn = part_Rn.sort(dim=-1, descending=True, stable=True)
            rank_Rn = torch.empty_like(order_Rn).scatter_(
                -1, order_Rn, torch.arange(group.num, device=order_Rn.device).expand_as(order_Rn)
            )
            scores.append(ordered_Rn.unflatten(-1, (-1, group.bundle)).mean(dim=(0, 2)))
            owner.append((first + rank_Rn.div(group.bundle, rounding_mode="floor")).flatten())
            first += group.num // group.bundle
        device = scores_U.device
        class_Q = self._bundle_class.to(device)
        costs_Q = torch.tensor(self._bundle_costs, dtype=torch.float64, device=device)[class_Q]
        return Bundles(torch.cat(scores), torch.cat(owner), costs_Q, self._mandatory.to(device), class_Q)

    def select(self, scores_U: torch.Tensor, keep: float) -> torch.Tensor:
        """(U,) 0/1: of all masks that meet the budget, the one that keeps the most score times cost.

        Args:
            scores_U: (U,) importance of each unit per unit of its cost.
            keep: share of the cost; must be reachable (`counts`).
        """
        bundles = self.bundles(scores_U)
        counts_VC = self.counts(keep).to(scores_U.device)
        value_V = torch.zeros(counts_VC.shape[0], dtype=torch.float64, device=scores_U.device)
        places = []
        for index, cost in enumerate(self._bundle_costs):
            mine = (self._bundle_class == index).nonzero().flatten().to(scores_U.device)
            scores = bundles.scores_Q[mine]
            order = scores.argsort(descending=True, stable=True)
            order = order[bundles.mandatory_Q[mine][order].int().argsort(descending=True, stable=True)]
            gained = torch.cat([scores.new_zeros(1), (scores[order] * cost).cumsum(0)])
            value_V += gained[counts_VC[:, index]]
            places.append(mine[order])
        best_C = counts_VC.index_select(0, value_V.argmax().view(1))[0]  # plain indexing would wait for the device
        kept_Q = torch.zeros_like(bundles.mandatory_Q)
        for index, place in enumerate(places):
            kept_Q[place] = torch.arange(place.numel(), device=place.device) < best_C[index]
        return kept_Q[bundles.bundle_of_unit_U].float()

    def counts(self, keep: float) -> torch.Tensor:
        """(V, C) how many bundles of each cost may be kept; every row is as near to the budget as the cheapest allow.

        Raises:
            ValueError: no mask comes within `TOLERANCE` of the budget; says the nearest shares.
        """
        if keep not in self._counts:
            self._counts[keep] = torch.from_numpy(self._reachable_counts(keep)).to(self._cpu)
        return self._counts[keep]

    def _reachable_counts(self, keep: float) -> np.ndarray:
        costs_C = np.array(self._bundle_costs, dtype=np.float64)
        num_C = np.bincount(self._bundle_class.numpy(), minlength=len(costs_C))
        least_C = np.bincount(self._bundle_class.numpy(), self._mandatory.numpy(), len(costs_C)).astype(np.int64)
        ranges = [np.arange(low, high + 1) for low, high in zip(least_C[:-1], num_C[:-1], strict=True)]
        limit = round(_MOST_VECTORS ** (1 / max(1, len(ranges))))
        ranges = [np.unique(np.linspace(r[0], r[-1], min(len(r), limit)).round().astype(np.int64)) for r in ranges]
        grid_VC = np.stack(np.meshgrid(*ranges, indexing="ij"), axis=-1).reshape(-1, len(ranges)) if ranges else None
        coarse_VC = np.zeros((1, 0), dtype=np.int64) if grid_VC is None else grid_VC
        budget = keep * self.total_cost
        rest_V = (budget - coarse_VC @ costs_C[:-1]) / costs_C[-1]

        def complete(fine_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            fine_V = fine_V.clip(least_C[-1], num_C[-1]).astype(np.int64)
            rows_VC = np.concatenate([coarse_VC, fine_V[:, None]], axis=1)
            return rows_VC, rows_VC @ costs_C

        rows_VC, kept_V = complete(np.rint(rest_V))
        error_V = np.abs(kept_V - budget)
        if error_V.min() > TOLERANCE * self.total_cost * (1 + 1e-9):
            reached = np.concatenate([complete(np.floor(rest_V))[1], complete(np.ceil(rest_V))[1]])
            near = [reached[reached <= budget].max(initial=0.0), reached[reached >= budget].min(initial=np.inf)]
            shares = " and ".join(f"{cost / self.total_cost:.4f}" for cost in near if 0 < cost < np.inf)
            sizes = ", ".join(f"{n} of {int(c):,}" for n, c in zip(num_C, costs_C, strict=True))
            raise ValueError(
                f"units.keep={keep} is not within {TOLERANCE:.0%} of any choice among {sizes} parameters; nearest: "
                f"{shares}"
            )
        return rows_VC[error_V <= max(error_V.min(), costs_C[-1] / 2) * (1 + 1e-9)]
