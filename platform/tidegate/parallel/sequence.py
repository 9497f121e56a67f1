"""Sequence parallelism: S neighbouring ranks hold the same sequences, each a run of their tokens.

Attention is DeepSpeed's Ulysses (arXiv 2309.14509): an all-to-all swaps tokens for heads, and another swaps them back.
A state goes from rank to rank, point to point, and its gradient the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.sequence.layer import DistributedAttention

from tidegate.model.sequence import SequenceRanks
from tidegate.parallel import collectives

__all__ = ["SequenceGroup"]

_BATCH, _TOKENS, _HEADS = 0, 1, 2


class SequenceGroup(SequenceRanks):
    """This rank's group; every rank of the process group must make it.

    Args:
        count: S, divides the world size.
    """

    def __init__(self, count: int) -> None:
        world, rank = collectives.world_size(), collectives.rank()
        assert world % count == 0, (world, count)
        self.count, self.index = count, rank % count
        groups = [dist.new_group(list(range(first, first + count))) for first in range(0, world, count)]
        self._group = groups[rank // count]
        self.before, self.after = rank - 1, rank + 1  # where there are any
        self._on_their_way: list[tuple[dist.Work, torch.Tensor]] = []

    def attend(
        self,
        attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        q_BTHd: torch.Tensor,
        k_BTGd: torch.Tensor,
        v_BTGd: torch.Tensor,
    ) -> torch.Tensor:
        ulysses = DistributedAttention(attention, self._group, scatter_idx=_HEADS, gather_idx=_TOKENS)
        y_BTHd: torch.Tensor = ulysses(q_BTHd, k_BTGd, v_BTGd, _BATCH)
        return y_BTHd

    def receive(self, like: Sequence[torch.Tensor], anchor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        received: tuple[torch.Tensor, ...] = _Receive.apply(self, anchor, *like)
        return received

    def send(self, y: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        if self.index == self.count - 1:
            return y
        sent: torch.Tensor = _Send.apply(self, y, *tensors)
        return sent

    def take(self, like: Sequence[torch.Tensor], rank: int) -> tuple[torch.Tensor, ...]:
        """Wait for tensors of these shapes and dtypes from a rank."""
        tensors = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in like)
        for tensor in tensors:
            dist.recv(tensor, rank, self._group)
        return tensors

    def give(self, tensors: Sequence[torch.Tensor], rank: int) -> None:
        """Send to a rank without waiting for it, but for what was sent before."""
        for work, _ in self._on_their_way:
            work.wait()
        dense = [x.contiguous() for x in tensors]
        works = [dist.isend(x, rank, self._group) for x in dense]
        self._on_their_way = [(work, x) for work, x in zip(works, dense, strict=True) if work is not None]


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: SequenceGroup, anchor: torch.Tensor, *like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        return group.take(like, group.before)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, ...]:
        ctx.group.give(gradients, ctx.group.before)
        return (None,) * (2 + len(gradients))


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: SequenceGroup, y: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.group, ctx.like = group, [torch.empty_like(x, device="meta") for x in tensors]
        group.give(tensors, group.after)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        like = [torch.empty_like(x, device=g_y.device) for x in ctx.like]
        return None, g_y, *ctx.group.take(like, ctx.group.after)
