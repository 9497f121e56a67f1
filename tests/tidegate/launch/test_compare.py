"""Planted runs in a real store: what differs, values at equal tokens and FLOPs, what cannot be compared."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import tidegate
from tidegate.config import ConfigError, load
from tidegate.launch.compare import compare, wanted_runs
from tidegate.launch.comparison import Comparison
from tidegate.launch.state import StateDir
from tidegate.model.flops import total
from tidegate.track import RunHandle, TrackConfig, finish_run, open_run, resolve_tracking_uri
from tidegate.track.client import connect
from tidegate.train.job import Job

DEMO = Path(__file__).resolve().parents[3] / "jobs" / "demo.yaml"
STEP_TOKENS, STEPS = 1000, 40
Losses = Callable[[int], float]


@pytest.fixture(autouse=True)
def no_user_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


class Store:
    """A store into which runs are planted."""

    def __init__(self, root: Path) -> None:
        self.state, self.uri = StateDir(root), resolve_tracking_uri(TrackConfig(), root)

    def plant(
        self,
        name: str,
        loss: Losses,
        *changes: str,
        steps: int = STEPS,
        every: int = 10,
        tags: Mapping[str, str] | None = None,
        seed: str | None = None,
    ) -> None:
        """A run that evaluates every so many steps."""
        from mlflow.entities import Metric

        handle = open_run(
            self.uri,
            TrackConfig(),
            job="tiny",
            resolved=_seeded(job_with(*changes), seed),
            changes={},
            command=["x"],
            name=name,
            tags=tags,
        )
        metrics = []
        for step in range(1, steps + 1):
            values = {"tokens": STEP_TOKENS * step, "train/loss": loss(step), "speed/tokens_per_s": 100.0 + step}
            values |= {"cost/gpu_hours": step / 10, "moe/0/maxvio": 0.5, "moe/1/maxvio": 1.5, "moe/0/prose/maxvio": 9.0}
            if step % every == 0:
                values |= {"val/loss": loss(step), "val/prose/ppl": math.exp(loss(step)), "val/bpb": loss(step) / 2}
            metrics += [Metric(key, value, step, step) for key, value in values.items()]
        for start in range(0, len(metrics), 1000):
            connect(self.uri).log_batch(handle.run_id, metrics=metrics[start : start + 1000])
        finish_run(handle, "FINISHED")

    def compared(self, *names: str, **how: Any) -> Comparison:
        return Comparison(wanted_runs(names, self.state, None, None, ""), **how)


def job_with(*changes: str) -> Job:
    job: Job = load(DEMO, Job, changes).config
    return job


def _seeded(job: Job, seed: str | None) -> dict[str, Any]:
    """The job, perhaps with a seed as another program may record it."""
    document = job.model_dump(mode="json")
    return document if seed is None else {**document, "train": {**document["train"], "seed": seed}}


WIDE = ("model.ffn.expert_dim=256",)
HEAVIER = [domain.model_dump(mode="json") for domain in job_with().data.domains]
HEAVIER[0]["weight"] = 2
OTHER = [{**domain, "held_out": 2 * domain["held_out"]} for domain in HEAVIER]
RUNS: Mapping[str, tuple[Losses, tuple[str, ...], dict[str, int]]] = {
    "narrow-0": (lambda step: 5 - 0.05 * step, ("train.seed=0",), {}),
    "narrow-1": (lambda step: 6 - 0.05 * step, ("train.seed=1",), {}),
    "wide-0": (lambda step: 4.9 - 0.05 * step, ("train.seed=0", *WIDE), {}),
    "wide-1": (lambda step: 5.88 - 0.05 * step, ("train.seed=1", *WIDE), {}),
    "short": (lambda step: 5 - 0.05 * step, ("train.seed=0", "model.ffn.top_k=4"), {"steps": 25}),
    "words": (lambda step: 5 - 0.05 * step, ("data.tokenizer.vocab_size=4000",), {}),
    "longer": (lambda step: 5 - 0.05 * step, ("data.eval_sequences=33",), {}),
    "heavier": (lambda step: 5 - 0.05 * step, (f"data.domains={json.dumps(HEAVIER)}",), {}),
    "other domain": (lambda step: 4 - 0.05 * step, (f"data.domains={json.dumps(OTHER)}",), {}),
    "empty": (lambda step: 0.0, (), {"steps": 0}),
    "diverged": (lambda step: math.nan if step > 15 else 5.0, ("model.ffn.top_k=3",), {}),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    planted = Store(tmp_path_factory.mktemp("compare"))
    for name, (loss, changes, how) in RUNS.items():
        planted.plant(name, loss, *changes, **how)
    return planted


def test_runs_that_differ_in_their_seeds_are_one_setting(store: Store) -> None:
    found = store.compared("narrow-0", "wide-0", "narrow-1", "wide-1")
    assert [[run.label for run in s.runs] for s in found.settings] == [["narrow-0", "narrow-1"], ["wide-0", "wide-1"]]
    assert found.differences() == {"model.ffn.expert_dim": ["128", "256"]}
    assert found.warnings == []
    narrow, wide = found.settings
    assert found.values("val/loss", narrow, at="tokens") == pytest.approx({"narrow-0": 3.0, "narrow-1": 4.0})
    assert found.values("moe/*/maxvio", wide, at="tokens") == {"wide-0": 1.0, "wide-1": 1.0}, (
        "of layers, not of domains"
    )
    # The mean over the last tenth: steps 37 to 40.
    assert found.values("train/loss", narrow, at="tokens")["narrow-0"] == pytest.approx(5 - 0.05 * 38.5)
    first, second = found.conclusions()
    errors = "in val/loss by more than 12.7 standard errors (95% by Student's t)"
    assert first == f"at equal tokens, B does not beat A {errors}: +0.1100 +- 0.0100 over 2 paired seeds"
    assert second.startswith(f"at equal FLOPs, A beats B {errors}: "), "B is wider, and so has seen fewer tokens"


def test_at_equal_flops_the_dearer_run_is_read_earlier(store: Store) -> None:
    found = store.compared("narrow-0", "wide-0")
    narrow, wide = (total(job.model, 256).flops_per_token for job in (job_with(), job_with(*WIDE)))
    assert found.flops == pytest.approx(STEP_TOKENS * STEPS * narrow)
    steps = STEPS * narrow / wide
    assert found.values("val/loss", found.settings[1], at="FLOPs")["wide-0"] == pytest.approx(4.9 - 0.05 * steps)
    assert found.values("val/loss", found.settings[0], at="FLOPs")["narrow-0"] == pytest.approx(3.0)


def test_equal_tokens_are_as_far_as_all_have_come(store: Store) -> None:
    found = store.compared("narrow-0", "short")
    assert found.tokens == 25 * STEP_TOKENS
    # Evaluations end at step 20, training at step 25.
    for setting in found.settings:
        (value,) = found.values("val/loss", setting, at="tokens").values()
        assert value == pytest.approx(5 - 0.05 * 20)
        (value,) = found.values("train/loss", setting, at="tokens").values()
        assert value == pytest.approx(5 - 0.05 * 24)
        assert [*found.values("cost/gpu_hours", setting, at="tokens").values()] == [pytest.approx(2.5)]
    assert "with one seed in common: whether chance would make it so is not known" in found.conclusions()[0]


@pytest.mark.parametrize("text", [None, "{torn", "null", '{"model": 1}'])
def test_a_run_whose_job_cannot_be_read_has_the_flops_of_its_tag(store: Store, text: str | None) -> None:
    name = f"without {text}"
    store.plant(name, lambda step: 1.0, tags={"flops_per_token": "1000"})
    (found,) = wanted_runs([name], store.state, None, None, "")
    (path,) = store.state.root.rglob(f"{found.id}/artifacts/job/resolved.json")
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert store.compared("narrow-0", name).flops == STEP_TOKENS * STEPS * 1000


def test_runs_that_a_search_finds_without_records_are_named(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    found = wanted_runs([], store.state, None, None, "attributes.run_name LIKE '%e%'")
    assert "empty" not in [run.name for run in found]
    assert "narrow-0" not in caplog.text
    assert "left out, as they have recorded nothing: empty (FINISHED)" in caplog.text


def test_losses_of_other_tokens_are_compared_by_force_only(store: Store) -> None:
    found = store.compared("narrow-0", "words")
    assert found.warnings[0].startswith("tokenizers differ")
    assert {"val/bpb", "moe/*/maxvio"} <= set(found.metrics)
    assert not {"val/loss", "val/prose/ppl", "train/loss"} & set(found.metrics)
    assert {"val/loss", "val/prose/ppl"} <= set(store.compared("narrow-0", "words", force=True).metrics)


@pytest.mark.parametrize(("size", "decides"), [("9950", True), ("9800", False), ("unknown", False), (None, False)])
def test_bits_per_byte_decide_where_the_same_text_is_scored(store: Store, size: str | None, decides: bool) -> None:
    words = ("data.tokenizer.vocab_size=4000",)
    store.plant(f"here {size}", lambda step: 5.0, tags={"tokenizer": "a", "scored_bytes": "10000"})
    tags = {"tokenizer": "b"} | ({} if size is None else {"scored_bytes": size})
    store.plant(f"there {size}", lambda step: 4.0, *words, tags=tags)
    found = store.compared(f"here {size}", f"there {size}")
    assert "val/bpb" in found.metrics
    assert any("val/bpb" in line for line in found.conclusions()) == decides
    assert any("same stretch of the held-out text" in text for text in found.warnings) != decides
    if not decides:
        assert found.conclusions() == []
        assert store.compared(f"here {size}", f"there {size}", force=True).conclusions()


def test_losses_on_other_text_are_compared_by_force_only(store: Store) -> None:
    found = store.compared("narrow-0", "longer")
    assert found.warnings[0].startswith("held-out text differs")
    assert not [name for name in found.metrics if name.startswith("val/")]
    assert "train/loss" in found.metrics
    heavier = store.compared("narrow-0", "heavier")
    assert heavier.warnings == [
        "training text or its mixture differs: train/loss is of other text",
        "not compared without --force: train/loss",
    ], "how often a domain is drawn is no other held-out text"
    assert "val/loss" in heavier.conclusions()[0]
    other = store.compared("narrow-0", "other domain", more=["*/loss", "train/*"])
    assert not [name for name in other.metrics if name.startswith(("val/", "train/")) or "*/loss" in name]
    assert other.conclusions() == []
    assert "at equal tokens" in store.compared("narrow-0", "other domain", force=True).conclusions()[0]


def test_fingerprints_say_more_than_parameters(store: Store) -> None:
    """The same tokenizer by another path, and other text at the same one."""
    tags = {"tokenizer": "a", "validation": "b"}
    store.plant("tagged", lambda step: 1.0, tags=tags)
    store.plant("same", lambda step: 1.0, "data.tokenizer={kind: file, path: t.json}", tags=tags)
    store.plant("other text", lambda step: 1.0, tags={**tags, "validation": "c"})
    store.plant("other tokens", lambda step: 1.0, tags={"tokenizer": "c", "validation": "d"})
    assert store.compared("tagged", "same").warnings == []
    assert store.compared("tagged", "other text").warnings[0].startswith("held-out text differs")
    warnings = store.compared("tagged", "other tokens").warnings
    assert warnings[0].startswith("tokenizers differ")
    assert not any(text.startswith("held-out text") for text in warnings)
    assert store.compared("narrow-0", "tagged").warnings == [], "the first has no tags"


def test_a_run_that_diverged_has_no_value_afterwards_and_all_are_read_before(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = store.compared("narrow-0", "diverged")
    assert found.settings[1].runs[0].at("train/loss", 15_000) == 5.0
    assert found.settings[1].runs[0].at("train/loss", 30_000) is None
    assert found.warnings == ["diverged is not finite from step 16 (train/loss): all are read before it"]
    rows = {metric: found.moment(metric, "tokens") for metric in found.metrics}
    assert (rows["val/loss"], rows["train/loss"], rows["moe/*/maxvio"]) == (10_000, 15_000, 40_000)
    compare([run.run for run in found.runs], force=False, more=[], out=tmp_path)
    printed = capsys.readouterr().out
    assert printed.startswith("warning: diverged is not finite from step 16")
    assert re.search(r"train/loss +\S +15,000 ", printed)
    with (tmp_path / "compare.csv").open(encoding="utf-8") as file:
        row = next(row for row in csv.DictReader(file) if row["metric"] == "val/loss")
    assert (row["run"], row["tokens"]) == ("narrow-0", "10000")


def test_a_run_that_came_back_is_finite(store: Store) -> None:
    store.plant("one bad step", lambda step: math.inf if step == 20 else 5.0)
    assert store.compared("one bad step").warnings == []


def test_seeds_are_what_was_recorded_and_runs_of_one_count_as_their_mean(store: Store) -> None:
    same, other = ("model.ffn.top_k=3",), ("model.ffn.top_k=5",)
    store.plant("a", lambda step: 4.0, *same, seed="x")
    store.plant("b", lambda step: 2.0, *same, seed="x")
    store.plant("c", lambda step: 3.5, *other, seed="x")
    found = store.compared("a", "b", "c")
    assert [run.seed for run in found.runs] == ["x", "x", "x"]
    assert found.conclusions()[0].startswith("at equal tokens, A is ahead of B in val/loss by 0.5000 with one seed")


@pytest.mark.parametrize("pattern", ["", "."])
def test_an_empty_pattern_is_named(store: Store, pattern: str) -> None:
    with pytest.raises(ConfigError, match=rf"--metric '{re.escape(pattern)}': no name or pattern"):
        store.compared("narrow-0", more=[pattern])


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (("empty", "narrow-0"), r"run empty \(FINISHED\) has recorded nothing yet"),
        (("gone",), "run 'gone': no such run"),
        ((), "no run to compare"),
    ],
)
def test_what_cannot_be_compared_says_why(store: Store, names: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        store.compared(*names)


def test_the_page_and_the_csv_hold_what_is_printed(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = wanted_runs(["narrow-0"], store.state, None, None, "params.`model.ffn.expert_dim` = '256'")
    assert sorted(run.name for run in found) == ["narrow-0", "wide-0", "wide-1"]
    compare(found, force=False, more=["speed/*"], out=tmp_path / "there")
    printed = capsys.readouterr().out
    page = (tmp_path / "there" / "compare.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|link)[^>]+(src|href)=", page)
    for text in ("model.ffn.expert_dim", "wide-1", "val/prose/ppl"):
        assert text in printed
        assert text in page
    traces = json.JSONDecoder().raw_decode(page, page.index("[", page.rindex("Plotly.newPlot(")))[0]
    drawn = [trace for trace in traces if trace["legendgroup"] == "narrow-0"]
    assert len(drawn) == 2 * len(["val/loss", "val/bpb", "train/loss", "moe/*/maxvio"])
    with (tmp_path / "there" / "compare.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    (row,) = [r for r in rows if (r["run"], r["metric"], r["at"]) == ("wide-1", "val/loss", "tokens")]
    assert float(row["value"]) == pytest.approx(5.88 - 2)


def test_names_cannot_break_the_page(store: Store, tmp_path: Path) -> None:
    store.plant("<script>alert(1)</script>", lambda step: 1.0)
    found = wanted_runs(["<script>alert(1)</script>"], store.state, None, None, "")
    compare(found, force=False, more=[], out=tmp_path)
    assert "<script>alert(1)</script>" not in (tmp_path / "compare.html").read_text(encoding="utf-8")


def test_weights_of_another_run_of_the_name_are_not_loaded(store: Store) -> None:
    (one,) = tidegate.runs("narrow-0", state_dir=store.state.root)
    there = RunHandle(store.uri, "", "0" * 32, "narrow-0")
    store.state.named_run("narrow-0").write(job_with(), Path(), there, ["x"], str(store.state.checkpoints / "x"))
    with pytest.raises(ConfigError, match=rf"run narrow-0: .* another run of this name \(MLflow id 0+, not {one.id}"):
        one.load_model()


@pytest.mark.slow
def test_a_notebook_gets_history_model_and_figure(tiny_job: Callable[..., Path], tmp_path: Path) -> None:
    """Of a real run: the model scores as the run's last evaluation did."""
    job = tiny_job(train={"tokens": 2048, "eval_every": 2})
    state = StateDir(tmp_path / "state")
    command = [sys.executable, "-m", "tidegate.cli", "train", str(job), "--local", "--state-dir", str(state.root)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (one,) = tidegate.runs("tiny-1", state_dir=state.root)
    history = one.history()
    assert history["tokens"].tolist()[-1] == 2048
    assert one.params["train.seed"] == "0"
    model = one.load_model()
    assert sum(p.numel() for p in model.parameters()) == total(load(job, Job).config.model, 64).params
    assert not model.training
    figure = tidegate.compare([one]).figure()
    assert {trace.name for trace in figure.data} == {f"A {one.name}"}
    with pytest.raises(ConfigError, match="no such run"):
        tidegate.runs("gone", state_dir=state.root)
