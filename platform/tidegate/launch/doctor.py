"""`tidegate doctor`: whether this machine can train, and what to do where it cannot.

Nothing is created, started or joined. Each check is a function that yields findings; one that itself breaks is a
warning, because a diagnosis must come to its end on exactly the machines that are odd.
"""

from __future__ import annotations

import http.client
import os
import platform
import shutil
import socket
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from tidegate.redact import redact

__all__ = ["LITTLE_SPACE_BYTES", "Finding", "examine", "show_findings", "why_no_ray"]

_REACH_TIMEOUT_S = 5.0
LITTLE_SPACE_BYTES = 5 * 10**9
_DASHBOARD_PORT = 8265
_PORTS = {
    _DASHBOARD_PORT: ("Ray's dashboard", "stop what holds it, or let Ray take the next free port"),
    5000: ("the MLflow UI", "stop what holds it, or use tidegate ui --port 5001"),
}
_COLOURS = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


class Finding(NamedTuple):
    status: Literal["ok", "warn", "FAIL"]
    found: str
    fix: str = ""
    name: str | None = None
    """What was looked at, if the check looks at several things."""


Check = Callable[[], Iterator[Finding]]


def examine(address: str | None, state_dir: Path) -> bool:
    """Print a table of checks.

    Args:
        address: of the Ray cluster that will be used; None: a local one.
        state_dir: where runs will live; it is not created.

    Returns:
        False if a check says FAIL; a warning is no failure.
    """
    # In a thread beside the local checks: both may use their whole time limit, and name servers have none.
    ray, jobs = _Later(lambda: _ray(address)), _Later(lambda: _jobs_apis(address))
    checks: list[tuple[str, Check]] = [
        ("python", _python),
        ("packages", _packages),
        ("devices", _devices),
        ("compiler", _compiler),
        ("state directory", lambda: _state_dir(state_dir)),
        ("ports", _ports),
        ("MLflow", lambda: _mlflow(state_dir)),
        ("Ray", ray.findings),
        ("Ray jobs API", jobs.findings),
    ]
    return show_findings((finding.name or name, finding) for name, check in checks for finding in _guarded(check))


def show_findings(findings: Iterable[tuple[str, Finding]]) -> bool:
    """Print a table of what was found, by name; False if one says FAIL."""
    folded = (Column(name, overflow="fold") for name in ("found", "fix"))  # a path cut short helps nobody
    table = Table("check", "", *folded)
    failed = False
    for name, finding in findings:
        status = Text(finding.status, style=_COLOURS[finding.status])
        table.add_row(name, status, Text(redact(finding.found)), Text(finding.fix))
        failed = failed or finding.status == "FAIL"
    Console(highlight=False).print(table)
    return not failed


def why_no_ray(address: str) -> str | None:
    """Why no Ray cluster can be joined at `address`, by trying to connect and nothing more; None if something listens.

    Args:
        address: `host:port`, `ray://host:port`, `http(s)://host:port`, or a word such as `auto` that only Ray can
            look up, for which the answer is None.
    """
    if "://" not in address and ":" not in address:
        return None
    try:
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        host, port = parts.hostname, parts.port
    except ValueError:  # it may quote a password
        return "not host:port, ray://host:port or http(s)://host:port"
    if parts.scheme in ("http", "https"):
        return _why_no_answer(address)
    if parts.scheme != "ray" or not host or port is None:
        return "not host:port, ray://host:port or http(s)://host:port"
    try:
        socket.create_connection((host, port), timeout=_REACH_TIMEOUT_S).close()
    except OSError as error:
        return str(error)
    return None


def _why_no_answer(address: str) -> str | None:
    url = f"{address.rstrip('/')}/api/version"
    try:
        urllib.request.urlopen(url, timeout=_REACH_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        error.close()  # it answers, if only to ask for a token
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(error)
    return None


class _Later:
    """Runs a check in a thread of its own, from now on."""

    def __init__(self, check: Check) -> None:
        self._found: list[Finding] = []
        self._thread = threading.Thread(target=lambda: self._found.extend(_guarded(check)), daemon=True)
        self._thread.start()

    def findings(self) -> Iterator[Finding]:
        self._thread.join(_REACH_TIMEOUT_S + 1)
        found = list(self._found)
        yield from found or [Finding("FAIL", "no answer from the name server", "check the address")]


def _guarded(check: Check) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # see the module docstring
        yield Finding("warn", f"could not be examined: {type(error).__name__}: {error}")


def _python() -> Iterator[Finding]:
    version, wanted = platform.python_version(), metadata.metadata("tidegate")["Requires-Python"]
    if SpecifierSet(wanted).contains(version, prereleases=True):
        yield Finding("ok", version)
    else:
        yield Finding("FAIL", version, f"use Python {wanted}")


def _packages() -> Iterator[Finding]:
    for line in metadata.requires("tidegate") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        fix = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding("FAIL", "not installed", fix, requirement.name)
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Finding("ok", version, name=requirement.name)
        else:
            yield Finding("FAIL", version, fix, requirement.name)


def _devices() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            build = f"torch {torch.__version__} sees no GPU, though nvidia-smi is here"
            yield Finding("warn", build, "install a CUDA build of torch that fits the driver")
        else:
            yield Finding("ok", "none: CPU with gloo")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
        if device.major >= 8:  # Ampere is the first with bf16 matrix units
            yield Finding("ok", f"{found}, bf16", name=f"GPU {index}")
        else:
            yield Finding("warn", f"{found}, no bf16", "use --set train.precision=fp32", f"GPU {index}")


def _compiler() -> Iterator[Finding]:
    names = [name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name]
    compiler = next((path for name in names if (path := shutil.which(name))), None)
    if compiler:
        yield Finding("ok", compiler)
        return
    import torch

    status: Literal["warn", "FAIL"] = "FAIL" if torch.cuda.is_available() else "warn"
    yield Finding(status, "no C++ compiler", "install g++: Triton and DeepSpeed compile GPU operators (CPU needs none)")


def _state_dir(root: Path) -> Iterator[Finding]:
    from tidegate.launch.state import LAYOUT_VERSION

    existing = next(path for path in [root, *root.absolute().parents] if path.exists())
    another = "choose another with --state-dir or TIDEGATE_STATE"
    if not existing.is_dir():
        yield Finding("FAIL", f"{existing} is a file", another)
        return
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        yield Finding("FAIL", f"{existing} cannot be written: {error.strerror or error}", another)
        return
    version_file = root / "VERSION"
    version = version_file.read_text(encoding="utf-8").strip() if version_file.exists() else None
    if version not in (None, LAYOUT_VERSION):
        yield Finding("FAIL", f"{root}: layout version {version!r}, this Tidegate writes {LAYOUT_VERSION!r}", another)
    else:
        yield Finding("ok", f"{root} ({f'layout version {version}' if version else 'the first run makes it'})")
    free = shutil.disk_usage(existing).free
    if free < LITTLE_SPACE_BYTES:
        yield Finding("warn", f"{free / 1e9:.1f} GB", "free some; tidegate show says what a job takes", "free space")
    else:
        yield Finding("ok", f"{free / 1e9:.1f} GB", name="free space")


def _ports() -> Iterator[Finding]:
    for port, (user, fix) in _PORTS.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that just ended does not count
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                yield Finding("warn", f"{error.strerror or error}; wanted by {user}", fix, f"port {port}")
            else:
                yield Finding("ok", f"free for {user}", name=f"port {port}")


def _mlflow(state_dir: Path) -> Iterator[Finding]:
    from tidegate.config import ConfigError
    from tidegate.track import TrackConfig, check_tracking, resolve_tracking_uri

    fix = "start the server, or correct MLFLOW_TRACKING_URI"
    try:
        answer = check_tracking(resolve_tracking_uri(TrackConfig(), state_dir.absolute()))
    except ConfigError as error:
        yield Finding("FAIL", str(error), fix)
        return
    if answer.startswith("reachable"):
        yield Finding("ok", answer)
    else:
        yield Finding("FAIL", answer, fix)


def _jobs_apis(address: str | None) -> Iterator[Finding]:
    """Who may submit jobs to the dashboards of the cluster at `address` and of this machine."""
    places = [f"http://127.0.0.1:{_DASHBOARD_PORT}"]
    if address is not None and why_no_ray(address) is None and ":" in address:
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        is_dashboard = parts.scheme in ("http", "https")
        netloc = parts.netloc.rpartition("@")[2]
        host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else parts.hostname
        places.append(f"{parts.scheme}://{netloc}" if is_dashboard else f"http://{host}:{_DASHBOARD_PORT}")
    for place in dict.fromkeys(places):
        yield _jobs_api(place)


def _jobs_api(dashboard: str) -> Finding:
    """Ask for the list of jobs as a stranger: without a token, and around any proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{dashboard}/api/jobs/", timeout=_REACH_TIMEOUT_S) as answer:
            is_list = answer.read(64).lstrip().startswith(b"[")
    except urllib.error.HTTPError as error:
        error.close()
        asks = error.code in (401, 403)
        return Finding("ok", f"{dashboard} {'asks for a token' if asks else f'has none (HTTP {error.code})'}")
    except (OSError, http.client.HTTPException) as error:
        return Finding("ok", f"{dashboard} does not answer ({error})")
    if not is_list:
        return Finding("ok", f"{dashboard} answers without a list of jobs")
    return Finding(
        "FAIL",
        f"{dashboard} takes jobs from anyone who reaches it, without a token (ShadowRay, CVE-2023-48022)",
        "stop that Ray; start it with RAY_AUTH_MODE=token, --dashboard-host 127.0.0.1 and a firewall around it",
    )


def _ray(address: str | None) -> Iterator[Finding]:
    mode = os.environ.get("RAY_AUTH_MODE")
    auth = f"RAY_AUTH_MODE={mode}" if mode else "RAY_AUTH_MODE is not set"
    if address is None:
        if mode == "disabled":
            found = f"will start one on 127.0.0.1 that asks for no token; {auth}"
            yield Finding("warn", found, "unset it: every user of this machine could run code as you")
        else:
            yield Finding("ok", f"will start one on 127.0.0.1, with a token of its own; {auth}")
        return
    problem = why_no_ray(address)
    if problem:
        yield Finding("FAIL", f"{address}: {problem}", "start the cluster, or correct --address")
    elif ":" not in address:
        yield Finding("ok", f"{address}: Ray will look it up; {auth}")
    else:
        yield Finding("ok", f"{address} answers; {auth}")
