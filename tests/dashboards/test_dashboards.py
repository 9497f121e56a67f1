"""What is committed is what is described, and names what is exported; alerts fire when they should, by promtool."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from tidegate.launch.alerts import ALERTS, RECORDED
from tidegate.launch.dashboards import DASHBOARDS, write_dashboards, write_rules
from tidegate.launch.live import OF_THE_RUN, gauge_of

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "dashboards"
RULES = HERE / "prometheus" / "tidegate.rules.yml"
FILES = sorted((HERE / "grafana" / "dashboards").iterdir())

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool: apt install prometheus")


def panels() -> Iterator[dict[str, Any]]:
    """Every panel with queries, of every file."""
    for file in FILES:
        yield from (panel for panel in json.loads(file.read_text())["panels"] if panel["type"] != "row")


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_committed_files_are_what_generate_writes(tmp_path: Path) -> None:
    write_dashboards(tmp_path)
    write_rules(tmp_path / RULES.name)
    written = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert written == {file.name: file.read_text() for file in (*FILES, RULES)}, "run dashboards/generate.py"
    assert len(FILES) == len(DASHBOARDS) == 4


def test_every_metric_that_is_named_is_exported() -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    # test_telemetry.py holds this table against what runs record.
    table = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"), re.MULTILINE)
    ours = {gauge for pattern in table if (gauge := gauge_of(pattern))} | OF_THE_RUN.keys()
    exported = {f"ray_{name}" for name in (*ours, *METRICS_GAUGES)} | RECORDED.keys()
    named = [*expressions(), *RECORDED.values(), *(alert.when for alert in ALERTS)]
    names = {name for text in named for name in re.findall(r"\b(?:ray_|tidegate:)[\w:]+", text)}
    assert len(names) > 40
    assert names <= exported
    assert RECORDED.keys() <= names, "a rule that nobody reads"


def test_every_unit_can_be_drawn_without_grafana() -> None:
    units = {panel["fieldConfig"]["defaults"]["unit"] for panel in panels()}
    assert units <= runpy.run_path(str(ROOT / "docs" / "draw_dashboard.py"))["SCALES"].keys()


OF_PROMETHEUS = {"definition", "titleFormat", "textFormat"}
"""Fields that Grafana leaves to its data source."""


def not_kept(written: Any, read: Any, at: str = "") -> Iterator[str]:
    """Where of a document something is not in another that was made from it."""
    if isinstance(written, dict) and isinstance(read, dict):
        for name, value in written.items():
            yield from not_kept(value, read.get(name), f"{at}/{name}")
    elif isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        for number, values in enumerate(zip(written, read, strict=True)):
            yield from not_kept(*values, f"{at}/{number}")
    elif written != read and at.rpartition("/")[2] not in OF_PROMETHEUS:
        yield f"{at}: {written}"


def through_grafanas_schema(dashboard: dict[str, Any]) -> list[str]:
    """What Grafana's own types, made from its schema, do not keep."""
    return [*not_kept(dashboard, json.loads(json.dumps(Dashboard.from_json(dashboard), cls=JSONEncoder)))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_grafanas_schema_has_every_field(file: Path) -> None:
    register_default_plugins()
    dashboard = json.loads(file.read_text())
    assert through_grafanas_schema(dashboard) == []
    panel = next(panel for panel in dashboard["panels"] if panel["type"] == "timeseries")
    panel["options"]["legend"]["shown"] = True
    panel["targets"][0]["expression"] = "up"
    assert [line.rpartition("/")[2] for line in through_grafanas_schema(dashboard)] == ["expression: up", "shown: True"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_grafanas_fields(file: Path) -> None:
    """What its JSON model asks for, and that no panel lies on another."""
    dashboard = json.loads(file.read_text())
    assert re.fullmatch(r"[\w-]{1,40}", dashboard["uid"])
    assert dashboard["schemaVersion"] >= 36, "from there on data sources are objects"
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    numbers, taken = [panel["id"] for panel in dashboard["panels"]], set()
    assert len(set(numbers)) == len(numbers)
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"]) if place["w"] > 0
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["type"] in {"timeseries", "stat", "bargauge", "table"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            asked = set(re.findall(r"\$\{?(\w+)", target["expr"])) - {"__range"}
            assert asked <= variables, target["expr"]
            assert target["range"] != target["instant"]


@needs_promtool
def test_rules_and_every_query_of_a_panel_are_promql(tmp_path: Path) -> None:
    assert f"{len(RECORDED) + len(ALERTS)} rules found" in promtool("check", "rules", RULES)
    filled = [re.sub(r"\$__range", "1h", text) for text in expressions()]
    asked = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(filled)]
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": asked}]}))
    assert f"{len(asked)} rules found" in promtool("check", "rules", path)


class Case(NamedTuple):
    """Series, a value a minute, and what an alert makes of them."""

    alert: str
    series: dict[str, str]
    fires: int
    """Minute at which it does."""
    quiet: tuple[int, ...]
    """Minutes at which it does not."""
    labels: dict[str, str]
    summary: str


RUN, LAYER, GPU = 'run="r"', 'run="r", layer="3"', 'ip="10.0.0.1", GpuIndex="5"'


def a_save_every(steps: int) -> dict[str, str]:
    """Of 512 tokens a step and a step a second."""
    values = {"checkpoint_every": steps, "tokens": 512 * 7, "step": 7, "speed_tokens_per_s": 512}
    return {f"ray_tidegate_{name}{{{RUN}}}": f"{value}x70" for name, value in values.items()}


CASES = (
    Case(
        "TidegateLossSpike",
        {f"ray_tidegate_train_loss_spikes{{{RUN}}}": "1x20 3x40"},
        25,
        (20, 40),
        {"run": "r"},
        "run r: 2 loss spikes in 10 minutes",
    ),
    Case(
        "TidegateDeadExperts",
        {
            f"ray_tidegate_moe_dead_experts{{{LAYER}}}": "0x20 0.25x40",
            'ray_tidegate_moe_dead_experts{run="r", layer="0"}': "0.04x60",
        },
        40,
        (20, 24),
        {"run": "r", "layer": "3"},
        "run r, layer 3: 25% of experts get no token",
    ),
    Case(
        "TidegateMaxVioHigh",
        {f"ray_tidegate_moe_maxvio{{{LAYER}}}": "0.9x20 2.5x40 0.9x40"},
        40,
        (20, 75),
        {"run": "r", "layer": "3"},
        "run r, layer 3: MaxVio is 2.5",
    ),
    Case(
        "TidegateMFUDrop",
        {f"ray_tidegate_speed_mfu{{{RUN}}}": "0.4x70 0.33x40 0.2x20"},
        120,
        (70, 105, 113),
        {"run": "r"},
        "run r: MFU is 20%, a fifth below its last hour's median",
    ),
    Case(
        "TidegateWorkerLost",
        {
            f"ray_tidegate_workers_wanted{{{RUN}}}": "4x80",
            f"ray_tidegate_workers_present{{{RUN}}}": "0x15 4x4 0x1 4x10 3x30",  # at first it waits for machines
            f"ray_tidegate_step{{{RUN}}}": "_x15 10+10x60",
        },
        40,
        (14, 20, 22, 33),
        {"run": "r"},
        "run r: 1 workers fewer than it asks for",
    ),
    Case(  # records stop after 10 minutes, and the last one was of a fresh checkpoint
        "TidegateCheckpointStale",
        {
            f"ray_tidegate_checkpoint_age_s{{{RUN}}}": "5x60",
            f"ray_tidegate_recorded_at_s{{{RUN}}}": "0+60x10 600x50",
            **a_save_every(100),
        },
        45,
        (9, 39),
        {"run": "r"},
        "run r: nothing saved for 35m 5s",
    ),
    Case(  # the same, of a job that saves every 25 minutes
        "TidegateCheckpointStale",
        {
            f"ray_tidegate_checkpoint_age_s{{{RUN}}}": "5x70",
            f"ray_tidegate_recorded_at_s{{{RUN}}}": "0+60x10 600x60",
            **a_save_every(1500),
        },
        61,
        (45, 59),
        {"run": "r"},
        "run r: nothing saved for 51m 5s",
    ),
    Case(
        "TidegateGPUMemoryNearFull",
        {
            f"ray_node_gram_used{{{GPU}}}": "70000x20 78400x40",
            f"ray_node_gram_available{{{GPU}}}": "10000x20 1600x40",
        },
        40,
        (20, 24),
        {"ip": "10.0.0.1", "GpuIndex": "5"},
        "GPU 5 of 10.0.0.1: 98% of its memory is in use",
    ),
)


def test_every_alert_has_a_case_and_is_explained() -> None:
    assert [*dict.fromkeys(case.alert for case in CASES)] == [alert.name for alert in ALERTS]
    text = (HERE / "README.md").read_text(encoding="utf-8")
    for alert in ALERTS:
        row = f"| `{alert.name}` | `{alert.when}` | {alert.lasting} | {alert.action} |"
        assert row in text, f"dashboards/README.md lacks: {row}"


@needs_promtool
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert)
def test_an_alert_fires_and_is_quiet(case: Case, tmp_path: Path) -> None:
    (alert,) = (alert for alert in ALERTS if alert.name == case.alert)
    firing = {
        "exp_labels": {"severity": alert.severity, **case.labels},
        "exp_annotations": {"summary": case.summary, "description": alert.action},
    }
    times = [(case.fires, [firing]), *((minute, []) for minute in case.quiet)]
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "alert_rule_test": [
            {"eval_time": f"{minute}m", "alertname": case.alert, "exp_alerts": expected} for minute, expected in times
        ],
    }
    path = tmp_path / "test.yml"
    groups = [group["name"] for group in yaml.safe_load(RULES.read_text())["groups"]]  # promtool's order is any other
    rules = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "group_eval_order": groups}
    path.write_text(yaml.safe_dump({**rules, "tests": [test]}))
    promtool("test", "rules", path)
