"""Runs in stretches with other settings, one of them on another's weights, against runs of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tidegate.config import ConfigError, load
from tidegate.data import prepare
from tidegate.train.checkpoint import Tracker
from tidegate.train.checkpoint_store import TRACKER, CheckpointStore, Damaged, Manifest
from tidegate.train.inheritance import inherit
from tidegate.train.job import Job
from tidegate.train.layout import layout_of, reshapes
from tidegate.train.loop import World, train
from tidegate.train.storage import Storage
from tidegate.train.telemetry import Record

PAUSE = 3 * 512
END = 7 * 512
FIRST = ["optimizer.schedule.peak=0.004", "balance.loss_weight=0.05"]
THEN = ["optimizer.schedule.peak=0.001", "optimizer.weight_decay=0.7", "train.pause_at_tokens=null"]


class Stretches:
    """Runs of the tiny job in one process, with the records that they made."""

    def __init__(self, folder: Path, job_file: Path) -> None:
        self.folder, self.job_file = folder, job_file
        self.dataset = prepare(self.job().data, cache_dir=folder / "data", job_dir=job_file.parent)
        self.records: dict[str, list[Record]] = {}

    def job(self, *overrides: str) -> Job:
        job: Job = load(self.job_file, Job, overrides).config
        return job

    def train(self, name: str, *overrides: str) -> None:
        """Begin the run, or go on with it."""
        records = self.records.setdefault(name, [])
        tracker = Tracker(lambda: [{"timestamp_ms": 1, "step": 1, "metrics": {name: 1.0}}], self._adopt)
        world = World(self.dataset, str(self.folder / name), records.append, print, lambda: False, tracker)
        self.adopted: list[Any] = []
        self.ended = train(self.job(*overrides), world)

    def _adopt(self, records: list[dict[str, Any]]) -> None:
        self.adopted += records

    def store(self, name: str) -> CheckpointStore:
        return CheckpointStore(Storage(self.folder / name))

    def inherit(self, heir: str, parent: str) -> None:
        inherit(str(self.folder / heir), str(self.folder / parent), PAUSE)

    def newest(self, name: str) -> Manifest:
        manifest = self.store(name).valid()[-1].manifest
        assert manifest is not None
        return manifest

    def state(self, name: str) -> dict[str, str]:
        """Digests of weights, optimizer, position and generators of the newest checkpoint."""
        files = self.newest(name).files
        return {file: record.sha256 for file, record in files.items() if file.endswith(".pt") and file != TRACKER}

    def values(self, name: str, metric: str) -> dict[int, float]:
        return {r.tokens: r.metrics[metric] for r in self.records[name] if metric in r.metrics}


def stretches(folder: Path, job_file: Path) -> None:
    runs = Stretches(folder, job_file)
    runs.train("parent", *FIRST)
    assert (runs.ended.tokens, runs.ended.finished, runs.newest("parent").tokens) == (PAUSE, False, PAUSE)
    assert runs.values("parent", "val/loss").keys() == {PAUSE}
    assert "val/loss" in runs.newest("parent").metrics
    runs.train("heir", "optimizer.schedule.peak=0.02")
    at_pause, own = runs.state("parent"), runs.state("heir")
    changed = {file for file, digest in own.items() if digest != at_pause[file]}
    assert any("optim" in file for file in changed)
    assert any("model" in file for file in changed)

    runs.inherit("heir", "parent")
    assert runs.state("heir") == at_pause
    (name,) = runs.store("heir").names()
    assert runs.store("heir").damage(name) == []
    runs.inherit("heir", "parent")
    assert runs.store("heir").names() == [name]

    runs.train("heir", *FIRST[1:], *THEN)
    assert runs.adopted == [], "metrics of the parent that were on their way are not the heir's"
    runs.inherit("heir", "parent")
    assert runs.newest("heir").tokens == END, "it has gone on since"
    runs.train("parent", *THEN, *FIRST[1:])
    assert runs.adopted
    assert runs.state("heir") == runs.state("parent"), "as if the parent had changed its settings"
    assert runs.values("heir", "val/loss")[END] == runs.values("parent", "val/loss")[END]
    schedule = runs.job(*THEN).optimizer.schedule
    rates = runs.values("heir", "train/learning_rate")
    for tokens in range(PAUSE + 512, END + 1, 512):
        assert rates[tokens] == schedule.at(tokens, END)

    runs.train("straight", *FIRST, "train.pause_at_tokens=null")
    runs.train("paused", *FIRST)
    runs.train("paused", *FIRST, "train.pause_at_tokens=null")
    assert runs.state("paused") == runs.state("straight"), "a pause by itself changes nothing"
    assert runs.state("paused") != runs.state("heir")
    with pytest.raises(Damaged, match=f"it holds no whole checkpoint of {PAUSE} tokens"):
        runs.inherit("other", "straight")


@pytest.mark.slow
def test_a_run_on_anothers_weights_is_that_other_with_other_settings_from_there(
    tmp_path: Path, tiny_job: Callable[..., Path], on_ranks: Callable[..., list[Any]]
) -> None:
    train = {"tokens": END, "pause_at_tokens": PAUSE, "eval_every": 4}
    on_ranks(1, stretches, tmp_path, tiny_job(train=train, checkpoint={"every": 2, "keep_last": 1}))


def test_what_is_copied_damaged_is_no_checkpoint(tmp_path: Path) -> None:
    stores = {name: CheckpointStore(Storage(tmp_path / name)) for name in ("parent", "heir")}
    for store, content in ((stores["parent"], b"good" * 1000), (stores["heir"], b"own")):
        writing = store.writing(3, "a1")
        with writing.create("state/weights.pt") as file:
            file.write(content)
        files = {"state/weights.pt": file.record}
        manifest = Manifest(tidegate="0", step=3, tokens=PAUSE, layout={}, model={}, metrics={}, files=files)
        store.commit(writing.name, manifest)
    path = tmp_path / "parent" / "step_00000003-a1" / "state" / "weights.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(Damaged, match=r"weights.pt: its content is not what was written"):
        inherit(str(tmp_path / "heir"), str(tmp_path / "parent"), PAUSE)
    assert [entry.name for entry in stores["heir"].valid()] == ["step_00000003-a1"], "its own stays"
    path.write_bytes(b"good" * 1000)
    inherit(str(tmp_path / "heir"), str(tmp_path / "parent"), PAUSE)
    (name,) = stores["heir"].names()
    with stores["heir"].open(name, "state/weights.pt") as copy:
        assert copy.read() == b"good" * 1000
    stores["parent"].delete("step_00000003-a1")
    inherit(str(tmp_path / "heir"), str(tmp_path / "parent"), PAUSE)
    assert stores["heir"].names() == [name], "the parent has gone on, and the copy is there"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (["model.ffn.router.tau_start=1.5", "optimizer.schedule.peak=1"], None),
        (
            ["model.ffn.router.tau_start=1.5", "model.width=48"],
            "written at model.width=32, this job has model.width=48",
        ),
        (["model.ffn.router.cutoff=0.1"], "model.ffn.router.cutoff=0.001"),
    ],
)
def test_a_checkpoint_is_resumed_at_another_temperature_and_not_with_another_model(
    tiny_job: Callable[..., Path], changes: list[str], problem: str | None
) -> None:
    annealed = ["model.ffn.router={kind: dense_to_sparse, anneal_tokens: 512}", "balance.bias_rate=0"]
    job: Job = load(tiny_job(), Job, annealed).config
    model = job.model.model_dump(mode="json")
    manifest = Manifest(tidegate="0", step=1, tokens=512, layout=layout_of(job), model=model, metrics={}, files={})
    wanted = load(tiny_job(), Job, [*annealed, *changes]).config
    if problem is None:
        assert not reshapes(wanted, manifest, "there")
    else:
        with pytest.raises(ConfigError, match=problem):
            reshapes(wanted, manifest, "there")


def test_a_pause_beyond_the_end_is_refused(tiny_job: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="pause_at_tokens=6145 is more than tokens=6144; set it to null"):
        load(tiny_job(), Job, ["train.pause_at_tokens=6145"])
