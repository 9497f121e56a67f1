"""A run's checkpoints in a storage. One exists from the moment its manifest does, which is written last.

<run>/owner.json            which start of the run may write
<run>/step_00000100-3f9a1c2e/
  manifest.json           step, tokens, layout, model, metrics; size and SHA-256 of every other file
  rank_00000.json         what one rank wrote, for the one that writes the manifest
  rank_00000/...          a rank's generators, and on rank 0 metrics on their way to MLflow
  state/...               DeepSpeed's shards

The end of a folder's name is new at every start of a run: an attempt never writes into the files of another, not even
of one whose workers still run while their driver is gone.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from pydantic import ValidationError

from tidegate.config import Config
from tidegate.train.storage import Storage, StorageError

__all__ = [
    "MANIFEST",
    "TRACKER",
    "CheckpointStore",
    "Damaged",
    "Entry",
    "FileRecord",
    "Manifest",
    "Writing",
    "finite",
    "is_checkpoint",
    "seal",
    "stays_inside",
    "step_of",
    "unseal",
]

MANIFEST = "manifest.json"
TRACKER = "rank_00000/tracker.pt"
"""Metrics on their way to MLflow."""
_NAME = re.compile(r"step_(\d{8,})-[0-9a-f]+")
_SEAL = re.compile(rb'"sha256_of_the_rest": "([0-9a-f]{64})"')
_OWNER = "owner.json"
_CHUNK = 1 << 20


class Damaged(Exception):
    """A checkpoint is not what its manifest says, or has none; the message says what is wrong, naming the file."""


class FileRecord(Config):
    size: int
    """Bytes."""
    sha256: str


class Manifest(Config):
    """manifest.json."""

    tidegate: str
    """Version that wrote it."""
    step: int
    tokens: int
    layout: dict[str, Any]
    """Job fields that must be the same to resume."""
    model: dict[str, Any]
    metrics: dict[str, float]
    """Of this step: the training loss and, once evaluated, held-out metrics. Finite ones only."""
    files: dict[str, FileRecord]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files.values())


class Entry(NamedTuple):
    """A line of the list of checkpoints."""

    name: str
    step: int
    manifest: Manifest | None
    problem: str | None
    """Why it cannot be resumed from; None if sizes are right (`CheckpointStore.damage` reads the contents too)."""


class CheckpointStore:
    """The checkpoints of one run; every method may be called on any machine that reaches the storage."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def names(self) -> list[str]:
        """Folders of checkpoints, complete or not, oldest step first."""
        return sorted(filter(is_checkpoint, self.storage.folders()), key=lambda name: (step_of(name), name))

    def entries(self) -> list[Entry]:
        """Every checkpoint, oldest step first, with what a look at names and sizes finds wrong."""
        return [self.entry(name) for name in self.names()]

    def valid(self) -> list[Entry]:
        return [entry for entry in self.entries() if entry.problem is None]

    def unfinished(self) -> list[str]:
        """Folders without a manifest: being written, or left by a process that was killed."""
        return [name for name in self.names() if MANIFEST not in self.storage.sizes(name)]

    def entry(self, name: str) -> Entry:
        try:
            manifest = self.manifest(name)
        except Damaged as error:
            return Entry(name, step_of(name), None, str(error))
        problems = self._misfits(name, manifest)
        return Entry(name, manifest.step, manifest, "; ".join(problems) or None)

    def manifest(self, name: str) -> Manifest:
        """The manifest, whole and safe to follow.

        Raises:
            Damaged: there is none, it is not what was written, or it points outside of the checkpoint.
        """
        try:
            manifest = Manifest.model_validate(unseal(self.storage.read(f"{name}/{MANIFEST}")))
        except FileNotFoundError:
            raise Damaged(f"{MANIFEST} is missing: it was not written to its end") from None
        except (ValidationError, Damaged) as error:
            raise Damaged(f"{MANIFEST} is damaged: {' '.join(str(error).split())}") from error
        for file in manifest.files:
            if not stays_inside(file):
                raise Damaged(f"{MANIFEST} names {file!r}, which is not a file of the checkpoint")
        return manifest

    def damage(self, name: str, share: slice = slice(None)) -> list[str]:
        """Read the contents again and say what is wrong, a line a file.

        Args:
            share: which of the files, in order of their names; all by default. Names and sizes are always looked at.
        """
        try:
            manifest = self.manifest(name)
        except Damaged as error:
            return [str(error)]
        problems = self._misfits(name, manifest)
        if problems:
            return problems
        for file in sorted(manifest.files)[share]:
            if not self.intact(name, file, manifest):
                problems.append(f"{file}: its content is not what was written (SHA-256 differs)")
        return problems

    def intact(self, name: str, file: str, manifest: Manifest) -> bool:
        """Whether a file has the digest that its checkpoint's manifest says; reads it."""
        return self._sha256(f"{name}/{file}") == manifest.files[file].sha256

    def claim(self, attempt: str) -> None:
        """Make this start of the run the one that writes; an earlier one that is still alive finds out."""
        self.storage.replace(_OWNER, seal({"attempt": attempt}))

    def check_owner(self, attempt: str) -> None:
        """Raise StorageError unless this start of the run is the last that claimed its checkpoints."""
        try:
            owner = unseal(self.storage.read(_OWNER)).get("attempt")
        except (FileNotFoundError, Damaged):
            owner = None
        if owner != attempt:
            raise StorageError(
                f"{self.storage.location}: the run was resumed by another process, which writes its checkpoints now; "
                "this one ends"
            )

    def writing(self, step: int, attempt: str) -> Writing:
        """A new checkpoint, to be filled and then committed."""
        return Writing(self.storage, f"step_{step:08d}-{attempt}")

    def commit(self, name: str, manifest: Manifest) -> None:
        """Make a checkpoint exist, or change its metrics."""
        self.storage.settle(name)
        self.storage.replace(f"{name}/{MANIFEST}", seal(manifest.model_dump(mode="json")))

    def annotate(self, name: str, metrics: Mapping[str, float]) -> None:
        """Add metrics to a checkpoint that exists; those that are not finite are left out."""
        manifest = self.manifest(name)
        known = manifest.metrics | finite(metrics)
        self.commit(name, manifest.model_copy(update={"metrics": known}))

    def delete(self, name: str) -> None:
        """Remove a checkpoint; it stops existing first."""
        self.storage.delete(f"{name}/{MANIFEST}")
        self.storage.delete(name)

    def open(self, name: str, file: str) -> BinaryIO:
        return self.storage.open(f"{name}/{file}")

    def _misfits(self, name: str, manifest: Manifest) -> list[str]:
        sizes = self.storage.sizes(name)
        return [problem for file, record in manifest.files.items() if (problem := _misfit(file, record, sizes))]

    def _sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        with self.storage.open(name) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()


class Writing:
    """A checkpoint that does not exist yet. Each rank writes its files, then its record; one of them the manifest."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.name = name
        self._storage = storage

    def create(self, file: str) -> _Recorded:
        """A new file as a context; when it ends, the context's `record` has size and SHA-256."""
        return _Recorded(self._storage, f"{self.name}/{file}")

    def finish_rank(self, rank: int, files: Mapping[str, FileRecord]) -> None:
        """Say that this rank has written all of its files."""
        document = {"files": {file: record.model_dump() for file, record in files.items()}}
        self._storage.replace(f"{self.name}/{_rank_file(rank)}", seal(document))

    def finished_ranks(self, ranks: Iterable[int]) -> Iterator[tuple[int, dict[str, FileRecord]]]:
        """Of these ranks, those that have finished, and all that they wrote."""
        for rank in ranks:
            try:
                data = self._storage.read(f"{self.name}/{_rank_file(rank)}")
            except FileNotFoundError:
                continue
            files = {file: FileRecord(**record) for file, record in unseal(data)["files"].items()}
            own = FileRecord(size=len(data), sha256=hashlib.sha256(data).hexdigest())
            yield rank, files | {_rank_file(rank): own}


class _Recorded:
    """A file being written, with its size and SHA-256."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._context = storage.create(name)
        self._digest, self._size = hashlib.sha256(), 0
        self._failure: BaseException | None = None

    def __enter__(self) -> _Recorded:
        self._file = self._context.__enter__()
        return self

    def write(self, data: bytes | memoryview) -> int:
        self._digest.update(data)
        self._size += len(data)
        try:
            self._file.write(data)
        except BaseException as failure:
            self._failure = failure  # torch raises an error of its own in its place
            raise
        return len(data)

    def flush(self) -> None:
        """torch asks for it; the file is on the disk when the context ends."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._failure is None:
            self._context.__exit__(kind, error, trace)
        else:
            self._context.__exit__(type(self._failure), self._failure, trace)
            raise self._failure

    @property
    def record(self) -> FileRecord:
        return FileRecord(size=self._size, sha256=self._digest.hexdigest())


def seal(document: Mapping[str, Any]) -> bytes:
    """JSON that holds its own SHA-256, over every byte but those of the digest."""
    text = json.dumps({**document, "sha256_of_the_rest": "0" * 64}, indent=1).encode()
    return text[: text.rindex(b'"' + b"0" * 64) + 1] + hashlib.sha256(text).hexdigest().encode() + b'"\n}'


def unseal(data: bytes) -> dict[str, Any]:
    """The document of `seal`.

    Raises:
        Damaged: any byte is another than was written, or it is not what `seal` writes.
    """
    found = list(_SEAL.finditer(data))
    if not found:
        raise Damaged("it has no digest")
    start, end = found[-1].span(1)
    if hashlib.sha256(data[:start] + b"0" * 64 + data[end:]).hexdigest().encode() != data[start:end]:
        raise Damaged("its content is not what was written (SHA-256 differs)")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"it is not JSON ({error})") from error
    if not isinstance(document, dict) or "sha256_of_the_rest" not in document:
        raise Damaged("it is no object with a digest")
    del document["sha256_of_the_rest"]
    return document


def stays_inside(file: str) -> bool:
    """Whether a name from a manifest can only mean a file below the checkpoint's folder."""
    path = PurePosixPath(file)
    plain = str(path) == file and "\\" not in file and "\0" not in file
    return plain and not path.is_absolute() and ".." not in path.parts and file not in (".", MANIFEST)


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def is_checkpoint(name: str) -> bool:
    """Whether a folder of this name is one."""
    return _NAME.fullmatch(name) is not None


def step_of(name: str) -> int:
    match = _NAME.fullmatch(name)
    assert match is not None, name
    return int(match[1])


def _misfit(file: str, record: FileRecord, sizes: Mapping[str, int | None]) -> str | None:
    parents = [parent.as_posix() for parent in PurePosixPath(file).parents]
    if any(name in sizes and sizes[name] is None for name in (file, *parents)):
        return f"{file}: is a link, not a file that a checkpoint wrote"
    size = sizes.get(file)
    if size is None:
        return f"{file}: is missing"
    return f"{file}: has {size:,} bytes, not {record.size:,}" if size != record.size else None


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.json"
