"""The run page: its numbers are those of the store, its text is only text, and every state of a run has a page."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time

import numpy as np
import pandas as pd
import pytest
from plotly.offline import get_plotlyjs

from tidegate.track import TrackConfig, find_run, finish_run, log_dict, log_file, log_text, open_run, tag_run
from tidegate.track.client import connect
from tidegate.track.page import run_page
from tidegate.track.page.figures import MAX_CELLS, frames, lines
from tidegate.track.page.health import find
from tidegate.track.page.recording import Event, Recording

JOB = {
    "name": "gate",
    "train": {"tokens": 9000},
    "model": {"attention": {"gate": {"kind": "sdpa_output"}}},
    "checkpoint": {"every": 2},
    "resources": {"workers": 3, "gpu": False},
}
HOSTILE = "</script><img src=x onerror=\"document.title='taken'\"><b>@@VALUES@@ & 'x'"


def planted(uri, *, name="gate-1", job=JOB, changes=None, records=(), begin_ms=None, **tags):
    """A run whose records (step, tokens, metrics) are a second apart."""
    from mlflow.entities import Metric

    handle = open_run(
        uri, TrackConfig(), job="gate", resolved=job, changes=changes or {}, command=["x"], name=name, tags=tags
    )
    begin_ms = begin_ms or time.time_ns() // 1_000_000 - 1000 * len(records)
    for place, (step, tokens, metrics) in enumerate(records):
        at = begin_ms + 1000 * place
        batch = [Metric(key, value, at, step) for key, value in {**metrics, "tokens": tokens}.items()]
        connect(uri).log_batch(handle.run_id, metrics=batch)
    return handle


def page(handle) -> str:
    return run_page(find_run(handle.uri, handle.run_id))


def values_of(text: str) -> dict:
    return json.loads(re.search(r'<script id="values" type="application/json">(.*?)</script>', text, re.DOTALL)[1])


def figure(values: dict, section: str, title: str) -> dict:
    figures = next(entry["figures"] for entry in values["sections"] if entry["id"] == section)
    return next(entry for entry in figures if entry["title"] == title)


def series(values: dict, section: str, title: str) -> dict:
    return {entry["name"]: entry["y"] for entry in figure(values, section, title)["series"]}


def metrics_of(step: int) -> dict[str, float]:
    """Of 2 layers of 3 experts and 2 blocks of 5 heads, all different."""
    loads = {f"moe/{layer}/load/{expert}": (layer + expert * step) / 100 for layer in range(2) for expert in range(3)}
    gates = {f"attention/{a}/head/{h}/gate_mean": (5 * a + h) / 10 + step / 1000 for a in range(2) for h in range(5)}
    gates |= {f"attention/{a}/gate/{b}": (a + b * step) / 100 for a in range(2) for b in range(4)}
    layers = {
        f"{name.format(layer)}": value + layer + step / 100
        for layer in range(2)
        for name, value in {
            "moe/{}/maxvio": 0.2,
            "moe/{}/dead_experts": 0.0,
            "moe/{}/domain_information": 0.3,
            "attention/{}/gate_mean": 0.4,
            "attention/{}/gate_closed": 0.5,
            "attention/{}/first_token": 0.6,
            "attention/{}/entropy": 0.7,
            "hidden/{}/max": 70.0,
            "system/{}/gpu_power_w": 400.0,
            "system/{}/cpu_busy": 0.1,
        }.items()
    }
    speed = {
        "speed/tokens_per_s": 1000.0 + step,
        "speed/mfu": 0.4 + step / 1000,
        "time/forward_ms": 30.0 + step,
        "time/backward_ms": 60.0,
        "checkpoint/stall_s": 0.25 * (step == 3),
        "cost/gpu_hours": 1.5 * step,
    }
    train = {"train/loss": 9.0 - step, "train/gradient_norm": 0.5 + step, "train/learning_rate": 1e-3}
    counts = {"train/loss_spikes": step // 3, "guards/nonfinite_steps": 0, "guards/rollbacks": 0}
    return (
        loads | gates | layers | speed | train | counts | {"attention/sink_heads": 0.4, "balance/lbl": 1.0 + step / 10}
    )


def test_every_sections_numbers_are_those_that_were_logged(uri, tmp_path):
    records = [(step, 1000 * step, metrics_of(step)) for step in (1, 2, 3)]
    held_out = {
        "val/loss": 5.5,
        "val/math/loss": 5.0,
        "val/math/ppl": 148.41,
        "val/math/bpb": 1.7,
        "val/prose/loss": 6.0,
    }
    records.append((3, 3000, held_out))
    handle = planted(uri, changes={"model.width": 63}, records=records)
    load_SDLE = np.arange(1, 13, dtype=np.float32).reshape(1, 2, 2, 3) / 100
    np.savez(tmp_path / "expert_load.npz", steps=[3], domains=np.array(["math", "prose"]), load_SDLE=load_SDLE)
    log_file(handle, tmp_path / "expert_load.npz")
    log_text(handle, json.dumps({"time_ms": 1, "step": 2, "text": "a worker was lost"}) + '\n{"torn', "events.jsonl")
    samples = [{"step": step, "domain": "math", "prompt": "1 +", "greedy": f"{step}", "drawn": "x"} for step in (1, 3)]
    log_text(handle, "\n".join(map(json.dumps, samples)) + '\n{"step": 9, "torn', "samples.jsonl")
    log_dict(handle, {"time": "2020-01-01T00:00:00Z", "differs": {"train.tokens": "7"}}, "job/resumed-1.json")
    tag_run(handle, "tidegate.stopped_by", "limits.max_gpu_hours=4.5")
    finish_run(handle, "FINISHED")
    values = values_of(page(handle))

    assert (values["name"], values["status"]) == ("gate-1", "FINISHED")
    facts = dict(values["facts"])
    assert facts["tokens"] == "3,000 of 9,000 (33 %), step 3"
    assert facts["hardware"] == "3 CPU workers"
    assert facts["held-out loss"] == "5.5000 at step 3"
    assert facts["cost"] == "4.5 worker-hours"
    assert facts["stopped by"] == "limits.max_gpu_hours=4.5"

    losses = series(values, "loss", "Loss")
    assert losses == {"training": [8.0, 7.0, 6.0], "held-out, mean of domains": [None, None, 5.5]}
    assert figure(values, "loss", "Loss")["x"] == {"steps": [1, 2, 3], "tokens": [1000, 2000, 3000]}
    assert series(values, "loss", "Held-out loss by domain") == {"math": [5.0], "prose": [6.0]}
    assert series(values, "loss", "Held-out perplexity by domain") == {"math": [148.41]}
    assert series(values, "loss", "Held-out bits a byte by domain") == {"math": [1.7]}

    training, math_, prose = figure(values, "load", "Load of each expert")["groups"]
    assert training["x"] == {"steps": [1, 2, 3], "tokens": [1000, 2000, 3000]}
    assert training["z"][2] == [[0.0, 0.09, 0.18], [0.03, 0.12, 0.21]]  # times 3 experts: 1 is even
    assert (math_["name"], math_["z"]) == ("held-out math", [[[0.03, 0.06, 0.09], [0.12, 0.15, 0.18]]])
    assert (prose["name"], prose["z"]) == ("held-out prose", [[[0.21, 0.24, 0.27], [0.3, 0.33, 0.36]]])

    of_layers = {
        ("balance", "MaxVio", "layer"): 0.2,
        ("balance", "Experts without a token", "layer"): 0.0,
        ("balance", "Information of expert and domain", "layer"): 0.3,
        ("gates", "Mean gate", "block"): 0.4,
        ("gates", "Closed gates", "block"): 0.5,
        ("attention", "Attention to the first token", "block"): 0.6,
        ("attention", "Entropy of attention", "block"): 0.7,
        ("activations", "Largest activation", "block"): 70.0,
        ("machines", "GPU power", "node"): 400.0,
        ("machines", "CPU busy", "node"): 0.1,
    }
    for (section, title, what), value in of_layers.items():
        seen = series(values, section, title)
        assert list(seen) == [f"{what} 0", f"{what} 1"], title
        for layer, row in enumerate(seen.values()):
            assert row == pytest.approx([value + layer + step / 100 for step in (1, 2, 3)]), title
    assert series(values, "balance", "Balance loss") == {"balance loss": [1.1, 1.2, 1.3]}
    assert series(values, "attention", "Sinks") == {"heads that are sinks": [0.4] * 3}

    (heads,) = figure(values, "gates", "Gate of each head")["groups"]
    assert heads["z"][1][1] == pytest.approx([0.502, 0.602, 0.702, 0.802, 0.902])
    histogram = figure(values, "gates", "Histogram of gate values")
    assert histogram["groups"][0]["z"][1] == [[0.0, 0.02, 0.04, 0.06], [0.01, 0.03, 0.05, 0.07]]
    assert histogram["x_labels"] == ["0", "0.25", "0.5", "0.75"]

    assert series(values, "speed", "Throughput") == {"all ranks": [1001, 1002, 1003]}
    assert series(values, "speed", "Model FLOPs used") == {"MFU": [0.401, 0.402, 0.403]}
    assert series(values, "speed", "A step") == {"backward": [60.0] * 3, "forward": [31.0, 32.0, 33.0]}
    spent = series(values, "speed", "Where the time went")  # 3 s; each record's 1000 tokens take a little less than 1 s
    assert spent["waiting for checkpoints"][-1] == pytest.approx(0.25 / 60, rel=1e-3)
    assert spent["steps"][-1] == pytest.approx((1000 / 1002 + 1000 / 1003 - 0.25) / 60, rel=1e-3)
    assert sum(row[-1] for row in spent.values()) == pytest.approx(3 / 60, rel=1e-3)
    assert series(values, "optimizer", "Gradient norm") == {"gradient norm": [1.5, 2.5, 3.5]}

    assert values["samples"] == [[3, "math", "1 +", "3", "x", ""], [1, "math", "1 +", "1", "x", ""]]

    events = {(event["kind"], event["step"], event["tokens"]): event["text"] for event in values["events"]}
    assert set(events) == {
        ("resume", 1, 1000),
        ("checkpoint", 2, 2000),
        ("notice", 2, 2000),
        ("spike", 3, 3000),
    }
    assert events["resume", 1, 1000] == "resumed with train.tokens=7"
    assert events["notice", 2, 2000] == "a worker was lost"
    assert values["changes"] == [["model.width", "63"]]
    assert "tokens: 9000" in values["job"]

    levels = {finding["subject"]: finding["level"] for finding in values["findings"]}
    assert levels == {
        "State": "green",
        "Loss": "amber",  # three records say little
        "Spikes": "amber",
        "Finite": "green",
        "Rollbacks": "green",
        "Experts": "red",  # layer 1 has its planted 1.01
        "Balance": "amber",
        "Sink": "amber",
        "Activations": "green",
        "Checkpoint": "green",
        "Speed": "green",
    }
    assert [hint["subject"] for hint in values["advice"]] == ["Experts", "Loss", "Spikes", "Balance", "Sink"]


def outside_plotly(text: str) -> str:
    assert text.count(get_plotlyjs()) == 1
    return text.replace(get_plotlyjs(), "")


def hostile(uri):
    job = {**JOB, "name": HOSTILE, "data": {HOSTILE: [HOSTILE]}}
    handle = planted(uri, name=HOSTILE, job=job, changes={HOSTILE: HOSTILE}, records=[(1, 5, {"train/loss": 1.0})])
    log_text(handle, json.dumps({"step": 1, "text": HOSTILE}), "events.jsonl")
    log_text(handle, json.dumps({"step": 1, "domain": HOSTILE, "drawn": HOSTILE}), "samples.jsonl")
    return handle


def test_a_resumed_run_lasts_until_its_last_record(uri):
    begin_ms = time.time_ns() // 1_000_000 + 3_601_000
    handle = planted(uri, records=[(1, 1000, {"train/loss": 3.0})], begin_ms=begin_ms)
    finish_run(handle, "FAILED")
    assert ", 1 h 0 min" not in page(handle)
    open_run(uri, TrackConfig(), job="gate", resolved=JOB, changes={}, command=["x"], run_id=handle.run_id)
    assert find_run(uri, handle.run_id).end is None
    assert ", 1 h 0 min" in page(handle)


def test_names_are_only_text(uri):
    text = page(hostile(uri))
    ours = outside_plotly(text)
    assert ours.count("<script") == ours.count("</script") == 3
    assert "<img" not in ours
    values = values_of(text)
    assert values["name"] == HOSTILE
    assert values["changes"] == [[HOSTILE, json.dumps(HOSTILE)]]
    assert values["events"][0]["text"] == HOSTILE


def test_the_page_loads_nothing(uri):
    text = page(planted(uri, records=[(1, 5, {"train/loss": 1.0})]))
    assert "default-src 'none'" in text
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|url\(|fetch\(""", outside_plotly(text))
    assert len(text) < 6e6


@pytest.mark.parametrize(
    "records",
    [
        (),
        [(1, 5, {"train/loss": 2.5})],
        [
            (step, 5 * step, {"train/loss": math.nan, "val/a/ppl": math.inf, "moe/0/maxvio": math.nan})
            for step in (1, 2, 3)
        ],
        [(7, 70, {"val/a/loss": 1.0})],
        [(3, 30, {"moe/0/load/4": 1.0, "attention/1/head/2/gate_mean": math.nan})],
    ],
    ids=["empty", "one step", "nothing finite", "evaluated only", "holes"],
)
@pytest.mark.parametrize("status", ["RUNNING", "FAILED"])
def test_any_history_has_a_page(uri, records, status):
    handle = planted(uri, records=records, job={})
    if status == "FAILED":
        finish_run(handle, "FAILED")
    values = values_of(page(handle))
    assert values["status"] == status
    state, loss = values["findings"][:2]
    assert state["level"] == {"RUNNING": "green", "FAILED": "red"}[status]
    assert loss["level"] != "green"


def test_a_page_of_a_run_that_recorded_nothing_of_ours(uri):
    run_id = connect(uri).create_run("0", run_name="foreign").info.run_id
    connect(uri).log_metric(run_id, "accuracy", 0.5, step=3)
    values = values_of(run_page(find_run(uri, run_id)))
    assert (values["sections"], values["job"], values["events"]) == ([], "", [])


def test_an_archive_of_loads_that_is_torn_is_left_out(uri):
    handle = planted(uri, records=[(1, 5, {"train/loss": 1.0})])
    log_text(handle, "PK\x03\x04 torn", "expert_load.npz")
    assert [section["id"] for section in values_of(page(handle))["sections"]] == ["loss"]


# --- health


class Run:
    status = "RUNNING"
    start = pd.Timestamp(0, tz="UTC")


def recording(metrics: dict[str, list[float]], *, status="RUNNING", saved=None, events=(), job=None) -> Recording:
    """Records at steps 10, 20, ... and a second apart."""
    length = max(map(len, metrics.values()))
    steps = np.arange(1, length + 1) * 10
    history = pd.DataFrame({"tokens": steps * 100.0, **metrics}, index=steps)
    records = history.assign(step=steps).set_axis(np.arange(length) * 1000)
    records = records.reindex(
        columns=[*records, *({"train/loss_spikes", "guards/nonfinite_steps", "guards/rollbacks"} - {*records})]
    )
    run = Run()
    run.status = status
    return Recording(run, history, records, list(events), None, [], job, None, saved)


def level(subject: str, made: Recording, now_s: float = 60.0) -> str | None:
    return next((finding.level for finding in find(made, now_s) if finding.subject == subject), None)


FALLING = [5 - step / 20 for step in range(20)]


@pytest.mark.parametrize(
    ("subject", "metrics", "expected"),
    [
        ("Loss", {"train/loss": FALLING}, "green"),
        ("Loss", {"train/loss": FALLING[::-1]}, "red"),
        ("Loss", {"train/loss": [3.0] * 20}, "amber"),
        ("Loss", {"train/loss": [3.0 + (-1) ** step / 4 + step / 500 for step in range(20)]}, "amber"),  # noise
        ("Loss", {"train/loss": [7.9, 7.0, 6.4, 5.85, 5.7, 5.4, 5.3, 5.5, 5.0, 5.05, 5.2, 5.4]}, "green"),
        ("Loss", {"train/loss": [*FALLING, math.inf]}, "red"),
        ("Loss", {"train/loss": [*FALLING, math.nan], "train/learning_rate": [0.1] * 21}, "red"),
        ("Loss", {"train/loss": [*FALLING, math.nan], "val/loss": [math.nan] * 20 + [1.0]}, "green"),  # an evaluation
        ("Spikes", {"train/loss_spikes": [0, 0]}, "green"),
        ("Spikes", {"train/loss_spikes": [0, 2]}, "amber"),
        ("Finite", {"guards/nonfinite_steps": [1, 1]}, "amber"),
        ("Rollbacks", {"guards/rollbacks": [0, 1]}, "amber"),
        ("Experts", {"moe/0/dead_experts": [0.5, 0.5, 0.0, 0.5, 0.5]}, "green"),
        ("Experts", {"moe/0/dead_experts": [0.0] * 5, "moe/11/dead_experts": [0.02] * 5}, "amber"),
        ("Experts", {"moe/0/dead_experts": [0.2] * 5}, "red"),
        ("Balance", {"moe/0/maxvio": [9.0, 0.3, 0.3, 0.3, 0.3]}, "green"),
        ("Balance", {"moe/0/maxvio": [0.3], "moe/3/maxvio": [2.0]}, "amber"),
        ("Balance", {"moe/0/maxvio": [4.0]}, "red"),
        ("Balance", {"moe/0/math/maxvio": [4.0]}, None),  # a domain's is no layer's
        ("Sink", {"attention/sink_heads": [0.05]}, "green"),
        ("Sink", {"attention/sink_heads": [0.6]}, "amber"),
        ("Activations", {"hidden/0/max": [12.0]}, "green"),
        ("Activations", {"hidden/0/max": [12.0], "hidden/1/max": [5000.0]}, "amber"),
        ("Speed", {"speed/tokens_per_s": [100.0] * 20}, "green"),
        ("Speed", {"speed/tokens_per_s": [100.0] * 20 + [50.0] * 5}, "amber"),
    ],
)
def test_a_finding_follows_from_its_metric(subject, metrics, expected):
    assert level(subject, recording(metrics)) == expected


@pytest.mark.parametrize(
    ("saved", "every", "expected"), [(200, 100, "green"), (80, 60, "red"), (None, 50, "red"), (None, 150, "green")]
)
def test_a_checkpoint_is_stale_after_two_intervals(saved, every, expected):
    made = recording({"train/loss": FALLING}, saved=saved, job={"checkpoint": {"every": every}})  # at step 200
    assert level("Checkpoint", made) == expected


def test_a_run_is_taken_for_dead_when_it_is_silent():
    made = recording({"train/loss": FALLING})
    assert level("State", made, now_s=19 + 599) == "green"
    assert level("State", made, now_s=19 + 601) == "red"
    assert level("State", recording({"train/loss": FALLING}, status="FINISHED"), now_s=1e9) == "green"
    assert level("State", recording({"train/loss": FALLING}, status="KILLED"), now_s=1e9) == "amber"


def test_counters_name_the_last_event_of_their_kind():
    counted = {"train/loss_spikes": [0, 2], "guards/rollbacks": [0, 1], "guards/nonfinite_steps": [0, 1]}
    events = [Event(300, "spike", ""), Event(500, "rollback", ""), Event(200, "spike", ""), Event(600, "notice", "")]
    said = {f.subject: f.sentence for f in find(recording(counted, events=events), 0.0)}
    assert said["Spikes"] == "2 loss spikes so far; the last is seen at step 300."
    assert said["Rollbacks"] == "1 rollbacks to a checkpoint so far; the last is seen at step 500."
    assert said["Finite"] == "1 steps whose loss or gradient was not finite so far."


def test_dead_experts_are_named_by_layer():
    nan = math.nan
    metrics = {"moe/0/dead_experts": [0.0] * 7, "moe/2/dead_experts": [0.4] * 7, "moe/11/dead_experts": [0.2] * 7}
    metrics |= {f"moe/2/load/{expert}": [0.1, nan, 0.0, 0.0, nan, 0.0, 0.0] for expert in (10, 9)}  # 5 loads
    metrics |= {"moe/0/load/1": [0.0] * 7, "moe/11/load/4": [0.7, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]}
    said = {f.subject: f.sentence for f in find(recording(metrics), 0.0)}
    assert said["Experts"].endswith("of its experts. Experts without one in the last recorded loads: 4 of layer 11.")
    metrics |= {f"moe/2/load/{expert}": [0.0] * 7 for expert in range(3, 17)}
    said = {f.subject: f.sentence for f in find(recording(metrics), 0.0)}
    assert said["Experts"].endswith(": 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14 of layer 2; and 3 more.")


# --- sizes


def test_a_long_history_is_thinned_and_keeps_its_spikes():
    steps = np.arange(10_001)
    losses = 5.0 - steps / 1e4
    losses[7777] = 40.0
    made = lines("Loss", "", pd.DataFrame({"tokens": steps, "train/loss": losses}, index=steps), {"train/loss": "loss"})
    kept = dict(zip(made["x"]["steps"], made["series"][0]["y"], strict=True))
    assert len(kept) <= 402
    assert kept[7777] == 40.0
    assert {0, 10_000} <= set(kept)
    assert made["x"]["tokens"] == made["x"]["steps"]


def test_a_long_history_keeps_every_evaluation():
    steps = np.arange(1, 5001)
    held_out = np.where(steps % 40 == 0, 1.0 + steps / 1e4, math.nan)
    history = pd.DataFrame({"tokens": steps, "train/loss": 5.0 - steps / 1e4, "val/loss": held_out}, index=steps)
    made = lines("Loss", "", history, {"train/loss": "training", "val/loss": "held-out"})
    training, evaluations = (np.array(entry["y"], dtype=float) for entry in made["series"])
    assert np.isfinite(evaluations).sum() == 125
    assert 400 < len(training) <= 402 + 125


def test_frames_of_many_experts_are_fewer_and_end_with_the_last():
    shown = [(step, np.full((61, 250), step / 100)) for step in range(100)]
    made = frames("Load", "", {"a": shown, "b": shown[:63]}, {}, ("layer", "expert"))
    assert sum(np.size(group["z"]) for group in made["groups"]) <= 2 * MAX_CELLS
    assert [group["x"]["steps"][-1] for group in made["groups"]] == [99, 62]
    assert made["groups"][0]["z"][-1][60][249] == 0.99


# --- in a browser


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here (apt-get install chromium)")
def test_a_browser_draws_every_figure_and_no_name_becomes_an_element(uri, tmp_path):
    handle = hostile(uri)
    for step in (1, 2, 3):
        from mlflow.entities import Metric

        batch = [Metric(key, value, step, step) for key, value in {**metrics_of(step), "tokens": 10 * step}.items()]
        connect(uri).log_batch(handle.run_id, metrics=batch)
    text = page(handle)
    (tmp_path / "page.html").write_text(text)
    browser = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    browser += ["--virtual-time-budget=20000", "--dump-dom", f"file://{tmp_path / 'page.html'}"]
    done = subprocess.run(browser, capture_output=True, text=True, timeout=120, check=True)
    drawn = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    figures = sum(len(section["figures"]) for section in values_of(text)["sections"])
    assert figures > 10
    assert len(re.findall(r'class="plot js-plotly-plot"', drawn)) == figures
    assert "<title>taken" not in drawn
    assert not re.search(r"<img[^>]*src=.?x", drawn)
    assert "What to look at" in drawn
