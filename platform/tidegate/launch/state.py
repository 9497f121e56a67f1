"""The state directory: shards, runs, checkpoints and the embedded MLflow store, under one versioned folder.

.tidegate/
  VERSION                          of this layout; another one is refused, not guessed at
  data/                            token shards (tidegate.data)
  mlflow/                          the embedded store (tidegate.track)
  runs/<run>/                      job.json (resolved), run.json (what `resume` needs), undelivered metrics
  checkpoints/<run>-<MLflow run>/   unless checkpoint.storage says elsewhere
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tidegate.config import Config, ConfigError, load_stored
from tidegate.redact import redact, redact_command
from tidegate.track import RunHandle, recorded_uri
from tidegate.train.job import Job

__all__ = ["LAYOUT_VERSION", "RunFolder", "RunRecord", "StateDir", "default_state_dir", "write_whole"]

LAYOUT_VERSION = "1"


def default_state_dir() -> Path:
    """`TIDEGATE_STATE`, or `.tidegate` in the current directory."""
    return Path(os.environ.get("TIDEGATE_STATE", ".tidegate")).absolute()


class RunRecord(Config):
    """run.json: how to find a run again."""

    job_dir: str
    """The folder that `{job}` stands for in the job's paths."""
    checkpoints: str
    """Folder or URI of the run's checkpoints."""
    tracking_uri: str
    """Without its password, for which `recorded_uri` asks the environment."""
    run_id: str
    command: tuple[str, ...]
    """The first start's command line."""


class RunFolder:
    """One run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self.job_file = folder / "job.json"
        self.spool = folder / "undelivered_metrics.jsonl"
        self._record_file = folder / "run.json"

    def write(self, job: Job, job_dir: Path, handle: RunHandle, command: Sequence[str], checkpoints: str) -> None:
        """Store what `resume` needs."""
        record = RunRecord(
            job_dir=str(job_dir),
            checkpoints=checkpoints,
            tracking_uri=redact(handle.uri),
            run_id=handle.run_id,
            command=redact_command(command),
        )
        self.write_job(job)
        write_whole(self._record_file, record.model_dump_json(indent=2))

    def write_job(self, job: Job) -> None:
        """Store the job as it runs now: the next resume starts from it."""
        write_whole(self.job_file, job.model_dump_json(indent=2))

    def handle(self) -> RunHandle:
        """The run in MLflow, to mark it from outside of it.

        Raises:
            ConfigError: the run has no record, or its store's password is nowhere.
        """
        record = self.read()
        return RunHandle(recorded_uri(record.tracking_uri), "", record.run_id, self.name)

    def read(self) -> RunRecord:
        """What `write` stored."""
        try:
            document = self._record_file.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{self._record_file}: cannot read the run's record ({error})") from error
        return load_stored(document, RunRecord, str(self._record_file))


class StateDir:
    """The state directory at `root`, created or checked.

    Raises:
        ConfigError: the folder has another layout version or cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        version_file = self.root / "VERSION"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not version_file.exists():
                write_whole(version_file, LAYOUT_VERSION + "\n")
            version = version_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.root}: the state directory cannot be used: {error}") from error
        if version != LAYOUT_VERSION:
            raise ConfigError(
                f"{version_file}: state directory of layout version {version!r}, this Tidegate writes "
                f"{LAYOUT_VERSION!r}; choose another with --state-dir"
            )
        self.data = self.root / "data"
        self.checkpoints = self.root / "checkpoints"
        self._runs = self.root / "runs"

    def new_run(self, name: str) -> RunFolder:
        """A folder for a new run: `<name>-1`, `<name>-2`, ... whichever is free."""
        self._runs.mkdir(exist_ok=True)
        number = 1
        while True:
            try:
                (self._runs / f"{name}-{number}").mkdir()
                return RunFolder(self._runs / f"{name}-{number}")
            except FileExistsError:
                number += 1

    def runs(self) -> list[str]:
        """Names of the runs."""
        return sorted(path.parent.name for path in self._runs.glob("*/job.json") if not path.parent.is_symlink())

    def run(self, name: str) -> RunFolder:
        """The folder of a run that exists.

        Raises:
            ConfigError: there is none; the message lists those there are.
        """
        known = self.runs()
        if name not in known:  # `../x` and links would lead out of the state directory
            raise ConfigError(f"{name}: no such run in {self._runs}; there are: {', '.join(known) or 'none'}")
        return RunFolder(self._runs / name)


def write_whole(path: Path, text: str) -> None:
    """Write to a neighbour and rename, so that a crash leaves the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
