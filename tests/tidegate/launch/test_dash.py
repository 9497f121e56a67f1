"""`tidegate dash` with the real Prometheus: finds who exports, evaluates our rules, and leaves nobody behind."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from tidegate.config import ConfigError
from tidegate.launch import dash

needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs apt install prometheus")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def session(temp: Path, name: str, target: str, age_s: float = 0) -> None:
    """What Ray writes of itself."""
    folder = temp / "ray" / name
    folder.mkdir(parents=True)
    path = folder / "prom_metrics_service_discovery.json"
    path.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": [target]}]))
    os.utime(path, (time.time() - age_s,) * 2)


class Dash:
    """The command, and what its Prometheus says."""

    def __init__(self, folder: Path, port: int) -> None:
        self.state, self.log, self._url = folder / "state", folder / "log", f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "tidegate.cli", "dash", "--port", str(port), "--state-dir", str(self.state)]
        environment = os.environ | {"RAY_TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def ask(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self._url}/api/v1/{path}", timeout=5) as answer:
            return json.load(answer)["data"]

    def query(self, text: str) -> list[Any]:
        return list(self.ask(f"query?query={urllib.parse.quote(text)}")["result"])

    def wait_for(self, what: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 60
        while True:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if found := what():
                    return found
            except OSError:
                pass
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.3)


@needs_prometheus
@pytest.mark.slow
def test_dash_scrapes_every_ray_that_runs_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    registry, exporter_port, port = CollectorRegistry(), free_port(), free_port()
    gauge = Gauge("ray_tidegate_moe_maxvio", "as a run exports it", ["run", "layer"], registry=registry)
    gauge.labels("a-run", "3").set(7.5)
    server, thread = start_http_server(exporter_port, "127.0.0.1", registry)
    session(tmp_path, "session_2026-01-01_dead", "127.0.0.1:1", age_s=3600)
    session(tmp_path, "session_2026-01-02_alive", f"127.0.0.1:{exporter_port}")
    (tmp_path / "ray" / "session_latest").symlink_to(tmp_path / "ray" / "session_2026-01-02_alive")
    served = Dash(tmp_path, port)
    try:
        (series,) = served.wait_for(lambda: served.query('ray_tidegate_moe_maxvio{layer="3"}'))
        assert series["value"][1] == "7.5"
        assert series["metric"]["run"] == "a-run"
        targets = served.ask("targets")["activeTargets"]
        assert [target["labels"]["instance"] for target in targets] == [f"127.0.0.1:{exporter_port}"]
        (averaged,) = served.wait_for(lambda: served.query("tidegate:moe_maxvio:avg10m"))
        assert averaged["metric"]["layer"] == "3"
        (alert,) = served.wait_for(lambda: served.ask("alerts")["alerts"])
        assert (alert["labels"]["alertname"], alert["state"]) == ("TidegateMaxVioHigh", "pending")
        assert "Grafana is not installed" in served.log.read_text() or shutil.which("grafana")
        listening = [
            connection.laddr.ip
            for child in psutil.Process(served.process.pid).children(recursive=True)
            for connection in child.net_connections()
            if connection.status == psutil.CONN_LISTEN
        ]
        assert set(listening) == {"127.0.0.1"}
        children = psutil.Process(served.process.pid).children(recursive=True)
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(timeout=90) == 130
        assert not any(child.is_running() for child in children)
        assert "Traceback" not in served.log.read_text()
    finally:
        if served.process.poll() is None:
            served.process.terminate()
            served.process.wait(timeout=30)
        server.shutdown()
        server.server_close()
        thread.join()


@needs_prometheus
def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"does not start: .*address already in use"):
            dash.serve_dashboards(tmp_path, taken.getsockname()[1], free_port())


def test_without_prometheus_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="apt install prometheus"):
        dash.serve_dashboards(tmp_path / "state", free_port(), free_port())


def test_grafana_gets_its_files_and_nobody_can_log_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dash._configure_grafana(tmp_path, "http://127.0.0.1:9090", 3001)
    settings = configparser.ConfigParser()
    settings.read(path)
    assert settings["server"]["http_addr"] == "127.0.0.1"
    assert settings["security"]["disable_initial_admin_creation"] == settings["auth"]["disable_login_form"] == "true"
    provisioning = Path(settings["paths"]["provisioning"])
    (source,) = yaml.safe_load((provisioning / "datasources" / "tidegate.yml").read_text())["datasources"]
    assert source["url"] == "http://127.0.0.1:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "tidegate.yml").read_text())["providers"]
    shown = {json.loads(file.read_text())["uid"] for file in Path(provider["options"]["path"]).iterdir()}
    assert "tidegate-training" in shown

    monkeypatch.delenv("GF_PATHS_HOME", raising=False)
    binary = tmp_path / "grafana-v12" / "bin" / "grafana"
    binary.parent.mkdir(parents=True)
    binary.touch()
    link = tmp_path / "grafana-link"
    link.symlink_to(binary)
    with pytest.raises(ConfigError, match="GF_PATHS_HOME"):
        dash._grafana_home(link)
    (tmp_path / "grafana-v12" / "conf").mkdir()
    (tmp_path / "grafana-v12" / "conf" / "defaults.ini").touch()
    assert dash._grafana_home(link) == tmp_path / "grafana-v12"
