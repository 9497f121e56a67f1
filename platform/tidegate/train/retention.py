"""When to save, where to, and which checkpoints to keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import Field

from tidegate.config import Config

__all__ = ["CheckpointConfig", "KeepBest", "Kept", "retained"]


class KeepBest(Config):
    metric: str = "val/loss"
    """`train/loss`, or a metric of evaluations (docs/metrics.md); a checkpoint without it is not among the best."""
    mode: Literal["min", "max"] = "min"
    n: int = Field(default=1, ge=1)


class CheckpointConfig(Config):
    every: int = Field(default=100, ge=1)
    """Steps between two checkpoints; the last step, and one before which the run was stopped, are saved too."""
    storage: str | None = None
    """Folder or fsspec URI; None: the state directory."""
    keep_last: int = Field(default=2, ge=1)
    """The newest so many stay."""
    keep_best: KeepBest | None = None
    keep_every_tokens: int | None = Field(default=None, ge=1)
    """The first checkpoint at or after each multiple of so many tokens stays for good."""
    at_tokens: int | None = Field(default=None, ge=1)
    """The step that reaches so many tokens is saved too, and that checkpoint stays for good."""

    @property
    def kept(self) -> int:
        """How many checkpoints stay at a time, without those of `keep_every_tokens`."""
        return self.keep_last + (self.keep_best.n if self.keep_best else 0) + (self.at_tokens is not None)


class Kept(NamedTuple):
    """What the policy looks at."""

    name: str
    step: int
    tokens: int
    metrics: dict[str, float]


def retained(checkpoints: Sequence[Kept], policy: CheckpointConfig) -> set[str]:
    """The names of those that stay; all others may go.

    The answer depends on nothing but the checkpoints that are there, and deleting the others does not change it.

    Args:
        checkpoints: the valid ones, in any order. The newest always stays.
        policy: of the job.
    """
    by_age = sorted(checkpoints, key=lambda checkpoint: (checkpoint.step, checkpoint.name))
    stay = {checkpoint.name for checkpoint in by_age[-policy.keep_last :]}
    best = policy.keep_best
    if best is not None:
        sign = 1 if best.mode == "min" else -1
        measured = [checkpoint for checkpoint in by_age if best.metric in checkpoint.metrics]
        measured.sort(key=lambda checkpoint: sign * checkpoint.metrics[best.metric])  # of equals, the older stays
        stay |= {checkpoint.name for checkpoint in measured[: best.n]}
    if policy.keep_every_tokens is not None:
        reached = set()
        for checkpoint in by_age:
            multiple = checkpoint.tokens // policy.keep_every_tokens
            if multiple and multiple not in reached:
                reached.add(multiple)
                stay.add(checkpoint.name)
    if policy.at_tokens is not None:
        stay |= {checkpoint.name for checkpoint in [c for c in by_age if c.tokens >= policy.at_tokens][:1]}
    return stay
