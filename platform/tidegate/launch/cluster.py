"""`tidegate cluster`: render a cluster's file, start the cluster with it, look at it, and take it down again.

<state>/clusters/<name>/
  cluster.json        the resolved cluster, for `down` and `status`
  cluster.yaml|.sh    what Ray's launcher, kubectl or sbatch read
  ray/auth_token      the cluster's token, for Ray's launcher
  up                  it is there once the cluster was started
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tidegate.cluster import Cluster, load_cluster, render
from tidegate.cluster.config import Aws, Azure, Gcp, Hosts, Kubernetes, Slurm
from tidegate.config import ConfigError, load_stored
from tidegate.launch.state import StateDir, write_whole

__all__ = ["cluster_down", "cluster_status", "cluster_up", "render_cluster"]

_PROBE_S = 30
_RAY = (sys.executable, "-m", "ray.scripts.scripts")


class _Tool(NamedTuple):
    """How a provider is spoken to."""

    up: Sequence[Sequence[str]]
    """One after the other, until one fails."""
    down: Sequence[Sequence[str]]
    """One after the other, whatever fails."""
    status: Sequence[str]
    needs: Sequence[str]
    """Programs."""
    modules: Sequence[str]
    """Python packages that Ray's launcher imports."""
    probe: Sequence[str]
    """A command that succeeds with working credentials; its output is not shown, as it may hold them."""
    login: str
    """What to do if it fails."""


class _Folder:
    """Where a cluster is remembered."""

    def __init__(self, state: StateDir, name: str) -> None:
        self.path = state.root / "clusters" / name
        self.resolved, self.started = self.path / "cluster.json", self.path / "up"
        self.auth = self.path / "ray"

    def file(self, cluster: Cluster) -> Path:
        return self.path / ("cluster.sh" if isinstance(cluster.provider, Slurm) else "cluster.yaml")

    def holds_a_job(self, cluster: Cluster) -> bool:
        """Whether what was rendered is a RayJob."""
        return "kind: RayJob" in self.file(cluster).read_text(encoding="utf-8").splitlines()

    def write(self, cluster: Cluster, job: Path | None) -> Path:
        self.auth.mkdir(parents=True, exist_ok=True, mode=0o700)
        token = self.auth / "auth_token"
        if not token.exists():
            with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
                file.write(secrets.token_hex(32))
        file_path = self.file(cluster)
        write_whole(file_path, render(cluster, self.auth, job))
        write_whole(self.resolved, cluster.model_dump_json(indent=2))
        return file_path


def render_cluster(
    name: str, overrides: Sequence[str], nodes: int | None, job: Path | None, out: Path | None, state_root: Path
) -> None:
    """Print a cluster's file or write it to `out`; on standard error, what only the account's owner knows.

    Raises:
        ConfigError: the cluster or the job is wrong, or does not fit.
    """
    cluster = load_cluster(name, overrides, nodes)
    text = render(cluster, state_root / "clusters" / cluster.name / "ray", job)
    if out is None:
        print(text, end="")
    else:
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--out {out}: cannot be written ({error})") from error
    if cluster.to_fill_in:
        print(f"{name}: change-me still stands in {', '.join(cluster.to_fill_in)}", file=sys.stderr)


def cluster_up(
    name: str, overrides: Sequence[str], nodes: int | None, job: Path | None, state: StateDir, timeout_s: float
) -> bool:
    """Start a cluster, or bring one that runs to what its file says now.

    Everything that can be known to fail is looked at before; a start that fails is taken down again.

    Returns:
        Whether it runs.

    Raises:
        ConfigError: the file is wrong or unfinished, a program is missing, credentials do not work, or a cluster of
            this name was started elsewhere.
    """
    cluster = load_cluster(name, overrides, nodes)
    if cluster.to_fill_in:
        fields = " ".join(f"--set {field}=..." for field in cluster.to_fill_in)
        raise ConfigError(f"{name}: change-me is not a value; write a file that extends it, or add {fields}")
    folder = _Folder(state, cluster.name)
    tool = _tool(cluster, folder.file(cluster), job is not None)
    if folder.resolved.exists():
        _refuse_another(cluster, job, *_started(cluster.name, state))
    _check_tool(cluster, tool)
    if isinstance(cluster.provider, Slurm):
        _refuse_second(cluster, tool)
    running = folder.started.exists()
    with _signals_as_ctrl_c():
        folder.write(cluster, job)
        if _run_until_one_fails(tool.up, timeout_s):
            folder.started.touch()
            print(_next(cluster, folder))
            return True
        return _not_up(cluster, folder, tool, running, timeout_s)


def _not_up(cluster: Cluster, folder: _Folder, tool: _Tool, running: bool, timeout_s: float) -> bool:
    """Take down what a failed start left, and say so; False."""
    if running:
        print(f"the cluster {cluster.name} was there before and is left as it is; end it: {_down(cluster.name)}")
    elif _run_all(tool.down, timeout_s):
        shutil.rmtree(folder.path)
        print(f"the cluster {cluster.name} did not start; what was there of it is taken down")
    else:
        print(
            f"the cluster {cluster.name} did not start and could not be taken down: nodes may run and cost money. Run "
            f"{_down(cluster.name)}, and look at the console of {cluster.provider.kind}"
        )
    return False


def cluster_down(name: str, state: StateDir, timeout_s: float) -> bool:
    """Take a cluster down by what was stored when it was started, whatever its file says now.

    Returns:
        Whether nothing of it is left.
    """
    cluster, folder = _started(name, state)
    if not _run_all(_tool(cluster, folder.file(cluster)).down, timeout_s):
        print(f"the cluster {name} could not be taken down: nodes may run and cost money; run {_down(name)} again")
        return False
    shutil.rmtree(folder.path)
    return True


def cluster_status(name: str, state: StateDir) -> bool:
    """Show what runs of a cluster.

    Returns:
        Whether it answers.
    """
    cluster, folder = _started(name, state)
    return _run(_tool(cluster, folder.file(cluster)).status, 2 * _PROBE_S)


_PLACES = {
    "aws": ("region",),
    "gcp": ("project", "region", "zone"),
    "azure": ("location", "resource_group"),
    "hosts": ("head", "workers", "ssh_user"),
    "kubernetes": ("namespace",),
    "slurm": (),
}
"""Fields of a provider by which `down` finds what runs."""


def _refuse_another(cluster: Cluster, job: Path | None, there: Cluster, folder: _Folder) -> None:
    """Raise ConfigError where a cluster of this name was started that `down` would not find after this."""
    if isinstance(there.provider, Kubernetes) and (job or folder.holds_a_job(there)):
        raise ConfigError(f"{cluster.name} is started, and a RayJob is not changed; first {_down(cluster.name)}")
    fields = ("kind", *_PLACES[there.provider.kind])
    for field in fields:
        was, now = getattr(there.provider, field), getattr(cluster.provider, field, None)
        if was != now:
            raise ConfigError(
                f"provider.{field}={now}: a cluster {cluster.name} was started with {was}; first run "
                f"{_down(cluster.name)}, or take another name with --set name=..."
            )


def _refuse_second(cluster: Cluster, tool: _Tool) -> None:
    """Raise ConfigError where Slurm has the job already: it would run twice."""
    command = [*tool.status, "--noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_PROBE_S).stdout.strip()
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"squeue does not say whether {cluster.name} is there already ({error})") from error
    if listed:
        raise ConfigError(
            f"{cluster.name} waits or runs in Slurm already ({' '.join(listed.split())}); end it first: "
            f"{_down(cluster.name)}"
        )


@contextlib.contextmanager
def _signals_as_ctrl_c() -> Iterator[None]:
    """SIGTERM and SIGHUP end what is in here as Ctrl-C does, once; where they are ignored they stay so."""
    signals = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]

    def end(number: int, frame: object) -> None:
        for each in signals:  # what is done at the first one is not cut short by the next
            signal.signal(each, lambda number, frame: None)
        if number == signal.SIGHUP:  # the terminal is gone: what is said would fail
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(nowhere, stream)
            os.close(nowhere)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _started(name: str, state: StateDir) -> tuple[Cluster, _Folder]:
    known = sorted(path.parent.name for path in (state.root / "clusters").glob("*/cluster.json"))
    if name not in known:  # `../x` would lead out of the state directory
        raise ConfigError(f"{name}: no such cluster in {state.root}; started from here: {', '.join(known) or 'none'}")
    folder = _Folder(state, name)
    return load_stored(folder.resolved.read_text(encoding="utf-8"), Cluster, str(folder.resolved)), folder


# --- providers -----------------------------------------------------------------------------------------------


def _tool(cluster: Cluster, file: Path, job: bool = False) -> _Tool:
    provider = cluster.provider
    if isinstance(provider, Kubernetes):
        space = ("--namespace", provider.namespace)
        return _Tool(
            up=[("kubectl", "apply", "-f", str(file)), *_kubernetes_wait(cluster.name, provider, job)],
            down=[("kubectl", "delete", "--ignore-not-found", "-f", str(file))],
            status=("kubectl", "get", "rayclusters,rayjobs,pods", *space),
            needs=("kubectl",),
            modules=(),
            probe=("kubectl", "get", "rayclusters", *space, f"--request-timeout={_PROBE_S // 2}s"),
            login="kubectl must reach a cluster with KubeRay's operator: cluster/README.md",
        )
    if isinstance(provider, Slurm):
        return _Tool(
            up=[("sbatch", str(file))],
            down=[("scancel", "--me", f"--name={cluster.name}")],
            status=("squeue", "--me", f"--name={cluster.name}"),
            needs=("sbatch", "scancel", "squeue"),
            modules=(),
            probe=("squeue", "--me"),
            login="run it where sbatch works",
        )
    status = " && ".join([*cluster.setup, "RAY_AUTH_MODE=token ray status"])
    needs, modules, probe, login = _LAUNCHER_NEEDS[provider.kind](provider)
    # Ray's newer autoscaler counts the head as one of the hosts: of N that should always be there it starts N - 1.
    older = ("env", "RAY_UP_enable_autoscaler_v2=0") if isinstance(provider, Hosts) else ()
    return _Tool(
        up=[(*older, *_RAY, "up", "-y", "--no-config-cache", str(file))],
        down=_launcher_down(cluster, file),
        status=(*_RAY, "exec", str(file), status),
        needs=("ssh", "rsync", *needs),
        modules=modules,
        probe=probe,
        login=login,
    )


def _kubernetes_wait(name: str, provider: Kubernetes, job: bool) -> list[Sequence[str]]:
    """Until the nodes to begin with are there, or the job has begun; a queue admits it when it does."""
    if provider.queue:
        return []
    kind, field = ("rayjob", "jobDeploymentStatus}=Running") if job else ("raycluster", "state}=ready")
    wait = ("kubectl", "wait", f"{kind}/{name}", "--namespace", provider.namespace)
    return [(*wait, f"--for=jsonpath={{.status.{field}", "--timeout=-1s")]  # for a week; `_run` ends it


_Needs = tuple[Sequence[str], Sequence[str], Sequence[str], str]


def _aws(provider: Aws) -> _Needs:
    return ["aws"], ["boto3"], ["aws", "sts", "get-caller-identity"], "log in with `aws configure` or `aws sso login`"


def _gcp(provider: Gcp) -> _Needs:
    probe = ["gcloud", "auth", "application-default", "print-access-token", "--project", provider.project]
    return ["gcloud"], ["googleapiclient"], probe, "log in with `gcloud auth application-default login`"


def _azure(provider: Azure) -> _Needs:
    modules = ["azure.identity", "azure.mgmt.compute", "azure.mgmt.network", "azure.mgmt.resource"]
    return ["az"], modules, ["az", "account", "show"], "log in with `az login`"


def _hosts(provider: Hosts) -> _Needs:
    return [], [], _ssh(provider, provider.head, "true"), "the head must take your SSH key without a question"


def _ssh(provider: Hosts, host: str, command: str) -> list[str]:
    key = ["-i", provider.ssh_private_key] if provider.ssh_private_key else []
    options = ["-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=accept-new", "-o", "ConnectTimeout=15"]
    return ["ssh", *key, *options, f"{provider.ssh_user}@{host}", command]


def _launcher_down(cluster: Cluster, file: Path) -> list[Sequence[str]]:
    down = (*_RAY, "down", "-y", str(file))
    provider = cluster.provider
    if not isinstance(provider, Hosts) or cluster.image:
        return [down]
    # Without containers `ray down` calls a bare `ray stop`, and on the head alone.
    stop = " && ".join([*cluster.setup, "ray stop"])
    workers = [_ssh(provider, host, stop) for host in provider.workers]
    return [_ssh(provider, provider.head, stop), down, *workers]


_LAUNCHER_NEEDS: dict[str, Callable[[Any], _Needs]] = {"aws": _aws, "gcp": _gcp, "azure": _azure, "hosts": _hosts}


def _check_tool(cluster: Cluster, tool: _Tool) -> None:
    kind = cluster.provider.kind
    missing = [program for program in tool.needs if shutil.which(program) is None]
    if missing:
        raise ConfigError(f"provider.kind={kind} needs {', '.join(missing)} on this machine's PATH")
    absent = [module for module in tool.modules if not _importable(module)]
    if absent:
        raise ConfigError(f"provider.kind={kind}: Ray's launcher needs the Python packages {', '.join(absent)}")
    try:
        done = subprocess.run(tool.probe, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_PROBE_S)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{tool.probe[0]}: no answer in {_PROBE_S} s; {tool.login}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ConfigError(f"{tool.probe[0]} is refused ({said[0]}); {tool.login}")


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def _run_all(commands: Sequence[Sequence[str]], timeout_s: float) -> bool:
    """Run each, whatever became of the others; True if none failed."""
    worked = [_run(command, timeout_s) for command in commands]
    return all(worked)


def _run_until_one_fails(commands: Sequence[Sequence[str]], timeout_s: float) -> bool:
    """Run one after the other, for `timeout_s` in all; False where one failed."""
    until = time.monotonic() + timeout_s
    return all(_run(command, max(until - time.monotonic(), 0.0)) for command in commands)


def _run(command: Sequence[str], timeout_s: float) -> bool:
    """Run with the output shown; False if it failed, took too long or was interrupted."""
    shown = shlex.join(command[1:] if command[0] == sys.executable else command)
    print(f"+ {shown}", flush=True)
    try:
        status = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=timeout_s).returncode
    except subprocess.TimeoutExpired:
        print(f"no end after {timeout_s:.0f} s: {shown}")
        return False
    except (KeyboardInterrupt, SystemExit):  # of `_signals_as_ctrl_c`
        print(f"interrupted: {shown}")
        return False
    if status:
        print(f"exit status {status}: {shown}")
    return status == 0


def _next(cluster: Cluster, folder: _Folder) -> str:
    file = folder.file(cluster)
    if isinstance(cluster.provider, Kubernetes):
        return f"look at it: tidegate cluster status {cluster.name}; end it: {_down(cluster.name)}"
    if isinstance(cluster.provider, Slurm):
        return f"the job waits or runs: tidegate cluster status {cluster.name}; end it: {_down(cluster.name)}"
    return (
        f"reach its dashboard on http://127.0.0.1:8265, while this runs: ray dashboard {file}\n"
        f"there: export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={folder.auth / 'auth_token'}\n"
        f"train: tidegate submit JOB --address http://127.0.0.1:8265\n"
        f"end it: {_down(cluster.name)}"
    )


def _down(name: str) -> str:
    return f"tidegate cluster down {name}"
