"""Looking at runs: the MLflow UI over the embedded store, and whether a store answers."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

from tidegate.config import ConfigError
from tidegate.redact import redact
from tidegate.track.client import connect, database_file, import_mlflow, one_line, schema_of
from tidegate.track.preset import experiment_pages
from tidegate.track.store import artifact_root, embedded_uri

__all__ = ["check_tracking", "serve_ui", "stop_server"]

CHECK_TIMEOUT_S = 4.5
_SHUTDOWN_S = 10.0
_LOOPBACK_NAMES = "localhost,localhost:*,127.0.0.1,127.0.0.1:*,[::1],[[]::1]:*"
"""What a browser may call a server on loopback, also through a tunnel; another name is DNS rebinding. The last two are
MLflow's patterns for an address in brackets."""


def serve_ui(state_dir: Path, host: str = "127.0.0.1", port: int = 5000) -> int:
    """Serve the MLflow UI over the store of `state_dir` until interrupted; print where each experiment is shown.

    Args:
        state_dir: the directory that runs were started with.
        host: the address to listen on. One that other machines reach is taken only with MLFLOW_SERVER_ALLOWED_HOSTS.
        port: the port to listen on, 1 to 65535.

    Returns:
        The exit status of the server.

    Raises:
        ConfigError: nothing has been recorded in `state_dir`, its store cannot be opened, or the address cannot or
            should not be used.
    """
    uri = embedded_uri(state_dir)
    database, artifacts = database_file(uri), artifact_root(uri)
    assert database is not None
    assert artifacts is not None
    if not database.exists():
        raise ConfigError(f"state_dir: no run has been recorded in {str(state_dir)!r} ({database} does not exist)")
    allowed = os.environ.get("MLFLOW_SERVER_ALLOWED_HOSTS")
    if not _is_loopback(host, port) and not allowed:
        raise ConfigError(
            f"host: whoever reaches {host} could read and change every run, as this server asks for no password; use "
            f"ssh -L {port}:localhost:{port}, or set MLFLOW_SERVER_ALLOWED_HOSTS to the names that it may be called by"
        )
    try:
        pages = experiment_pages(uri)
    except ConfigError:
        raise
    except Exception as error:  # MLflow lets errors of SQLAlchemy and the file system through
        raise ConfigError(f"state_dir: {database} cannot be opened: {one_line(error)}") from error
    for page in pages:
        print(f"{page.name}: http://{f'[{host}]' if ':' in host else host}:{port}{page.path}", flush=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", uri, "--default-artifact-root", artifacts]
    command += ["--allowed-hosts", allowed or _LOOPBACK_NAMES]
    # Without the job runner of MLflow's evaluation features, which would start several more processes.
    environment = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | os.environ
    environment["MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE"] = "false"
    return _wait_for(subprocess.Popen(command, env=environment, cwd=database.parent))


def check_tracking(uri: str) -> str:
    """One line for `tidegate doctor`, within 5 s: starts with `reachable` or `not reachable`, then why."""
    shown = redact(uri)
    database = database_file(uri)
    if database:
        return _check_database(database)
    import_mlflow()  # outside the time limit, since it says nothing about the server
    failures: list[Exception] = []
    # A thread, because no timeout of a request covers a name server that does not answer.
    thread = threading.Thread(target=_probe, args=(uri, failures), daemon=True)
    thread.start()
    thread.join(CHECK_TIMEOUT_S)
    if thread.is_alive():
        return f"not reachable: {shown} gave no answer in {CHECK_TIMEOUT_S} s"
    return f"not reachable: {shown}: {one_line(failures[0])}" if failures else f"reachable: {shown}"


def _probe(uri: str, failures: list[Exception]) -> None:
    try:
        connect(uri).search_experiments(max_results=1)
    except Exception as error:  # the report is the purpose
        failures.append(error)


def _check_database(database: Path) -> str:
    if not database.exists():
        return f"reachable: {database} (will be created by the first run)"
    try:
        read_only = sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=CHECK_TIMEOUT_S)
        with closing(read_only):
            runs = read_only.execute("SELECT count(*) FROM runs").fetchone()[0]
        schema_of(f"sqlite:///{database}")
    except (sqlite3.Error, ConfigError) as error:
        return f"not reachable: {database}: {error}"
    return f"reachable: {database} ({runs} runs)"


def _is_loopback(host: str, port: int) -> bool:
    """Whether only this machine reaches the address.

    Raises:
        ConfigError: nobody can listen there.
    """
    if not 1 <= port <= 65535:  # getaddrinfo would take it modulo 65536
        raise ConfigError(f"port: {port} is not between 1 and 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that just ended does not count
            probe.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host has
        raise ConfigError(f"port: cannot listen on {host}:{port} ({one_line(error)}); choose another") from error
    return ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback


def stop_server(child: subprocess.Popen[bytes]) -> None:
    """End a server that was started here, by force if it takes long."""
    child.terminate()
    try:
        child.wait(_SHUTDOWN_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _wait_for(child: subprocess.Popen[bytes]) -> int:
    """Wait for the server; SIGTERM and Ctrl-C end it too, so that no server is left behind."""
    previous = None
    if threading.current_thread() is threading.main_thread():
        previous = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        return child.wait()
    except KeyboardInterrupt:
        return 130
    finally:
        stop_server(child)
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
