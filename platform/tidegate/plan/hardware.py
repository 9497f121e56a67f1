"""GPUs and what connects them: `hardware.yaml`, and what a user lays over it."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, NonNegativeFloat

from tidegate.config import Config, ConfigError, load

__all__ = ["Gpu", "Hardware", "load_gpus", "parse_gpus"]

_SHIPPED = Path(__file__).with_name("hardware.yaml")
_GPUS = re.compile(r"\s*(\d+)\s*[xX*]\s*([A-Za-z]\w*)\s*")


class Gpu(Config):
    """One kind of GPU in the nodes that it comes in. Speeds are in one direction; G is 10^9, Gi is 2^30."""

    peak_tflops: float = Field(gt=0)
    """Dense bf16, of the data sheet; what MFU is of."""
    memory_gib: float = Field(gt=0)
    reserved_gib: float = Field(ge=0)
    """Of it, what the driver and NCCL take."""
    memory_tb_per_s: float = Field(gt=0)
    nvlink_gb_per_s: float = Field(gt=0)
    """To the GPUs of its node."""
    nvlink_latency_us: float = Field(ge=0)
    """Of a message."""
    network_gb_per_s: float = Field(gt=0)
    """To other nodes; a GPU has so much for itself."""
    network_latency_us: float = Field(ge=0)
    host_gb_per_s: float = Field(gt=0)
    """To the host's memory."""
    storage_gb_per_s: float = Field(gt=0)
    """Of a node, to where checkpoints go."""
    gpus_per_node: int = Field(ge=1)
    load_w: float = Field(gt=0)
    idle_w: float = Field(ge=0)
    machine_w: float = Field(ge=0)
    """Of everything else in the node, for each GPU."""
    mtbf_gpu_hours: float = Field(gt=0)
    """GPU-hours between two failures that end a run."""
    restart_s: float = Field(ge=0)
    """From a failure until the run steps on from its checkpoint."""
    usd_per_gpu_hour: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """By who rents it out."""

    @property
    def peak(self) -> float:
        """FLOP/s."""
        return self.peak_tflops * 1e12

    @property
    def usable(self) -> float:
        """Bytes that a job may allocate."""
        return (self.memory_gib - self.reserved_gib) * 2**30


class GpuTable(Config):
    gpus: dict[str, Gpu]


class Hardware(NamedTuple):
    """So many GPUs of a kind, in full nodes but for the last."""

    num_gpus: int
    name: str
    gpu: Gpu

    def __str__(self) -> str:
        return f"{self.num_gpus}x{self.name}"


def load_gpus(path: Path | None = None) -> dict[str, Gpu]:
    """The GPUs that are shipped, with a user's file over them.

    Raises:
        ConfigError: the file cannot be read, or a field of it is wrong.
    """
    if path is not None and not path.is_file():
        raise ConfigError(f"--hardware {path}: no such file")
    table: GpuTable = load(path or _SHIPPED, GpuTable, below=_SHIPPED if path else None).config
    return table.gpus


def parse_gpus(text: str, path: Path | None = None) -> Hardware:
    """`256xH100`.

    Args:
        text: as it was written.
        path: a user's file over the shipped one.

    Raises:
        ConfigError: not of this form, no GPU, or a kind that is not known.
    """
    match = _GPUS.fullmatch(text)
    if match is None:
        raise ConfigError(f"--gpus {text!r} is not of the form 256xH100")
    count, name = int(match[1]), match[2]
    known = load_gpus(path)
    by_case = {key.lower(): key for key in known}
    if name.lower() not in by_case:
        near = difflib.get_close_matches(name.lower(), by_case, n=1, cutoff=0.0)
        raise ConfigError(
            f"--gpus {text!r}: unknown GPU {name!r}; did you mean {by_case[near[0]]!r}? known are {', '.join(known)}, "
            "and --hardware FILE adds others"
        )
    if count < 1:
        raise ConfigError(f"--gpus {text!r} is no GPU at all; ask for 1 or more")
    name = by_case[name.lower()]
    return Hardware(count, name, known[name])
