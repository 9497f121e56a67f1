"""How strongly each unit writes to the residual stream: what dynamic sparse training drops by.

Letters: U units, E experts, F hidden width, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tidegate.model.decoder import Decoder
from tidegate.model.moe import MoE
from tidegate.model.unit_gates.base import AllReduce
from tidegate.model.unit_gates.units import Group, Units

__all__ = ["strengths"]


def strengths(model: Decoder, units: Units, all_reduce: AllReduce) -> torch.Tensor:
    """(U,) root mean square of what each unit writes to the residual stream with, over all ranks' experts."""
    device = model.embedding.weight.device
    squares_U, numbers_U = torch.zeros(units.num, device=device), torch.zeros(units.num, device=device)
    first = 0
    for group in units.groups:
        for written in _written(model, group):
            mine = slice(first + written.first, first + written.first + written.weight.shape[0])
            flat = written.weight.float().flatten(1)
            squares_U[mine] += written.share * flat.square().sum(dim=1)
            numbers_U[mine] += written.share * flat.shape[1]
        first += group.size
    both = torch.cat([squares_U, numbers_U])
    all_reduce(both)  # replicas add up above and below the line alike
    return (both[: units.num] / both[units.num :]).sqrt()


class _Written(NamedTuple):
    first: int
    """Which unit of the group the first row is."""
    weight: torch.Tensor
    """(units of this rank, ...)."""
    share: float = 1.0
    """Weight in the mean: a replicated matrix beside this rank's share of the experts counts as that share."""


def _written(model: Decoder, group: Group) -> list[_Written]:
    blocks: list[Any] = list(model.blocks)
    if group.place == "block":
        found = []
        for layer, block in enumerate(blocks):
            ffn = block.ffn
            moe = isinstance(ffn, MoE)
            share = ffn.experts.num_experts / ffn.config.num_experts if moe else 1.0
            found.append(_Written(layer, block.attention.wo.weight.unsqueeze(0), share))
            found.append(_Written(layer, (ffn.experts.w2 if moe else ffn.w2.weight).unsqueeze(0)))
        return found
    block = blocks[group.layer]
    ffn = block.ffn
    match group.place:
        case "heads":
            return [_Written(0, block.attention.wo.weight.unflatten(1, (group.num, -1)).transpose(0, 1))]
        case "channels":
            writes: Any = ffn.shared_experts if isinstance(ffn, MoE) else ffn
            return [_Written(0, writes.w2.weight.T)]
        case "experts":
            return [_Written(ffn.experts.first, ffn.experts.w2)]
        case "expert_channels":
            return [_Written(ffn.experts.first * group.num, ffn.experts.w2.transpose(1, 2).flatten(0, 1))]
