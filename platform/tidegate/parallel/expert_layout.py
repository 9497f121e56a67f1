"""How the experts of a layer lie in one flat tensor: one tensor of theirs behind the other.

Letters: n numbers of a layer, padded to whole parts of its replicas; E experts of this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

__all__ = ["Layout", "Piece"]


class Piece(NamedTuple):
    """One of the tensors of a layer, (E, ...)."""

    shape: tuple[int, ...]
    decayed: bool
    """Whether weight decay acts on it."""


class Layout(NamedTuple):
    """How a layer's tensors lie one behind the other in a flat one."""

    pieces: Mapping[str, Piece]
    num_replicas: int

    @property
    def num_experts(self) -> int:
        """E."""
        return next(iter(self.pieces.values())).shape[0]

    @property
    def numbers(self) -> int:
        """Without padding."""
        return sum(prod(piece.shape) for piece in self.pieces.values())

    @property
    def padded(self) -> int:
        """n."""
        return -(-self.numbers // self.num_replicas) * self.num_replicas

    def places(self) -> list[tuple[int, int, Piece]]:
        """(start, stop, piece) of each."""
        found, start = [], 0
        for piece in self.pieces.values():
            stop = start + prod(piece.shape)
            found.append((start, stop, piece))
            start = stop
        return found

    def ranges(self, experts: frozenset[int]) -> list[tuple[int, int]]:
        """(start, stop) of the numbers of some experts, as few as there can be."""
        if len(experts) == self.num_experts:
            return [(0, self.padded)]
        found: list[tuple[int, int]] = []
        for start, _, piece in self.places():
            row = prod(piece.shape[1:])
            for expert in sorted(experts):
                begins, ends = start + expert * row, start + (expert + 1) * row
                if found and found[-1][1] == begins:
                    begins = found.pop()[0]
                found.append((begins, ends))
        return found
