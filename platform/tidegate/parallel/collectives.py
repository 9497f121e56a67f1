"""Process group start-up and the few collectives that training uses outside DeepSpeed."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["all_gather_object", "all_reduce", "barrier", "default_device", "rank", "start", "stop", "world_size"]


def default_device() -> torch.device:
    """This process's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def start() -> bool:
    """Join the process group: Ray's if there is one, torchrun's environment, or a group of one.

    Returns:
        Whether this call made the group, so that the caller should `stop` it.
    """
    device = default_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return False
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    cuda = device.type == "cuda"
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return True


def stop() -> None:
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def barrier() -> None:
    dist.barrier()


def all_reduce(tensor: torch.Tensor) -> None:
    """Sum over all ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)


def all_gather_object(value: Any) -> list[Any]:
    """One picklable object of every rank, in rank order, on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
