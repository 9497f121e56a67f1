"""Checkpoints on a real disk and in fsspec's memory: nothing half-written exists, nothing damaged goes unseen."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from tidegate.train import storage as storage_module
from tidegate.train.checkpoint_store import MANIFEST, CheckpointStore, Damaged, Manifest, seal, stays_inside, unseal
from tidegate.train.retention import CheckpointConfig, KeepBest
from tidegate.train.saver import Saver
from tidegate.train.storage import Storage, StorageError


def manifest(step: int, **metrics: float) -> Manifest:
    layout = {"resources.workers": 1}
    return Manifest(tidegate="0", step=step, tokens=100 * step, layout=layout, model={}, metrics=metrics, files={})


def contents(step: int, rank: int = 0) -> dict[str, Any]:
    weights = torch.full((37,), float(step))
    return {f"state/weights_{rank}.pt": {"w": weights, "v": weights[3:5]}, f"rank_{rank:05d}/generators.pt": [step]}


def saver(store: CheckpointStore, policy: CheckpointConfig | None = None, attempt: str = "a", **ranks: int) -> Saver:
    return Saver(store, policy or CheckpointConfig(), **({"rank": 0, "world_size": 1} | ranks), attempt=attempt)


def save(store: CheckpointStore, step: int, policy: CheckpointConfig | None = None, attempt: str = "a") -> None:
    one = saver(store, policy, attempt)
    one.save(manifest(step), contents(step))
    one.close()


@pytest.fixture(params=["folder", "memory"])
def store(request: Any, tmp_path: Path) -> Iterator[CheckpointStore]:
    location = str(tmp_path / "run") if request.param == "folder" else f"memory://{tmp_path.name}/run"
    yield CheckpointStore(Storage(location))
    MemoryFileSystem.store.clear()


def test_what_was_saved_is_listed_whole_and_comes_back(store: CheckpointStore) -> None:
    assert store.entries() == []
    one = saver(store, CheckpointConfig(keep_last=3))
    for step in (10, 20, 30):
        one.wait()
        one.save(manifest(step, **{"train/loss": step / 7}), contents(step))
    one.annotate({"val/loss": 1.5, "val/prose/loss": float("nan")})
    one.close()
    assert [(entry.step, entry.problem) for entry in store.entries()] == [(10, None), (20, None), (30, None)]
    newest = store.valid()[-1]
    assert newest.manifest is not None
    assert newest.manifest.metrics == {"train/loss": 30 / 7, "val/loss": 1.5}
    assert newest.manifest.size == sum(size or 0 for size in store.storage.sizes(newest.name).values()) - len(
        store.storage.read(f"{newest.name}/{MANIFEST}")
    )
    with store.open(newest.name, "state/weights_0.pt") as file:
        loaded = torch.load(file, weights_only=True)
    assert torch.equal(loaded["w"], torch.full((37,), 30.0))
    assert all(store.damage(entry.name) == [] for entry in store.entries())


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    store = CheckpointStore(Storage(tmp_path))
    save(store, 7)
    (name,) = store.names()
    files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert len(files) == 4
    for path in files:
        good = path.read_bytes()
        positions = range(len(good)) if path.suffix == ".json" else range(0, len(good), 41)
        for position in positions:
            bad = bytearray(good)
            bad[position] ^= 1 << position % 8
            path.write_bytes(bad)
            (problem,) = store.damage(name)
            assert problem.startswith(path.relative_to(tmp_path / name).as_posix()), (path, position)
        for bad in (good[:-1], good + b"\0", b""):
            path.write_bytes(bad)
            assert path.relative_to(tmp_path / name).as_posix() in (store.entry(name).problem or ""), path
        path.unlink()
        assert path.relative_to(tmp_path / name).as_posix() in (store.entry(name).problem or ""), path
        path.write_bytes(good)
    assert store.damage(name) == []


class PowerCut(BaseException):
    """Ends the process as far as the writer is concerned."""


def steps_of_a_save(folder: Path, monkeypatch: pytest.MonkeyPatch, policy: CheckpointConfig, last: int | None) -> int:
    """Save step 20 in a folder that holds step 10, with the power cut before the storage's step number `last`.

    Every write, sync, rename and removal is a step. Returns how many were taken.
    """
    taken = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **keywords: Any) -> Any:
            nonlocal taken
            if last is not None and taken >= last:
                raise PowerCut
            taken += 1
            return function(*args, **keywords)

        return step

    store = CheckpointStore(Storage(folder))
    save(store, 10, policy)
    one = saver(store, policy, attempt="b")

    class Half:
        """A file whose writes are two steps: power may go in the middle of one."""

        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> Half:
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.close()

        def write(self, data: Any) -> int:
            data = bytes(data)
            counted(self._file.write)(data[: len(data) // 2])
            counted(self._file.write)(data[len(data) // 2 :])
            self._file.flush()
            return len(data)

    opened = Storage._open

    def open_file(self: Storage, name: str, mode: str) -> Any:
        file = counted(opened)(self, name, mode) if "w" in mode else opened(self, name, mode)
        return Half(file) if "w" in mode else file

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "_open", open_file)
        for name in ("_make_folder_of", "_rename"):
            patch.setattr(Storage, name, counted(getattr(Storage, name)))
        patch.setattr(storage_module.os, "fsync", counted(storage_module.os.fsync))
        patch.setattr(Storage, "_remove", removed_file_by_file(counted))
        one.save(manifest(20), contents(20))
        with contextlib.suppress(PowerCut):
            one.close()
    return taken


def removed_file_by_file(counted: Callable[..., Any]) -> Callable[..., None]:
    def remove(self: Storage, name: str) -> None:
        path = self._on_disk(name)
        if not path.exists():
            raise FileNotFoundError(name)
        for file in sorted(path.rglob("*"), reverse=True) if path.is_dir() else []:
            counted(file.rmdir if file.is_dir() else file.unlink)()
        counted(path.rmdir if path.is_dir() else path.unlink)()

    return remove


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_power_cut_at_any_moment_of_a_save_leaves_the_old_state_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_last: int
) -> None:
    policy = CheckpointConfig(keep_last=keep_last)
    num_steps = steps_of_a_save(tmp_path / "whole", monkeypatch, policy, None)
    assert num_steps > 25
    seen = []
    for last in range(num_steps + 1):
        folder = tmp_path / str(last)
        steps_of_a_save(folder, monkeypatch, policy, last)
        store = CheckpointStore(Storage(folder))
        valid = [entry.step for entry in store.valid()]
        assert valid in ([10], [10, 20], [20][: 2 - keep_last] or [10, 20]), (last, store.entries())
        assert all(store.damage(entry.name) == [] for entry in store.valid()), last
        seen.append(valid[-1])
        # The next start clears what is left and goes on.
        for name in store.unfinished():
            store.delete(name)
        save(store, 30, policy, attempt="c")
        assert [entry.problem for entry in store.entries()] == [None] * len(store.entries())
        assert len(store.entries()) <= keep_last
        shutil.rmtree(folder)
    assert seen == sorted(seen), "once the new one exists it stays"
    assert {10, 20} == set(seen)


def test_ranks_meet_in_the_storage_and_the_slowest_decides(store: CheckpointStore) -> None:
    first, second = (saver(store, rank=rank, world_size=2) for rank in (0, 1))
    stale = saver(store, attempt="0", rank=1, world_size=2)  # of an earlier start, still alive
    stale.save(manifest(10), contents(10, 1))
    stale.close()
    first.save(manifest(10), contents(10, 0))
    time.sleep(0.2)
    assert store.valid() == [], "rank 1 has written nothing for this attempt"
    second.save(manifest(10), contents(10, 1))
    second.close()
    first.close()
    (entry,) = store.valid()
    assert entry.manifest is not None
    assert {"state/weights_0.pt", "state/weights_1.pt", "rank_00001.json"} < set(entry.manifest.files)
    assert store.damage(entry.name) == []
    parts = [store.damage(entry.name, slice(rank, None, 2)) for rank in (0, 1)]
    assert parts == [[], []]


def test_only_the_last_start_of_a_run_writes_and_deletes(store: CheckpointStore) -> None:
    """The workers of a dead driver go on for a while, and get further than the run that was resumed."""
    policy = CheckpointConfig(keep_last=1)
    old = saver(store, policy, attempt="a")
    old.save(manifest(40), contents(40))
    old.wait()
    new = saver(store, policy, attempt="b")
    for act in (lambda: old.save(manifest(60), contents(60)), lambda: old.annotate({"val/loss": 1.0})):
        act()
        with pytest.raises(StorageError, match="was resumed by another process"):
            old.wait()
    assert [entry.step for entry in store.valid()] == [40]
    save(store, 60, policy, attempt="a")  # was just in time
    store.claim("b")
    new.save(manifest(44), contents(44))
    new.annotate({"val/loss": 2.0})
    new.close()
    assert [entry.step for entry in store.valid()] == [44, 60]
    assert store.valid()[0].manifest.metrics == {"val/loss": 2.0}  # type: ignore[union-attr]


def test_a_rank_that_never_comes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.train.saver._LONGEST_WAIT_S", 0.1)
    first = saver(CheckpointStore(Storage(tmp_path)), rank=0, world_size=3)
    first.save(manifest(10), contents(10))
    with pytest.raises(StorageError, match=r"ranks \[1, 2\] did not finish writing; checkpoint.storage must be one"):
        first.close()


def test_training_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = threading.Event()
    opened = Storage._open
    monkeypatch.setattr(Storage, "_open", lambda *args: (written.wait(10), opened(*args))[1])
    one = saver(CheckpointStore(Storage(tmp_path)))
    begun = time.monotonic()
    one.save(manifest(10), contents(10))
    one.check()
    assert time.monotonic() - begun < 5, "save returned before anything was written"
    written.set()
    one.close()


def test_the_best_stay_and_what_is_damaged_counts_for_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(Storage(tmp_path))
    policy = CheckpointConfig(keep_last=1, keep_best=KeepBest(n=1))
    one = saver(store, policy)
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0)):
        one.wait()
        one.save(manifest(step), contents(step))
        one.annotate({"val/loss": loss})
    one.close()
    assert [entry.step for entry in store.entries()] == [20, 30]

    # Step 30 loses bytes; step 20 must outlive any policy until there is another good one.
    damaged = tmp_path / store.names()[-1] / "state" / "weights_0.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    save(store, 25, CheckpointConfig(keep_last=1), attempt="b")
    assert [(entry.step, entry.problem is None) for entry in store.entries()] == [(25, True), (30, False)]

    # Damage that only reading finds, found by resuming from the one before.
    save(store, 26, CheckpointConfig(keep_last=9), attempt="b")
    resumed = saver(store, CheckpointConfig(keep_last=2), attempt="c")
    resumed.ignored = {store.names()[1]}
    resumed.save(manifest(25), contents(25))
    resumed.wait()
    assert [entry.name for entry in store.valid()] == ["step_00000025-b", "step_00000025-c", "step_00000026-b"]
    resumed.save(manifest(26), contents(26))  # past its step
    resumed.close()
    assert [entry.name for entry in store.valid()] == ["step_00000025-c", "step_00000026-c"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a//b", "./a", ".", "", "a\\b", MANIFEST, "a/"])
def test_a_manifest_cannot_point_outside(tmp_path: Path, name: str) -> None:
    assert not stays_inside(name)
    store = CheckpointStore(Storage(tmp_path))
    save(store, 7)
    (checkpoint,) = store.names()
    path = tmp_path / checkpoint / MANIFEST
    document = unseal(path.read_bytes())
    document["files"][name] = {"size": 1, "sha256": "0" * 64}
    path.write_bytes(seal(document))
    assert repr(name) in (store.entry(checkpoint).problem or "")
    with pytest.raises(Damaged, match="is not a file of the checkpoint"):
        store.manifest(checkpoint)


@pytest.mark.parametrize("linked", ["state/weights_0.pt", "state"])
def test_a_link_is_no_part_of_a_checkpoint(tmp_path: Path, linked: str) -> None:
    store = CheckpointStore(Storage(tmp_path / "run"))
    save(store, 7)
    (name,) = store.names()
    inside, outside = tmp_path / "run" / name / linked, tmp_path / "outside"
    inside.rename(outside)
    inside.symlink_to(outside)
    assert (store.entry(name).problem or "").startswith("state/weights_0.pt: is a link")
    assert store.damage(name) != []


def test_a_sealed_document_is_json_that_people_can_read() -> None:
    data = seal({"a": [1, 2.5], "b": {"c": "0" * 64, "sha256_of_the_rest": "x"}})
    assert json.loads(data)["a"] == [1, 2.5]
    assert unseal(data)["b"]["c"] == "0" * 64


class Failing:
    """A disk or bucket that takes so many bytes and then fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception, after: int) -> None:
        self.left = after
        opened = Storage._open

        def open_file(storage: Storage, name: str, mode: str) -> Any:
            file = opened(storage, name, mode)
            if "w" in mode:
                write = file.write

                def limited(data: Any) -> int:
                    self.left -= len(data)
                    if self.left < 0:
                        raise error
                    return write(data)

                return _Wrapped(file, limited)
            return file

        monkeypatch.setattr(Storage, "_open", open_file)


class _Wrapped:
    def __init__(self, file: Any, write: Callable[[Any], int]) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Wrapped:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()


@pytest.mark.parametrize("after", [0, 300, 3000])
@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left; free some, or keep fewer with"),
        (OSError(errno.EROFS, "Read-only file system"), "change its permissions or set checkpoint.storage"),
        (
            TimeoutError("no answer from bucket"),
            "does not answer (no answer from bucket); check that it can be reached",
        ),
    ],
)
def test_a_failed_save_says_where_and_what_to_do_and_the_last_one_stays(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, error: Exception, advice: str, after: int
) -> None:
    save(store, 10, CheckpointConfig(keep_last=1))
    one = saver(store, CheckpointConfig(keep_last=1), attempt="b")
    with monkeypatch.context() as patch:
        Failing(patch, error, after)
        one.save(manifest(20), contents(20))
        with pytest.raises(StorageError) as caught:
            one.wait()
        with pytest.raises(StorageError):
            one.check()
    assert advice in str(caught.value)
    assert f"{store.storage.location}/step_00000020-b/" in str(caught.value)
    assert [entry.step for entry in store.valid()] == [10]
    assert store.damage(store.valid()[0].name) == []
