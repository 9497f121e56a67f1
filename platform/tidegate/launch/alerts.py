"""Prometheus rules on what runs export: what is worth computing once, and what somebody should be told.

dashboards/prometheus/tidegate.rules.yml is written from here by dashboards/generate.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["ALERTS", "DEAD_EXPERTS", "GPU_MEMORY", "MAX_VIOLATION", "RECORDED", "STALE_S", "Alert", "rules"]

MAX_VIOLATION, DEAD_EXPERTS, GPU_MEMORY, STALE_S, MFU_DROP = 1.0, 0.05, 0.95, 1800, 0.8
"""Where alerts begin. Panels draw the lines, and an organisation's own values go here. A checkpoint is stale after two
of the job's intervals, and never before `STALE_S`, which leaves room for evaluations."""

RECORDED = {
    "tidegate:moe_maxvio:avg10m": "max by (run, layer) (avg_over_time(ray_tidegate_moe_maxvio[10m]))",
    "tidegate:moe_dead_experts:avg10m": "max by (run, layer) (avg_over_time(ray_tidegate_moe_dead_experts[10m]))",
    "tidegate:mfu:median1h": "max by (run) (quantile_over_time(0.5, ray_tidegate_speed_mfu[1h]))",
    # Goes on where records stop: a run that hangs saves nothing either.
    "tidegate:checkpoint_age_s": (
        "max by (run) (ray_tidegate_checkpoint_age_s + (time() - ray_tidegate_recorded_at_s))"
    ),
    "tidegate:checkpoint_interval_s": (
        "max by (run) (ray_tidegate_checkpoint_every * (ray_tidegate_tokens / ray_tidegate_step)"
        " / ray_tidegate_speed_tokens_per_s)"
    ),
    "tidegate:workers_missing": (
        "max by (run) (ray_tidegate_workers_wanted) - max by (run) (ray_tidegate_workers_present)"
    ),
    "tidegate:gpu_memory_share": "ray_node_gram_used / (ray_node_gram_used + ray_node_gram_available)",
}
"""Series that rules compute, by name."""


class Alert(NamedTuple):
    """One alert."""

    name: str
    when: str
    """In PromQL."""
    lasting: str
    """For how long before it fires, such as 5m."""
    severity: str
    summary: str
    """For people; with Prometheus' templates."""
    action: str
    """What to do."""


ALERTS = (
    Alert(
        "TidegateLossSpike",
        "max by (run) (ray_tidegate_train_loss_spikes - min_over_time(ray_tidegate_train_loss_spikes[10m])) > 0",
        "0m",
        "warning",
        "run {{ $labels.run }}: {{ $value }} loss spikes in 10 minutes",
        "Look at train/gradient_norm and hidden/max_mean before it. If the loss does not come back: "
        "guards.spikes.action=skip_batches, a lower optimizer.schedule.peak, or attention.qk_clip.",
    ),
    Alert(
        "TidegateDeadExperts",
        f"tidegate:moe_dead_experts:avg10m > {DEAD_EXPERTS}",
        "5m",
        "warning",
        "run {{ $labels.run }}, layer {{ $labels.layer }}: {{ $value | humanizePercentage }} of experts get no token",
        "Raise balance.loss_weight or balance.bias_rate, or widen balance.scope; on small batches few tokens alone can "
        "be the cause.",
    ),
    Alert(
        "TidegateMaxVioHigh",
        f"tidegate:moe_maxvio:avg10m > {MAX_VIOLATION:g}",
        "5m",
        "warning",
        "run {{ $labels.run }}, layer {{ $labels.layer }}: MaxVio is {{ $value }}",
        "With expert parallelism all ranks wait for the one of the busiest expert. Raise balance.loss_weight or "
        "balance.bias_rate.",
    ),
    Alert(
        "TidegateMFUDrop",
        f"max by (run) (ray_tidegate_speed_mfu) < {MFU_DROP} * tidegate:mfu:median1h",
        "5m",
        "warning",
        "run {{ $labels.run }}: MFU is {{ $value | humanizePercentage }}, a fifth below its last hour's median",
        "Look for a throttled or shared GPU, a slow link, or checkpoint/stall_s. tidegate bench says where a step's "
        "time goes.",
    ),
    Alert(
        "TidegateWorkerLost",
        "tidegate:workers_missing > 0 and on (run) ray_tidegate_step",  # a run that waits for its first has no step
        "3m",
        "critical",
        "run {{ $labels.run }}: {{ $value }} workers fewer than it asks for",
        "Ray status says what the cluster lacks. A run without resources.min_workers waits; with it, it goes on with "
        "fewer (docs/elastic.md).",
    ),
    Alert(
        "TidegateCheckpointStale",
        f"tidegate:checkpoint_age_s > clamp_min(2 * tidegate:checkpoint_interval_s, {STALE_S})",
        "0m",
        "critical",
        "run {{ $labels.run }}: nothing saved for {{ $value | humanizeDuration }}",
        "If records stopped too, the run hangs: the watchdog's report is beside its checkpoints (docs/guards.md). "
        "Otherwise lower checkpoint.every, or look at checkpoint/write_s and the storage.",
    ),
    Alert(
        "TidegateGPUMemoryNearFull",
        f"tidegate:gpu_memory_share > {GPU_MEMORY}",
        "5m",
        "warning",
        "GPU {{ $labels.GpuIndex }} of {{ $labels.ip }}: {{ $value | humanizePercentage }} of its memory is in use",
        "A longer document or an evaluation may not fit. Lower train.micro_batch, set train.recompute, or offload: "
        "tidegate show predicts each (docs/memory.md).",
    ),
)


def rules() -> dict[str, Any]:
    """All rules, as Prometheus reads them."""
    alerts = [
        {
            "alert": alert.name,
            "expr": alert.when,
            "for": alert.lasting,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "description": alert.action},
        }
        for alert in ALERTS
    ]
    recorded = [{"record": name, "expr": expression} for name, expression in RECORDED.items()]
    return {"groups": [{"name": "tidegate-recorded", "rules": recorded}, {"name": "tidegate-alerts", "rules": alerts}]}
