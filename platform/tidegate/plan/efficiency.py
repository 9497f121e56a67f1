"""What our kernels and collectives reach of what the hardware has: `efficiency.yaml`, which docs/plan_calibration.py
writes from measurements."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import Field

from tidegate.config import Config, load

__all__ = ["Efficiency", "measured_efficiency"]


class Efficiency(Config):
    """Shares are of the peak in `Gpu`, in (0, 1]."""

    memory: float = Field(gt=0, le=1)
    """Of the memory bandwidth, by kernels that only move data."""
    nvlink: float = Field(gt=0, le=1)
    """Of NVLink, by NCCL."""
    network: float = Field(gt=0, le=1)
    """Of the network, by NCCL; assumed."""
    head: float = Field(gt=0, le=1)
    """Of the FLOP/s, by the head and the loss."""
    experts: float = Field(gt=0, le=1)
    """By the grouped matrix products, beside the time that their rows and weights take to move."""
    projections: float = Field(gt=0, le=1)
    """By all other matrix products."""
    attention: dict[int, float]
    """By attention over whole sequences, by head width."""
    attention_isolated: dict[int, float]
    """The same inside documents of about 1,500 tokens, of the FLOPs of whole sequences."""
    unlisted: float = Field(ge=0)
    """Time of kernels that are not reckoned one by one and of gaps, over the time of those that are."""
    host_s_per_layer: float = Field(ge=0)
    """What the host needs to launch a layer's forward and backward pass."""
    zero2_bytes: float = Field(ge=0)
    """Bytes a parameter and micro-batch that DeepSpeed's own path at ZeRO 2 moves."""
    ranges: dict[str, tuple[int, int]]
    """Of fields of the jobs whose steps were measured, the smallest and the largest value."""
    load_skew: float = Field(ge=1)
    """With expert parallelism, assignments of the rank that the others wait for, over the mean; assumed."""


@cache
def measured_efficiency() -> Efficiency:
    """What is shipped."""
    efficiency: Efficiency = load(Path(__file__).with_name("efficiency.yaml"), Efficiency).config
    return efficiency
