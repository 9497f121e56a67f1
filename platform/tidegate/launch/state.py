"""The state directory: shards, runs, checkpoints and the embedded MLflow store, under one versioned folder.

.tidegate/
  VERSION                          of this layout; another one is refused, not guessed at
  data/                            token shards (tidegate.data)
  mlflow/                          the embedded store (tidegate.track)
  runs/<run>/                      job.json (resolved), run.json (what `resume` needs), undelivered metrics
  checkpoints/<run>-<MLflow run>/   unless checkpoint.storage or TIDEGATE_STORAGE says elsewhere; job.json and run.json
                                    stand there again, so that a run can go on where there is only its storage
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from tidegate.config import Config, ConfigError, load_stored
from tidegate.redact import redact, redact_command
from tidegate.track import RunHandle, recorded_uri
from tidegate.train.job import Job
from tidegate.train.storage import Storage

__all__ = [
    "LAYOUT_VERSION",
    "RunFolder",
    "RunRecord",
    "StateDir",
    "check_name",
    "default_state_dir",
    "open_state",
    "write_whole",
]

LAYOUT_VERSION = "1"
_JOB_FILE, _RECORD_FILE = "job.json", "run.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


def default_state_dir() -> Path:
    """`TIDEGATE_STATE`, or `.tidegate` in the current directory."""
    return Path(os.environ.get("TIDEGATE_STATE", ".tidegate")).absolute()


def open_state(path: Path | None) -> StateDir:
    """The state directory that `--state-dir` names; None is the default."""
    return StateDir(path or default_state_dir())


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
        self.job_file = folder / _JOB_FILE
        self.spool = folder / "undelivered_metrics.jsonl"
        self._record_file = folder / _RECORD_FILE

    def write(self, job: Job, job_dir: Path, handle: RunHandle, command: Sequence[str], checkpoints: str) -> None:
        """Store what `resume` needs."""
        record = RunRecord(
            job_dir=str(job_dir),
            checkpoints=checkpoints,
            tracking_uri=redact(handle.uri),
            run_id=handle.run_id,
            command=redact_command(command),
        )
        write_whole(self.job_file, job.model_dump_json(indent=2))
        write_whole(self._record_file, record.model_dump_json(indent=2))
        for file in (self.job_file, self._record_file):
            Storage(checkpoints).replace(file.name, file.read_bytes())

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

    def named_run(self, name: str) -> RunFolder:
        """A folder for a new run of this name.

        Raises:
            ConfigError: it is no name of a folder, or there is such a folder.
        """
        check_name(name)
        folder = self._runs / name
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):  # an empty one is what a start left that was killed
            raise ConfigError(f"{folder} is there without a run in it; remove it or take another --name")
        return RunFolder(folder)

    def storage_of(self, job: Job) -> str:
        """Whole folder or URI of checkpoints: the job's, else `TIDEGATE_STORAGE`, else one in here."""
        storage = job.checkpoint.storage or os.environ.get("TIDEGATE_STORAGE") or str(self.checkpoints)
        return storage.rstrip("/") if "://" in storage else str(Path(storage).absolute())

    def adopt(self, name: str, storage: str, job_dir: Path) -> RunFolder | None:
        """The folder of a run that another state directory began, from what stands beside its checkpoints.

        Args:
            name: of the run.
            storage: folder or URI with the checkpoints of runs.
            job_dir: that `{job}` stands for here.

        Returns:
            None if the storage has no such run.

        Raises:
            ConfigError: it has several.
        """
        check_name(name)
        pattern = re.compile(re.escape(name) + "-[0-9a-f]{8}")
        found = {}
        for folder in filter(pattern.fullmatch, Storage(storage).folders()):
            try:
                found[folder] = [(Storage(storage) / folder).read(file) for file in (_JOB_FILE, _RECORD_FILE)]
            except FileNotFoundError:
                continue
        if len(found) > 1:
            raise ConfigError(f"{storage} has several runs of the name {name}: {', '.join(found)}; take another name")
        for folder, (job, record) in found.items():
            there = load_stored(record.decode(), RunRecord, f"{storage}/{folder}/{_RECORD_FILE}")
            here = there.model_copy(update={"job_dir": str(job_dir), "checkpoints": f"{storage}/{folder}"})
            run = self.named_run(name)
            write_whole(run.folder / _RECORD_FILE, here.model_dump_json(indent=2))
            write_whole(run.job_file, job.decode())
            return run
        return None

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


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` can be that of a run, a folder and a submission to Ray."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--name {name!r}: a name has letters, digits, '.', '_' and '-', at most 80")


def write_whole(path: Path, text: str) -> None:
    """Write to a neighbour and rename, so that a crash leaves the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
