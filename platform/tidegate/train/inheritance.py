"""A run that goes on from another run's checkpoint as if it had come there itself."""

from __future__ import annotations

import hashlib
import shutil
from typing import IO, cast

import torch

from tidegate.train.checkpoint_store import TRACKER, CheckpointStore, Damaged, Entry, FileRecord
from tidegate.train.storage import Storage

__all__ = ["inherit"]


def inherit(heir: str, parent: str, tokens: int) -> None:
    """Make another run's checkpoint of so many tokens the only one of a run; nothing if the run went on from it.

    Weights, optimizer, position and generators are the parent's, byte for byte; metrics that it had still to deliver
    are not. Killed at any moment, it can be done again, also when the parent has gone on since it was done.

    Args:
        heir, parent: folders or URIs of two runs' checkpoints; neither trains.
        tokens: trained on.

    Raises:
        Damaged: the parent has no such checkpoint, or it is not what its manifest says.
        StorageError: a storage does not take or give it.
    """
    own, mark = CheckpointStore(Storage(heir)), hashlib.sha256(f"{parent} {tokens}".encode()).hexdigest()[:16]
    valid = own.valid()
    if any(_tokens(entry) > tokens for entry in valid):
        return
    own.claim(mark)  # a process of the heir that outlived its driver writes no more
    name = next((entry.name for entry in valid if entry.name.endswith(mark)), None) or _copy(own, parent, tokens, mark)
    for other in own.names():
        if other != name:
            own.delete(other)


def _copy(own: CheckpointStore, parent: str, tokens: int, mark: str) -> str:
    store = CheckpointStore(Storage(parent))
    found = [entry for entry in store.valid() if _tokens(entry) == tokens]
    if not found:
        raise Damaged(f"{parent}: it holds no whole checkpoint of {tokens} tokens")
    source, manifest = found[-1].name, found[-1].manifest
    assert manifest is not None
    writing = own.writing(manifest.step, mark)
    files: dict[str, FileRecord] = {}
    for file, record in manifest.files.items():
        with writing.create(file) as copy:
            if file == TRACKER:
                torch.save([], cast(IO[bytes], copy))
            else:
                with store.open(source, file) as content:
                    shutil.copyfileobj(content, copy)
        files[file] = copy.record
        if file != TRACKER and copy.record != record:
            raise Damaged(f"{store.storage.path(f'{source}/{file}')}: its content is not what was written")
    own.commit(writing.name, manifest.model_copy(update={"files": files}))
    return writing.name


def _tokens(entry: Entry) -> int:
    assert entry.manifest is not None
    return entry.manifest.tokens
