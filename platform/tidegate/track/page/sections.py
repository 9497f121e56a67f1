"""The page's sections: which figures, of which metrics (docs/metrics.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from tidegate.track.page.figures import Figure, by_layer, columns, frames, lines
from tidegate.track.page.recording import Recording
from tidegate.track.spool import TOKENS

if TYPE_CHECKING:
    from tidegate.model.gates import AttentionGate

__all__ = ["Section", "sections"]


class Section(NamedTuple):
    """A heading, what to know, figures."""

    id: str
    title: str
    note: str
    figures: list[Figure]


def sections(recording: Recording) -> list[Section]:
    """Those that the run recorded something for."""
    made = [
        _loss(recording),
        _load(recording),
        _balance(recording),
        _gates(recording),
        _attention(recording),
        _activations(recording),
        _speed(recording),
        _machines(recording),
        _optimizer(recording),
    ]
    return [section for section in made if section.figures]


def _section(id: str, title: str, note: str, *figures: Figure | None) -> Section:
    return Section(id, title, note, [figure for figure in figures if figure is not None])


def _loss(recording: Recording) -> Section:
    history = recording.history
    pooled = {"train/loss": "training", "val/loss": "held-out, mean of domains"}
    bpb = columns(history, r"val/(.+)/bpb")
    return _section(
        "loss",
        "Loss",
        "Nats a token; held-out text of each domain at every evaluation.",
        lines("Loss", "nats a token", history, pooled),
        lines("Held-out loss by domain", "nats a token", history, columns(history, r"val/(.+)/loss")),
        lines("Held-out perplexity by domain", "", history, columns(history, r"val/(.+)/ppl"), log=True),
        lines("Held-out bits a byte by domain", "bits a byte", history, bpb),
    )


def _load(recording: Recording) -> Section:
    """Load over its even share, so that 1 is balanced whatever the number of experts."""
    history, tokens = recording.history, recording.history[TOKENS].to_dict()
    groups: dict[str, list[tuple[int, np.ndarray]]] = {}
    trained = _cube(history, r"moe/(\d+)/load/\d+", r"moe/{}/load/(\d+)")
    if trained:
        groups["training"] = [(step, matrix_LE * matrix_LE.shape[1]) for step, matrix_LE in trained]
    if recording.loads is not None:
        steps, domains, load_SDLE = recording.loads
        for index, domain in enumerate(domains):
            shown = [(step, load_SDLE[place, index] * load_SDLE.shape[-1]) for place, step in enumerate(steps)]
            groups[f"held-out {domain}"] = shown
    return _section(
        "load",
        "Expert load",
        "Share of the assignments over the even share: 1 is balanced, 0 is a dead expert. One training step, or a "
        "domain's held-out text.",
        frames("Load of each expert", "times even", groups, tokens, ("MoE layer", "expert"), middle=1.0),
    )


def _balance(recording: Recording) -> Section:
    history = recording.history
    return _section(
        "balance",
        "Balance",
        "MaxVio: busiest expert's load over the mean, minus 1. Information: how much an expert tells of the domain, "
        "0 is nothing; experts that specialise raise it.",
        by_layer("MaxVio", "", history, r"moe/(\d+)/maxvio", "layer"),
        by_layer("Experts without a token", "share", history, r"moe/(\d+)/dead_experts", "layer"),
        by_layer("Information of expert and domain", "nats", history, r"moe/(\d+)/domain_information", "layer"),
        lines("Balance loss", "1 is balanced", history, {"balance/lbl": "balance loss"}),
    )


def _gates(recording: Recording) -> Section:
    history, tokens = recording.history, recording.history[TOKENS].to_dict()
    means = _cube(history, r"attention/(\d+)/head/\d+/gate_mean", r"attention/{}/head/(\d+)/gate_mean")
    return _section(
        "gates",
        "Attention gates",
        "Sparse gates are near 0 (arXiv 2505.06708). Closed: values below 0.1. The histogram is of single gate values.",
        _gate_histogram(recording),
        frames("Gate of each head", "mean value", {"heads": means}, tokens, ("block", "head")),
        by_layer("Mean gate", "", history, r"attention/(\d+)/gate_mean", "block"),
        by_layer("Closed gates", "share", history, r"attention/(\d+)/gate_closed", "block"),
    )


def _gate_histogram(recording: Recording) -> Figure | None:
    """A row a block: how its gate values are spread."""
    history, tokens = recording.history, recording.history[TOKENS].to_dict()
    shares = _cube(history, r"attention/(\d+)/gate/\d+", r"attention/{}/gate/(\d+)")
    figure = frames("Histogram of gate values", "share", {"values": shares}, tokens, ("block", "gate value from"))
    gate = _gate(recording.job)
    if figure is None or gate is None:
        return figure
    edges = np.linspace(*gate.shown_values, shares[0][1].shape[1] + 1)
    labels = [f"{low:.2g}" for low in edges[:-1]]
    if gate.shown_values != (0.0, 1.0):  # whose outer bins have no end
        labels[0] = "less"
    return figure | {"x_labels": labels}


def _gate(job: dict[str, Any] | None) -> AttentionGate | None:
    """None where the job is of a version that this one does not read, or has none."""
    from tidegate.model.gates import AttentionGate

    try:
        assert job is not None
        return AttentionGate.model_validate(job["model"]["attention"]["gate"])
    except (AssertionError, KeyError, TypeError, ValueError):
        return None


def _attention(recording: Recording) -> Section:
    history = recording.history
    uniform = columns(history, r"attention/(\d+)/first_token_uniform")
    sink = {"attention/sink_heads": "heads that are sinks"}
    if uniform:
        sink |= {next(iter(uniform)): "first token's share if attention were uniform"}
    return _section(
        "attention",
        "Attention",
        "Attention to the first token. A head is a sink above 0.3 (arXiv 2410.10781).",
        by_layer("Attention to the first token", "share", history, r"attention/(\d+)/first_token", "block"),
        lines("Sinks", "share", history, sink),
        by_layer("Entropy of attention", "nats", history, r"attention/(\d+)/entropy", "block"),
        by_layer("Largest logit", "", history, r"attention/(\d+)/max_logit", "block"),
    )


def _activations(recording: Recording) -> Section:
    history = recording.history
    return _section(
        "activations",
        "Activations",
        "Largest magnitude of the residual stream after each block, in the first micro-batch.",
        by_layer("Largest activation", "", history, r"hidden/(\d+)/max", "block"),
    )


def _speed(recording: Recording) -> Section:
    history = recording.history
    phases = lines("A step", "ms, first rank", history, columns(history, r"time/(.+)_ms"))
    return _section(
        "speed",
        "Speed",
        "Tokens a second leave out evaluations. Time: since the run's first record, all that was repeated included.",
        lines("Throughput", "tokens/s", history, {"speed/tokens_per_s": "all ranks"}),
        lines("Model FLOPs used", "of the device's peak", history, {"speed/mfu": "MFU"}),
        lines("Model FLOPs", "TFLOP/s a device", history, {"speed/model_tflops_per_device": "a device"}),
        None if phases is None else phases | {"stacked": True},
        _time(recording.records),
    )


def _time(records: pd.DataFrame) -> Figure | None:
    """Minutes since the first record, by what they went into."""
    table = records[[TOKENS, "step"]].copy()
    elapsed_s = records.index.to_series().diff().fillna(0.0) / 1000
    stalled_s = records["checkpoint/stall_s"].fillna(0.0).clip(upper=elapsed_s)
    trained_s = (table[TOKENS].diff().clip(lower=0.0) / records["speed/tokens_per_s"]).fillna(0.0)
    steps_s = (trained_s.clip(upper=elapsed_s) - stalled_s).clip(lower=0.0)
    table["steps"] = steps_s.cumsum() / 60
    table["checkpoints"] = stalled_s.cumsum() / 60
    table["rest"] = (elapsed_s - steps_s - stalled_s).cumsum() / 60
    # A step that was repeated has its last time: the axis cannot go back.
    table = table[table["step"] >= table["step"].cummax()].drop_duplicates("step", keep="last").set_index("step")
    if len(table) < 2 or not table["steps"].iloc[-1]:
        return None
    named = {"steps": "steps", "checkpoints": "waiting for checkpoints", "rest": "evaluating, starting, interruptions"}
    figure = lines("Where the time went", "minutes, cumulative", table, named)
    return None if figure is None else figure | {"stacked": True}


def _machines(recording: Recording) -> Section:
    history = recording.history
    shown = (
        ("GPUs busy", "share of time, mean", "gpu_busy"),
        ("GPU memory", "GiB in use, fullest", "gpu_memory_gib"),
        ("GPU power", "W, all of the node", "gpu_power_w"),
        ("GPU temperature", "degrees C, hottest", "gpu_temperature_c"),
        ("CPU busy", "share of all cores", "cpu_busy"),
        ("Memory", "GiB in use", "memory_gib"),
        ("Read from disk", "MB/s", "disk_read_mb_per_s"),
        ("Written to disk", "MB/s", "disk_write_mb_per_s"),
        ("Received", "MB/s", "network_received_mb_per_s"),
        ("Sent", "MB/s", "network_sent_mb_per_s"),
    )
    return _section(
        "machines",
        "Machines",
        "Each node of the run, the whole machine: what others do on it counts too. Means since the record before.",
        *(by_layer(title, unit, history, rf"system/(\d+)/{name}", "node") for title, unit, name in shown),
    )


def _optimizer(recording: Recording) -> Section:
    history = recording.history
    tuned = columns(history, r"tuned/((?!.*_spread).+)")
    return _section(
        "optimizer",
        "Optimizer",
        "Gradient norm before clipping, over the global batch.",
        lines("Gradient norm", "", history, {"train/gradient_norm": "gradient norm"}, log=True),
        lines("Learning rate", "", history, {"train/learning_rate": "learning rate"}),
        lines("Self-tuned", "", history, tuned),
    )


def _cube(history: pd.DataFrame, layer_pattern: str, member_pattern: str) -> list[tuple[int, np.ndarray]]:
    """(step, (layers, members) matrix) of metrics with both numbers in their names; NaN where one is not recorded.

    Args:
        layer_pattern: its group is the layer's number.
        member_pattern: with `{}` for that; its group is the member's number.
    """
    layers = sorted({*columns(history, layer_pattern).values()}, key=int)
    members = {layer: columns(history, member_pattern.format(layer)) for layer in layers}
    width = 1 + max((int(number) for found in members.values() for number in found.values()), default=-1)
    names = [name for found in members.values() for name in found]
    table = history[names].dropna(how="all")
    cube_SLE = np.full((len(table), len(layers), width), np.nan)
    for row, found in enumerate(members.values()):
        for name, number in found.items():
            cube_SLE[:, row, int(number)] = table[name]
    return list(zip((int(step) for step in table.index), cube_SLE, strict=True))
