"""The batch script is run: Slurm's two commands are stand-ins that start on this machine, Ray is real."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tidegate.cluster import load_cluster, render

SCONTROL = "#!/bin/bash\nprintf '127.0.0.1\\nlocalhost\\n'\n"
SRUN = """#!/bin/bash
echo "srun $*" >>"$0.log"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
# In place of training: what it is told, and whether it sees both nodes.
TIDEGATE = f"""#!{sys.executable}
import os, sys, time, ray
ray.init(address=sys.argv[-1], logging_level="ERROR", log_to_driver=False)
until = time.monotonic() + 60
while len(alive := [node for node in ray.nodes() if node["Alive"]]) < 2 and time.monotonic() < until:
    time.sleep(0.2)
print("NODES", len(alive), "CPU", ray.cluster_resources()["CPU"], *sys.argv[1:-1], flush=True)
print("TOKEN", oct(os.stat(os.environ["RAY_AUTH_TOKEN_PATH"]).st_mode & 0o777), flush=True)
ray.shutdown()
if "wait" in sys.argv:
    time.sleep(600)
"""


@pytest.fixture
def slurm(tmp_path):
    """Environment and script of a job of two nodes; at the end none of its processes is left."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("tidegate", TIDEGATE)):
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    cpus = ["pools.gpu.gpu=null", "pools.gpu.gpus=0", "pools.gpu.cpus=1"]
    overrides = [*cpus, "provider.partition=x", "setup=[]", f"storage.path={tmp_path}"]
    script = tmp_path / "job.sh"
    script.write_text(render(load_cluster("slurm", overrides, nodes=2), tmp_path))
    job_id = str(os.getpid())  # names the session's folder and the port
    bins = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {
        "PATH": bins,
        "SLURM_JOB_ID": job_id,
        "SLURM_JOB_NODELIST": "n[1-2]",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # there is nothing to move away
    }
    yield script, environment, folder
    for process in of_job(job_id):
        process.kill()
    shutil.rmtree(f"/tmp/tidegate-{job_id}", ignore_errors=True)


@pytest.fixture
def start():
    jobs = []

    def run(script, environment, log):
        with log.open("w") as out:
            command = ["bash", str(script), "jobs/h100.yaml", "wait"]
            jobs.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
        return jobs[-1]

    yield run
    for job in jobs:
        job.terminate()
        try:
            job.wait(timeout=30)
        except subprocess.TimeoutExpired:
            job.kill()
            job.wait()


def of_job(job_id):
    found = []
    for process in psutil.process_iter():
        try:
            if f"/tmp/tidegate-{job_id}" in " ".join(process.cmdline()) and process.status() != "zombie":
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_a_batch_job_is_a_cluster_that_ends_with_its_run(slurm, start, tmp_path):
    script, environment, folder = slurm
    log = tmp_path / "log"
    job = start(script, environment, log)
    until = time.monotonic() + 150
    while "TOKEN 0o" not in log.read_text() and job.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    assert "NODES 2 CPU 2.0 train jobs/h100.yaml wait --address" in log.read_text(), log.read_text()
    assert "TOKEN 0o600" in log.read_text()
    assert of_job(environment["SLURM_JOB_ID"])
    job.send_signal(signal.SIGTERM)  # as Slurm sends it before the time limit
    assert job.wait(timeout=60) == 143, log.read_text()
    assert of_job(environment["SLURM_JOB_ID"]) == []
    assert not list((tmp_path / "state" / "clusters").iterdir()), "the token is gone"
    steps = (folder / "srun.log").read_text()
    assert "--nodes=1 --ntasks=1 --nodelist=127.0.0.1 ray start --head" in steps
    assert "--nodes=1 --ntasks=1 --exclude=127.0.0.1 ray start --block" in steps
    assert "--nodes=1 --ntasks=1 --nodelist=127.0.0.1 tidegate train" in steps


def test_another_ray_is_refused_before_it_starts(slurm):
    script, environment, folder = slurm
    (folder / "ray").write_text("#!/bin/bash\necho ray, version 2.0.0\n")
    (folder / "ray").chmod(stat.S_IRWXU)
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "is needed on every node, found: ray, version 2.0.0" in done.stderr
    assert not (folder / "srun.log").exists()
