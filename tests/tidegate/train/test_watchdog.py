"""A rank that hangs in real processes, and which rank is blamed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException

from tidegate.parallel import collectives
from tidegate.train.storage import Storage
from tidegate.train.watchdog import EXIT_STATUS, Report, Watchdog, culprits


def stand_still(folder: str, culprit: int, frozen: bool) -> None:
    """One step goes well; then a rank does not come to the second one's collective."""
    rank = collectives.rank()

    def notice(line: str) -> None:
        Path(folder, f"notice_{rank}").write_text(line)

    with Watchdog(1.0, Storage(folder), "a1", rank, collectives.world_size(), notice) as watchdog:
        for step in (1, 2):
            time.sleep(0.5 * (rank == 0))  # the last to notice, whom the end of the others may take with them
            watchdog.beat(f"step {step}")
            if step == 2 and rank == culprit:
                read_forever(frozen)
            dist.all_reduce(torch.ones(1))


def read_forever(frozen: bool) -> None:
    if frozen:
        os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        time.sleep(0.1)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_hung_collective_ends_with_stacks_and_the_rank_that_did_not_come(
    on_ranks: Callable[..., list[Any]], tmp_path: Path, frozen: bool
) -> None:
    with pytest.raises(ProcessExitedException) as ended:
        on_ranks(3, stand_still, str(tmp_path), 1, frozen)
    assert ended.value.exit_code == EXIT_STATUS
    lines = [path.read_text() for path in tmp_path.glob("notice_*")]
    who = "rank 1 (silent)" if frozen else "rank 1 (step 2, "
    assert lines
    for line in lines:
        assert f"nothing moved for guards.hang_after_s=1; the others wait for {who}" in line
        assert frozen or "read_forever" in line
    reports = {path.name: json.loads(path.read_text()) for path in (tmp_path / "stacks-a1").iterdir()}
    assert reports.keys() == {f"rank_{rank:05d}.json" for rank in ((0, 2) if frozen else (0, 1, 2))}
    assert all("stand_still" in report["stack"] for report in reports.values())
    assert [report["waits"] for _, report in sorted(reports.items())] == ([True] * 2 if frozen else [True, False, True])


def test_a_watchdog_lets_go_of_what_moves_and_of_what_has_ended(tmp_path: Path) -> None:
    with Watchdog(0.4, Storage(tmp_path), "a1", 0, 1, lambda line: None) as watchdog:
        time.sleep(0.6)  # before the first beat
        for step in range(6):
            watchdog.beat(f"step {step}")
            time.sleep(0.2)
    time.sleep(0.6)
    with Watchdog(0.0, Storage(tmp_path), "a1", 0, 1, lambda line: None) as watchdog:
        watchdog.beat("step 1")
        time.sleep(0.3)
    assert not list(tmp_path.iterdir())


def test_who_is_blamed() -> None:
    waits, busy = Report(7, "step 7", "", True, ""), Report(7, "step 7", "", False, "")
    assert culprits({0: waits, 2: waits}, 3) == [1]
    assert culprits({0: waits, 1: busy, 2: waits}, 3) == [1]
    assert culprits({0: waits, 1: waits, 2: waits._replace(beats=6)}, 3) == [2]
    assert culprits({0: waits, 1: waits}, 2) == [0, 1], "nobody can be told from the others"
