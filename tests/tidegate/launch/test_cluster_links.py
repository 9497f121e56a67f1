"""Which nodes count as slow; test_cluster_check.py measures real ones."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tidegate.launch.cluster_links import Link, judge_links, judge_pairs
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
        seen.append(Bandwidth(60.0 - rank, 50.0 - rank, pairs))
    nodes = [NODES[node] for node in ranks]
    links = judge_links(nodes, seen, dict.fromkeys(nodes, kind), {"H100": Link(450.0, 50.0)})
    (all_nodes,) = links.of_all
    last = len(ranks) - 1
    assert all_nodes.found == (
        f"{len(ranks)} ranks: all-reduce {60 - last:.2f} GB/s, all-to-all {50 - last:.2f} GB/s of each rank"
        + (", 450 expected" if kind and len(set(ranks)) == 1 else "")
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


@pytest.mark.parametrize(
    ("reduce", "exchange", "kinds", "status"),
    [
        (26.0, 26.0, "NVIDIA H100", "ok"),
        (24.0, 26.0, "NVIDIA H100", "warn"),
        (26.0, 24.0, "NVIDIA H100", "warn"),
        (0.5, 0.5, "", "ok"),
    ],
)
def test_what_all_ranks_do_together_is_judged(reduce: float, exchange: float, kinds: str, status: str) -> None:
    seen = [Bandwidth(reduce, exchange, {1: 50.0}), Bandwidth(99.0, 99.0, {0: 50.0})]
    (found,) = judge_links(NODES[:2], seen, dict.fromkeys(NODES[:2], kinds), {"H100": Link(450.0, 50.0)}).of_all
    assert found.status == status
    assert ("50 expected" in found.found) == (status == "warn")


def test_a_cut_off_node_and_a_cut_link_are_named() -> None:
    def found(cut: set[tuple[int, int]], size: int) -> dict[str, tuple[str, str]]:
        pairs = {
            NODES[me]: {NODES[other]: not {(me, other), (other, me)} & cut for other in range(size) if other != me}
            for me in range(size)
        }
        return {node[0]: (finding.status, finding.found) for node, (finding,) in judge_pairs(pairs).items()}

    alone = found({(0, 1), (1, 2)}, 3)
    assert alone["b"] == ("FAIL", "reaches none of 2 other nodes")
    assert {alone["a"], alone["c"]} == {("ok", "reaches 1 other nodes, one at a time")}
    link = found({(0, 3)}, 4)
    assert link["a"] == ("FAIL", "does not reach node 10.0.0.3 (dddddddd)")
    assert link["d"] == ("FAIL", "does not reach node 10.0.0.0 (aaaaaaaa)")
    assert {link["b"][0], link["c"][0]} == {"ok"}
    assert {status for status, _ in found({(0, 1)}, 2).values()} == {"FAIL"}
