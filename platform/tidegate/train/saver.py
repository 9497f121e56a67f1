"""Checkpoints written in the background: training waits for a snapshot, and for the save before if it is not done."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, cast

import torch

from tidegate.train.checkpoint_store import CheckpointStore, FileRecord, Manifest, Writing, step_of
from tidegate.train.retention import CheckpointConfig, Kept, retained
from tidegate.train.storage import StorageError

__all__ = ["Saver"]

_LONGEST_WAIT_S = 600.0
"""For other ranks to finish writing; they write as much as this one, at the same time."""


class Saver:
    """One rank's writer: a thread that takes one save at a time, in order.

    Every rank writes its files and a record of them; rank 0 waits for all records, writes the manifest and deletes
    what the policy does not keep. Ranks meet in the storage only, so that no collective runs beside training's.

    Args:
        store: of the run.
        policy: what to keep.
        rank, world_size: of this process.
        attempt: hexadecimal, the same on every rank and new at every start of the run.
    """

    def __init__(
        self, store: CheckpointStore, policy: CheckpointConfig, *, rank: int, world_size: int, attempt: str
    ) -> None:
        self._store, self._policy = store, policy
        self._rank, self._world_size, self._attempt = rank, world_size, attempt
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tidegate-saver")
        self._last: Future[None] | None = None
        self._giving_up = threading.Event()
        if rank == 0:
            store.claim(attempt)
        self.newest: str | None = None
        """Name of the checkpoint that was last written, or resumed from."""
        self.ignored: set[str] = set()
        """Names of checkpoints that resuming found damaged: they count as little as if they were not there."""
        self.written_s = 0.0
        """Seconds that the last finished save took in the background."""
        self.committed_at = time.monotonic()
        """When the last checkpoint was there, on rank 0; before the first, when this run began here."""

    def wait(self) -> None:
        """Until the save before is done.

        Raises:
            StorageError: it failed.
        """
        if self._last is not None:
            self._last.result()

    def check(self) -> None:
        """Raise the error of a save that failed, if one did; does not wait."""
        if self._last is not None and self._last.done():
            self._last.result()

    def save(self, manifest: Manifest, files: Mapping[str, Any]) -> None:
        """Begin to write; `files` (name to content) must stay as they are until the next `wait` returns.

        Args:
            manifest: all but its files.
        """
        assert self._last is None or self._last.done(), "wait for the save before"
        self._last = self._thread.submit(self._write, manifest, files)

    def annotate(self, metrics: Mapping[str, float]) -> None:
        """Add metrics to the checkpoint of the last `save`, once it is there; for rank 0."""
        self._last = self._thread.submit(self._annotate, self._last, metrics)

    def close(self) -> None:
        """Finish what was begun, and end the thread.

        Raises:
            StorageError: the last save failed.
        """
        self._thread.shutdown()
        self.wait()

    def abandon(self) -> None:
        """End the thread while another error is on its way: what this rank can still finish it does."""
        self._giving_up.set()
        self._thread.shutdown()

    # --- the thread ----------------------------------------------------------------------------------------------

    def _write(self, manifest: Manifest, files: Mapping[str, Any]) -> None:
        begun = time.monotonic()
        writing = self._store.writing(manifest.step, self._attempt)
        records: dict[str, FileRecord] = {}
        for name, content in files.items():
            with writing.create(name) as file:
                torch.save(content, cast(IO[bytes], file))  # it asks for no more than write and flush
            records[name] = file.record
        writing.finish_rank(self._rank, records)
        if self._rank == 0:
            everything = self._everything(writing)
            self._store.check_owner(self._attempt)
            self._store.commit(writing.name, manifest.model_copy(update={"files": everything}))
            self.newest, self.committed_at = writing.name, time.monotonic()
            self._retain()
        self.written_s = time.monotonic() - begun

    def _everything(self, writing: Writing) -> dict[str, FileRecord]:
        """The files of all ranks, as soon as all have written theirs."""
        files: dict[str, FileRecord] = {}
        missing = set(range(self._world_size))
        deadline = time.monotonic() + _LONGEST_WAIT_S
        while True:
            for rank, written in list(writing.finished_ranks(sorted(missing))):
                assert not files.keys() & written.keys(), "two ranks wrote one file"
                files |= written
                missing.remove(rank)
            if not missing:
                return dict(sorted(files.items()))
            if time.monotonic() > deadline or self._giving_up.is_set():
                raise StorageError(
                    f"{self._store.storage.path(writing.name)}: ranks {sorted(missing)} did not finish writing; "
                    "checkpoint.storage must be one storage that all workers share"
                )
            time.sleep(0.05)

    def _annotate(self, save: Future[None] | None, metrics: Mapping[str, float]) -> None:
        if save is not None:
            save.result()
        assert self.newest is not None
        self._store.check_owner(self._attempt)
        self._store.annotate(self.newest, metrics)
        self._retain()

    def _retain(self) -> None:
        """Only the owner deletes, in this thread, between two saves: none is being written."""
        valid = [
            Kept(entry.name, entry.step, entry.manifest.tokens, entry.manifest.metrics)
            for entry in self._store.valid()
            if entry.manifest is not None and entry.name not in self.ignored
        ]
        # A predecessor whose workers outlived it may have got further than this run is by now.
        stay = retained(valid, self._policy) | {self.newest}
        gone = {checkpoint.name for checkpoint in valid if checkpoint.name not in stay}
        # A damaged one is kept until the run is past its step again: until then somebody may want to repair it.
        assert self.newest is not None
        gone |= {name for name in self.ignored if step_of(name) <= step_of(self.newest)}
        for name in sorted(gone):
            self._store.delete(name)
        self.ignored -= gone
