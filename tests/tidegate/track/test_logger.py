"""MetricLogger against real SQLite stores, dead servers, silent servers and lost answers."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from pathlib import Path

import pytest

from tidegate.config import ConfigError
from tidegate.track import Delivery, MetricLogger, TrackConfig, open_run, replay_spool
from tidegate.track import logger as logger_module
from tidegate.track.client import connect
from tidegate.track.delivery import Sender
from tidegate.track.spool import Record, Spool, read_spool


@pytest.fixture
def spool(tmp_path):
    return tmp_path / "spools" / "rank0.jsonl"


def log_steps(logger: MetricLogger, steps: range) -> float:
    """Log `loss = 10 * step` at 100 tokens a step; returns the longest call in seconds."""
    longest = 0.0
    for step in steps:
        start = time.monotonic()
        logger.log({"loss": 10.0 * step}, step=step, tokens=100 * step)
        longest = max(longest, time.monotonic() - start)
    return longest


@pytest.fixture
def sent(monkeypatch):
    """The records of every request, as they leave; a test may put exceptions into `after` to lose answers."""

    class Wire:
        def __init__(self) -> None:
            self.requests: list[list[Record]] = []
            self.before: list[Exception] = []
            self.after: list[Exception] = []

        @property
        def steps(self) -> list[int]:
            return [record.step for request in self.requests for record in request]

    wire = Wire()
    send = Sender.send

    def observed(self, records):
        if wire.before:
            raise wire.before.pop(0)
        send(self, records)
        wire.requests.append(list(records))
        if wire.after:
            raise wire.after.pop(0)

    monkeypatch.setattr(Sender, "send", observed)
    return wire


# --- the server is well


def test_values_steps_and_tokens_arrive_in_order(handle, spool, history):
    logger = MetricLogger(handle.uri, handle.run_id, spool=spool, flush_every_s=0.05)
    log_steps(logger, range(1, 8))
    time.sleep(0.2)
    log_steps(logger, range(8, 12))
    assert logger.close() == Delivery(delivered=11, undelivered=0, spool=None)
    assert history(handle.uri, handle.run_id, "loss") == [(step, 10.0 * step) for step in range(1, 12)]
    assert history(handle.uri, handle.run_id, "tokens") == [(step, 100.0 * step) for step in range(1, 12)]
    assert not spool.exists()
    assert not logger._thread.is_alive()


def test_nan_is_kept_and_infinity_is_the_largest_float(handle, spool, history):
    with MetricLogger(handle.uri, handle.run_id, spool=spool) as logger:
        for step, value in enumerate([math.nan, math.inf, -math.inf, math.nan]):
            logger.log({"loss": value}, step=step, tokens=step)
    values = [value for _, value in history(handle.uri, handle.run_id, "loss")]
    assert math.isnan(values[0])
    assert math.isnan(values[3])
    assert values[1:3] == [1.7976931348623157e308, -1.7976931348623157e308]


def test_requests_hold_whole_records_and_at_most_1000_metrics(handle, spool, sent, history):
    wide = {f"m{i:04d}": float(i) for i in range(2500)}
    with MetricLogger(handle.uri, handle.run_id, spool=spool, flush_every_s=60) as logger:
        for step in range(7):
            logger.log({f"m{i:04d}": 1.0 for i in range(300)}, step=step, tokens=step)
        logger.log(wide, step=7, tokens=7)
        logger.log({}, step=8, tokens=8)
    assert [len(request) for request in sent.requests] == [3, 3, 1, 1, 1]
    assert len(history(handle.uri, handle.run_id, "m0299")) == 8
    assert history(handle.uri, handle.run_id, "m2499") == [(7, 2499.0)]
    assert history(handle.uri, handle.run_id, "tokens") == [(step, float(step)) for step in range(9)]


def test_times_rise_when_the_clock_is_set_back(handle, spool, sent, monkeypatch):
    clock = iter([5_000_000_000, 5_000_000_000, 1_000_000_000, 9_000_000_000])
    logger = MetricLogger(handle.uri, handle.run_id, spool=spool, flush_every_s=60)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: next(clock))
        log_steps(logger, range(4))
    logger.close()
    assert [record.timestamp_ms for record in sent.requests[0]] == [5000, 5001, 5002, 9000]


def files_of(handle) -> dict[str, dict[str, float]]:
    client = connect(handle.uri)
    paths = [entry.path for entry in client.list_artifacts(handle.run_id, "details")]
    return {path: json.loads(Path(client.download_artifacts(handle.run_id, path)).read_text()) for path in paths}


DETAILED = {"loss": 1.0, "moe/0/maxvio": 2.0, "moe/0/load/3": 0.5, "attention/0/head/1/gate_mean": math.nan}


def test_what_single_experts_and_heads_do_is_in_files(handle, spool):
    with MetricLogger(handle.uri, handle.run_id, spool=spool, flush_every_s=60) as logger:
        logger.log(DETAILED, step=7, tokens=70)
        logger.log({"loss": 1.0}, step=8, tokens=80)
    assert connect(handle.uri).get_run(handle.run_id).data.metrics.keys() == {"loss", "moe/0/maxvio", "tokens"}
    ((path, values),) = files_of(handle).items()
    assert path.startswith("details/00000007-")
    assert values.keys() == {"moe/0/load/3", "attention/0/head/1/gate_mean"}
    assert values["moe/0/load/3"] == 0.5
    assert math.isnan(values["attention/0/head/1/gate_mean"])


def test_a_store_that_takes_no_files_has_the_metrics(handle, spool, monkeypatch, caplog):
    def refuse(*_):
        raise OSError("no such bucket")

    monkeypatch.setattr("mlflow.MlflowClient.log_text", refuse)
    with (
        caplog.at_level(logging.WARNING, "tidegate.track"),
        MetricLogger(handle.uri, handle.run_id, spool=spool, flush_every_s=60) as logger,
    ):
        logger.log(DETAILED, step=7, tokens=70)
    assert logger.close() == Delivery(1, 0, None)
    assert connect(handle.uri).get_run(handle.run_id).data.metrics["loss"] == 1.0
    (warning,) = caplog.records
    assert "no such bucket" in warning.getMessage()


# --- the server is not


def test_files_of_lost_answers_are_there_once(handle, spool, sent, monkeypatch):
    monkeypatch.setattr(logger_module, "CLOSING_RETRY_S", 0.05)
    sent.before, sent.after = [ConnectionError("refused")], [ConnectionError("lost")]
    with MetricLogger(handle.uri, handle.run_id, spool=spool, flush_every_s=60) as logger:
        logger.log(DETAILED, step=7, tokens=70)
    assert len(files_of(handle)) == 1


def test_a_spool_brings_the_files_too(handle, spool, unused_port):
    logger = MetricLogger(f"http://127.0.0.1:{unused_port}", handle.run_id, spool=spool)
    logger.log(DETAILED, step=7, tokens=70)
    assert logger.close(timeout_s=0.5).undelivered == 1
    assert replay_spool(spool, handle.uri) == 1
    assert len(files_of(handle)) == 1


def test_lost_answers_are_not_sent_again(handle, spool, sent, history, monkeypatch):
    """The store took two requests whose answers never came: each record must leave once."""
    monkeypatch.setattr(logger_module, "CLOSING_RETRY_S", 0.05)
    sent.after = [ConnectionError("lost"), ConnectionError("lost")]
    logger = MetricLogger(handle.uri, handle.run_id, spool=spool, flush_every_s=0.02)
    log_steps(logger, range(5))
    time.sleep(0.2)
    log_steps(logger, range(5, 9))
    assert logger.close() == Delivery(delivered=9, undelivered=0, spool=None)
    assert sent.steps == list(range(9))
    assert [step for step, _ in history(handle.uri, handle.run_id, "loss")] == list(range(9))
    assert not spool.exists()


def test_refused_requests_are_sent_again_in_order(handle, spool, sent, history, caplog, monkeypatch, wait_until):
    monkeypatch.setattr(logger_module, "CLOSING_RETRY_S", 0.05)
    sent.before = [ConnectionError("refused"), ConnectionError("refused")]
    logger = MetricLogger(handle.uri, handle.run_id, spool=spool, flush_every_s=0.02)
    with caplog.at_level(logging.WARNING, "tidegate.track"):
        log_steps(logger, range(4))
        wait_until(spool.exists, 5, "the spool")
        log_steps(logger, range(4, 6))
        wait_until(lambda: len(read_spool(spool).records) == 6, 5, "records logged during the outage in the spool")
        assert logger.close().delivered == 6
    assert history(handle.uri, handle.run_id, "loss") == [(step, 10.0 * step) for step in range(6)]
    assert not spool.exists()
    assert len(caplog.records) == 1, "one warning an outage"
    assert "refused" in caplog.text


def test_recovery_removes_the_spool_while_the_run_goes_on(handle, spool, sent, wait_until):
    sent.before = [ConnectionError("refused")]
    logger = MetricLogger(handle.uri, handle.run_id, spool=spool, flush_every_s=0.02)
    log_steps(logger, range(3))
    wait_until(spool.exists, 5, "the spool")
    wait_until(lambda: not spool.exists(), 5, "recovery")
    assert sent.steps == [0, 1, 2]
    assert logger.close() == Delivery(3, 0, None)


def test_a_dead_server_costs_nothing_and_its_spool_can_be_replayed(handle, spool, unused_port, history):
    dead = f"http://127.0.0.1:{unused_port}"
    logger = MetricLogger(dead, handle.run_id, spool=spool, flush_every_s=0.05)
    assert log_steps(logger, range(30)) < 0.05
    time.sleep(0.3)
    assert log_steps(logger, range(30, 47)) < 0.05
    logger.log({"loss": math.nan}, step=47, tokens=4700)
    start = time.monotonic()
    assert logger.close(timeout_s=1.0) == Delivery(delivered=0, undelivered=48, spool=spool)
    assert time.monotonic() - start < 2.0
    contents = read_spool(spool)
    assert contents.run_id == handle.run_id
    assert [record.step for record in contents.records] == list(range(48))
    logger._thread.join(5)
    assert not logger._thread.is_alive()

    with pytest.raises(ConfigError, match="cannot replay"):
        replay_spool(spool, dead)
    assert len(read_spool(spool).records) == 48
    assert replay_spool(spool, handle.uri) == 48
    assert not spool.exists()
    arrived = history(handle.uri, handle.run_id, "loss")
    assert arrived[:47] == [(step, 10.0 * step) for step in range(47)]
    assert math.isnan(arrived[47][1])


def test_backoff_doubles_up_to_a_minute(handle, spool, unused_port):
    logger = MetricLogger(f"http://127.0.0.1:{unused_port}", handle.run_id, spool=spool, flush_every_s=600)
    waits = []
    for _ in range(9):
        start = time.monotonic()
        logger._fail(ConnectionError("down"))
        waits.append(round(logger._next_attempt - start))
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    logger.close(timeout_s=0)


def test_close_keeps_its_deadline_when_the_server_hangs(handle, spool, silent_server, monkeypatch, history):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    logger = MetricLogger(silent_server, handle.run_id, spool=spool, flush_every_s=0.02)
    longest = log_steps(logger, range(5))
    time.sleep(0.2)
    longest = max(longest, log_steps(logger, range(5, 8)))
    start = time.monotonic()
    assert logger.close(timeout_s=0.3) == Delivery(0, 8, spool)
    assert time.monotonic() - start < 0.8
    assert longest < 0.05
    logger._thread.join(10)
    assert not logger._thread.is_alive(), "the thread ends with its last request"
    assert [record.step for record in read_spool(spool).records] == list(range(8))
    assert replay_spool(spool, handle.uri) == 8
    assert len(history(handle.uri, handle.run_id, "loss")) == 8


def test_a_record_the_store_rejects_does_not_stop_the_others(handle, spool, history, caplog):
    logger = MetricLogger(handle.uri, handle.run_id, spool=spool, flush_every_s=60)
    log_steps(logger, range(5))
    logger.log({"bad$name": 1.0}, step=5, tokens=5)
    log_steps(logger, range(6, 9))
    assert logger.close(timeout_s=10) == Delivery(delivered=8, undelivered=1, spool=spool)
    assert [step for step, _ in history(handle.uri, handle.run_id, "loss")] == [0, 1, 2, 3, 4, 6, 7, 8]
    assert [record.step for record in read_spool(spool).records] == [5]
    assert "bad$name" in caplog.text
    with pytest.raises(ConfigError, match="rejects 1 of 1 records"):
        replay_spool(spool, handle.uri)
    assert spool.exists()


def test_a_store_that_is_not_on_this_machine_is_not_created(tmp_path, spool, caplog):
    missing = tmp_path / "elsewhere" / "mlflow.db"
    logger = MetricLogger(f"sqlite:///{missing}", "a" * 32, spool=spool, flush_every_s=0.02)
    log_steps(logger, range(2))
    assert logger.close(timeout_s=0.1) == Delivery(0, 2, spool)
    assert not missing.exists()
    assert "need an MLflow server" in caplog.text


# --- the spool


def test_a_spool_of_an_earlier_process_goes_first(handle, spool, sent, history):
    old = [Record(1000 + i, i, {"loss": float(i), "tokens": float(i)}) for i in range(4)]
    Sender(handle.uri, handle.run_id).send(old[:1])  # arrived, its answer did not
    Spool(spool, handle.run_id).append(old)
    with spool.open("a") as file:
        file.write('{"timestamp_ms": 1004, "st')  # killed while writing
    sent.requests.clear()
    logger = MetricLogger(handle.uri, handle.run_id, spool=spool, flush_every_s=60)
    log_steps(logger, range(4, 6))
    assert logger.close() == Delivery(delivered=6, undelivered=0, spool=None)
    assert sent.steps == [1, 2, 3, 4, 5]
    assert [step for step, _ in history(handle.uri, handle.run_id, "loss")] == list(range(6))
    assert not spool.exists()


def test_records_of_a_checkpoint_arrive_once_and_before_later_ones(handle, spool, tmp_path, sent, history):
    sent.before = [ConnectionError("refused")] * 100
    killed = MetricLogger(handle.uri, handle.run_id, spool=tmp_path / "lost", flush_every_s=60)
    log_steps(killed, range(4))
    unsent = killed.unsent()
    assert [record["step"] for record in unsent] == [0, 1, 2, 3]
    sent.before.clear()
    Sender(handle.uri, handle.run_id).send([Record(**unsent[0])])  # arrived after the checkpoint was taken

    sent.requests.clear()
    logger = MetricLogger(handle.uri, handle.run_id, spool=spool, flush_every_s=60)
    logger.adopt(unsent)
    log_steps(logger, range(4, 6))
    assert [record["step"] for record in logger.unsent()] == [0, 1, 2, 3, 4, 5]
    assert logger.close() == Delivery(delivered=6, undelivered=0, spool=None)
    assert sent.steps == [1, 2, 3, 4, 5]
    assert [step for step, _ in history(handle.uri, handle.run_id, "loss")] == list(range(6))
    assert logger.unsent() == []
    killed.close(timeout_s=0)


def test_another_runs_spool_is_left_alone(handle, spool):
    Spool(spool, "b" * 32).append([Record(1, 1, {"tokens": 1.0})])
    before = spool.read_bytes()
    with pytest.raises(ValueError, match=f"{'b' * 32}, not of {handle.run_id}"):
        MetricLogger(handle.uri, handle.run_id, spool=spool)
    assert spool.read_bytes() == before


def test_an_unwritable_spool_keeps_records_in_memory(handle, tmp_path, sent, caplog, wait_until):
    (tmp_path / "file").write_text("")
    sent.before = [ConnectionError("refused")]
    logger = MetricLogger(handle.uri, handle.run_id, spool=tmp_path / "file" / "spool", flush_every_s=0.02)
    log_steps(logger, range(3))
    wait_until(lambda: "cannot write metric spool" in caplog.text, 5, "the warning")
    assert logger.close(timeout_s=5) == Delivery(3, 0, None)
    assert sent.steps == [0, 1, 2]


def test_a_full_disk_that_left_half_a_line_does_not_spoil_the_spool(
    handle, spool, unused_port, monkeypatch, wait_until
):
    append = Spool.append
    failures = [OSError(28, "No space left on device")]

    def full_once(self, records):
        if failures:
            self.path.parent.mkdir(parents=True)
            self.path.write_text(json.dumps({"run_id": handle.run_id}) + '\n{"timest')
            raise failures.pop()
        append(self, records)

    monkeypatch.setattr(Spool, "append", full_once)
    logger = MetricLogger(f"http://127.0.0.1:{unused_port}", handle.run_id, spool=spool, flush_every_s=0.02)
    log_steps(logger, range(3))
    wait_until(lambda: spool.exists() and not read_spool(spool).torn, 5, "a whole spool")
    log_steps(logger, range(3, 5))
    wait_until(lambda: len(read_spool(spool).records) == 5, 5, "later records")
    assert logger.close(timeout_s=0.1).undelivered == 5
    assert [record.step for record in read_spool(spool).records] == list(range(5))


# --- closing


def test_close_from_many_threads_answers_once_and_alike(handle, spool, sent):
    logger = MetricLogger(handle.uri, handle.run_id, spool=spool, flush_every_s=60)
    log_steps(logger, range(20))
    answers: list[Delivery] = []
    threads = [threading.Thread(target=lambda: answers.append(logger.close())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == [Delivery(20, 0, None)] * 8
    assert sent.steps == list(range(20))
    assert logger.close() == Delivery(20, 0, None)


def test_what_was_logged_before_close_is_delivered_or_refused_never_lost(handle, tmp_path, history):
    """Threads log while another closes: a call that did not raise must have arrived. Ten rounds, as it is a race."""
    accepted: list[int] = []

    def worker(logger: MetricLogger, first: int) -> None:
        for step in range(first, first + 10_000):
            try:
                logger.log({}, step=step, tokens=step)
            except RuntimeError:
                return
            accepted.append(step)
            time.sleep(0.0005)

    for attempt in range(10):
        before = len(accepted)
        logger = MetricLogger(handle.uri, handle.run_id, spool=tmp_path / "spool", flush_every_s=0.001)
        firsts = [(3 * attempt + index) * 10_000 for index in range(3)]
        threads = [threading.Thread(target=worker, args=(logger, first)) for first in firsts]
        for thread in threads:
            thread.start()
        time.sleep(0.03)
        delivery = logger.close()
        for thread in threads:
            thread.join(10)
        assert delivery == Delivery(len(accepted) - before, 0, None)
    assert sorted(step for step, _ in history(handle.uri, handle.run_id, "tokens")) == sorted(accepted)


def test_a_closed_logger_refuses(handle, spool, tmp_path):
    logger = MetricLogger(handle.uri, handle.run_id, spool=spool)
    logger.close()
    with pytest.raises(RuntimeError, match="closed"):
        logger.log({}, step=0, tokens=0)
    with pytest.raises(RuntimeError, match="closed"):
        logger.log_artifact(tmp_path)


def test_a_later_logger_continues_the_run(uri, handle, tmp_path, history):
    for attempt in range(2):
        again = open_run(
            uri,
            TrackConfig(),
            job="job",
            resolved={"a": 1},
            changes={},
            command=[],
            run_id=handle.run_id if attempt else None,
        )
        with MetricLogger(again.uri, handle.run_id, spool=tmp_path / "spool") as logger:
            log_steps(logger, range(3 * attempt, 3 * attempt + 3))
    assert history(uri, handle.run_id, "loss") == [(step, 10.0 * step) for step in range(6)]


# --- artifacts


def test_artifacts_arrive_and_missing_ones_only_warn(handle, spool, tmp_path, caplog, monkeypatch):
    (tmp_path / "routing.npz").write_bytes(b"x" * 63)
    with MetricLogger(handle.uri, handle.run_id, spool=spool, flush_every_s=0.02) as logger:
        logger.log_artifact(tmp_path / "missing.npz")
        logger.log_artifact(tmp_path / "routing.npz", "routing")
        logger.tag("gpu", "NVIDIA H200")
        log_steps(logger, range(2))
    files = connect(handle.uri).list_artifacts(handle.run_id, "routing")
    assert [(file.path, file.file_size) for file in files] == [("routing/routing.npz", 63)]
    assert connect(handle.uri).get_run(handle.run_id).data.tags["gpu"] == "NVIDIA H200"
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("tidegate")]
    assert len(warnings) == 1
    assert "missing.npz" in warnings[0]


def test_artifacts_of_a_dead_server_are_named_at_close(handle, spool, tmp_path, unused_port, caplog):
    logger = MetricLogger(f"http://127.0.0.1:{unused_port}", handle.run_id, spool=spool, flush_every_s=0.02)
    logger.log({}, step=0, tokens=0)
    logger.log_artifact(tmp_path / "routing.npz")
    logger.tag("gpu", "cpu")
    assert logger.close(timeout_s=0.2) == Delivery(0, 1, spool)
    assert f"artifact {tmp_path / 'routing.npz'}, tag gpu" in caplog.text
