"""`tidegate submit`: a job file to a Ray cluster, where the same command runs that runs here.

What is sent is the packages and the job's YAML files, a few MB; data, checkpoints and the state directory stay where
they are. Before that, a small command on the head says what is installed and what can be seen there, so that a
mismatch ends here, in seconds, and not in a worker.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from platform import python_version
from typing import Any, NamedTuple

from packaging.requirements import Requirement

from tidegate.config import ConfigError, JobFile
from tidegate.data.config import TokenizerFile
from tidegate.launch import cluster_head
from tidegate.launch.ray_train import SHIPPED, forwarded_environment
from tidegate.launch.state import check_name
from tidegate.launch.submissions import STOP_WAIT_S, Cluster, Submission, follow
from tidegate.launch.versions import mismatches
from tidegate.train.job import Job

__all__ = ["Submit", "resume", "submit"]

_PROBE_TIMEOUT_S = 120.0


class Submit(NamedTuple):
    """What the command line asked for."""

    address: str | None
    overrides: Sequence[str] = ()
    name: str | None = None
    """Of the run; the job's by default."""
    state_dir: str | None = None
    """On the cluster, seen by all its nodes; by default TIDEGATE_STATE there."""
    job_dir: str | None = None
    """What `{job}` stands for on the cluster; by default the folder of the job file here."""
    wait: bool = False


def submit(job_file: Path, request: Submit) -> int:
    """Submit a job, or find that it runs already or has ended; returns an exit status.

    Raises:
        ConfigError: the job is wrong, or the cluster cannot run it as it would run here.
    """
    files = JobFile(job_file, request.overrides)
    job: Job = files.load(Job).config
    name = request.name or job.name
    check_name(name)
    cluster = Cluster(request.address)
    before = cluster.latest(name)
    if before is not None and before.status.name == "SUCCEEDED":
        print(f"{name} has ended already; go on with tidegate resume {name} --set ..., or take another --name")
        return 0
    if before is not None and before.running:
        print(f"{name} is {before.status.lower()} already; its logs: tidegate logs {name}")
        return follow(cluster, before.id) if request.wait else 0
    job_dir = request.job_dir or str(job_file.absolute().parent)
    state = _examine(cluster, request.state_dir, [*_read_paths(job, job_dir)])
    folder, sent = _pack(files.paths)
    try:
        arguments = [sent, "--name", name, "--job-dir", job_dir, *_as_flags(request.overrides)]
        return _start(cluster, name, before, state, arguments, request.wait, folder)
    finally:
        shutil.rmtree(folder)


def resume(name: str, request: Submit) -> int:
    """Submit a run again that stopped or failed: it goes on from its last checkpoint. Returns an exit status."""
    cluster = Cluster(request.address)
    before = cluster.known(name)
    if before.running:
        raise ConfigError(f"{name} is {before.status.lower()}; stop it first with: tidegate stop {name}")
    state = _examine(cluster, request.state_dir or before.state, [])
    arguments = ["--resume", name, *_as_flags(request.overrides)]
    return _start(cluster, name, before, state, arguments, request.wait)


def _start(
    cluster: Cluster,
    name: str,
    before: Submission | None,
    state: str,
    arguments: Sequence[str],
    wait: bool,
    folder: Path | None = None,
) -> int:
    command = ["python", "-m", "tidegate.cli", "train", *arguments, "--address", "auto", "--state-dir", state]
    settings = {
        "PYTHONUNBUFFERED": "1",
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
        "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # the driver there may add settings for its workers
    }
    runtime_env: dict[str, Any] = {
        "py_modules": list(SHIPPED),
        "excludes": ["__pycache__"],
        "env_vars": forwarded_environment(devices=False) | settings,
    }
    if folder is not None:
        runtime_env["working_dir"] = str(folder)
    submission = cluster.submit(name, before, state, shlex.join(command), runtime_env)
    print(f"submitted {name} to {cluster.address}; see it with: tidegate logs {name} --wait")
    return follow(cluster, submission) if wait else 0


def _as_flags(overrides: Sequence[str]) -> Iterator[str]:
    for override in overrides:
        yield from ("--set", override)


def _pack(paths: Sequence[Path]) -> tuple[Path, str]:
    """Copies of the job's files alone, in a new folder and as they stand to each other; and the job's name in it."""
    whole = [Path(os.path.normpath(path.absolute())) for path in paths]
    above = Path(os.path.commonpath([path.parent for path in whole]))
    folder = Path(tempfile.mkdtemp(prefix="tidegate-submit-"))
    for path in whole:
        copy = folder / path.relative_to(above)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return folder, whole[-1].relative_to(above).as_posix()


def _read_paths(job: Job, job_dir: str) -> Iterator[str]:
    """Globs of what the job reads from a file system, as the cluster's nodes name it."""
    paths = [path for domain in job.data.domains for path in domain.paths]
    paths += [job.data.tokenizer.path] if isinstance(job.data.tokenizer, TokenizerFile) else []
    paths += [path for path in (job.train.init_from, job.train.mask) if path is not None]
    for path in paths:
        if "://" not in path and "{stdlib}" not in path:
            yield path.replace("{job}", job_dir)


# --- what the cluster has ----------------------------------------------------------------------------------------


def _examine(cluster: Cluster, state_dir: str | None, paths: Sequence[str]) -> str:
    """The state directory to use there.

    Raises:
        ConfigError: versions differ, or what the job reads or writes cannot be seen.
    """
    here = _versions()
    wanted = {"packages": [*here], "paths": [*paths], "state": state_dir}
    command = shlex.join(["python", "-c", Path(cluster_head.__file__).read_text(encoding="utf-8"), json.dumps(wanted)])
    printed = cluster.ask(command, _PROBE_TIMEOUT_S)
    answer = re.search(f"^{cluster_head.MARK}(.*)$", printed, re.MULTILINE)
    if answer is None:
        raise ConfigError(f"--address {cluster.address}: the head answers with {printed[-300:]!r}")
    there = json.loads(answer[1])
    differ = [*mismatches(here, python_version(), there["packages"], there["python"])]
    if differ:
        raise ConfigError(
            f"--address {cluster.address}: the job would run with other versions there than here: {'; '.join(differ)}; "
            "install the cluster's here, or use an image with these"
        )
    if there["state"] is None:
        raise ConfigError("--state-dir: say where runs live on the cluster, or set TIDEGATE_STATE there")
    problems = [f"{there['state']} cannot be written"] * (not there["writable"])
    problems += [f"there is no {path}" for path in there["missing"]]
    if problems:
        raise ConfigError(
            f"--address {cluster.address}: on the head, {'; '.join(problems)} (--state-dir and --job-dir say where "
            "things are there)"
        )
    return str(there["state"])


def _versions() -> dict[str, str]:
    """Of all that Tidegate needs, as installed here."""
    requirements = map(Requirement, metadata.requires("tidegate") or [])
    names = [wanted.name for wanted in requirements if wanted.marker is None or wanted.marker.evaluate({"extra": ""})]
    return {name: metadata.version(name) for name in names}
