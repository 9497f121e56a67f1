"""Where checkpoints live: a folder, or anything that fsspec has a URI for. Every error names the path and what to do.

A folder is written so that power may go at any moment: contents reach the disk before the name that makes them count.
Object stores do as much by themselves, since an object is there whole or not at all.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from tidegate.config import ConfigError

__all__ = ["Storage", "StorageError", "sync_folder"]

_KEPT = "; the checkpoints that are complete stay"


class StorageError(ConfigError):
    """The storage does not take or give what it should; the message names the path and what to do."""


class Storage:
    """A tree of files under one folder or URI; names are relative to it, with slashes.

    Args:
        location: a path, or a URI with a protocol that fsspec knows.

    Raises:
        ConfigError: the protocol is unknown, or its package is not installed.
    """

    def __init__(self, location: str | Path) -> None:
        self.location = str(location).rstrip("/")
        try:
            self._filesystem, root = fsspec.core.url_to_fs(self.location)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"checkpoint.storage={self.location}: {error}") from error
        self._root = str(root).rstrip("/")
        self._local = isinstance(self._filesystem, LocalFileSystem)

    def __truediv__(self, name: str) -> Storage:
        """The storage of a folder in it."""
        return Storage(f"{self.location}/{name}")

    def path(self, name: str) -> str:
        """For people: where a file is."""
        return f"{self.location}/{name}" if name else self.location

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """A new file, on the disk when the block ends."""
        with self._explained(name):
            self._make_folder_of(name)
            with self._open(name, "wb") as file:
                yield file
                if self._local:
                    file.flush()
                    os.fsync(file.fileno())

    def replace(self, name: str, data: bytes) -> None:
        """Write a whole file: whatever happens, there is the old one or the new one."""
        if not self._local:
            with self.create(name) as file:
                file.write(data)
            return
        scratch = f"{name}.writing"
        with self.create(scratch) as file:
            file.write(data)
        with self._explained(name):
            self._rename(scratch, name)
            sync_folder(self._on_disk(name).parent)

    def settle(self, folder: str) -> None:
        """Make the names of all files in a folder reach the disk, and its own."""
        if self._local:
            with self._explained(folder):
                for place, _, _ in os.walk(self._on_disk(folder)):
                    sync_folder(Path(place))
                sync_folder(self._on_disk(folder).parent)

    def open(self, name: str) -> BinaryIO:
        """An existing file, to read.

        Raises:
            FileNotFoundError: there is none.
        """
        with self._explained(name):
            return self._open(name, "rb")

    def read(self, name: str) -> bytes:
        """A whole small file; raises FileNotFoundError where there is none."""
        with self._explained(name):
            self._filesystem.invalidate_cache()  # other processes write here
            with self._open(name, "rb") as file:
                return file.read()

    def folders(self) -> list[str]:
        """Names of the folders at the top, in order."""
        with self._explained(""):
            self._filesystem.invalidate_cache()
            try:
                listed = self._filesystem.ls(self._root, detail=True)
            except FileNotFoundError:
                return []
            return sorted(self._relative(entry) for entry in listed if entry["type"] == "directory")

    def sizes(self, folder: str) -> dict[str, int | None]:
        """Bytes of every file under a folder, by its name in there; None for what is a link."""
        with self._explained(folder):
            if self._local:
                return dict(_sizes_on_disk(self._on_disk(folder)))
            self._filesystem.invalidate_cache()
            try:
                listed = self._filesystem.find(f"{self._root}/{folder}", detail=True)
            except FileNotFoundError:
                return {}
            return {self._relative(entry).removeprefix(f"{folder}/"): entry["size"] for entry in listed.values()}

    def delete(self, name: str) -> None:
        """Remove a file, or a folder with all in it; nothing happens if there is none."""
        with self._explained(name):
            try:
                self._remove(name)
            except FileNotFoundError:
                return

    # --- single steps, each of which a test can make the last one ------------------------------------------------

    def _make_folder_of(self, name: str) -> None:
        self._filesystem.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)

    def _open(self, name: str, mode: str) -> Any:
        if self._local:
            return self._on_disk(name).open(mode)
        return self._filesystem.open(f"{self._root}/{name}", mode)

    def _rename(self, name: str, to: str) -> None:
        os.replace(self._on_disk(name), self._on_disk(to))

    def _remove(self, name: str) -> None:
        self._filesystem.rm(f"{self._root}/{name}", recursive=True)
        if self._local:
            sync_folder(self._on_disk(name).parent)

    # -------------------------------------------------------------------------------------------------------------

    def _on_disk(self, name: str) -> Path:
        return Path(self._root, name)

    def _relative(self, entry: dict[str, Any]) -> str:
        path = str(entry["name"]).rstrip("/")
        return path[path.index(self._root.lstrip("/")) + len(self._root.lstrip("/")) :].lstrip("/")

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, ConfigError):
            raise
        except Exception as error:  # clients of object stores raise what they like
            raise StorageError(f"{self.path(name)}: {_advice(error)}{_KEPT}") from error


def _advice(error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "no space left; free some, or keep fewer with checkpoint.keep_last"
    if number == errno.EROFS or isinstance(error, PermissionError):
        return f"cannot be written to or read ({error}); change its permissions or set checkpoint.storage"
    if isinstance(error, (NotADirectoryError, IsADirectoryError, FileExistsError)):
        return f"is in the way ({error}); move it or set checkpoint.storage"
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"the storage does not answer ({reason[:300]}); check that it can be reached, or set checkpoint.storage"


def _sizes_on_disk(folder: Path) -> Iterator[tuple[str, int | None]]:
    for place, folders, files in os.walk(folder):
        for name in [*files, *folders]:
            path = Path(place, name)
            if path.is_symlink() or name in files:
                yield path.relative_to(folder).as_posix(), None if path.is_symlink() else path.stat().st_size


def sync_folder(folder: Path) -> None:
    """Make the names in a folder reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
