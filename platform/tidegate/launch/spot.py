"""The clouds' warnings that a spot machine will be taken away, passed on to Ray, which tells every worker.

Ray learns of machines that drain, and drains one itself at SIGTERM, but asks no cloud's metadata server. Here a worker
of each machine does, while it trains: AWS warns two minutes before, GCP and Azure half a minute.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import Literal

import ray
import ray.train

from tidegate.launch.elastic import notice

__all__ = ["Cloud", "drain_this_node", "watch", "watch_cloud", "will_be_taken"]

Cloud = Literal["aws", "gcp", "azure"]
_SERVERS: dict[Cloud, str] = {
    "aws": "http://169.254.169.254",
    "gcp": "http://metadata.google.internal",
    "azure": "http://169.254.169.254",
}
_LEFT_S: dict[Cloud, int] = {"aws": 110, "gcp": 25, "azure": 25}
"""From a warning until the machine goes, less what passing it on takes."""
_INTERVAL_S, _TIMEOUT_S = 5.0, 2.0


@contextmanager
def watch_cloud(cloud: Cloud | Literal["none"]) -> Iterator[None]:
    """Ask the cloud while the context lasts, from one worker of each machine; at a warning, Ray drains the machine."""
    if cloud == "none" or ray.train.get_context().get_local_rank() != 0:
        yield
        return

    def warned() -> None:
        notice()  # the workers end after their step, whatever Ray does
        drain_this_node(_LEFT_S[cloud])

    with watch(cloud, warned):
        yield


@contextmanager
def watch(
    cloud: Cloud, warned: Callable[[], None], server: str | None = None, every_s: float = _INTERVAL_S
) -> Iterator[None]:
    """Call `warned` once, in a thread, when the machine will be taken away. A silent server is asked again."""
    done = threading.Event()

    def ask() -> None:
        while not done.wait(every_s):
            try:
                taken = will_be_taken(cloud, server or _SERVERS[cloud])
            except (OSError, ValueError, LookupError, HTTPException):
                continue
            if taken:
                warned()
                return

    thread = threading.Thread(target=ask, name="tidegate-spot", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def will_be_taken(cloud: Cloud, server: str) -> bool:
    """Whether the machine's metadata server says so.

    Raises:
        OSError, HTTPException: it does not answer.
        ValueError, LookupError: not as documented.
    """
    if cloud == "aws":  # docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
        lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
        token = _read(f"{server}/latest/api/token", lifetime, method="PUT")
        try:
            action = _read(f"{server}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
        except urllib.error.HTTPError as error:
            if error.code == 404:  # nothing is planned
                return False
            raise
        return json.loads(action)["action"] in ("terminate", "stop", "hibernate")
    if cloud == "gcp":  # docs.cloud.google.com/compute/docs/instances/create-use-spot
        return _read(f"{server}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}) == "TRUE"
    # learn.microsoft.com/azure/virtual-machines/linux/scheduled-events; it lists the events of neighbours, too
    known = {"Metadata": "true"}
    events = json.loads(_read(f"{server}/metadata/scheduledevents?api-version=2020-07-01", known))["Events"]
    preempted = [event for event in events if event["EventType"] == "Preempt"]
    if not preempted:
        return False
    name = _read(f"{server}/metadata/instance/compute/name?api-version=2021-02-01&format=text", known)
    return any(name in event["Resources"] for event in preempted)


def drain_this_node(left_s: int) -> None:
    """Tell Ray that this worker's machine goes in so many seconds: no new worker starts there, and all hear of it."""
    context = ray.get_runtime_context()
    drain = ["drain-node", "--address", context.gcs_address, "--node-id", context.get_node_id()]
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the cloud takes the machine away"]
    deadline = ["--deadline-remaining-seconds", str(left_s)]
    subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *drain, *why, *deadline], check=True, timeout=60)


def _read(url: str, headers: dict[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        return answer.read().decode().strip()
