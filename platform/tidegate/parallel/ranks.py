"""Running one function on several ranks of this machine, without Ray."""

from __future__ import annotations

import faulthandler
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.multiprocessing.spawn import spawn

from tidegate.parallel import collectives

__all__ = ["on_ranks"]

R = TypeVar("R")


def on_ranks(world_size: int, function: Callable[..., R], *args: Any) -> list[R]:
    """Call a function on every rank of a new process group; its results, in the order of ranks.

    One rank is this process. More are new processes, one GPU each if there are any: then the function, its arguments
    and its result must pickle.

    Args:
        world_size: number of ranks; on a machine with GPUs, at most as many as it has.
    """
    if world_size == 1:
        collectives.start(alone=True)
        try:
            return [function(*args)]
        finally:
            collectives.stop()
    with tempfile.TemporaryDirectory(prefix="tidegate-") as folder:
        call = _Call(world_size, collectives.free_port(), Path(folder), function, args)
        spawn(_run_rank, (call,), nprocs=world_size)
        # Any Python value, so unpickled: from a folder that only this user may enter, written by the processes above.
        return [torch.load(call.result(rank), weights_only=False) for rank in range(world_size)]


class _Call(NamedTuple):
    world_size: int
    port: str
    folder: Path
    function: Callable[..., Any]
    args: tuple[Any, ...]

    def result(self, rank: int) -> Path:
        return self.folder / str(rank)


def _run_rank(rank: int, call: _Call) -> None:
    faulthandler.enable()  # a crash below Python says where Python was
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(call.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=call.port,
    )
    if "OMP_NUM_THREADS" not in os.environ:  # or every rank takes all cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // call.world_size))
    collectives.start()
    torch.save(call.function(*call.args), call.result(rank))
    collectives.stop()  # not after an error: the group would wait for this rank, and `spawn` ends the others
