"""Two hosts with addresses of their own: a run over both, over a slow link, and over one that is cut.

Network namespaces of Linux, joined by a virtual cable, stand for the hosts; they share the disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

BIN = Path(sys.executable).parent
CABLE = "tg0"
HEAD, OTHER = "10.77.0.1", "10.77.0.2"


def system(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)


def inside(host: str, *command: str) -> list[str]:
    return ["ip", "netns", "exec", host, *command]


class Hosts(NamedTuple):
    names: tuple[str, str]
    """Of the namespaces; the first has Ray's head."""
    environment: dict[str, str]

    def slow(self, rate: str) -> None:
        """Let no more than that through, such as 2mbit, in either direction."""
        for name in self.names:
            limit = ("tbf", "rate", rate, "burst", "16kbit", "latency", "400ms")
            system(*inside(name, "tc", "qdisc", "replace", "dev", CABLE, "root", *limit))

    def quick(self) -> None:
        for name in self.names:
            system(*inside(name, "tc", "qdisc", "del", "dev", CABLE, "root"))

    def cut(self) -> None:
        system("ip", "-n", self.names[1], "link", "set", CABLE, "down")

    def start(self, host: int, *command: str, log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as file:
            return subprocess.Popen(
                inside(self.names[host], *command), env=self.environment, stdout=file, stderr=file, cwd=log.parent
            )


def why_no_hosts() -> str | None:
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
        return "network namespaces need root, ip and tc"
    name = f"tg-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True)
    if made.returncode:
        return f"no network namespace: {made.stderr.decode().strip()}"
    system("ip", "netns", "del", name)
    return None


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if why := why_no_hosts():
        pytest.skip(why)
    names = (f"tga-{os.getpid()}", f"tgb-{os.getpid()}")
    with ExitStack() as undo:
        for name in names:
            system("ip", "netns", "add", name)
            undo.callback(system, "ip", "netns", "del", name)
        system("ip", "link", "add", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1])
        for name, address in zip(names, (HEAD, OTHER), strict=True):
            system("ip", "-n", name, "addr", "add", f"{address}/24", "dev", CABLE)
            for link in ("lo", CABLE):
                system("ip", "-n", name, "link", "set", link, "up")
        settings = {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "GLOO_SOCKET_IFNAME": CABLE,
            "OMP_NUM_THREADS": "1",
            # A host that does not answer is given up after some 25 s, not 50.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "3000",
            "RAY_health_check_failure_threshold": "8",
        }
        made = Hosts(names, os.environ | settings)
        for host, address in enumerate((HEAD, OTHER)):
            folder = Path(tempfile.mkdtemp(prefix="tg"))
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            where = ("--head", "--port=6379", "--include-dashboard=false") if host == 0 else (f"--address={HEAD}:6379",)
            command = ["ray", "start", "--block", f"--node-ip-address={address}", "--num-cpus=1", *where]
            command += [f"--temp-dir={folder}", "--object-store-memory=80000000", "--disable-usage-stats"]
            process = made.start(host, *command, log=folder / "node.log")
            undo.callback(_end, process)
            _wait_for("Ray runtime started", folder / "node.log", process)
        yield made


def _wait_for(text: str, log: Path, process: subprocess.Popen[bytes], timeout_s: float = 240) -> None:
    until = time.monotonic() + timeout_s
    while not re.search(text, log.read_text(), re.MULTILINE):
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()
    process.wait()


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_over_two_hosts_a_slow_link_and_one_that_is_cut(
    hosts: Hosts, tiny_job: Callable[..., Path], tmp_path: Path
) -> None:
    job = tiny_job(
        train={"micro_batch": 1, "tokens": 512 * 100_000},
        checkpoint={"every": 5},
        guards={"hang_after_s": 10},
    )
    elastic = ["resources.workers=2", "resources.min_workers=1", "parallel.expert=2", "resources.max_failures=2"]
    overrides = [flag for override in elastic for flag in ("--set", override)]
    command = [sys.executable, "-m", "tidegate.cli", "train", str(job), "--address", f"{HEAD}:6379"]
    log = tmp_path / "run.log"
    run = hosts.start(0, *command, *overrides, "--state-dir", str(tmp_path / "state"), log=log)
    try:
        _wait_for(r"2 of at most 2 workers: EP 2", log, run)
        _wait_for(r"^ *step 5/", log, run)

        def tokens_a_second(steps: int) -> float:
            """Median of so many steps from now on."""
            seen = len(speeds())
            until = time.monotonic() + 240
            while len(speeds()) < seen + steps + 1:  # the first began before
                assert run.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < until, log.read_text()[-3000:]
                time.sleep(0.1)
            return sorted(speeds()[seen + 1 : seen + steps + 1])[steps // 2]

        def speeds() -> list[float]:
            return [float(speed.replace(",", "")) for speed in re.findall(r"([\d,]+) tok/s", log.read_text())]

        quick = tokens_a_second(9)
        hosts.slow("2mbit")
        slow = tokens_a_second(3)
        hosts.quick()
        assert slow < quick / 2, (quick, slow)

        hosts.cut()
        text = log.read_text()
        _wait_for(re.escape(text[-60:]) + r"[\s\S]*1 of at most 2 workers: EP 1[\s\S]*^ *step \d+/", log, run, 300)
        after = log.read_text()[len(text) :]
        assert re.search(r"nothing moved for guards\.hang_after_s=10; the others wait for rank \d", after)
        reports = [json.loads(path.read_text()) for path in tmp_path.glob("state/checkpoints/*/stacks-*/rank_*.json")]
        assert len(reports) == 2
        assert all(report["doing"].startswith("step ") and "all_to_all" in report["stack"] for report in reports)
        assert "is reshaped from resources.workers=2, parallel.expert=2" in after
    finally:
        _end(run)
