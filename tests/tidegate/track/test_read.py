"""Reading runs back from a store: what was logged comes back, and what cannot be read says why."""

from __future__ import annotations

import math
import re
import sqlite3
import threading
from contextlib import closing

import pytest

from tidegate.config import ConfigError
from tidegate.track import (
    RunHandle,
    TrackConfig,
    check_tracking,
    find_run,
    find_runs,
    finish_run,
    log_text,
    logged_model,
    open_run,
    register_model,
    serve_ui,
    tag_run,
)
from tidegate.track.client import connect, database_file, is_database, schema_of
from tidegate.track.delivery import Sender
from tidegate.track.spool import Record


def start(uri, name, *, experiment="tidegate", tags=None, resolved=None):
    config = TrackConfig(experiment=experiment)
    resolved = resolved or {"model": {"width": 63}, "balance": {"scope": "global_batch"}}
    return open_run(
        uri, config, job="job", resolved=resolved, changes={"model.width": 63}, command=["x"], name=name, tags=tags
    )


def log(handle, *records):
    """Records of (step, tokens, metrics), at distinct rising times."""
    sender = Sender(handle.uri, handle.run_id)
    for time_ms, (step, tokens, metrics) in enumerate(records, 1):
        sender.send([Record(time_ms, step, {**metrics, "tokens": tokens})])


def test_a_run_comes_back_by_name_and_by_id(uri):
    handle = start(uri, "gate-1", tags={"gate": "headwise"})
    start(uri, "gate-2")
    log(handle, (7, 7000, {"train/loss": 2.5}), (14, 14000, {"train/loss": 1.5, "val/math/ppl": 9.0}))
    running = find_run(uri, "gate-1")
    assert (running.status, running.end) == ("RUNNING", None)
    finish_run(handle, "FINISHED")

    for run in (find_run(uri, "gate-1"), find_run(uri, handle.run_id)):
        assert (run.name, run.id, run.experiment, run.status) == ("gate-1", handle.run_id, "tidegate", "FINISHED")
        assert run.end is not None
        assert run.end >= run.start
        assert run.tags["gate"] == "headwise"
        assert run.params == {"model.width": "63", "balance.scope": "global_batch"}
        assert run.metrics == {"train/loss": 1.5, "val/math/ppl": 9.0, "tokens": 14000}
        assert run.job() == {"model": {"width": 63}, "balance": {"scope": "global_batch"}}
        assert run.changes() == {"model.width": 63}
    table = run.history()
    assert list(table.columns) == ["tokens", "train/loss", "val/math/ppl"]
    assert table.index.tolist() == [7, 14]
    assert table["tokens"].tolist() == [7000, 14000]
    assert table["train/loss"].tolist() == [2.5, 1.5]
    assert math.isnan(table.loc[7, "val/math/ppl"])
    some = run.history({"train/loss", "never/logged"})
    assert some.equals(table[["tokens", "train/loss"]])


def test_nan_and_infinity_come_back(uri):
    handle = start(uri, "diverged-1")
    log(
        handle, (1, 10, {"train/loss": math.nan}), (2, 20, {"train/loss": math.inf}), (3, 30, {"train/loss": -math.inf})
    )
    run = find_run(uri, "diverged-1")
    losses = run.history()["train/loss"].tolist()
    assert math.isnan(losses[0])
    assert losses[1:] == [math.inf, -math.inf]
    assert run.metrics["train/loss"] == -math.inf


def test_what_a_rollback_left_behind_is_in_the_points_and_not_in_the_history(uri):
    handle = start(uri, "back-1")
    log(
        handle,
        (1, 10, {"train/loss": 5.0}),
        (2, 20, {"train/loss": 4.0}),
        (2, 20, {"val/loss": 4.5}),
        (3, 30, {"train/loss": 90.0}),
        (5, 50, {"train/loss": 91.0}),  # after it the run goes back to step 2, and never reaches step 5 again
        (3, 35, {"train/loss": 3.0}),
        (4, 45, {"train/loss": 2.0}),
    )
    run = find_run(uri, "back-1")
    table = run.history()
    assert table.index.tolist() == [1, 2, 3, 4]
    assert table["train/loss"].tolist() == [5.0, 4.0, 3.0, 2.0]
    assert table["tokens"].tolist() == [10, 20, 35, 45]
    assert table.loc[2, "val/loss"] == 4.5
    assert run.points.query("key == 'train/loss'")["value"].tolist() == [5.0, 4.0, 90.0, 91.0, 3.0, 2.0]


def test_a_records_metrics_of_machines_are_in_the_history_and_those_of_mlflows_monitor_are_not(uri):
    handle = start(uri, "machine-1")
    log(handle, (100, 1000, {"train/loss": 1.0, "system/1/cpu_busy": 0.5}))
    connect(uri).log_metric(handle.run_id, "system/cpu_utilization_percentage", 50.0, step=1)
    run = find_run(uri, "machine-1")
    assert run.history().to_dict("index") == {100: {"tokens": 1000, "train/loss": 1.0, "system/1/cpu_busy": 0.5}}
    logged = {"tokens", "train/loss", "system/1/cpu_busy", "system/cpu_utilization_percentage"}
    assert set(run.points["key"]) == logged


def test_a_sampled_run_has_all_of_the_run_and_some_of_its_layers(uri):
    handle = start(uri, "long-1")
    log(handle, *((step, 10 * step, {"train/loss": step / 7, "moe/0/maxvio": float(step)}) for step in range(1, 64)))
    run = find_run(uri, "long-1")
    whole, table = run.history(), run.sampled(10).history()
    assert table["train/loss"].equals(whole["train/loss"])
    kept = table["moe/0/maxvio"].dropna()
    assert len(kept) == 9
    assert kept.index[-1] == 63
    assert kept.tolist() == kept.index.tolist()
    assert run.sampled(63).history().equals(whole)


def test_a_sampled_run_has_what_comes_with_evaluations_only(uri):
    handle = start(uri, "evaluated-1")
    records = [(step, 10 * step, {"train/loss": 1.0, "moe/0/maxvio": 0.5}) for step in range(1, 64)]
    records[19][2]["moe/0/load/5"] = 0.25
    log(handle, *records[:20], (20, 200, {"val/loss": 2.0}), *records[20:])
    table = find_run(uri, "evaluated-1").sampled(10).history()
    assert table["moe/0/load/5"].dropna().to_dict() == {20: 0.25}
    assert len(table["moe/0/maxvio"].dropna()) == 10


def test_a_sampled_run_has_the_details_that_come_after_an_evaluation(uri):
    """Records every 7 steps, evaluations every 20: details of that at 20 come at 21, of that at 63 with it."""
    handle = start(uri, "after-1")
    trained = [(step, 10 * step, {"train/loss": 1.0, "moe/0/maxvio": 0.5}) for step in range(7, 64, 7)]
    for step in (21, 42, 63):
        trained[step // 7 - 1][2]["moe/0/load/5"] = step / 100
    evaluated = [(step, 10 * step, {"val/loss": 2.0, "moe/0/domain_information": 0.1}) for step in (20, 40, 63, 65)]
    log(handle, *sorted([*trained, *evaluated], key=lambda record: record[0]))
    table = find_run(uri, "after-1").sampled(4).history()
    assert table["moe/0/load/5"].dropna().to_dict() == {21: 0.21, 42: 0.42, 63: 0.63}
    assert table["moe/0/domain_information"].dropna().index.tolist() == [20, 40, 63, 65]


def test_what_single_experts_and_heads_do_is_read_from_files_and_from_stores_that_have_it(uri):
    """Steps 1 and 2, then 2 again after a resume; the metric of an expert stands for a run of an earlier version."""
    handle = start(uri, "detailed-1")
    values = {"train/loss": 1.0, "moe/0/load/5": 0.25, "attention/1/head/2/gate_mean": math.nan}
    again = {**values, "moe/0/load/5": 0.5}
    log(handle, (1, 10, values), (2, 20, {**values, "moe/0/load/5": math.inf}), (2, 20, again))
    connect(uri).log_metric(handle.run_id, "moe/0/load/6", 0.75, timestamp=3, step=2)
    run = find_run(uri, "detailed-1")
    assert run.metrics.keys() == {"tokens", "train/loss", "moe/0/load/6"}
    table = run.history()
    assert table["moe/0/load/5"].tolist() == [0.25, 0.5]
    assert table["moe/0/load/6"].tolist()[1:] == [0.75]
    assert "attention/1/head/2/gate_mean" in table
    assert table["attention/1/head/2/gate_mean"].isna().all()
    assert run.points.query("key == 'moe/0/load/5'")["value"].tolist() == [0.25, math.inf, 0.5]
    assert run.history(["moe/0/load/5", "moe/0/load/6"]).columns.tolist() == ["tokens", "moe/0/load/5", "moe/0/load/6"]

    connect(uri).log_text(handle.run_id, '{"moe/0/load/5": 0.', "details/00000003-9.json")
    assert run.history().equals(table), "a file that is being written"


def test_a_run_that_crashed_before_its_first_record_has_an_empty_history(uri):
    finish_run(start(uri, "crashed-1"), "FAILED")
    run = find_run(uri, "crashed-1")
    table = run.history()
    assert (run.status, len(table), list(table.columns)) == ("FAILED", 0, ["tokens"])


def test_runs_are_found_by_experiment_and_filter_newest_first(uri):
    for name, experiment, gate in (("a-1", "one", "none"), ("a-2", "one", "headwise"), ("a-1", "two", "headwise")):
        start(uri, name, experiment=experiment, tags={"gate": gate})
    assert [run.name for run in find_runs(uri, experiment="one")] == ["a-2", "a-1"]
    gated = find_runs(uri, filter="tags.gate = 'headwise'")
    assert [(run.experiment, run.name) for run in gated] == [("two", "a-1"), ("one", "a-2")]
    assert [run.experiment for run in find_runs(uri, limit=1)] == ["two"]
    assert find_run(uri, "a-1", experiment="one").tags["gate"] == "none"


def test_a_server_gives_the_same_as_its_database(server, uri):
    handle = start(uri, "served-1")
    log(handle, *((step, 10 * step, {f"m/{n}": step + n for n in range(21)} | {"nan": math.nan}) for step in (3, 5)))
    here, there = find_run(uri, "served-1"), find_run(server.uri, "served-1")
    assert there.history().equals(here.history())
    assert there.history({"m/7"}).equals(here.history()[["tokens", "m/7"]])
    assert there.job() == here.job()
    assert there.artifact("nothing.txt") is None


# --- what cannot be read


def test_a_run_that_is_not_there_names_the_newest(uri):
    start(uri, "gate-1")
    with pytest.raises(ConfigError, match=r"run 'gate-9': no such run in sqlite.*the newest there are: gate-1, j$"):
        find_run(uri, "gate-9")
    with pytest.raises(ConfigError, match="no such run"):
        find_run(uri, "0" * 32)
    with pytest.raises(ConfigError, match=r"experiment 'nine': not in .*: Default, template, tidegate"):
        find_runs(uri, experiment="nine")


def test_a_name_of_several_runs_is_refused_with_their_ids(uri):
    handles = [start(uri, "gate-1"), start(uri, "gate-1", experiment="other")]
    with pytest.raises(ConfigError, match=r"2 runs in .* have this name") as caught:
        find_run(uri, "gate-1")
    assert all(handle.run_id in str(caught.value) for handle in handles)


def test_a_deleted_run_is_said_to_be(uri):
    handle = start(uri, "gate-1")
    connect(uri).delete_run(handle.run_id)
    with pytest.raises(ConfigError, match="deleted"):
        find_run(uri, handle.run_id)


@pytest.mark.parametrize("name", ["o'brien", 'say "hi"', "50%", "a_b", "x' or '1'='1"])
def test_odd_names_are_found_as_they_are(uri, name):
    start(uri, name)
    start(uri, "axb")
    assert find_run(uri, name).name == name


def test_a_name_that_no_filter_can_hold_asks_for_the_id(uri):
    with pytest.raises(ConfigError, match="give its MLflow id"):
        find_run(uri, "both ' and \"")


def test_a_filter_that_mlflow_does_not_take_is_named(uri):
    start(uri, "gate-1")
    with pytest.raises(ConfigError, match=r"^filter 'tags\.gate =': "):
        find_runs(uri, filter="tags.gate =")


def test_a_store_that_is_not_there_is_not_made(tmp_path):
    with pytest.raises(ConfigError, match="no such store"):
        find_runs(f"sqlite:///{tmp_path}/mlflow.db")
    assert not list(tmp_path.iterdir())


def test_a_server_that_does_not_answer_is_named(unused_port):
    with pytest.raises(ConfigError, match=rf"http://127.0.0.1:{unused_port}: the store cannot be read"):
        find_run(f"http://127.0.0.1:{unused_port}", "gate-1")


def test_a_store_of_another_schema_is_refused_and_left_alone(uri, state_dir):
    database = database_file(uri)
    with closing(sqlite3.connect(database)) as tables:
        tables.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        tables.commit()
        tables.execute("DROP TABLE webhooks")  # MLflow migrates where one of its tables is missing
        tables.commit()
    before = database.read_bytes()
    handle = RunHandle(uri, "1", "0" * 32, "a")
    for use in (
        lambda: find_runs(uri),
        lambda: start(uri, "gate-1"),
        lambda: open_run(uri, TrackConfig(), job="j", resolved={}, changes={}, command=[], run_id="0" * 32),
        lambda: serve_ui(state_dir),
        lambda: logged_model(handle),
        lambda: register_model(handle, "name", None, "m"),
    ):
        with pytest.raises(ConfigError, match=r"written by another MLflow \(schema 451aebb31d03; .*mlflow db upgrade"):
            use()
    assert not tag_run(handle, "key", "value")
    assert re.match(r"not reachable: .*written by another MLflow", check_tracking(uri))
    assert database.read_bytes() == before


def test_tables_that_are_being_made_are_waited_for(uri):
    with closing(sqlite3.connect(database_file(uri), check_same_thread=False)) as tables:

        def set_to(revision):
            tables.execute("UPDATE alembic_version SET version_num = ?", [revision])
            tables.commit()

        last = schema_of(uri)
        set_to("451aebb31d03")
        timers = [threading.Timer(after_s, set_to, [revision]) for after_s, revision in ((0.5, "next"), (1.5, last))]
        for timer in timers:
            timer.start()
        assert schema_of(uri) == last
        for timer in timers:
            timer.join()


@pytest.mark.parametrize("uri", ["databricks", "databricks://profile", "databricks-uc", "uc:http://host:1"])
def test_a_store_that_is_no_database_is_left_to_mlflows_client(uri):
    assert not is_database(uri)
    assert schema_of(uri) is None
    assert is_database("postgresql+psycopg2://host/name")


def test_another_programs_database_is_refused_and_left_alone(tmp_path):
    database = tmp_path / "cats.db"
    with closing(sqlite3.connect(database)) as tables:
        tables.execute("CREATE TABLE cats (name TEXT)")
        tables.commit()
    before = database.read_bytes()
    with pytest.raises(ConfigError, match="not of MLflow"):
        find_runs(f"sqlite:///{database}")
    assert database.read_bytes() == before


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "mlflow.db").write_text("hello " * 1000)
    with pytest.raises(ConfigError, match=r"cannot be read .*not a database"):
        find_runs(f"sqlite:///{tmp_path}/mlflow.db")


def test_an_artifact_that_is_torn_is_named(uri):
    handle = start(uri, "torn-1")
    log_text(handle, '{"model": ', "job/resolved.json")
    with pytest.raises(ConfigError, match=r"run torn-1: its artifact job/resolved\.json is not JSON"):
        find_run(uri, "torn-1").job()
