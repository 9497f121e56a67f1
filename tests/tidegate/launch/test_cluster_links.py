"""Which nodes count as slow; test_cluster_check.py measures real ones."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tidegate.launch.cluster_links import Link, judge_links
from tidegate.launch.cluster_nodes import Node
from tidegate.parallel.bandwidth import Bandwidth

NODES = [Node(letter * 56, f"10.0.0.{index}", {"GPU": 2.0}) for index, letter in enumerate("abcde")]


def judged(
    ranks: Sequence[int], speed: dict[int, float], kind: str = "NVIDIA H100 80GB HBM3", inside: float = 400.0
) -> dict[str, tuple[str, str]]:
    """status and words, by the first letter of a node's id.

    Args:
        ranks: each one's node.
        speed: of a node to others, 40 unless said; the slower one of two counts.
    """
    seen = []
    for rank, node in enumerate(ranks):
        others = {other: there for other, there in enumerate(ranks) if other != rank}
        pairs = {
            other: inside if there == node else min(speed.get(node, 40.0), speed.get(there, 40.0))
            for other, there in others.items()
        }
        seen.append(Bandwidth(30.0 - rank, 20.0 - rank, pairs))
    nodes = [NODES[node] for node in ranks]
    links = judge_links(nodes, seen, dict.fromkeys(nodes, kind), {"H100": Link(450.0, 50.0)})
    (all_nodes,) = links.of_all
    last = len(ranks) - 1
    assert all_nodes.found == (
        f"{len(ranks)} ranks: all-reduce {30 - last:.2f} GB/s, all-to-all {20 - last:.2f} GB/s of each rank"
    )
    return {node[0]: (finding.status, finding.found) for node, (finding,) in links.of_node.items()}


@pytest.mark.parametrize("ranks", [[0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 0, 1, 2]])
def test_one_node_is_slow(ranks: list[int]) -> None:
    found = judged(ranks, {1: 4.0})
    assert found.pop("b")[0] == "FAIL"
    assert {status for status, _ in found.values()} <= {"ok", "warn"}
    assert found.keys() == {NODES[node].id[0] for node in ranks} - {"b"}


def test_between_two_only_an_expectation_tells() -> None:
    assert judged([0, 1], {1: 4.0})["a"] == (
        "warn",
        "4.00 GB/s with other nodes, 50 expected of NVIDIA H100 80GB HBM3",
    )
    assert judged([0, 1], {1: 4.0}, kind="")["a"] == ("ok", "4.00 GB/s with other nodes")
    assert judged([0, 1], {})["b"] == ("ok", "40.00 GB/s with other nodes")


def test_gpus_of_the_same_node_say_nothing_of_the_network() -> None:
    assert judged([0, 0, 0, 1, 1], {})["a"] == ("ok", "40.00 GB/s with other nodes")


def test_gpus_of_one_node() -> None:
    assert judged([3, 3, 3], {})["d"] == ("ok", "400.00 GB/s between its GPUs")
    assert judged([3, 3, 3], {}, inside=20.0)["d"][0] == "warn", "not over NVLink"
