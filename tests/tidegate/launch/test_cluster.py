"""`tidegate cluster up | down | status`: what is looked at before, and that no node stays where a start fails."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tidegate.config import ConfigError
from tidegate.launch import cluster as launch
from tidegate.launch.state import StateDir

ROOT = Path(__file__).resolve().parents[3]
FILLED = ["image=r/tidegate:1", "provider.claim=shared"]
# Stands for kubectl, which has no cluster here: it logs what it is told, and fails or hangs at the words of a file.
KUBECTL = """#!/bin/bash
echo "$*" >>"$0.log"
if grep -qx "$1" "$0.hang" 2>/dev/null; then exec sleep 60; fi
if grep -qx "$1" "$0.fail" 2>/dev/null; then echo "error: You must be logged in" >&2; exit 1; fi
"""


def program(folder, name, text):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(stat.S_IRWXU)
    return path


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return program(tmp_path / "bin", "kubectl", KUBECTL)


@pytest.fixture
def state(tmp_path):
    return StateDir(tmp_path / "state")


def said_to(kubectl):
    log = Path(f"{kubectl}.log")
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def make(kubectl, verb, problem):
    Path(f"{kubectl}.{problem}").write_text(f"{verb}\n")


def up(state, *overrides, timeout_s=30.0):
    return launch.cluster_up("kuberay", [*FILLED, *overrides], 1, None, state, timeout_s)


def test_a_cluster_is_remembered_and_goes_by_what_was_stored(kubectl, state, monkeypatch, tmp_path):
    assert up(state)
    folder = state.root / "clusters" / "kuberay"
    token = folder / "ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) == 64
    before = token.read_text()
    assert up(state, "pools.gpu.max_nodes=3")  # a change of one that runs
    assert token.read_text() == before
    assert "maxReplicas: 3" in (folder / "cluster.yaml").read_text()
    assert launch.cluster_status("kuberay", state)
    monkeypatch.chdir(tmp_path)  # where there is no cluster/
    assert launch.cluster_down("kuberay", state, 30)
    assert said_to(kubectl) == ["get", "apply", "wait", "get", "apply", "wait", "get", "delete"]
    assert not folder.exists()
    with pytest.raises(ConfigError, match=r"kuberay: no such cluster in .*; started from here: none"):
        launch.cluster_down("kuberay", state, 30)


def test_what_is_not_filled_in_is_asked_for_before_anything_runs(kubectl, state):
    with pytest.raises(ConfigError, match=r"--set image=\.\.\. --set provider\.claim=\.\.\."):
        launch.cluster_up("kuberay", [], 1, None, state, 30)
    assert said_to(kubectl) == []


def test_a_missing_program_is_named(tmp_path, state, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"provider\.kind=kubernetes needs kubectl on this machine's PATH"):
        up(state)


def test_wrong_credentials_are_said_before_anything_starts(kubectl, state):
    make(kubectl, "get", "fail")
    with pytest.raises(ConfigError, match=r"kubectl is refused \(error: You must be logged in\)"):
        up(state)
    assert said_to(kubectl) == ["get"]
    assert not (state.root / "clusters").exists()


def test_a_provider_that_does_not_answer_takes_bounded_time(kubectl, state, monkeypatch):
    monkeypatch.setattr(launch, "_PROBE_S", 0.3)
    make(kubectl, "get", "hang")
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"no answer in 0\.3 s"):
        up(state)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("verb", ["apply", "wait"])
@pytest.mark.parametrize("problem", ["fail", "hang"])
def test_what_does_not_start_is_taken_down(kubectl, state, capsys, verb, problem):
    make(kubectl, verb, problem)
    assert not up(state, timeout_s=3 if problem == "hang" else 30)
    assert said_to(kubectl)[-2:] == [verb, "delete"]
    assert "did not start; what was there of it is taken down" in capsys.readouterr().out
    assert not (state.root / "clusters" / "kuberay").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_takes_down_as_ctrl_c_does(kubectl, state, number):
    make(kubectl, "wait", "hang")
    before, streams = signal.getsignal(number), [os.dup(1), os.dup(2)]

    def send():
        while "wait" not in said_to(kubectl):
            time.sleep(0.05)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # as systemd sends two; the second does not end the taking down

    sender = threading.Thread(target=send)
    sender.start()
    try:
        assert not up(state)
    finally:
        sender.join()
        for stream, kept in enumerate(streams, 1):
            os.dup2(kept, stream)
            os.close(kept)
    assert said_to(kubectl)[-1] == "delete"
    assert signal.getsignal(number) == before


def test_up_waits_until_nodes_are_ready_or_the_job_has_begun(kubectl, state):
    assert up(state)
    assert launch.cluster_down("kuberay", state, 30)
    assert launch.cluster_up("kuberay", FILLED, 1, Path("jobs/h100.yaml"), state, 30)
    waits = [line for line in Path(f"{kubectl}.log").read_text().splitlines() if line.startswith("wait")]
    assert [wait.split()[1] for wait in waits] == ["raycluster/kuberay", "rayjob/kuberay"]
    assert "--for=jsonpath={.status.state}=ready" in waits[0]
    assert "--for=jsonpath={.status.jobDeploymentStatus}=Running" in waits[1]
    with pytest.raises(ConfigError, match="kuberay is started, and a RayJob is not changed; first tidegate"):
        up(state)


def test_another_place_is_refused_while_one_is_started(kubectl, state):
    assert up(state)
    stored = (state.root / "clusters" / "kuberay" / "cluster.json").read_text()
    with pytest.raises(ConfigError, match=r"provider\.namespace=lab: a cluster kuberay was started with default"):
        up(state, "provider.namespace=lab")
    with pytest.raises(ConfigError, match=r"provider\.kind=slurm: a cluster kuberay was started with kubernetes"):
        launch.cluster_up("slurm", ["name=kuberay", "provider.partition=gpu"], 1, None, state, 30)
    assert (state.root / "clusters" / "kuberay" / "cluster.json").read_text() == stored
    assert said_to(kubectl) == ["get", "apply", "wait"]


def test_slurm_gets_a_cluster_once(tmp_path, state, monkeypatch):
    for name in ("sbatch", "scancel", "squeue"):
        path = program(tmp_path / "bin", name, '#!/bin/bash\necho "$*" >>"$0.log"\n')
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def submit():
        filled = ["image=r/tidegate:1", "provider.partition=gpu"]
        return launch.cluster_up("slurm", filled, 2, None, state, 30)

    assert submit()
    path.write_text("#!/bin/bash\necho '  77 gpu slurm PD'\n")
    with pytest.raises(ConfigError, match=r"slurm waits or runs in Slurm already \(77 gpu slurm PD\); end it first"):
        submit()
    assert len((tmp_path / "bin" / "sbatch.log").read_text().splitlines()) == 1


def test_what_cannot_be_taken_down_is_said_with_the_command(kubectl, state, capsys):
    make(kubectl, "apply", "fail")
    Path(f"{kubectl}.fail").write_text("apply\ndelete\n")
    assert not up(state)
    assert "nodes may run and cost money. Run tidegate cluster down kuberay" in capsys.readouterr().out
    Path(f"{kubectl}.fail").write_text("")
    assert launch.cluster_down("kuberay", state, 30), "it still knows how"


def test_a_change_that_fails_leaves_a_running_cluster(kubectl, state, capsys):
    assert up(state)
    make(kubectl, "apply", "fail")
    assert not up(state)
    assert "delete" not in said_to(kubectl)
    assert "left as it is; end it: tidegate cluster down kuberay" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../kuberay", "", "kuberay/../kuberay", "x"])
def test_names_are_no_paths(kubectl, state, name):
    assert up(state)
    with pytest.raises(ConfigError, match=r"no such cluster in .*started from here: kuberay"):
        launch.cluster_down(name, state, 30)


# --- Ray's launcher, really, on this machine as its only host --------------------------------------------------

# Ray's launcher goes by ssh and rsync; these do here what they are told. `ray stop` would end every Ray of the machine.
SSH = f"""#!{sys.executable}
import os, sys
import psutil
arguments = sys.argv[1:]
at = next(n for n, argument in enumerate(arguments) if argument.startswith("tester@"))
command = " ".join(arguments[at + 1 :])
with open(os.environ["CLUSTER_TEST_HOME"] + "/ssh.log", "a") as log:
    print(command, file=log)
home = os.environ["CLUSTER_TEST_HOME"]
node = home + arguments[at]
if "ray stop" in command:
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("CLUSTER_TEST_NODE") == node:
                process.kill()
        except psutil.Error:
            pass
    sys.exit(0)
os.environ.update(HOME=home, CLUSTER_TEST_NODE=node)
os.execvp("bash", ["bash", "-c", command])
"""
RSYNC = f"""#!{sys.executable}
import os, shutil, sys
source, target = sys.argv[-2:]
target = target.split(":", 1)[1].replace("~", os.environ["CLUSTER_TEST_HOME"])
if os.path.exists(target) and os.path.samefile(source, target):
    pass  # from the head to a worker: the same machine
elif os.path.isdir(source):
    shutil.copytree(source, target, dirs_exist_ok=True)
else:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    shutil.copy2(source, target)
"""


def of_node(home):
    found = []
    for process in psutil.process_iter():
        try:
            there = process.environ().get("CLUSTER_TEST_NODE", "").startswith(str(home))
            if there and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def host(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    (home / ".bashrc").touch()
    program(tmp_path / "bin", "ssh", SSH)
    program(tmp_path / "bin", "rsync", RSYNC)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CLUSTER_TEST_HOME", str(home))
    yield home
    for process in of_node(home):
        process.kill()
    for left in Path("/tmp/ray").glob(f"cluster-hosts{os.getpid()}*"):
        left.unlink()


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.ray
@pytest.mark.slow
def test_rays_launcher_starts_a_host_and_ends_it(host, state, tmp_path, capfd):
    name = f"hosts{os.getpid()}"
    path = f"{Path(sys.executable).parent}:{tmp_path / 'bin'}"
    overrides = [
        f"name={name}",
        "image=null",
        f"setup=['export PATH={path}:$PATH']",
        f"storage.path={tmp_path}/shared",
        "pools.gpu={gpu: null, gpus: 0, cpus: 1, memory_gib: 1, min_nodes: 1, max_nodes: 1}",
        f"provider={{kind: hosts, head: 127.0.0.1, workers: [127.0.0.2], ssh_user: tester, port: {free_port()}}}",
    ]
    assert launch.cluster_up("on-prem", overrides, None, None, state, 120), capfd.readouterr()
    assert (host / ".ray" / "auth_token").read_text() == (
        state.root / "clusters" / name / "ray" / "auth_token"
    ).read_text()
    assert of_node(host)
    until = time.monotonic() + 90
    worker = "ray start --address=$RAY_HEAD_IP:"
    while worker not in (host / "ssh.log").read_text() and time.monotonic() < until:
        time.sleep(0.2)
    assert worker in (host / "ssh.log").read_text(), "the head starts the worker that should always be there"
    assert launch.cluster_status(name, state)
    assert "Active:" in capfd.readouterr().out
    assert launch.cluster_down(name, state, 120)
    assert of_node(host) == []
    assert shutil.which("ray", path=path)
