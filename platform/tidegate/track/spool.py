"""Metric records and the file that keeps them while a server is away.

The file is JSON lines: first `{"run_id": ...}`, then one record a line. NaN and Infinity stand as Python's json
writes them, so that a diverged loss survives the way through the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tidegate.config import ConfigError

TOKENS = "tokens"
"""The metric that every record carries last: training tokens seen."""


class Record(NamedTuple):
    """One call of `MetricLogger.log`. No two records of a run share their time."""

    timestamp_ms: int
    step: int
    metrics: dict[str, float]


class SpoolContents(NamedTuple):
    """What a spool file holds."""

    run_id: str
    records: list[Record]
    torn: bool
    """The last line was cut off, as a killed process leaves it; `records` lacks it."""


class Spool:
    """The spool file of one run; exists only while it holds records. Raises OSError as the disk does."""

    def __init__(self, path: Path, run_id: str) -> None:
        self.path = path
        self._run_id = run_id

    def load(self) -> list[Record]:
        """The records that an earlier process left, oldest first.

        Raises:
            ConfigError: the file belongs to another run, or is no spool.
        """
        if not self.path.exists():
            return []
        contents = read_spool(self.path)
        if contents.run_id != self._run_id:
            raise ConfigError(
                f"spool {self.path} holds metrics of run {contents.run_id}, not of {self._run_id}; replay or move it"
            )
        if contents.torn:
            self.replace(contents.records)  # an append would continue the torn line
        return contents.records

    def append(self, records: Sequence[Record]) -> None:
        """Add records at the end."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            if file.tell() == 0:
                file.write(self._header())
            file.writelines(map(_line, records))

    def replace(self, records: Sequence[Record]) -> None:
        """Make the file hold exactly these records; no records, no file."""
        if not records:
            self.path.unlink(missing_ok=True)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(self.path.name + ".new")
        with scratch.open("w", encoding="utf-8") as file:
            file.write(self._header())
            file.writelines(map(_line, records))
        os.replace(scratch, self.path)  # a kill between the two leaves the old file whole

    def _header(self) -> str:
        return json.dumps({"run_id": self._run_id}) + "\n"


def read_spool(path: Path) -> SpoolContents:
    """Read a spool file.

    Raises:
        OSError: it cannot be read.
        ConfigError: it is no spool; the message names the line.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    torn = bool(lines) and not lines[-1].endswith("\n")
    whole = lines[:-1] if torn else lines
    records: list[Record] = []
    try:
        run_id = str(json.loads(whole[0])["run_id"])
        for line in whole[1:]:
            entry = json.loads(line)
            records.append(Record(int(entry["timestamp_ms"]), int(entry["step"]), dict(entry["metrics"])))
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not a metric spool after {len(records)} records") from error
    return SpoolContents(run_id, records, torn)


def _line(record: Record) -> str:
    return json.dumps(record._asdict()) + "\n"
