"""Sweeps of the tiny job through the command line, in real processes that are really killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

MARK = "TIDEGATE_TEST_SWEEP"
"""An environment variable that all processes of a sweep inherit; Ray's too, which are no children of the driver."""


class Sweeps:
    """The command line on one state directory, and the sweep `tiny-1` in it."""

    def __init__(self, folder: Path) -> None:
        self.state, self.folder = folder / "state", folder / "state" / "sweeps" / "tiny-1"
        self._log = folder / "log"

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "tidegate.cli", *arguments, "--state-dir", str(self.state)]

    def results(self) -> dict[int, dict[str, Any]]:
        files = (self.folder / "trials").glob("[0-9]*.json")
        return {document["trial"]["number"]: document for document in (json.loads(file.read_text()) for file in files)}

    def kill_when(self, job: Path, moment: Callable[[dict[str, Any]], bool]) -> None:
        """Begin a sweep, and SIGKILL all of it when a trial is as `moment` says."""
        self.kill_at(lambda: any(moment(result) for result in self.results().values()), "tune", str(job))

    def kill_at(self, moment: Callable[[], bool], *arguments: str) -> None:
        """Begin a command, and SIGKILL it and its Ray as soon as it is time."""
        mark = str(self.state)
        with self._log.open("w") as log:
            process = subprocess.Popen(
                self.command(*arguments), stdout=log, stderr=subprocess.STDOUT, env=os.environ | {MARK: mark}
            )
            deadline = time.monotonic() + 240
            while not moment():
                assert process.poll() is None, self._log.read_text()
                assert time.monotonic() < deadline, self._log.read_text()
                time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        for other in psutil.process_iter():
            try:
                if other.environ().get(MARK) == mark:
                    other.kill()
            except psutil.Error:
                continue


@pytest.fixture
def sweeps(tmp_path: Path) -> Sweeps:
    return Sweeps(tmp_path)
