"""A few of the injections of `inject.py`, one at each kill point; `make chaos` makes hundreds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_fault_at_each_kill_point_leaves_no_trace() -> None:
    command = [sys.executable, str(Path(__file__).with_name("inject.py")), "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    total = done.stdout.splitlines()[-1].split("|")
    assert [cell.strip() for cell in total[1:5]] == ["all", "12", "12", "12"], done.stdout
