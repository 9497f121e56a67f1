"""The UI over the embedded store, and the check that `tidegate doctor` prints."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from tidegate.config import ConfigError
from tidegate.track import TrackConfig, check_tracking, run_url, serve_ui, ui
from tidegate.track.client import connect
from tidegate.track.preset import experiment_pages, view_tags


def test_no_store_is_refused_by_its_path(tmp_path):
    with pytest.raises(ConfigError, match=rf"^state_dir: .*{tmp_path}/none/mlflow/mlflow\.db does not exist") as caught:
        serve_ui(tmp_path / "none")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "none").exists()


def test_a_taken_port_and_a_foreign_host_are_refused(state_dir):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^port: cannot listen on 127\.0\.0\.1:{port} "):
            serve_ui(state_dir, port=port)
    with pytest.raises(ConfigError, match=r"^port: cannot listen on 192\.0\.2\.1:5000 "):
        serve_ui(state_dir, host="192.0.2.1")
    for port in (0, 70000):
        with pytest.raises(ConfigError, match=rf"^port: {port} is not between"):
            serve_ui(state_dir, port=port)


def test_experiments_with_a_run_have_our_view_from_their_first_run_on(handle, uri):
    client = connect(uri)
    (tag, view), *others = view_tags().items()
    assert not others
    assert client.get_experiment(handle.experiment_id).tags[tag] == view
    client.set_experiment_tag(handle.experiment_id, tag, "of another version")
    client.create_experiment("empty")
    paths = {page.name: page.path for page in experiment_pages(uri)}
    assert paths.keys() == {TrackConfig().experiment, "template"}
    start = f"/#/experiments/{handle.experiment_id}/runs?viewStateShareKey={tag.split('.')[-1]}&"
    assert paths[TrackConfig().experiment].startswith(start)
    assert client.get_experiment(handle.experiment_id).tags[tag] == view


def test_a_store_that_cannot_be_opened_is_named(state_dir):
    (state_dir / "mlflow" / "mlflow.db").write_bytes(b"no database")
    with pytest.raises(ConfigError, match=r"^state_dir: .*mlflow\.db cannot be opened: .*not a database"):
        serve_ui(state_dir)


@pytest.mark.slow
def test_the_ui_shows_the_run_and_ends_with_its_parent(handle, state_dir, unused_port, wait_until):
    code = "import sys; from pathlib import Path; from tidegate.track import serve_ui; "
    code += "sys.exit(serve_ui(Path(sys.argv[1]), port=int(sys.argv[2])))"
    with (state_dir / "log").open("wb") as log:
        command = [sys.executable, "-c", code, str(state_dir), str(unused_port)]
        careless = os.environ | {"MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "true"}
        parent = subprocess.Popen(command, stdout=log, stderr=log, cwd=state_dir.parent, env=careless)
    address = f"http://127.0.0.1:{unused_port}"
    try:
        wait_until(lambda: parent.poll() is not None or check_port(unused_port), 90, "the UI")
        for page in (
            run_url(handle).split()[-1].rstrip(")"),
            "/get-artifact?path=job/resolved.json&run_id=" + handle.run_id,
        ):
            with urllib.request.urlopen(address + page, timeout=20) as response:
                assert response.status == 200
                body = response.read()
        assert body == b'{\n  "a": 1\n}\n'
        search = "/api/2.0/mlflow/experiments/search"
        assert post(address + search) == 200
        assert post(address + search, Host=f"localhost:{unused_port}", Origin="http://localhost:6000") == 200
        assert post(address + search, Host="localhost:6000") == 200, "through a tunnel"
        for stranger in ("rebound.example", "192.168.0.7:5000", "10.0.0.1"):
            assert post(address + search, Host=stranger) == 403, stranger
        assert post(address + search, Origin="https://elsewhere.example") == 403
    finally:
        parent.send_signal(signal.SIGTERM)
        parent.wait(20)
    wait_until(lambda: not check_port(unused_port), 10, "the server to end with its parent")
    assert not (state_dir.parent / "mlruns").exists()


def post(url: str, **headers: str) -> int:
    """The status of the answer."""
    headers = {"Content-Type": "application/json", **headers}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, b'{"max_results": 1}', headers), timeout=20
        ) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_a_host_that_others_reach_is_taken_only_on_purpose(state_dir, unused_port, monkeypatch):
    monkeypatch.setattr(ui, "_wait_for", lambda child: pytest.fail("a server was started"))
    with pytest.raises(
        ConfigError, match=rf"^host: whoever reaches .*ssh -L {unused_port}:localhost:{unused_port}, or"
    ):
        serve_ui(state_dir, "0.0.0.0", unused_port)


def check_port(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_check_of_the_embedded_store(handle, uri, tmp_path):
    assert check_tracking(uri) == f"reachable: {uri.removeprefix('sqlite:///')} (2 runs)"  # one is the template's
    missing = tmp_path / "mlflow.db"
    assert check_tracking(f"sqlite:///{missing}") == f"reachable: {missing} (will be created by the first run)"
    assert not missing.exists()
    missing.write_text("this is not a database, and long enough to be taken for one" * 20)
    assert check_tracking(f"sqlite:///{missing}").startswith(f"not reachable: {missing}: ")


def test_check_of_a_server_takes_at_most_five_seconds(unused_port, silent_server):
    dead = f"http://me:hunter2@127.0.0.1:{unused_port}"
    start = time.monotonic()
    report = check_tracking(dead)
    assert report.startswith(f"not reachable: http://me:***@127.0.0.1:{unused_port}: ")
    assert "hunter2" not in report
    assert time.monotonic() - start < 5
    start = time.monotonic()
    assert check_tracking(silent_server) == f"not reachable: {silent_server} gave no answer in 4.5 s"
    assert time.monotonic() - start < 5
