"""Prometheus, and Grafana where it is installed, on loopback, over every Ray of this machine; until Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from ray._common.utils import get_default_ray_temp_dir
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

from tidegate.config import ConfigError
from tidegate.launch.dashboards import write_dashboards, write_rules
from tidegate.launch.state import write_whole
from tidegate.track import stop_server

__all__ = ["serve_dashboards"]

LOOPBACK = "127.0.0.1"
_KEPT = "30d"
_FRESH_S = 60.0
"""Ray writes where its metrics are every 5 s, for as long as it runs."""
_START_S = 30.0
_NO_PROMETHEUS = (
    "prometheus: not installed here (apt install prometheus, brew install prometheus, or "
    "https://prometheus.io/download). Where Prometheus runs elsewhere, give it the rules and dashboards in dashboards/"
)
_NO_GRAFANA = (
    "Grafana is not installed here: https://grafana.com/grafana/download. Elsewhere, give it dashboards/grafana/ and {}"
)


def serve_dashboards(state_dir: Path, port: int, grafana_port: int, say: Callable[[str], None] = print) -> None:
    """Serve until interrupted; what was measured stays in `dash/` of the state directory.

    Args:
        state_dir: is made.
        port, grafana_port: of Prometheus and Grafana, on loopback.
        say: is told where to look.

    Raises:
        ConfigError: Prometheus is not installed, or one of them does not start or ended by itself.
    """
    prometheus, grafana = shutil.which("prometheus"), shutil.which("grafana")
    if prometheus is None:
        raise ConfigError(_NO_PROMETHEUS)
    folder, url = state_dir.absolute() / "dash", f"http://{LOOPBACK}:{port}"
    _configure_prometheus(folder)
    _write_targets(folder)
    command = [prometheus, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'measured'}"]
    command += [f"--storage.tsdb.retention.time={_KEPT}", f"--web.listen-address={LOOPBACK}:{port}", "--log.level=warn"]
    with ExitStack() as exits:
        exits.enter_context(_sigterm_interrupts())
        running = [exits.enter_context(_running(command, folder / "prometheus.log", f"{url}/-/ready"))]
        say(f"Prometheus: {url}/alerts")
        if grafana is None:
            say(_NO_GRAFANA.format(url))
        else:
            page = f"http://{LOOPBACK}:{grafana_port}"
            command = [grafana, "server", "--config", str(_configure_grafana(folder, url, grafana_port))]
            command += ["--homepath", str(_grafana_home(Path(grafana)))]
            running.append(exits.enter_context(_running(command, folder / "grafana.log", f"{page}/api/health")))
            say(f"Grafana: {page}/dashboards")
        say("Ctrl-C ends both" if grafana else "Ctrl-C ends it")
        before = -1
        while True:
            found = len(_write_targets(folder))
            if found != before:
                before = found
                say(f"Rays on this machine: {found or 'none yet, they are found when they start'}")
            for child in running:
                if child.poll() is not None:
                    raise ConfigError(f"a server ended by itself (status {child.returncode}); see the logs in {folder}")
            time.sleep(2)


def _configure_prometheus(folder: Path) -> None:
    write_rules(folder / "tidegate.rules.yml")
    config = {
        "global": {"scrape_interval": "10s", "evaluation_interval": "10s"},  # as Ray's own
        "rule_files": ["tidegate.rules.yml"],
        "scrape_configs": [
            {"job_name": "ray", "file_sd_configs": [{"files": ["targets.json"], "refresh_interval": "10s"}]}
        ],
    }
    write_whole(folder / "prometheus.yml", yaml.safe_dump(config, sort_keys=False))


def _write_targets(folder: Path) -> list[Any]:
    """Put together what every Ray that runs here says of itself: Ray's own file names the one that began last."""
    found: list[Any] = []
    for path in sorted(Path(get_default_ray_temp_dir()).glob(f"session_*/{PROMETHEUS_SERVICE_DISCOVERY_FILE}")):
        if path.parent.is_symlink():  # session_latest
            continue
        try:
            if time.time() - path.stat().st_mtime < _FRESH_S:
                found += json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # a session that is just being removed
            continue
    text = json.dumps(found)
    path = folder / "targets.json"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_whole(path, text)
    return found


def _configure_grafana(folder: Path, prometheus_url: str, port: int) -> Path:
    """Write Grafana's files, in the layout that Ray writes its own in."""
    home = folder / "grafana"
    write_dashboards(home / "dashboards")
    source = {"name": "Prometheus", "type": "prometheus", "access": "proxy", "url": prometheus_url, "isDefault": True}
    provider = {"name": "Tidegate", "folder": "Tidegate", "type": "file", "options": {"path": str(home / "dashboards")}}
    for kind, entries in (("datasources", [source]), ("dashboards", [provider])):
        (home / "provisioning" / kind).mkdir(parents=True, exist_ok=True)
        document = yaml.safe_dump({"apiVersion": 1, ("providers" if kind == "dashboards" else kind): entries})
        write_whole(home / "provisioning" / kind / "tidegate.yml", document)
    settings = ConfigParser(interpolation=None)
    settings.read_dict(
        {
            "server": {"http_addr": LOOPBACK, "http_port": port},
            "paths": {
                "data": home / "data",
                "logs": home / "logs",
                "plugins": home / "plugins",
                "provisioning": home / "provisioning",
            },
            # Everyone on this machine may look, and nobody may log in: there is no admin with a known password.
            "auth.anonymous": {"enabled": "true", "org_role": "Viewer"},
            "auth": {"disable_login_form": "true"},
            "security": {"disable_initial_admin_creation": "true", "allow_embedding": "false"},
            "analytics": {"reporting_enabled": "false", "check_for_updates": "false"},
        }
    )
    with (home / "grafana.ini").open("w", encoding="utf-8") as file:
        settings.write(file)
    return home / "grafana.ini"


def _grafana_home(binary: Path) -> Path:
    """Where Grafana's own files are: beside its binary, or where its packages put them."""
    places = [binary.resolve().parent.parent, Path("/usr/share/grafana")]
    places += [Path(os.environ["GF_PATHS_HOME"])] if "GF_PATHS_HOME" in os.environ else []
    for place in reversed(places):
        if (place / "conf" / "defaults.ini").is_file():
            return place
    raise ConfigError(f"grafana: {binary} is here, but not its files (conf/defaults.ini); set GF_PATHS_HOME")


@contextmanager
def _running(command: list[str], log: Path, ready_url: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers, until the context is left."""
    with log.open("wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd=log.parent)
    try:
        deadline = time.monotonic() + _START_S
        while not _answers(ready_url):
            if child.poll() is not None or time.monotonic() > deadline:
                lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
                raise ConfigError(f"{command[0]} does not start: {lines[-1]} ({log})")
            time.sleep(0.1)
        yield child
    finally:
        stop_server(child)


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends this as Ctrl-C does, so that no server is left behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
