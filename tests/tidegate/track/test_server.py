"""A real MLflow server that is killed in the middle of a run."""

from __future__ import annotations

import logging
import math
import time
import urllib.request

import pytest

from tidegate.track import Delivery, MetricLogger, TrackConfig, check_tracking, finish_run, log_text, open_run, run_url
from tidegate.track.client import connect
from tidegate.track.spool import read_spool


@pytest.mark.slow
def test_a_run_survives_the_death_of_its_server(server, tmp_path, history, wait_until, caplog):
    config = TrackConfig(tracking_uri=server.uri)
    handle = open_run(server.uri, config, job="job", resolved={"a": {"b": 1}}, changes={"a.b": 1}, command=["x"])
    assert check_tracking(server.uri) == f"reachable: {server.uri}"
    with urllib.request.urlopen(run_url(handle), timeout=10) as page:
        assert page.status == 200

    spool = tmp_path / "spool.jsonl"
    logger = MetricLogger(handle.uri, handle.run_id, spool=spool, flush_every_s=0.1)
    longest = 0.0

    def log_steps(steps: range) -> None:
        nonlocal longest
        for step in steps:
            start = time.monotonic()
            logger.log(
                {f"layer{i}/load": float(step) for i in range(20)} | {"loss": 10.0 * step}, step=step, tokens=step
            )
            longest = max(longest, time.monotonic() - start)
            time.sleep(0.005)

    log_steps(range(50))
    server.kill()
    log_steps(range(50, 150))
    wait_until(lambda: spool.exists() and len(read_spool(spool).records) > 50, 30, "the spool")
    assert check_tracking(server.uri).startswith(f"not reachable: {server.uri}: ")
    log_steps(range(150, 160))
    server.start()
    log_steps(range(160, 170))
    logger.log({"loss": math.nan, "grad": math.inf}, step=170, tokens=170)
    with caplog.at_level(logging.WARNING):
        assert logger.close(timeout_s=60) == Delivery(delivered=171, undelivered=0, spool=None)
    assert longest < 0.05
    assert not spool.exists()

    losses = history(server.uri, handle.run_id, "loss")
    assert losses[:170] == [(step, 10.0 * step) for step in range(170)]
    assert losses[170][0] == 170
    assert math.isnan(losses[170][1])
    assert history(server.uri, handle.run_id, "tokens") == [(step, float(step)) for step in range(171)]
    assert history(server.uri, handle.run_id, "grad") == [(170, 1.7976931348623157e308)]

    resumed = open_run(
        server.uri, config, job="job", resolved={"a": {"b": 2}}, changes={}, command=["x"], run_id=handle.run_id
    )
    assert resumed == handle
    assert log_text(handle, "report", "report.txt")
    assert finish_run(handle, "FINISHED")
    run = connect(server.uri).get_run(handle.run_id)
    assert (run.info.status, run.data.params) == ("FINISHED", {"a.b": "1"})
