"""Hardware, links, failures and counts: values by hand, and what cannot be."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from tidegate.config import ConfigError
from tidegate.plan.communication import Group, all_to_all, expert_group, pairs, replica_group, ring
from tidegate.plan.efficiency import Efficiency, measured_efficiency
from tidegate.plan.failures import daly, lost_share, saving, young
from tidegate.plan.hardware import Gpu, load_gpus, parse_gpus
from tidegate.quantities import count_shown, parse_count

ALL = Efficiency.model_validate({**measured_efficiency().model_dump(), "nvlink": 1.0, "network": 1.0})
H100 = load_gpus()["H100"]


def of(**fields: float) -> Gpu:
    return H100.model_copy(update=fields)


@pytest.mark.parametrize(
    ("text", "count"),
    [("1T", 10**12), ("300M", 300_000_000), ("131_072", 131072), ("2e9", 2 * 10**9), (" 1.5 k", 1500)],
)
def test_counts_are_read(text: str, count: int) -> None:
    assert parse_count(text, "--tokens") == count


@pytest.mark.parametrize("text", ["", "1X", "-3M", "M", "0", "0.1", "1e40", "1.5.2B", "nan"])
def test_what_is_no_count_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--tokens {text!r}"):
        parse_count(text, "--tokens")


def test_counts_are_shown() -> None:
    assert [count_shown(value) for value in (7, 1500, 2.5e9, 1e12)] == ["7", "1.5k", "2.5G", "1T"]


def test_gpus_are_read_and_a_users_file_lies_over_ours(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("gpus:\n  H100: {network_gb_per_s: 25, usd_per_gpu_hour: {contract: 2.1}}\n")
    mine = parse_gpus("63xh100", file)
    assert (mine.num_gpus, mine.name, str(mine)) == (63, "H100", "63xH100")
    assert mine.gpu.network_gb_per_s == 25
    assert mine.gpu.memory_gib == H100.memory_gib
    assert mine.gpu.usd_per_gpu_hour["contract"] == 2.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0xH100", "'0xH100' is no GPU at all"),
        ("8xH10", "unknown GPU 'H10'; did you mean 'H100'"),
        ("8xB20", "did you mean 'B200'"),
        ("H100", "not of the form 256xH100"),
        ("-8xH100", "not of the form 256xH100"),
    ],
)
def test_gpus_that_are_not_there(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_gpus(text)


def test_a_wrong_field_of_a_users_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("gpus:\n  H100: {network_gb_per_s: fast}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml.*gpus\.H100\.network_gb_per_s"):
        parse_gpus("8xH100", file)
    file.write_text("gpus:\n  H100: {usd_per_gpu_hour: {contract: -1}}\n")
    with pytest.raises(ConfigError, match=r"gpus\.H100\.usd_per_gpu_hour\.contract"):
        parse_gpus("8xH100", file)
    file.write_text("gpus:\n  H100: {networc_gb_per_s: 3}\n")
    with pytest.raises(ConfigError, match="network_gb_per_s"):
        parse_gpus("8xH100", file)


def test_rows_that_go_to_a_rank() -> None:
    """Of 8 experts a row on 2 ranks nearly all rows go to both; with one expert a row a rank gets its part."""
    assert pairs(256, 8, 2) == 255
    assert pairs(1000, 1, 8) == pytest.approx(125)
    assert pairs(1000, 8, 1) == 1000


def test_a_ring_in_a_node_and_across() -> None:
    gpu = of(nvlink_gb_per_s=400, nvlink_latency_us=0, network_gb_per_s=50, network_latency_us=0)
    assert ring(400e9, Group(4, 4), gpu, ALL) == pytest.approx(0.75)  # 3/4 of 400 GB at 400 GB/s
    assert ring(400e9, Group(16, 4), gpu, ALL) == pytest.approx(15 / 16 * 2)  # four adapters: 200 GB/s
    assert ring(400e9, Group(16, 1), gpu, ALL) == pytest.approx(15 / 16 * 8)
    assert ring(400e9, Group(16, 8), gpu, ALL) == pytest.approx(15 / 16)  # eight adapters are as fast as NVLink
    assert ring(400e9, Group(1, 1), gpu, ALL) == 0
    slow = of(nvlink_latency_us=5, network_latency_us=20)
    assert ring(0.0, Group(16, 8), slow, ALL) == pytest.approx((7 * 5 + 20) * 1e-6)


def test_an_exchange_in_a_node_and_across() -> None:
    gpu = of(nvlink_gb_per_s=400, nvlink_latency_us=0, network_gb_per_s=50, network_latency_us=0)
    assert all_to_all(4e9, Group(4, 4), gpu, ALL) == pytest.approx(0.03)  # 3 x 4 GB at 400 GB/s
    assert all_to_all(4e9, Group(16, 8), gpu, ALL) == pytest.approx(8 * 4 / 50)
    within, across = 7 * 2 * 4 / 400, 1 * 8 * 4 / 50
    assert all_to_all(4e9, Group(16, 8), gpu, ALL, hierarchical=True) == pytest.approx(within + across)


def test_hierarchical_pays_for_small_messages_only() -> None:
    group = Group(64, 8)
    for size, pays in ((1e3, True), (1e8, False)):
        plain = all_to_all(size, group, H100, ALL)
        assert (all_to_all(size, group, H100, ALL, hierarchical=True) < plain) is pays


def test_groups_lie_in_nodes_as_ranks_do() -> None:
    assert expert_group(4, H100) == Group(4, 4)
    assert expert_group(16, H100) == Group(16, 8)
    assert replica_group(64, 4, H100) == Group(16, 2)
    assert replica_group(64, 16, H100) == Group(4, 1)
    assert replica_group(4, 2, H100) == Group(2, 2)


def test_faster_links_are_never_slower() -> None:
    random_ = random.Random(0)
    for _ in range(200):
        group = Group(size := random_.choice([2, 3, 8, 24, 63, 512]), min(size, random_.choice([1, 4, 8])))
        size_bytes, field = 10 ** random_.uniform(2, 10), random_.choice(["nvlink_gb_per_s", "network_gb_per_s"])
        faster = H100.model_copy(update={field: getattr(H100, field) * random_.uniform(1, 10)})
        assert ring(size_bytes, group, faster, ALL) <= ring(size_bytes, group, H100, ALL)
        for way in (False, True):
            after = all_to_all(size_bytes, group, faster, ALL, hierarchical=way)
            assert after <= all_to_all(size_bytes, group, H100, ALL, hierarchical=way)


def test_intervals_between_saves() -> None:
    assert young(50, 10_000) == 1000
    # x = delta / 2M = 0.0025, so 1000 (1 + 0.05 / 3 + 0.0025 / 9) - 50
    assert daly(50, 10_000) == pytest.approx(966.944, abs=1e-3)
    assert daly(300, 100) == 100


def test_what_failures_cost() -> None:
    assert lost_share(1000, 0, 1e12, 300) == pytest.approx(0, abs=1e-6)
    assert lost_share(1000, 50, 1e12, 0) == pytest.approx(50 / 1050, rel=1e-6)
    assert lost_share(100, 1, 0.1, 300) == 1.0
    # To first order: the save, half an interval and a restart for each failure.
    assert lost_share(1000, 10, 1e6, 300) == pytest.approx(10 / 1010 + (505 + 300) / 1e6, rel=0.01)


def test_dalys_interval_loses_least() -> None:
    for delta, mtbf in ((0.2, 700_000.0), (30.0, 10_000.0), (60.0, 3000.0)):
        best = daly(delta, mtbf)
        at_best = lost_share(best, delta, mtbf, 300)
        for factor in (0.5, 0.8, 1.25, 2.0):
            assert at_best <= lost_share(factor * best, delta, mtbf, 300) + 1e-6, (delta, mtbf, factor)


def test_a_save_waits_for_the_one_before() -> None:
    assert saving(0.1, 900, 10_000, 300, 1e6).interval_s == 900
    assert saving(50, 1, 10_000, 300, 1e6).interval_s == pytest.approx(daly(50, 10_000))
    assert saving(50, 1, 10_000, 300, 77).interval_s == 77
    assert math.isclose(saving(50, 1, 10_000, 300, 1e6).lost, lost_share(daly(50, 10_000), 50, 10_000, 300))
