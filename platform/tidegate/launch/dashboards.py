"""Grafana dashboards on what runs export: one description here, and the JSON that Grafana loads.

The files in dashboards/grafana/ are written from here by dashboards/generate.py, in the layout that Ray writes its own
in; `tidegate dash` writes them where it needs them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from tidegate.launch.alerts import DEAD_EXPERTS, GPU_MEMORY, MAX_VIOLATION, STALE_S, rules

__all__ = ["DASHBOARDS", "Dashboard", "Panel", "Query", "write_dashboards", "write_rules"]

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS, _HEIGHT = 24, 8  # Grafana's grid
_HEADER = "# Written by dashboards/generate.py from platform/tidegate/launch/alerts.py.\n"


class Query(NamedTuple):
    """One query of a panel."""

    expression: str
    """PromQL."""
    legend: str = "{{run}}"


class Panel(NamedTuple):
    """One panel."""

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    """Grafana's name of it."""
    kind: Literal["timeseries", "stat", "bargauge", "table"] = "timeseries"
    width: int = 8
    line: float | None = None
    """Where an alert begins."""
    log: bool = False


class Dashboard(NamedTuple):
    """One dashboard."""

    name: str
    title: str
    chosen: Literal["run", "sweep"]
    """What a person chooses to look at."""
    rows: dict[str, tuple[Panel, ...]]
    """Panels under titles."""


_RUN, _TRIAL = 'run=~"$run"', 'sweep=~"$sweep", sweep!=""'
_MEAN = 'domain=""'  # of val/, where every domain has a series too


def _of(metric: str, *by: str, where: str = _RUN) -> str:
    """PromQL of a run's metric; a run that began again has two processes for half a minute."""
    return f"max by ({', '.join(('run', *by))}) (ray_tidegate_{metric}{{{where}}})"


def _panel(title: str, metric: str, *by: str, where: str = _RUN, **settings: Any) -> Panel:
    """A panel of one metric, a series a run or a place in it."""
    legend = " ".join(("{{run}}", *(f"{label} {{{{{label}}}}}" for label in by)))
    return Panel(title, (Query(_of(metric, *by, where=where), legend),), **settings)


_PHASES = ("data", "counting", "forward", "backward", "optimizer", "experts", "other")
_WORKERS = Panel("Workers", (Query(_of("workers_present")), Query(_of("workers_wanted"), "{{run}} wanted")))
_GPU = "{{ip}} GPU {{GpuIndex}}"


def _most(metric: str) -> str:
    """PromQL of a metric that only grows, also of runs that have ended."""
    return f"max by (run) (max_over_time(ray_tidegate_{metric}{{{_RUN}}}[$__range]))"


def _done(where: str, kind: Literal["stat", "bargauge"], width: int) -> Panel:
    share = f"{_of('tokens', where=where)} / {_of('tokens_wanted', where=where)}"
    return Panel("Done", (Query(share),), "percentunit", kind, width)


_TRAINING = Dashboard(
    "training",
    "Tidegate: training",
    "run",
    {
        "Where runs are": (
            _panel("Step", "step", kind="stat", width=4),
            _panel("Tokens", "tokens", kind="stat", width=4),
            _done(_RUN, "stat", 4),
            Panel("Not saved for", (Query(f"tidegate:checkpoint_age_s{{{_RUN}}}"),), "s", "stat", 4, STALE_S),
            _panel("Loss spikes", "train_loss_spikes", kind="stat", width=4),
            _panel("Steps that were not finite", "guards_nonfinite_steps", kind="stat", width=4),
        ),
        "Loss": (
            _panel("Training loss (nats a token)", "train_loss", log=True),
            _panel("Held-out loss (nats a token)", "val_loss", where=f"{_RUN}, {_MEAN}", log=True),
            _panel("Held-out loss by domain", "val_loss", "domain", where=f'{_RUN}, domain!=""', log=True),
            _panel("Gradient norm", "train_gradient_norm", log=True),
            _panel("Learning rate", "train_learning_rate"),
            _panel("Largest magnitude of the residual stream", "hidden_max_mean", log=True),
        ),
        "Speed": (
            _panel("Tokens a second", "speed_tokens_per_s"),
            Panel(
                "MFU",
                (Query(_of("speed_mfu")), Query(f"tidegate:mfu:median1h{{{_RUN}}}", "{{run}} median of an hour")),
                "percentunit",
            ),
            _panel("Model TFLOP/s a device", "speed_model_tflops_per_device"),
            Panel(
                "Where a step's time goes",
                tuple(Query(_of(f"time_{phase}_ms"), f"{{{{run}}}} {phase}") for phase in _PHASES),
                "ms",
            ),
            _panel("Stood still for checkpoints", "checkpoint_stall_s", unit="s"),
            _panel("The last save took", "checkpoint_write_s", unit="s"),
            _WORKERS,
        ),
    },
)

_EXPERTS = Dashboard(
    "experts",
    "Tidegate: experts and gates",
    "run",
    {
        "Balance": (
            _panel("MaxVio now", "moe_maxvio", "layer", kind="bargauge", line=MAX_VIOLATION),
            _panel("MaxVio", "moe_maxvio", "layer", line=MAX_VIOLATION),
            _panel("Dead experts", "moe_dead_experts", "layer", unit="percentunit", line=DEAD_EXPERTS),
            _panel("Deviation of loads over their mean", "moe_load_cv", "layer"),
            _panel("Entropy of loads (nats)", "moe_load_entropy", "layer"),
            _panel("Balance loss (1 is balanced)", "balance_lbl"),
        ),
        "Routing": (
            _panel("Router entropy (nats)", "moe_router_entropy", "layer"),
            _panel("Probability on the chosen experts", "moe_top_k_share", "layer", unit="percentunit"),
            _panel("Norm of router logits", "moe_logit_norm", "layer"),
            _panel("Information of expert on domain (nats)", "moe_domain_information", "layer"),
            _panel("Specialisation a micro-batch loss would punish", "moe_lbl_covariance", "layer"),
            _panel("Experts a token", "moe_experts_per_token", "layer"),
        ),
        "Attention and gates": (
            _panel("Mean gate", "attention_gate_mean", "block", unit="percentunit"),
            _panel("Closed gates", "attention_gate_closed", "block", unit="percentunit"),
            _panel("Attention to the first token", "attention_first_token", "block", unit="percentunit"),
            _panel("Heads that are sinks", "attention_sink_heads", unit="percentunit"),
            _panel("Entropy of attention (nats)", "attention_entropy", "block"),
            _panel("Largest magnitude after the block", "hidden_max", "block", log=True),
        ),
    },
)

_CLUSTER = Dashboard(
    "cluster",
    "Tidegate: cluster and cost",
    "run",
    {
        "Workers and cost": (
            _WORKERS,
            Panel("GPU-hours (without GPUs, worker-hours)", (Query(_most("cost_gpu_hours")),), kind="stat", width=4),
            Panel("Money", (Query(_most("cost_money")),), kind="stat", width=4),
            Panel("Money for a million tokens", (Query(f"{_of('cost_money')} / {_of('tokens')} * 1e6"),)),
        ),
        "GPUs": (
            Panel("Utilisation", (Query("ray_node_gpus_utilization", _GPU),), "percent"),
            Panel("Memory", (Query("tidegate:gpu_memory_share", _GPU),), "percentunit", line=GPU_MEMORY),
            Panel("Power", (Query("ray_node_gpu_power_milliwatts / 1000", _GPU),), "watt"),
        ),
        "Nodes": (
            Panel("CPU", (Query("ray_node_cpu_utilization", "{{ip}}"),), "percent"),
            Panel("Memory", (Query("ray_node_mem_used / ray_node_mem_total", "{{ip}}"),), "percentunit"),
            Panel("Received", (Query("ray_node_network_receive_speed", "{{ip}}"),), "Bps"),
            Panel("Sent", (Query("ray_node_network_send_speed", "{{ip}}"),), "Bps"),
            Panel("Free on disk", (Query("ray_node_disk_free", "{{ip}}"),), "bytes"),
            Panel("Nodes", (Query("count(ray_node_cpu_count)", "nodes"),), kind="stat"),
        ),
    },
)

_SWEEP = Dashboard(
    "sweep",
    "Tidegate: sweep",
    "sweep",
    {
        "Trials under way": (
            Panel("Trials", (Query(f"count by (sweep) ({_of('step', 'sweep', where=_TRIAL)})", "{{sweep}}"),)),
            Panel(
                "Tokens a second of all",
                (Query(f"sum by (sweep) ({_of('speed_tokens_per_s', 'sweep', where=_TRIAL)})", "{{sweep}}"),),
            ),
            _done(_TRIAL, "bargauge", 8),
        ),
        "What they come to": (
            Panel("Held-out loss now", (Query(_of("val_loss", where=f"{_TRIAL}, {_MEAN}")),), kind="table"),
            _panel("Held-out loss", "val_loss", where=f"{_TRIAL}, {_MEAN}", log=True),
            _panel("Training loss", "train_loss", where=_TRIAL, log=True),
            _panel("Worst MaxVio", "moe_maxvio", where=_TRIAL, line=MAX_VIOLATION),
            _panel(
                "Dead experts, worst layer", "moe_dead_experts", where=_TRIAL, unit="percentunit", line=DEAD_EXPERTS
            ),
            _panel("Tokens a second", "speed_tokens_per_s", where=_TRIAL),
        ),
    },
)

DASHBOARDS = (_TRAINING, _EXPERTS, _CLUSTER, _SWEEP)


def write_dashboards(folder: Path) -> None:
    """Write every dashboard's JSON into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for dashboard in DASHBOARDS:
        text = json.dumps(_dashboard(dashboard), indent=1) + "\n"
        (folder / f"tidegate_{dashboard.name}_grafana_dashboard.json").write_text(text, encoding="utf-8")


def write_rules(path: Path) -> None:
    """Write the rules for Prometheus."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_HEADER + yaml.safe_dump(rules(), sort_keys=False, width=110), encoding="utf-8")


def _dashboard(dashboard: Dashboard) -> dict[str, Any]:
    return {
        "uid": f"tidegate-{dashboard.name}",
        "title": dashboard.title,
        "tags": ["tidegate"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,  # one cursor for all panels
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [{"type": "dashboards", "title": "Tidegate", "tags": ["tidegate"], "asDropdown": True}],
        "templating": {"list": [*_variables(dashboard)]},
        "annotations": {"list": [_FIRING]},
        "panels": [*_panels(dashboard)],
    }


_FIRING = {
    "name": "Alerts",
    "datasource": _SOURCE,
    "enable": True,
    "iconColor": "red",
    "expr": 'ALERTS{alertname=~"Tidegate.*", alertstate="firing"}',
    "titleFormat": "{{alertname}}",
    "textFormat": "{{run}} {{layer}}",
}


def _variables(dashboard: Dashboard) -> Iterator[dict[str, Any]]:
    yield {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    query = f"label_values(ray_tidegate_step, {dashboard.chosen})"
    yield {
        "name": dashboard.chosen,
        "type": "query",
        "datasource": _SOURCE,
        "definition": query,
        "query": {"query": query, "refId": dashboard.chosen},
        "refresh": 2,  # when the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _panels(dashboard: Dashboard) -> Iterator[dict[str, Any]]:
    y = number = 0
    for title, panels in dashboard.rows.items():
        number += 1
        place = {"h": 1, "w": _COLUMNS, "x": 0, "y": y}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        x, y = 0, y + 1
        for panel in panels:
            if x + panel.width > _COLUMNS:
                x, y = 0, y + _HEIGHT
            number += 1
            place = {"h": _HEIGHT, "w": panel.width, "x": x, "y": y}
            yield {"id": number, "gridPos": place, **_drawn(panel)}
            x += panel.width
        y += _HEIGHT


def _drawn(panel: Panel) -> dict[str, Any]:
    over_time = panel.kind == "timeseries"
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": _SOURCE,
            "expr": query.expression,
            "legendFormat": query.legend,
            "range": over_time,
            "instant": not over_time,
            "format": "table" if panel.kind == "table" else "time_series",
        }
        for index, query in enumerate(panel.queries)
    ]
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.line is not None:
        steps.append({"color": "red", "value": panel.line})
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if over_time:
        scale = {"type": "log", "log": 10} if panel.log else {"type": "linear"}
        style = {"mode": "off" if panel.line is None else "dashed"}
        defaults["custom"] = {"fillOpacity": 0, "scaleDistribution": scale, "thresholdsStyle": style}
        defaults["color"] = {"mode": "palette-classic"}
    return {
        "type": panel.kind,
        "title": panel.title,
        "datasource": _SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _OPTIONS[panel.kind],
    }


_LAST = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {"reduceOptions": _LAST, "colorMode": "value", "graphMode": "area", "textMode": "value_and_name"},
    "bargauge": {"reduceOptions": _LAST, "orientation": "horizontal", "displayMode": "basic"},
    "table": {"showHeader": True, "sortBy": [{"displayName": "Value", "desc": False}]},
}
