"""Ends a run that stands still, and says which rank the others wait for.

A rank that dies ends the collectives of the others with an error; one that hangs does not. Each rank's watchdog is a
thread that expects a beat at every step, evaluation and checkpoint. Where none comes in time, it writes what this rank
is doing to the run's storage, reads what the others wrote, and ends the process: the main thread may be in a call
that no exception reaches.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from tidegate.train.storage import Storage, StorageError

__all__ = ["EXIT_STATUS", "Report", "Watchdog", "culprits"]

EXIT_STATUS = 75
"""Of a process that its watchdog ended; EX_TEMPFAIL: it may go better next time."""
_GRACE_S = 5.0
"""For the reports of the other ranks; they began to stand still within a step of each other."""
_WAITS = ("torch/distributed/", "torch/cuda/", "deepspeed/comm/", "tidegate/parallel/all_to_all.py")
"""Where a main thread is that waits for other ranks, or for its device."""


class Report(NamedTuple):
    """What a rank that stands still does."""

    beats: int
    """How often it had beaten."""
    doing: str
    """What the last beat announced."""
    place: str
    """Innermost line of the main thread."""
    waits: bool
    """Whether that is a wait for other ranks or for the device."""
    stack: str
    """Of all threads, the main one first."""


class Watchdog:
    """Of one rank. Inside its context, from the first beat on, one is due every `hang_after_s`.

    Args:
        hang_after_s: 0: never.
        storage: of the run; reports go to `stacks-<attempt>/`.
        attempt: the same on every rank, another at every start of the run.
        rank, world_size: of this process.
        notice: shows a line to the user, and returns when it is on its way. Every rank that stands still calls it, with
            the same line if it knows as much: the link to one of them may be what broke.
    """

    def __init__(
        self,
        hang_after_s: float,
        storage: Storage,
        attempt: str,
        rank: int,
        world_size: int,
        notice: Callable[[str], None],
    ) -> None:
        self._hang_after_s, self._notice = hang_after_s, notice
        self._storage, self._folder = storage, f"stacks-{attempt}"
        self._rank, self._world_size = rank, world_size
        self._main = threading.get_ident()
        self._beats, self._doing, self._last = 0, "", math.inf
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tidegate-watchdog", daemon=True)

    def beat(self, doing: str) -> None:
        """This rank moves; `doing` is what it begins now."""
        self._beats, self._doing, self._last = self._beats + 1, doing, time.monotonic()

    def __enter__(self) -> Watchdog:
        if self._hang_after_s:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    # --- the thread ----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._hang_after_s / 4)):
            if time.monotonic() - self._last > self._hang_after_s:
                self._end()

    def _end(self) -> None:
        try:
            self._storage.replace(self._file(self._rank), json.dumps(self._report()._asdict()).encode())
            time.sleep(_GRACE_S)
            self._notice(self._verdict(self._reports()))
        finally:
            os._exit(EXIT_STATUS)

    def _report(self) -> Report:
        frames = sys._current_frames()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        innermost = traceback.extract_stack(frames[self._main])[-1]
        order = sorted(frames, key=lambda ident: ident != self._main)
        stacks = (f"{names.get(ident, ident)}:\n{''.join(traceback.format_stack(frames[ident]))}" for ident in order)
        place = f"{innermost.filename}:{innermost.lineno} {innermost.name}"
        files = (frame.filename for frame in traceback.extract_stack(frames[self._main]))
        return Report(self._beats, self._doing, place, _waits(files), "\n".join(stacks))

    def _reports(self) -> dict[int, Report]:
        found = {}
        for rank in range(self._world_size):
            try:
                found[rank] = Report(**json.loads(self._storage.read(self._file(rank))))
            except (FileNotFoundError, StorageError):
                continue  # it does not answer
        return found

    def _file(self, rank: int) -> str:
        return f"{self._folder}/rank_{rank:05d}.json"

    def _verdict(self, reports: Mapping[int, Report]) -> str:
        said = ", ".join(
            f"rank {rank} ({reports[rank].doing}, {reports[rank].place})"
            if rank in reports
            else f"rank {rank} (silent)"
            for rank in culprits(reports, self._world_size)
        )
        return (
            f"nothing moved for guards.hang_after_s={self._hang_after_s:g}; the others wait for {said}; "
            f"stacks: {self._storage.path(self._folder)}"
        )


def culprits(reports: Mapping[int, Report], world_size: int) -> list[int]:
    """The ranks that the others wait for: those that do not answer; else those that do not wait; else those behind."""
    silent = [rank for rank in range(world_size) if rank not in reports]
    busy = [rank for rank, report in reports.items() if not report.waits]
    fewest = min(report.beats for report in reports.values())
    return silent or busy or [rank for rank, report in reports.items() if report.beats == fewest]


def _waits(files: Iterable[str]) -> bool:
    """Whether a stack, by its files from the outermost to the innermost, ends in a wait for others."""
    return any(part in file.replace("\\\\", "/") for file in list(files)[-3:] for part in _WAITS)
