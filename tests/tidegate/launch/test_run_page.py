"""Writing run pages: of any run that can be found, and never to a run's harm."""

from __future__ import annotations

import json
import logging
import threading

import pytest

from tidegate.config import ConfigError
from tidegate.launch.run_page import MAX_LOADS, RunPage, write_report
from tidegate.launch.state import StateDir, write_whole
from tidegate.track import RunHandle, TrackConfig, finish_run, open_run, resolve_tracking_uri
from tidegate.track.page import EVENTS_FILE, LOADS_FILE, SAMPLES_FILE, read_loads, read_samples
from tidegate.track.read import find_run
from tidegate.train.evaluate import Evaluation
from tidegate.train.generate import Sample
from tidegate.train.telemetry import Record


@pytest.fixture
def state(tmp_path, monkeypatch) -> StateDir:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return StateDir(tmp_path / "state")


def evaluated(step: int, load: float = 0.5) -> Record:
    return Record(step, 10 * step, {"val/loss": 1.0}, Evaluation(("a",), [1.0], [1.0], [[[load, 1 - load]]]))


def written(step: int, text: str) -> Record:
    sample = Sample("a", "beginning", "its end", text, "drawn")
    return Record(step, 10 * step, {"val/loss": 1.0}, Evaluation(("a",), [1.0], [1.0], None, (sample,)))


def opened(state: StateDir, name: str) -> RunHandle:
    uri = resolve_tracking_uri(TrackConfig(), state.root)
    return open_run(uri, TrackConfig(), job="j", resolved={}, changes={}, command=[], name=name)


def test_a_store_that_is_gone_costs_a_run_nothing_but_a_warning(state, caplog):
    nowhere = RunHandle(f"sqlite:///{state.root}/gone/mlflow.db", "1", "0" * 32, "gate-1")
    with caplog.at_level(logging.WARNING), RunPage(nowhere, state.new_run("gate"), TrackConfig()) as page:
        page.record(evaluated(1))
    assert "its page was not written" in caplog.text
    assert not (state.root / "gone").exists()


def test_a_folder_that_is_gone_costs_a_run_nothing(state, caplog):
    folder = state.new_run("gate")
    folder.folder.rmdir()
    page = RunPage(RunHandle("", "", "", "gate-1"), folder, TrackConfig())
    with caplog.at_level(logging.WARNING):
        page.notice("a line")
        page.record(evaluated(1))
    assert caplog.text.count("its page was not written") == 2


def test_a_run_that_ends_while_its_page_is_written_has_a_last_one(state, monkeypatch):
    """The store is read after the run's end, whatever the thread does then."""
    handle = opened(state, "gate-1")
    begun, ended, states = threading.Event(), threading.Event(), []

    def slow_page(run) -> str:
        states.append(run.status)
        begun.set()
        assert ended.wait(20)
        return "page"

    monkeypatch.setattr("tidegate.track.page.run_page", slow_page)
    with RunPage(handle, state.new_run("gate"), TrackConfig(page_every_s=0.01, flush_every_s=0.01)) as page:
        page.record(evaluated(1))
        assert begun.wait(20)
        finish_run(handle, "FINISHED")
        threading.Timer(0.3, ended.set).start()
    assert states == ["RUNNING", "FINISHED"]


def test_what_the_driver_keeps_goes_on_where_a_resumed_run_does(state):
    folder = state.new_run("gate")

    def follow() -> RunPage:  # without its thread
        return RunPage(RunHandle("", "", "", "gate-1"), folder, TrackConfig())

    page = follow()
    page.record(evaluated(3, 0.25))
    page.record(evaluated(6, 0.5))
    page.notice("a worker was lost at http://user:hunter2@host")
    page = follow()
    page.record(evaluated(6, 0.75))
    kept = read_loads((folder.folder / LOADS_FILE).read_bytes())
    assert (kept.steps, kept.domains) == ([3, 6], ["a"])
    assert kept.load_SDLE[:, 0, 0, 0].tolist() == [0.25, 0.75]
    (line,) = (folder.folder / EVENTS_FILE).read_text().splitlines()
    assert json.loads(line)["step"] == 6
    assert "hunter2" not in line
    for step in range(7, 7 + MAX_LOADS):
        page.record(evaluated(step))
    steps = read_loads((folder.folder / LOADS_FILE).read_bytes()).steps
    assert len(steps) <= MAX_LOADS
    assert steps[-1] == 6 + MAX_LOADS


def test_what_the_model_wrote_is_kept_as_it_came_out_last(state):
    folder = state.new_run("gate")
    page = RunPage(RunHandle("", "", "", "gate-1"), folder, TrackConfig())
    for record in (written(3, "one"), written(6, "two\nlines"), written(6, "again"), evaluated(9)):
        page.record(record)
    first, last = read_samples((folder.folder / SAMPLES_FILE).read_bytes())
    assert first == {
        "step": 3, "tokens": 30, "domain": "a", "prompt": "beginning", "text": "its end", "greedy": "one",
        "drawn": "drawn",
    }  # fmt: skip
    assert (last["step"], last["greedy"]) == (6, "again")
    for step in range(7, 7 + MAX_LOADS):
        page.record(written(step, "more"))
    steps = [line["step"] for line in read_samples((folder.folder / SAMPLES_FILE).read_bytes())]
    assert len(steps) <= MAX_LOADS
    assert steps[-1] == 6 + MAX_LOADS
    assert steps == sorted(steps)


@pytest.mark.parametrize("more", [1, 2])
def test_of_more_than_are_kept_the_newest_stays_and_the_one_before_goes(state, more):
    folder = state.new_run("gate")
    page = RunPage(RunHandle("", "", "", "gate-1"), folder, TrackConfig())
    for step in range(1, 1 + MAX_LOADS + more):
        page.record(evaluated(step, step / 100))
        page.record(written(step, f"at {step}"))
    kept = [*range(1, MAX_LOADS + 2, 2), *range(MAX_LOADS + 2, MAX_LOADS + more + 1)]
    loads = read_loads((folder.folder / LOADS_FILE).read_bytes())
    assert loads.steps == kept
    assert loads.load_SDLE[:, 0, 0, 0].tolist() == pytest.approx([step / 100 for step in kept])
    samples = read_samples((folder.folder / SAMPLES_FILE).read_bytes())
    assert [line["greedy"] for line in samples] == [f"at {step}" for step in kept]


def test_a_run_without_a_page_leaves_nothing(state):
    folder, handle = state.new_run("gate"), opened(state, "gate-1")
    for enabled, config in ((False, TrackConfig()), (True, TrackConfig(page_every_s=None))):
        with RunPage(handle, folder, config, enabled=enabled) as page:
            page.record(evaluated(1))
            page.notice("a line")
    assert not list(folder.folder.iterdir())
    assert "report.html" not in find_run(handle.uri, handle.run_id).artifacts()


def test_a_report_is_written_for_a_run_of_here_or_of_the_store(state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    elsewhere = opened(state, "theirs-1")
    assert write_report("theirs-1", state, None).read_text().startswith("<!doctype html>")
    assert (tmp_path / "theirs-1.html").exists()
    assert write_report(elsewhere.run_id, state, tmp_path / "by_id.html").exists()
    folder, here = state.new_run("ours"), opened(state, "ours-1")
    record = {"job_dir": "/", "checkpoints": "/", "tracking_uri": here.uri, "run_id": here.run_id, "command": ["x"]}
    write_whole(folder.folder / "run.json", json.dumps(record))
    write_whole(folder.job_file, "{}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")  # where no run of here is looked for
    assert here.run_id in write_report("ours-1", state, None).read_text()


def test_a_report_is_written_for_a_run_of_another_store(state, tmp_path):
    there = opened(StateDir(tmp_path / "there"), "gate-1")
    assert there.run_id in write_report("gate-1", state, tmp_path / "page.html", there.uri).read_text()


def test_a_report_that_cannot_be_written_names_run_or_file(state, tmp_path):
    opened(state, "gate-1")
    with pytest.raises(ConfigError, match="'gate-2': no such run"):
        write_report("gate-2", state, None)
    with pytest.raises(ConfigError, match=r"--out .*/no/page\.html: cannot be written \(No such file"):
        write_report("gate-1", state, tmp_path / "no" / "page.html")
