"""Ray clusters of one machine, started as an operator starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Head(NamedTuple):
    address: str
    """Of its dashboard."""
    folder: Path
    """Of all that it writes."""


@contextmanager
def ray_head(*arguments: str, port: int | None = None, **environment: str) -> Iterator[Head]:
    """A head node."""
    dashboard = free_port()
    bin_folder = Path(sys.executable).parent
    command = [
        *(str(bin_folder / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
        *(f"--port={port or free_port()}", f"--dashboard-port={dashboard}", "--object-store-memory=100000000"),
        *arguments,
    ]
    # Not pytest's folder: the sockets below it would have names that are too long.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as temporary:
        env = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}"} | environment
        with Path(temporary, "head.log").open("w") as log:
            process = subprocess.Popen([*command, f"--temp-dir={temporary}"], env=env, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{dashboard}"
            _wait_for(address, process, Path(temporary, "head.log"))
            yield Head(address, Path(temporary))
        finally:
            end([process.pid])
            process.wait()


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(f"{address}/api/jobs/", timeout=5).close()
            return
        except urllib.error.HTTPError as error:
            error.close()  # it asks for a token
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.3)


def end(pids: Sequence[int]) -> None:
    """Kill processes and all that they started."""
    for pid in filter(psutil.pid_exists, pids):
        process = psutil.Process(pid)
        for child in [*process.children(recursive=True), process]:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """With three CPUs, for the tests of one file."""
    with ray_head("--num-cpus=3") as started:
        yield started


@pytest.fixture
def head_with_token() -> Iterator[tuple[Head, str]]:
    token = "0123456789abcdef" * 4
    with ray_head("--num-cpus=1", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token) as started:
        yield started, token
