"""The Ray that Tidegate starts: only this machine reaches it, and only with its token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ray._private import ray_constants

from tidegate.launch import ray_train

_STARTED = """
import json, os, pathlib, subprocess, sys, urllib.error, urllib.request
import psutil, ray
from tidegate.config import load
from tidegate.launch.doctor import _jobs_api
from tidegate.launch.ray_train import connect
from tidegate.train.job import Job

connect(None, load(sys.argv[1], Job).config)
token = ray.remote(lambda: os.environ.get("RAY_AUTH_TOKEN"))  # a worker's own calls need it, too
in_worker = ray.get(token.remote())
info = ray._private.worker._global_node.address_info
me = psutil.Process()
listening = [
    (process.name(), connection.laddr.ip)
    for process in [me, *me.children(recursive=True)]
    for connection in process.net_connections()
    if connection.status == psutil.CONN_LISTEN
]

def answers(headers):
    request = urllib.request.Request(f"http://{info['webui_url']}/api/jobs/", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code

def ask_gcs(token):
    command = [sys.executable, "-c", sys.argv[2], info["gcs_address"]]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"RAY_AUTH_TOKEN": token}).stdout

def holds_token(path):
    return path.is_file() and os.environ["RAY_AUTH_TOKEN"].encode() in path.read_bytes()

json.dump({
    "written": [str(path) for path in pathlib.Path(info["session_dir"]).rglob("*") if holds_token(path)],
    "listening": listening,
    "gcs": info["gcs_address"],
    "stranger": answers({}),
    "wrong": answers({"Authorization": "Bearer " + "0" * 64}),
    "owner": answers({"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}),
    "doctor": _jobs_api(f"http://{info['webui_url']}"),
    "token": os.environ["RAY_AUTH_TOKEN"],
    "in_worker": in_worker,
    "gcs_with_token": ask_gcs(os.environ["RAY_AUTH_TOKEN"]),
    "gcs_without": ask_gcs("0" * 64),
}, open("found.json", "w"))
ray.shutdown()
"""

_ASK_GCS = """
import sys
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None, timeout=10)
    print("answers")
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_only_this_machine_reaches_a_local_ray_and_only_with_its_token(
    tiny_job: Callable[..., Path], tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-c", _STARTED, str(tiny_job()), _ASK_GCS]
    environment["HOME"] = str(tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("auth_token")), "a token in the home folder is every Ray's"
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["written"] == []
    assert found["token"] not in done.stdout + done.stderr
    names = {name for name, _ in found["listening"]}
    assert {"gcs_server", "raylet"} <= names
    assert {ip.removeprefix("::ffff:") for _, ip in found["listening"]} == {"127.0.0.1"}, found["listening"]
    assert found["gcs"].startswith("127.0.0.1:")
    assert (found["stranger"], found["wrong"], found["owner"]) == (401, 403, 200)
    assert found["doctor"][0] == "ok"
    assert len(found["token"]) == 64
    assert found["in_worker"] == found["token"]
    assert found["gcs_with_token"] == "answers\n"
    assert found["gcs_without"].startswith("AuthenticationError")
    assert "InvalidAuthToken" in found["gcs_without"]


@pytest.mark.parametrize(
    ("mine", "token", "loopback"),
    [
        ({"RAY_AUTH_TOKEN": "mine"}, "mine", True),
        ({"RAY_AUTH_TOKEN_PATH": "/a/file"}, None, True),
        ({"RAY_AUTH_MODE": "disabled"}, None, True),
        ({"RAY_AUTH_TOKEN": "mine", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}, "mine", False),
    ],
)
def test_what_the_user_has_set_wins(
    monkeypatch: pytest.MonkeyPatch, mine: dict[str, str], token: str | None, loopback: bool
) -> None:
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    monkeypatch.setattr(os, "environ", dict(mine))
    ray_train._keep_to_this_machine()
    assert os.environ.get("RAY_AUTH_TOKEN") == token
    assert ray_constants.ENABLE_RAY_CLUSTER is not loopback


_BOARD_DIES = """
import contextlib, json, os, sys, time
import ray
from tidegate.config import load
from tidegate.launch.ray_train import _Board
from tidegate.train.job import Job
from tidegate.train.limits import Spent

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
board = _Board.options(num_cpus=0, max_restarts=-1).remote("tiny-1", "", load(sys.argv[1], Job).config, Spent())
spent = lambda: ray.get(board.drain.remote())[1]
process = lambda: ray.get(board.__ray_call__.remote(lambda board: os.getpid()))
ray.get(board.begin.remote(3))
before = again = process()
ray.kill(board, no_restart=False)
while again == before:
    with contextlib.suppress(ray.exceptions.RayActorError):
        again = process()  # the one that is killed may answer for a while
    time.sleep(0.2)
seen = [spent()]
ray.get(board.wish.remote(3, Spent(hours=1, gpu_hours=3, money=5)))
time.sleep(0.2)
seen.append(spent())
ray.get(board.wish.remote(3, Spent(hours=9, gpu_hours=27, money=45)))
seen.append(spent())
ray.get(board.workers_ended.remote())
seen.append(spent())
ray.get(board.wish.remote(3, Spent(hours=9, gpu_hours=27, money=45)))
seen.append(spent())
print(json.dumps([one.gpu_hours for one in seen]))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_board_that_died_learns_from_its_run_how_many_train_and_what_they_cost(tiny_job: Callable[..., Path]) -> None:
    command = [sys.executable, "-c", _BOARD_DIES, str(tiny_job())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    forgot, told, again, ended, late = json.loads(done.stdout.splitlines()[-1])
    assert forgot == 0
    assert 3 + 3 * 0.2 / 3600 <= told <= again < 4
    assert ended == late, "no worker trains any more"
