"""Bandwidth of a cluster's nodes, in a process group of one actor a GPU, or a node where there are none.

A node is slow if what it reaches with others is far below what nodes reach in the median. Two nodes see one number, so
that only an expectation can tell.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import ray
from ray.util import get_node_ip_address

from tidegate.launch.cluster_nodes import Node
from tidegate.launch.doctor import Finding
from tidegate.parallel.bandwidth import Bandwidth, measure_as, rounds
from tidegate.parallel.collectives import free_port

__all__ = ["Link", "Links", "judge_links", "judge_pairs", "measure_links"]

PLACED_WITHIN_S, MEASURED_WITHIN_S, PAIRS_WITHIN_S = 30.0, 60.0, 25.0
_PAIR_ROUNDS = 3
"""Where all together fail: every pair of four nodes, three partners of each of more."""
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
    """Measure between nodes that take workers, for at most a minute and a half; where that fails, once more in pairs.

    Args:
        kinds: nodes that are well, with the name of their GPUs or "".
        expected: by a part of the GPU's name.
    """
    gpu = any(node.resources.get("GPU") for node in kinds)
    slots = {node: int(node.resources.get("GPU", 0)) if gpu else int("CPU" in node.resources) for node in kinds}
    # The first of each node, then the second of each: most partners are on another node.
    places = sorted((slot, index, node) for index, node in enumerate(kinds) for slot in range(slots[node]))
    num_bytes = _GPU_BYTES if gpu else _CPU_BYTES
    with _members([node for _, _, node in places], gpu) as members:
        links = _measure(members, kinds, expected, num_bytes)
    if any(finding.status == "FAIL" for finding in links.of_all):
        free = [node for node in kinds if slots[node] and node.id not in links.of_node]
        return Links(links.of_node | _measure_pairs(free, gpu, num_bytes), links.of_all)
    return links


@contextlib.contextmanager
def _members(nodes: Sequence[Node], gpu: bool) -> Iterator[dict[Any, Node]]:
    """An actor for each, which has ended afterwards."""
    members: dict[Any, Node] = {}
    try:
        for node in nodes:
            options = {"num_gpus": int(gpu), "scheduling_strategy": node.here()}
            members[_Member.options(**options).remote()] = node  # type: ignore[attr-defined]
        yield members
    finally:
        for member in members:
            ray.kill(member)


def _measure_pairs(nodes: Sequence[Node], gpu: bool, num_bytes: int) -> dict[str, list[Finding]]:
    """Which nodes reach each other at all, in a few rounds of pairs."""
    reached: dict[Node, dict[Node, bool]] = {node: {} for node in nodes}
    for partner_N in rounds(len(nodes))[:_PAIR_ROUNDS]:
        with _members(nodes, gpu) as found:
            members = [*found]
            stores = [member.store.remote() for member in members]
            placed = set(ray.wait(stores, num_returns=len(stores), timeout=PLACED_WITHIN_S)[0])
            until, answers = time.monotonic() + PAIRS_WITHIN_S, {}
            for me, partner in enumerate(partner_N):
                if me < partner and {stores[me], stores[partner]} <= placed:
                    both = [(0, members[me]), (1, members[partner])]
                    answers[me, partner] = [m.measure.remote(rank, 2, stores[me], num_bytes) for rank, m in both]
            for (me, partner), asked in answers.items():
                one, other = nodes[me], nodes[partner]
                reached[one][other] = reached[other][one] = _end_well(asked, max(until - time.monotonic(), 0.0))
    return judge_pairs({node: others for node, others in reached.items() if others})


def _end_well(answers: Sequence[Any], timeout_s: float) -> bool:
    try:
        ray.get(answers, timeout=timeout_s)
    except ray.exceptions.RayError:  # GetTimeoutError is one
        return False
    return True


def judge_pairs(reached: Mapping[Node, Mapping[Node, bool]]) -> dict[str, list[Finding]]:
    """Which nodes are cut off, by id.

    Args:
        reached: whether a pair could exchange anything, from both sides.
    """
    lonely = {node for node, others in reached.items() if not any(others.values())}
    findings: dict[str, list[Finding]] = {}
    for node, others in reached.items():
        cut = [str(other) for other, well in others.items() if not well and other not in lonely]
        if node in lonely:
            findings[node.id] = [Finding("FAIL", f"reaches none of {len(others)} other nodes", _FIX)]
        elif cut:
            findings[node.id] = [Finding("FAIL", f"does not reach {', '.join(cut)}", _FIX)]
        else:
            findings[node.id] = [Finding("ok", f"reaches {sum(others.values())} other nodes, one at a time")]
    return findings


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
    wanted_of = {node: _wanted(kinds[node], expected, several) for node in typical}
    findings: dict[str, list[Finding]] = {}
    for node, speed in typical.items():
        said = f"{speed:.2f} GB/s {'with other nodes' if several else 'between its GPUs'}"
        wanted = wanted_of[node]
        if speed < _SLOW * middle:
            finding = Finding("FAIL", f"{said}, the median is {middle:.2f}", "look at its network adapter and cable")
        elif speed < _SLOW * wanted:
            finding = Finding("warn", f"{said}, {wanted:g} expected of {kinds[node]}", _FIX)
        else:
            finding = Finding("ok", said)
        findings[node.id] = [finding]
    slowest = [min(getattr(bandwidth, name) for bandwidth in seen) for name in ("all_reduce", "all_to_all")]
    said = f"{len(seen)} ranks: " + "all-reduce {:.2f} GB/s, all-to-all {:.2f} GB/s of each rank".format(*slowest)
    wanted = min(wanted_of.values())  # across nodes a GPU's own adapter: what NCCL adds by NVLink comes on top
    if min(slowest) < _SLOW * wanted:
        return Links(findings, [Finding("warn", f"{said}, {wanted:g} expected", _FIX)])
    return Links(findings, [Finding("ok", said)])


def _wanted(kind: str, expected: Mapping[str, Link], several: bool) -> float:
    """GB/s of a node's GPUs, to other nodes where there are several; 0 where nothing is expected."""
    link = next((link for name, link in expected.items() if name in kind), None)
    return 0.0 if link is None else link.network if several else link.inside
