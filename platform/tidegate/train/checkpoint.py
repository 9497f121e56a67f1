"""What a checkpoint holds, and saving and resuming as the loop sees them.

DeepSpeed's shards hold weights, controllers and masks (buffers of the model), optimizer state and, with them, the
`Position`. Beside them, each rank keeps its generators, and rank 0 the metrics that MLflow had not yet taken. What
must fit for all that to mean something, the layout and the model, is in the manifest and is read first. Another number
of workers, expert parallelism, ZeRO stage or place of the optimizer fits after a reshape.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from tidegate import __version__
from tidegate.config import ConfigError
from tidegate.parallel import collectives
from tidegate.parallel.engine import Engine
from tidegate.train.checkpoint_store import TRACKER, CheckpointStore, Manifest, finite
from tidegate.train.job import Job
from tidegate.train.layout import in_words, layout_of, reshapes
from tidegate.train.saver import Saver
from tidegate.train.storage import Storage

__all__ = ["Checkpoints", "Position", "Tracker"]


class Position(NamedTuple):
    """Where a run is; everything but weights, controllers, optimizer state and generators."""

    step: int
    """Finished optimizer steps."""
    tokens: int
    """Tokens trained on."""
    data: dict[str, Any]
    """`TrainLoader.state_dict`."""
    guards: dict[str, Any]
    """`GuardsState`."""


class Tracker(NamedTuple):
    """What rank 0 knows of metrics on their way to the store; plain values."""

    unsent: Callable[[], list[dict[str, Any]]]
    adopt: Callable[[list[dict[str, Any]]], None]


class Checkpoints:
    """One rank's view of its run's checkpoints; every rank calls every method. Leaving the context finishes the saves.

    Args:
        location: folder or URI of the run's checkpoints, the same on every rank.
        job: the run's.
        engine: whose state is saved and restored.
        tracker: of rank 0; None elsewhere.
        notice: shows a line to the user; called on rank 0.
    """

    def __init__(
        self, location: str, job: Job, engine: Engine, tracker: Tracker | None, notice: Callable[[str], None]
    ) -> None:
        self._job, self._engine, self._tracker, self._notice = job, engine, tracker, notice
        self._store = CheckpointStore(Storage(location))
        self._rank, self._world_size = collectives.rank(), collectives.world_size()
        self.attempt = collectives.gather(f"{time.time_ns() // 1_000_000:x}")[0]
        """Names this start of the run; the same on every rank."""
        ranks = {"rank": self._rank, "world_size": self._world_size}
        self._saver = Saver(self._store, job.checkpoint, **ranks, attempt=self.attempt)
        self._saved_step = 0
        self.stalled_s = 0.0
        """Seconds for which training stood still so far: snapshots, and waiting for the save before."""
        self._read_s = 0.0

    def resume(self) -> Position | None:
        """Restore engine, generators and tracker from the newest checkpoint that is whole.

        Without one, generators start from the job's seed, and the answer is None.

        Raises:
            ConfigError: the checkpoint is of another model, or of a layout that does not lead to the job's.
        """
        if self._rank == 0:
            for left in self._store.unfinished():  # by an attempt that was killed while it wrote
                self._store.delete(left)
        name = self._newest_whole()
        if name is None:
            _seed_generators(self._job.train.seed, self._rank)
            return None
        state = self._restore(name)
        if self._tracker is not None:
            with self._store.open(name, TRACKER) as file:
                self._tracker.adopt(torch.load(file, weights_only=True))
        return state

    def go_back(self) -> Position:
        """Restore engine and generators, in the middle of a run, from its newest checkpoint that is whole.

        Raises:
            ConfigError: there is none.
        """
        self._saver.wait()
        name = self._newest_whole()
        if name is None:
            raise ConfigError(
                f"{self._store.storage.location}: there is no checkpoint to go back to yet; lower checkpoint.every="
                f"{self._job.checkpoint.every}, or the learning rate at the beginning"
            )
        return self._restore(name)

    def _restore(self, name: str) -> Position:
        manifest = self._store.manifest(name)
        reshape = reshapes(self._job, manifest, self._store.storage.path(name))
        state = self._engine.load(lambda file: self._store.open(name, file), manifest.files, reshape=reshape)
        if reshape and self._rank == 0:
            self._notice(f"{self._store.storage.path(name)} is reshaped from {in_words(manifest.layout)}")
        if _generator_file(self._rank) in manifest.files:
            with self._store.open(name, _generator_file(self._rank)) as file:
                _restore_generators(torch.load(file, weights_only=True), self._engine.device)
        else:  # there were fewer ranks
            _seed_generators(self._job.train.seed, self._rank)
        self._saver.newest, self._saved_step = name, manifest.step
        return Position(**state)

    def save(self, position: Position, metrics: Mapping[str, float]) -> None:
        """Take a snapshot and begin to write it.

        Args:
            metrics: of this step; the training loss and the one of `checkpoint.keep_best` are kept.

        Raises:
            StorageError: the save before failed.
        """
        begun = time.monotonic()
        self._saver.wait()
        files: dict[str, Any] = {}
        self._engine.save(files.__setitem__, position._asdict())
        files[_generator_file(self._rank)] = _generators()
        if self._tracker is not None:
            files[TRACKER] = self._tracker.unsent()
        best = self._job.checkpoint.keep_best
        kept = {"train/loss", best.metric if best else "train/loss"}
        manifest = Manifest(
            tidegate=__version__,
            step=position.step,
            tokens=position.tokens,
            layout=layout_of(self._job),
            model=self._job.model.model_dump(mode="json"),
            metrics=finite({name: value for name, value in metrics.items() if name in kept}),
            files={},
        )
        self._saver.save(manifest, files)
        if self._engine.store is not None:  # as large as all of the host's memory, so there is no copy to write from
            self._saver.wait()
        self._saved_step = position.step
        self.stalled_s += time.monotonic() - begun

    def keep_batch(self, number: int, content: Mapping[str, Any]) -> None:
        """Write what this rank trained on in a step that went wrong, to `replay/`; waits until it is there.

        Args:
            number: of the batch in the order of data.
            content: plain values and tensors in host memory.
        """
        name = f"replay/batch_{number:08d}/rank_{self._rank:05d}.pt"
        with self._store.storage.create(name) as file:
            torch.save(dict(content), file)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add held-out metrics to the checkpoint of the step, if it has one."""
        if self._rank == 0 and step == self._saved_step:
            self._saver.annotate({name: value for name, value in metrics.items() if name.startswith("val/")})

    def check(self) -> None:
        """Raise the error of a save in the background, if one failed; does not wait."""
        self._saver.check()

    def read(self) -> dict[str, float]:
        """Metrics since the last reading."""
        stalled_s, self._read_s = self.stalled_s - self._read_s, self.stalled_s
        return {
            "checkpoint/stall_s": stalled_s,
            "checkpoint/write_s": self._saver.written_s,
            "checkpoint/age_s": time.monotonic() - self._saver.committed_at,
        }

    @property
    def newest(self) -> str:
        """Path or URI of the last checkpoint."""
        return self._store.storage.path(self._saver.newest or "")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._saver.close()
        else:
            self._saver.abandon()

    def _newest_whole(self) -> str | None:
        """The name of the newest checkpoint whose contents are what was written; each rank reads its share of it."""
        listed = [(entry.name, entry.problem) for entry in self._store.entries()] if self._rank == 0 else []
        for name, problem in reversed(collectives.gather(listed)[0]):
            problems = [problem] if problem else []
            if not problems:
                reshapes(self._job, self._store.manifest(name), self._store.storage.path(name))
                mine = self._store.damage(name, slice(self._rank, None, self._world_size))
                problems = [line for lines in collectives.gather(mine) for line in lines]
            if not problems:
                return name
            self._saver.ignored.add(name)
            if self._rank == 0:
                self._notice(f"{self._store.storage.path(name)} is not used: {problems[0]}")
        return None


def _generator_file(rank: int) -> str:
    return f"rank_{rank:05d}/generators.pt"


def _seed_generators(seed: int, rank: int) -> None:
    """The model draws from the clock of its steps and from nothing here; what does not know of it is seeded too."""
    for start in (random.seed, np.random.seed, torch.manual_seed):
        start(seed + rank)


def _generators() -> dict[str, Any]:
    algorithm, keys, *rest = np.random.get_state(legacy=True)
    states = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (str(algorithm), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_generators(states: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    algorithm, keys, *rest = states["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"])
