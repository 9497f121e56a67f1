"""Bandwidth of a cluster's nodes, in a process group of one actor a GPU, or a node where there are none.

A node is slow if what it reaches with others is far below what nodes reach in the median. Two nodes see one number, so
that only an expectation can tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import ray
from ray.util import get_node_ip_address

from tidegate.launch.cluster_nodes import Node
from tidegate.launch.doctor import Finding
from tidegate.parallel.bandwidth import Bandwidth, measure_as
from tidegate.parallel.collectives import free_port

__all__ = ["Link", "Links", "judge_links", "measure_links"]

PLACED_WITHIN_S, MEASURED_WITHIN_S = 30.0, 60.0
_GPU_BYTES, _CPU_BYTES = 64 * 10**6, 8 * 10**6
_SLOW = 0.5
"""Of the median, or of what is expected."""


class Link(NamedTuple):
    """What is expected of a kind of GPU, GB/s in one direction."""

    inside: float
    """To the GPUs of its node."""
    network: float


class Links(NamedTuple):
    of_node: dict[str, list[Finding]]
    """By the node's id."""
    of_all: list[Finding]


@ray.remote(num_cpus=0)
class _Member:
    def store(self) -> str:
        return f"{get_node_ip_address()}:{free_port()}"

    def measure(self, rank: int, size: int, store: str, num_bytes: int) -> Bandwidth:
        return measure_as(rank, size, store, num_bytes, MEASURED_WITHIN_S / 2)


def measure_links(kinds: Mapping[Node, str], expected: Mapping[str, Link]) -> Links:
    """Measure between nodes that take workers, for at most a minute and a half.

    Args:
        kinds: nodes that are well, with the name of their GPUs or "".
        expected: by a part of the GPU's name.
    """
    gpu = any(node.resources.get("GPU") for node in kinds)
    slots = {node: int(node.resources.get("GPU", 0)) if gpu else int("CPU" in node.resources) for node in kinds}
    # The first of each node, then the second of each: most partners are on another node.
    places = sorted((slot, index, node) for index, node in enumerate(kinds) for slot in range(slots[node]))
    members: dict[Any, Node] = {}
    try:
        for _, _, node in places:
            options = {"num_gpus": int(gpu), "scheduling_strategy": node.here()}
            members[_Member.options(**options).remote()] = node  # type: ignore[attr-defined]
        return _measure(members, kinds, expected, _GPU_BYTES if gpu else _CPU_BYTES)
    finally:
        for member in members:
            ray.kill(member)


def _measure(
    members: Mapping[Any, Node], kinds: Mapping[Node, str], expected: Mapping[str, Link], num_bytes: int
) -> Links:
    stores = {member: member.store.remote() for member in members}
    placed = set(ray.wait([*stores.values()], num_returns=len(stores), timeout=PLACED_WITHIN_S)[0] if stores else ())
    came = [member for member, store in stores.items() if store in placed]
    absent = Finding("warn", f"links not measured: no room within {PLACED_WITHIN_S:.0f} s", "wait until it is free")
    busy = {node.id: [absent] for member, node in members.items() if member not in came}
    if len(came) < 2:
        return Links(busy, [])
    try:
        store = ray.get(stores[came[0]])
        answers = [member.measure.remote(rank, len(came), store, num_bytes) for rank, member in enumerate(came)]
        seen = ray.get(answers, timeout=MEASURED_WITHIN_S)
    except ray.exceptions.GetTimeoutError:
        return Links(busy, [Finding("FAIL", f"collectives do not end within {MEASURED_WITHIN_S:.0f} s", _FIX)])
    except ray.exceptions.RayError as error:
        return Links(busy, [Finding("FAIL", f"collectives fail: {str(error).strip().splitlines()[-1]}", _FIX)])
    found = judge_links([members[member] for member in came], seen, kinds, expected)
    return Links(busy | found.of_node, found.of_all)


_FIX = "look at the network between nodes: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, a firewall"


def judge_links(
    nodes: Sequence[Node], seen: Sequence[Bandwidth], kinds: Mapping[Node, str], expected: Mapping[str, Link]
) -> Links:
    """Which nodes are slow.

    Args:
        nodes: of every rank.
        seen: by every rank.
        kinds, expected: as of `measure_links`.
    """
    several = len(set(nodes)) > 1
    reached: dict[Node, list[float]] = {node: [] for node in nodes}
    for node, bandwidth in zip(nodes, seen, strict=True):
        reached[node] += [speed for rank, speed in bandwidth.pairs.items() if not several or nodes[rank] != node]
    typical = {node: median(speeds) for node, speeds in reached.items()}
    middle = median(typical.values())
    findings: dict[str, list[Finding]] = {}
    for node, speed in typical.items():
        said = f"{speed:.2f} GB/s {'with other nodes' if several else 'between its GPUs'}"
        link = next((link for name, link in expected.items() if name in kinds[node]), None)
        wanted = 0.0 if link is None else link.network if several else link.inside
        if speed < _SLOW * middle:
            finding = Finding("FAIL", f"{said}, the median is {middle:.2f}", "look at its network adapter and cable")
        elif speed < _SLOW * wanted:
            finding = Finding("warn", f"{said}, {wanted:g} expected of {kinds[node]}", _FIX)
        else:
            finding = Finding("ok", said)
        findings[node.id] = [finding]
    slowest = (min(getattr(bandwidth, name) for bandwidth in seen) for name in ("all_reduce", "all_to_all"))
    both = "all-reduce {:.2f} GB/s, all-to-all {:.2f} GB/s of each rank".format(*slowest)
    return Links(findings, [Finding("ok", f"{len(seen)} ranks: {both}")])
