"""Seconds of collectives: latency of each message and bytes over the bandwidth of the narrowest link (alpha-beta).

Hockney, "The communication challenge for MPP" (Parallel Computing 20, 1994); rings after Thakur, Rabenseifner and
Gropp, "Optimization of collective communication operations in MPICH" (IJHPCA 19, 2005).

Letters: n ranks of a group, m of them in each node; R ranks of expert parallelism, N rows, K experts a row.
"""

from __future__ import annotations

from typing import NamedTuple

from tidegate.plan.efficiency import Efficiency
from tidegate.plan.hardware import Gpu

__all__ = ["Group", "all_to_all", "dense_group", "expert_group", "pairs", "replica_group", "ring"]


class Group(NamedTuple):
    """Ranks that talk to each other."""

    size: int
    in_node: int
    """Of them, in one node."""

    @property
    def nodes(self) -> int:
        return -(-self.size // self.in_node)


def dense_group(world: int, gpu: Gpu) -> Group:
    """All ranks: they share what is not an expert."""
    return Group(world, min(world, gpu.gpus_per_node))


def expert_group(expert: int, gpu: Gpu) -> Group:
    """Neighbours, which hold a copy of the experts between them."""
    return Group(expert, min(expert, gpu.gpus_per_node))


def replica_group(world: int, expert: int, gpu: Gpu) -> Group:
    """Ranks that hold the same experts: every `expert`-th."""
    replicas = world // expert
    return Group(replicas, min(replicas, max(1, gpu.gpus_per_node // expert)))


def ring(size_bytes: float, group: Group, gpu: Gpu, efficiency: Efficiency) -> float:
    """A reduce-scatter to, or an all-gather of, `size_bytes` on each rank.

    In a node NVLink is the limit. Across nodes rings run side by side, each through the adapter of another GPU, so a
    group with m ranks in a node has m adapters.
    """
    if group.size == 1:
        return 0.0
    rate, network = _rates(gpu, efficiency)
    if group.nodes > 1:
        rate = min(rate, group.in_node * network)
    latency_us = (group.in_node - 1) * gpu.nvlink_latency_us + (group.nodes - 1) * gpu.network_latency_us
    return (1 - 1 / group.size) * size_bytes / rate + latency_us * 1e-6


def pairs(rows: float, top_k: int, ranks: int) -> float:
    """Rows that go to one rank: N (1 - (1 - 1/R)^K), for a row goes once however many of its experts are there."""
    return rows * (1 - (1 - 1 / ranks) ** top_k)


def all_to_all(
    bytes_to_one: float, group: Group, gpu: Gpu, efficiency: Efficiency, *, hierarchical: bool = False
) -> float:
    """`bytes_to_one` from each rank to each other one.

    Messages within the node and across take different links and run at the same time; `hierarchical` sends those for
    other nodes through the node first, and then a message to each of the other nodes.
    """
    near, far = group.in_node - 1, group.size - group.in_node
    nvlink, network = _rates(gpu, efficiency)
    alpha_near, alpha_far = gpu.nvlink_latency_us * 1e-6, gpu.network_latency_us * 1e-6
    if hierarchical and far:
        within = near * (alpha_near + group.nodes * bytes_to_one / nvlink)
        return within + (group.nodes - 1) * (alpha_far + group.in_node * bytes_to_one / network)
    return max(near * (alpha_near + bytes_to_one / nvlink), far * (alpha_far + bytes_to_one / network))


def _rates(gpu: Gpu, efficiency: Efficiency) -> tuple[float, float]:
    """Bytes/s of one GPU within its node and across."""
    return gpu.nvlink_gb_per_s * 1e9 * efficiency.nvlink, gpu.network_gb_per_s * 1e9 * efficiency.network
