"""Real stores: one SQLite store is created and migrated a session, every test gets a copy."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tidegate.track import RunHandle, TrackConfig, open_run
from tidegate.track.client import connect
from tidegate.track.store import artifact_root, embedded_uri


@pytest.fixture(autouse=True)
def no_user_settings(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def state_dir(tmp_path, template) -> Path:
    """A state directory with a migrated store; its name has a space, as a user's may."""
    directory = tmp_path / "state dir"
    template.copy_to(directory)
    return directory


@pytest.fixture
def uri(state_dir) -> str:
    return embedded_uri(state_dir)


@pytest.fixture
def handle(uri) -> RunHandle:
    """A run in the embedded store."""
    return open_run(uri, TrackConfig(), job="job", resolved={"a": 1}, changes={}, command=["tidegate", "run"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture
def unused_port() -> int:
    """A port on which nothing listens."""
    return free_port()


@pytest.fixture
def history() -> Callable[[str, str, str], list[tuple[int, float]]]:
    """`history(uri, run_id, key)`: a metric's `(step, value)` in the order of their times."""

    def read(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
        points = sorted(connect(uri).get_metric_history(run_id, key), key=lambda metric: metric.timestamp)
        return [(metric.step, metric.value) for metric in points]

    return read


@pytest.fixture(name="wait_until")
def wait_until_fixture() -> Callable[[Callable[[], bool], float, str], None]:
    return wait_until


@pytest.fixture(name="answers")
def answers_fixture() -> Callable[[int], bool]:
    """Whether a server of MLflow on this port is ready."""
    return answers


class Server:
    """A real `mlflow server` on one port over one store, which can be killed and started again."""

    def __init__(self, uri: str, log: Path) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._store = uri
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", self._store, "--default-artifact-root", artifact_root(self._store) or ""]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with self._log.open("ab") as log:  # a session of its own, so that kill() reaches uvicorn's worker too
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=self._log.parent, start_new_session=True
            )
        wait_until(lambda: answers(self.port), 90, f"the MLflow server; log: {self._log}")

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(uri, tmp_path) -> Iterator[Server]:
    server = Server(uri, tmp_path / "server.log")
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The URI of a server that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
