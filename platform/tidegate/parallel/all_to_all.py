"""All-to-all of rows, in one step or in two: within a node, then across nodes.

`AllToAll` hands every row straight to the rank that it is for. `HierarchicalAllToAll` hands it to the rank of the same
node that has the destination's place in its node, and that one hands it across, together with the rows of all its
node: each rank then talks to one rank of every other node instead of all, in messages as many times larger as a node
has ranks. The rows arrive in the same order, so whatever is computed from them has the same bits.

Ranks agree on the numbers of rows once; a `Way` then takes any rows of those numbers there or back, differentiably,
and lets others compute while they travel.

Letters: R ranks of the group = G nodes of L ranks; Q kinds of rows that are agreed on together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tidegate.config import ConfigError
from tidegate.parallel import collectives

__all__ = ["AllToAll", "HierarchicalAllToAll", "NodeGroups", "Way", "node_groups"]

Sizes = list[int]
Finish = Callable[[], torch.Tensor]
"""Waits on the current stream for rows on their way, and returns them."""


class Way:
    """The way of rows to the ranks that they are for. All ranks of the group take the same ways in the same order.

    Args:
        sent: (R,) rows of this rank for each rank, in whose order they lie.
        came: (R,) rows of each rank for this one.
        group: of the ranks.
    """

    def __init__(self, sent: Sizes, came: Sizes, group: Any) -> None:
        self.sent, self.came = sent, came
        self._group = group

    def begin(self, x: torch.Tensor, *, there: bool) -> Finish:
        """Let rows of any width leave, those sent towards those that come or the other way round."""
        give, take = (self.sent, self.came) if there else (self.came, self.sent)
        if x.is_meta:  # shapes only: there is nobody to exchange with
            arrived = x.new_empty(sum(take), *x.shape[1:])
            return lambda: arrived
        return _begin(x, give, take, self._group)

    def there(self, x: torch.Tensor) -> torch.Tensor:
        """(sum of came, ...) the rows that the others sent here; differentiable."""
        return self.set_out(x)()

    def back(self, y: torch.Tensor) -> torch.Tensor:
        """(sum of sent, ...) what the others made of this rank's rows; differentiable."""
        return self._differentiably(y, there=False)()

    def set_out(self, x: torch.Tensor) -> Finish:
        """As `there`, but the rows leave now and arrive when the result is called, and so do their gradients:
        what is computed in between runs while either travels."""
        return self._differentiably(x, there=True)

    def _differentiably(self, x: torch.Tensor, *, there: bool) -> Finish:
        journey = _Journey(self, there)
        ticket = _SetOut.apply(x, journey)
        return lambda: _Arrive.apply(ticket, journey)


class AllToAll:
    """Rows go straight to the rank that they are for.

    Args:
        group: of the ranks.
    """

    def __init__(self, group: Any) -> None:
        self._group = group

    def agree(self, sizes_RQ: torch.Tensor) -> list[Way]:
        """The Q ways of `sizes_RQ[r, q]` rows of this rank for rank r; the one host sync of an exchange."""
        others_RQ = torch.empty_like(sizes_RQ)
        dist.all_to_all_single(others_RQ, sizes_RQ, group=self._group)
        sent_QR, came_QR = collectives.HostCopy(torch.stack([sizes_RQ.t(), others_RQ.t()])).tensor().tolist()
        return [Way(sent, came, self._group) for sent, came in zip(sent_QR, came_QR, strict=True)]


class NodeGroups(NamedTuple):
    """The two kinds of groups that ranks r = (g, l) of an expert-parallel group are in."""

    within: Any
    """Ranks of node g."""
    across: Any
    """Ranks with place l in their nodes."""
    num_nodes: int
    """G."""
    node_size: int
    """L."""


def node_groups(group_size: int) -> NodeGroups | None:
    """Groups for expert parallelism over `group_size` neighbouring ranks; every rank of the world calls this.

    Returns:
        None if no group of ranks is larger than a node, or a node holds one rank: there is one step to take then.

    Raises:
        ConfigError: nodes hold different numbers of ranks, or numbers that do not divide the group.
    """
    nodes = collectives.gather(collectives.local_world_size())
    node_size, world = nodes[0], len(nodes)
    if len(set(nodes)) > 1 or (group_size % node_size and node_size % group_size):
        raise ConfigError(
            f"parallel.all_to_all=hierarchical needs nodes with equal numbers of workers that divide "
            f"parallel.expert={group_size}, but they have {sorted(set(nodes))}; use parallel.all_to_all=plain"
        )
    if group_size <= node_size or node_size == 1:
        return None
    within = [list(range(first, first + node_size)) for first in range(0, world, node_size)]
    across = [
        list(range(first + place, first + group_size, node_size))
        for first in range(0, world, group_size)
        for place in range(node_size)
    ]
    own_within, _ = dist.new_subgroups_by_enumeration(within)
    own_across, _ = dist.new_subgroups_by_enumeration(across)
    return NodeGroups(own_within, own_across, group_size // node_size, node_size)


class HierarchicalAllToAll(AllToAll):
    """Rows go to a rank of their own node, then across nodes.

    Args:
        nodes: groups of this rank.
    """

    def __init__(self, nodes: NodeGroups) -> None:
        self._nodes = nodes

    def agree(self, sizes_RQ: torch.Tensor) -> list[Way]:
        (within, across, G, L), Q = self._nodes, sizes_RQ.shape[1]
        mine_LGQ = sizes_RQ.view(G, L, Q).transpose(0, 1).contiguous()
        nodes_LGQ = torch.empty_like(mine_LGQ)  # what each rank of the node gives this one to pass on, by node
        dist.all_to_all_single(nodes_LGQ, mine_LGQ, group=within)
        passed_GLQ = nodes_LGQ.transpose(0, 1).contiguous()
        came_GLQ = torch.empty_like(passed_GLQ)
        dist.all_to_all_single(came_GLQ, passed_GLQ, group=across)
        sizes_3QR = torch.stack([sizes_RQ.t(), passed_GLQ.view(G * L, Q).t(), came_GLQ.view(G * L, Q).t()])
        rows = zip(*collectives.HostCopy(sizes_3QR).tensor().tolist(), strict=True)
        return [_HierarchicalWay(sent, passed, came, self._nodes) for sent, passed, came in rows]


class _HierarchicalWay(Way):
    """Rows that lie by (g, l) of their destination go to rank l of this node, and then, by (g, l) of their origin,
    across to node g; on the way back the other way round."""

    def __init__(self, sent: Sizes, passed: Sizes, came: Sizes, nodes: NodeGroups) -> None:
        self.sent, self.came, self._passed = sent, came, passed
        self._nodes = nodes

    def begin(self, x: torch.Tensor, *, there: bool) -> Finish:
        within, across, G, L = self._nodes
        by_mate = _sums(_turned(self.sent, G, L), L), _sums(_turned(self._passed, G, L), L)
        by_node = _sums(self._passed, G), _sums(self.came, G)
        arrived = x.new_empty(sum(self.came if there else self.sent), *x.shape[1:])
        if there:
            first = _begin(_reordered(x, self.sent, G, L), *by_mate, within)
            with _beside(x.device):  # the second step follows the first while the current stream goes on
                passed = _reordered(first(), _turned(self._passed, G, L), L, G)
                second = _begin(passed, *by_node, across, arrived)
            return _keeping(second, first)
        first = _begin(x, by_node[1], by_node[0], across)
        with _beside(x.device):
            passed = _reordered(first(), self._passed, G, L)
            second = _begin(passed, by_mate[1], by_mate[0], within, arrived)
        return _keeping(lambda: _reordered(second(), _turned(self.sent, G, L), L, G), first)


class _Journey:
    """Rows on their way, and later their gradients."""

    def __init__(self, way: Way, there: bool) -> None:
        self.way, self.there = way, there
        self.finish: Finish | None = None

    def begin(self, x: torch.Tensor, *, there: bool) -> None:
        self.finish = self.way.begin(x.contiguous(), there=there)

    def end(self) -> torch.Tensor:
        assert self.finish is not None
        arrived, self.finish = self.finish(), None
        return arrived


class _SetOut(torch.autograd.Function):
    """Rows leave, and a ticket stands for them; their gradients have arrived at the end of the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, journey: _Journey) -> torch.Tensor:
        ctx.journey = journey
        journey.begin(x, there=journey.there)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.journey.end(), None


class _Arrive(torch.autograd.Function):
    """The rows of a ticket; their gradients leave."""

    @staticmethod
    def forward(ctx: Any, ticket: torch.Tensor, journey: _Journey) -> torch.Tensor:
        ctx.journey = journey
        return journey.end()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.journey.begin(g, there=not ctx.journey.there)
        return g.new_zeros(()), None


def _begin(x: torch.Tensor, give: Sizes, take: Sizes, group: Any, out: torch.Tensor | None = None) -> Finish:
    """Exchange rows by numbers for each rank and from each rank; `x` is kept until they have arrived."""
    arrived = x.new_empty(sum(take), *x.shape[1:]) if out is None else out
    work = dist.all_to_all_single(arrived, x, take, give, group=group, async_op=True)

    def finish() -> torch.Tensor:
        work.wait()
        return arrived

    return _keeping(finish, x)


def _keeping(finish: Finish, needed: Any) -> Finish:
    """`finish`, holding on to what must not be freed before: the current stream waits for nothing earlier."""

    def finish_and_free() -> torch.Tensor:
        nonlocal needed
        arrived, needed = finish(), None
        return arrived

    return finish_and_free


def _turned(sizes: Sizes, outer: int, inner: int) -> Sizes:
    """Of blocks by (outer, inner), by (inner, outer)."""
    return [sizes[o * inner + i] for i in range(inner) for o in range(outer)]


def _sums(sizes: Sizes, outer: int) -> Sizes:
    inner = len(sizes) // outer
    return [sum(sizes[o * inner : (o + 1) * inner]) for o in range(outer)]


def _reordered(x: torch.Tensor, sizes: Sizes, outer: int, inner: int) -> torch.Tensor:
    """Blocks of rows that lie by (outer, inner), by (inner, outer)."""
    blocks: Sequence[torch.Tensor] = x.split(sizes)
    return torch.cat([blocks[o * inner + i] for i in range(inner) for o in range(outer)])


def _beside(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.stream(_side_stream(device)) if device.type == "cuda" else nullcontext()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
