"""The nodes of the Ray cluster that this process has joined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tidegate.launch.capacity import Needs, room
from tidegate.train.job import Job

__all__ = ["Node", "nodes_alive"]


class Node(NamedTuple):
    id: str
    address: str
    resources: Mapping[str, float]

    @property
    def is_head(self) -> bool:
        return "node:__internal_head__" in self.resources

    def here(self) -> Any:
        """For Ray to place something on it."""
        return NodeAffinitySchedulingStrategy(self.id, soft=False)

    def room(self, job: Job) -> int:
        """Workers of the job that fit."""
        return room(Needs.of(job).per_worker, [self.resources])

    def __hash__(self) -> int:
        return hash(self.id)

    def __str__(self) -> str:
        return f"node {self.address} ({self.id[:8]}{', head' if self.is_head else ''})"


def nodes_alive() -> list[Node]:
    """The head first."""
    alive = (node for node in ray.nodes() if node["Alive"])
    nodes = [Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"]) for node in alive]
    return sorted(nodes, key=lambda node: (not node.is_head, node.address, node.id))
