"""Process group start-up and the few collectives that training uses outside DeepSpeed."""

from __future__ import annotations

import os
import socket
from typing import TypeVar

import torch
import torch.distributed as dist

__all__ = [
    "HostCopy",
    "all_reduce",
    "all_reduce_max",
    "default_device",
    "free_port",
    "gather",
    "local_rank",
    "local_world_size",
    "rank",
    "start",
    "stop",
    "world_size",
]


T = TypeVar("T")


def default_device() -> torch.device:
    """This process's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def start(*, alone: bool = False) -> bool:
    """Join the process group: the launcher's if there is one, else the environment's (torchrun), or a group of one.

    Args:
        alone: make a group of one whatever the environment says.

    Returns:
        Whether this call made the group, so that the caller should `stop` it.
    """
    device = default_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return False
    if alone or "RANK" not in os.environ:
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=free_port(),
        )
    cuda = device.type == "cuda"
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return True


def stop() -> None:
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def local_rank() -> int:
    """This rank among those of its machine, as the launcher says; its rank if it does not."""
    return int(os.environ.get("LOCAL_RANK", dist.get_rank()))


def local_world_size() -> int:
    """Ranks on this machine, as the launcher says (Ray Train and torchrun do); all of them if it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))


def all_reduce(tensor: torch.Tensor) -> None:
    """Sum over all ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)


def all_reduce_max(tensor: torch.Tensor) -> None:
    """Largest over all ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of ranks, on every rank; for small Python objects, at the start of a run."""
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


class HostCopy:
    """A device tensor on its way to the host: reading it later does not wait for work queued after the copy."""

    def __init__(self, value: torch.Tensor) -> None:
        self._event = None
        self._host = value
        if value.is_cuda:
            self._host = torch.empty_like(value, device="cpu", pin_memory=True)
            self._host.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def tensor(self) -> torch.Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host

    def read(self) -> float:
        """Of a scalar."""
        return float(self.tensor())


def free_port() -> str:
    """A port of this machine that nothing listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
