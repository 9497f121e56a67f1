"""Names of metrics taken apart, against the table in docs/metrics.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tidegate.metric_path import parse_metric

ROOT = Path(__file__).resolve().parents[2]
TABLE = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"), re.MULTILINE)
VALUES = {"layer": "0", "block": "11", "expert": "63", "head": "7", "node": "2", "bin": "19", "domain": "web-text.en"}


@pytest.mark.parametrize("pattern", TABLE)
def test_every_name_of_the_table_comes_back_with_its_places(pattern: str) -> None:
    places = re.findall("<(.+?)>", pattern)
    name = pattern
    for place in places:
        name = name.replace(f"<{place}>", VALUES[place])
    assert parse_metric(name) == (pattern, {place: VALUES[place] for place in places})


def test_a_domain_may_be_called_load_and_a_metric_of_no_family_is_its_own_pattern() -> None:
    assert parse_metric("moe/3/load/maxvio") == ("moe/<layer>/<domain>/maxvio", {"layer": "3", "domain": "load"})
    assert parse_metric("moe/3/load/12").place == {"layer": "3", "expert": "12"}
    assert parse_metric("moe/3/5/maxvio").place == {"layer": "3", "domain": "5"}
    for name in ("tokens", "val/loss", "moe/top_k_share_floor", "somebody/elses/metric/of/3"):
        assert parse_metric(name) == (name, {})
