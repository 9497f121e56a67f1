"""`tidegate doctor`: what it finds on this machine, on broken ones, and that it always comes to its end."""

from __future__ import annotations

import contextlib
import http.server
import platform
import socket
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from tidegate.launch import doctor
from tidegate.launch.doctor import Finding, examine, why_no_ray
from tidegate.launch.state import StateDir


@pytest.fixture(autouse=True)
def no_user_settings(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "RAY_AUTH_MODE", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setattr(doctor, "_DASHBOARD_PORT", 1)  # not of a Ray that runs beside the tests


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Accepts connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener


@pytest.fixture
def dead_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rows(text: str) -> dict[str, list[str]]:
    """The table that was printed: name -> [status, found, fix]."""
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[:1] == "│"]
    return {row[0]: row[1:] for row in cells}


def test_this_machine(tmp_path, capsys):
    started = time.monotonic()
    healthy = examine(None, tmp_path / "state")
    assert time.monotonic() - started < 10
    found = rows(capsys.readouterr().out)
    assert healthy == all(row[0] != "FAIL" for row in found.values())
    assert found["python"][:2] == ["ok", platform.python_version()]
    for package in ("torch", "ray", "mlflow", "deepspeed", "pydantic"):
        assert found[package][:2] == ["ok", metadata.version(package)]
    assert "pytest" not in found, "extras are not asked for"
    assert found["state directory"][:2] == ["ok", f"{tmp_path / 'state'} (the first run makes it)"]
    assert found["Ray"][:2] == ["ok", "will start one on 127.0.0.1, with a token of its own; RAY_AUTH_MODE is not set"]
    assert found["MLflow"][0] == "ok"
    assert {"devices", "compiler", "free space", "port 8265", "port 5000"} <= found.keys() | {"GPU 0"}
    assert not (tmp_path / "state").exists(), "looking makes nothing"


def test_an_existing_state_directory(tmp_path, capsys, monkeypatch):
    StateDir(tmp_path / "state")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert examine(None, tmp_path / "state")
    found = rows(capsys.readouterr().out)
    assert found["state directory"][1] == f"{tmp_path / 'state'} (layout version 1)"
    assert found["Ray"][1] == "will start one on 127.0.0.1, with a token of its own; RAY_AUTH_MODE=token"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    finding = only(doctor._ray(None))
    assert (finding.status, finding.found) == (
        "warn",
        "will start one on 127.0.0.1 that asks for no token; RAY_AUTH_MODE=disabled",
    )


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_a_package_too_old_and_one_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        metadata,
        "requires",
        lambda _: ["torch>=99", "no-such-thing[x]>=1", "rich>=1", "pytest>=99; extra == 'dev'", "wmi; os_name == 'x'"],
    )
    assert not examine(None, tmp_path)
    found = rows(capsys.readouterr().out)
    assert found["torch"] == ["FAIL", metadata.version("torch"), "pip install 'torch>=99'"]
    assert found["no-such-thing"] == ["FAIL", "not installed", "pip install 'no-such-thing>=1'"]
    assert found["rich"][0] == "ok"
    assert "pytest" not in found
    assert "wmi" not in found


def test_a_python_too_old(monkeypatch):
    monkeypatch.setattr(platform, "python_version", lambda: "3.9.1")
    assert only(doctor._python()) == Finding("FAIL", "3.9.1", "use Python >=3.10")


Properties = namedtuple("Properties", "name total_memory major")


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (Properties("NVIDIA H100", 80 * 2**30, 9), Finding("ok", "NVIDIA H100, 80 GiB, bf16", "", "GPU 0")),
        (
            Properties("Tesla T4", 16 * 2**30, 7),
            Finding("warn", "Tesla T4, 16 GiB, no bf16", "use --set train.precision=fp32", "GPU 0"),
        ),
    ],
)
def test_devices(monkeypatch, device, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: device)
    assert only(doctor._devices()) == expected


def test_no_devices(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert only(doctor._devices()) == Finding("ok", "none: CPU with gloo")
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    finding = only(doctor._devices())
    assert finding.status == "warn"
    assert "nvidia-smi" in finding.found


@pytest.mark.parametrize(("cuda", "status"), [(False, "warn"), (True, "FAIL")])
def test_no_compiler(monkeypatch, cuda, status):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    finding = only(doctor._compiler())
    assert finding.status == status
    assert "Triton and DeepSpeed" in finding.fix


def test_a_compiler_of_ones_own(monkeypatch):
    monkeypatch.setenv("CXX", "my-c++")
    monkeypatch.setattr("shutil.which", lambda name: f"/opt/{name}" if name == "my-c++" else None)
    assert only(doctor._compiler()) == Finding("ok", "/opt/my-c++")


def test_a_state_directory_of_another_version(tmp_path, capsys):
    (tmp_path / "VERSION").write_text("7\n", encoding="utf-8")
    assert not examine(None, tmp_path)
    assert rows(capsys.readouterr().out)["state directory"] == [
        "FAIL",
        f"{tmp_path}: layout version '7', this Tidegate writes '1'",
        "choose another with --state-dir or TIDEGATE_STATE",
    ]


def test_a_state_directory_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        finding = only(doctor._state_dir(path))
        assert (finding.status, finding.found) == ("FAIL", f"{tmp_path / 'file'} is a file")


def test_a_state_directory_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    finding = only(doctor._state_dir(tmp_path / "new"))
    assert (finding.status, finding.found) == ("FAIL", f"{tmp_path} cannot be written: Permission denied")


def test_little_space_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "free")(1_500_000_000))
    space = list(doctor._state_dir(tmp_path))[-1]
    assert (space.status, space.found, space.name) == ("warn", "1.5 GB", "free space")


def test_a_taken_port_is_a_warning(listener, monkeypatch):
    port = listener.getsockname()[1]
    monkeypatch.setattr(doctor, "_PORTS", {port: ("somebody", "stop it")})
    finding = only(doctor._ports())
    assert finding == Finding("warn", "Address already in use; wanted by somebody", "stop it", f"port {port}")


def test_mlflow_that_is_not_there(tmp_path, capsys, monkeypatch, dead_port):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "relative/store")
    assert not examine(None, tmp_path)
    found = rows(capsys.readouterr().out)["MLflow"]
    assert found[0] == "FAIL"
    assert found[1].startswith("MLFLOW_TRACKING_URI: 'relative/store' is not a store")
    assert found[2] == "start the server, or correct MLFLOW_TRACKING_URI"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{dead_port}")
    finding = only(doctor._mlflow(tmp_path))
    assert finding.status == "FAIL"
    assert finding.found.startswith(f"not reachable: http://me:***@127.0.0.1:{dead_port}")


def test_why_no_ray(listener, dead_port):
    port = listener.getsockname()[1]
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "auto", "local"):
        assert why_no_ray(address) is None, address
    for address in (f"127.0.0.1:{dead_port}", f"ray://127.0.0.1:{dead_port}", f"http://127.0.0.1:{dead_port}"):
        assert "refused" in (why_no_ray(address) or ""), address
    for address in ("ftp://host:1", "host:port", "127.0.0.1:99999", "ray://host", ":6379", "host:"):
        assert (why_no_ray(address) or "").startswith("not host:port, ray://host:port or http(s)://host:port"), address


@contextlib.contextmanager
def dashboard(status: int, body: bytes = b"") -> Iterator[int]:
    """The port of a server that answers every GET so; one with 401 wants `Bearer right`."""

    class Dashboard(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = self.headers.get("Authorization") == "Bearer right"
            self.send_response(200 if status == 401 and allowed else status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("status", [200, 401])
def test_a_dashboard_that_answers(status):
    with dashboard(status) as port:
        assert why_no_ray(f"http://127.0.0.1:{port}/") is None


@pytest.mark.parametrize("body", [b"[]", b' [{"type": "SUBMISSION"}]'])
def test_a_jobs_api_open_to_all_fails(tmp_path, capsys, monkeypatch, body, dead_port):
    monkeypatch.setattr(doctor, "_DASHBOARD_PORT", dead_port)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    with dashboard(200, body) as port:
        assert not examine(f"http://127.0.0.1:{port}", tmp_path)
        text = capsys.readouterr().out
        (line,) = (line for line in text.splitlines() if "CVE-2023-48022" in line)
        assert "FAIL" in line
        assert f"http://127.0.0.1:{port} takes jobs from anyone who reaches it" in line
        assert "RAY_AUTH_MODE=token" in line
        monkeypatch.setattr(doctor, "_DASHBOARD_PORT", port)
        for address in (None, f"127.0.0.1:{port}", f"ray://localhost:{port}"):  # the port that clusters have
            found = list(doctor._jobs_apis(address))
            assert {finding.status for finding in found} == {"FAIL"}, address


@pytest.mark.parametrize(
    ("status", "body", "found"),
    [
        (401, b"[]", "asks for a token"),
        (403, b"", "asks for a token"),
        (404, b"", "has none (HTTP 404)"),
        (200, b"<html>", "answers without a list of jobs"),
    ],
)
def test_a_jobs_api_that_is_closed(status, body, found, monkeypatch):
    with dashboard(status, body) as port:
        monkeypatch.setattr(doctor, "_DASHBOARD_PORT", port)
        monkeypatch.setenv("http_proxy", "http://192.0.2.1:1")  # a proxy of the user's is not asked
        assert only(doctor._jobs_apis(None)) == Finding("ok", f"http://127.0.0.1:{port} {found}")


def test_no_dashboard(monkeypatch, dead_port, listener):
    monkeypatch.setattr(doctor, "_DASHBOARD_PORT", dead_port)
    finding = only(doctor._jobs_apis(None))
    assert finding.status == "ok"
    assert finding.found.startswith(f"http://127.0.0.1:{dead_port} does not answer")
    monkeypatch.setattr(doctor, "_REACH_TIMEOUT_S", 0.3)
    monkeypatch.setattr(doctor, "_DASHBOARD_PORT", listener.getsockname()[1])
    assert "does not answer" in only(doctor._jobs_apis(None)).found


def test_a_dashboard_that_hangs(listener, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_REACH_TIMEOUT_S", 0.5)
    started = time.monotonic()
    assert not examine(f"http://127.0.0.1:{listener.getsockname()[1]}", tmp_path)
    assert time.monotonic() - started < 10
    assert rows(capsys.readouterr().out)["Ray"][0] == "FAIL"


def test_a_cluster_that_is_not_there(tmp_path, capsys, dead_port):
    assert not examine(f"127.0.0.1:{dead_port}", tmp_path)
    found = rows(capsys.readouterr().out)["Ray"]
    assert found[0] == "FAIL"
    assert found[1].startswith(f"127.0.0.1:{dead_port}: ")
    assert found[2] == "start the cluster, or correct --address"


def test_a_name_server_that_hangs(tmp_path, capsys, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(doctor, "_REACH_TIMEOUT_S", -0.9)
    monkeypatch.setattr("socket.create_connection", lambda *_, **__: release.wait(30))
    try:
        assert not examine("head.example:6379", tmp_path)
    finally:
        release.set()
    assert rows(capsys.readouterr().out)["Ray"][:2] == ["FAIL", "no answer from the name server"]


def test_a_check_that_breaks_is_a_warning(tmp_path, capsys, monkeypatch):
    def broken() -> Iterator[Finding]:
        yield Finding("ok", "half [of] it")
        raise RuntimeError("the driver says [no]")

    monkeypatch.setattr(doctor, "_devices", broken)
    monkeypatch.setattr(metadata, "metadata", lambda _: {})
    assert examine(None, tmp_path)
    text = capsys.readouterr().out
    assert rows(text)["devices"][:2] == ["warn", "could not be examined: RuntimeError: the driver says [no]"]
    assert rows(text)["python"][:2] == ["warn", "could not be examined: KeyError: 'Requires-Python'"]
    assert "half [of] it" in text
    assert rows(text)["torch"][0] == "ok", "the other checks go on"
