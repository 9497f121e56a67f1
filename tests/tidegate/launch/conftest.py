"""Ray clusters of one machine, started as an operator starts them."""

from __future__ import annotations

import json
import os
import shutil
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
import ray._private.services
from ray.autoscaler._private.fake_multi_node import node_provider as fake_multi_node


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Head(NamedTuple):
    address: str
    """Of its dashboard."""
    folder: Path
    """Of all that it writes."""
    gcs: str = ""
    """Address for Ray's own commands."""


@contextmanager
def ray_head(*arguments: str, port: int | None = None, **environment: str) -> Iterator[Head]:
    """A head node."""
    dashboard = free_port()
    bin_folder = Path(sys.executable).parent
    command = [
        *(str(bin_folder / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
        *(
            f"--port={port or free_port()}",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={free_port()}",  # of which Ray has one a machine
            "--object-store-memory=100000000",
        ),
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


@contextmanager
def autoscaling_head(pool: dict[str, object], *, idle_minutes: float = 0.2, sold_out: bool = False) -> Iterator[Head]:
    """A head without room for work, whose autoscaler starts and ends nodes of this machine.

    Args:
        pool: the one kind of worker node, as in a file for Ray's cluster launcher.
        idle_minutes: after which a node goes.
        sold_out: the cloud has no machine to give.
    """
    port, folder = free_port(), tempfile.mkdtemp(prefix="cloud")
    gcs = f"{ray._private.services.get_node_ip_address()}:{port}"
    lists = ["initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"]
    lists += ["head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"]
    lists += ["rsync_exclude", "rsync_filter"]
    config = {
        "cluster_name": "pretended",
        "max_workers": 8,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_minutes,
        "provider": {
            "type": "external",
            "module": "pretended_cloud.PretendedCloud",
            "gcs_address": gcs,
            "folder": folder,
            "sold_out": sold_out,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": fake_multi_node.FAKE_HEAD_NODE_ID,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "workers": {"node_config": {}, "min_workers": 0, **pool},
        },
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        "file_mounts_sync_continuously": False,
        **{key: [] for key in lists},
    }
    environment = {
        "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": fake_multi_node.FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": fake_multi_node.FAKE_HEAD_NODE_ID,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        with ray_head("--num-cpus=0", f"--autoscaling-config={file.name}", port=port, **environment) as started:
            yield started._replace(gcs=gcs)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """With three CPUs, for the tests of one file."""
    with ray_head("--num-cpus=3") as started:
        yield started


@pytest.fixture
def cloud() -> Iterator[Head]:
    """An autoscaling cluster of up to two machines with one CPU."""
    with autoscaling_head({"resources": {"CPU": 1, "object_store_memory": 80_000_000}, "max_workers": 2}) as started:
        yield started


@pytest.fixture
def cloud_sold_out() -> Iterator[Head]:
    with autoscaling_head({"resources": {"CPU": 1}, "max_workers": 2}, sold_out=True) as started:
        yield started


@pytest.fixture
def head_with_token() -> Iterator[tuple[Head, str]]:
    token = "0123456789abcdef" * 4
    with ray_head("--num-cpus=1", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token) as started:
        yield started, token
