"""Which checkpoints a job can continue from: those of its model, at its layout or at one that can be reshaped to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidegate.config import ConfigError, diff, flatten
from tidegate.model.decoder import ModelConfig
from tidegate.train.checkpoint_store import Manifest
from tidegate.train.job import Job

__all__ = ["CHANGEABLE", "in_words", "layout_of", "reshapes"]

CHANGEABLE = (
    "balance.bias_rate",
    "balance.budget.target",
    "balance.budget.weight",
    "balance.loss_weight",
    "balance.z_loss_weight",
    "model.ffn.router.noise",
    "model.ffn.router.tau_end",
    "model.ffn.router.tau_start",
    "optimizer.gradient_clip",
    "optimizer.schedule.final_fraction",
    "optimizer.schedule.peak",
    "optimizer.weight_decay",
)
"""What every step reads from the job and nothing that is saved hangs on: a resume may change it."""
_RESHAPED = ("resources.workers", "parallel.expert", "parallel.zero_stage", "parallel.offload")


def layout_of(job: Job) -> dict[str, Any]:
    """What a checkpoint's files hang on, beside the model."""
    return {
        "resources.workers": job.resources.workers,
        "parallel.expert": job.parallel.expert,
        "parallel.zero_stage": job.parallel.zero_stage,
        "parallel.offload": job.parallel.offload,
        "train.precision": job.train.precision,
        "optimizer.state": job.optimizer.state,
    }


def in_words(layout: Mapping[str, Any]) -> str:
    return ", ".join(f"{field}={layout[field]}" for field in _RESHAPED)


def reshapes(job: Job, manifest: Manifest, path: str) -> bool:
    """Whether a checkpoint was written at another layout, to which this job's can be reached.

    Args:
        job: that is to continue.
        manifest: of the checkpoint.
        path: of it, for the message.

    Raises:
        ConfigError: it cannot, or the checkpoint is of another model.
    """
    model = ModelConfig.model_validate(manifest.model)  # fills in fields that are younger than the checkpoint
    stored = manifest.layout | {f"model.{field}": value for field, value in flatten(model).items()}
    wanted = layout_of(job) | {f"model.{field}": value for field, value in flatten(job.model).items()}
    changed = [field for field in diff(stored, wanted) if field not in CHANGEABLE]
    why = "resume with the checkpoint's"
    fixed = [field for field in changed if field not in _RESHAPED]
    if not fixed and changed and 0 in (stored["parallel.zero_stage"], wanted["parallel.zero_stage"]):
        fixed, why = changed, f"{why}: reshaping needs parallel.zero_stage=1 or 2 on both sides"
    if not fixed and changed and "experts" in (stored["parallel.offload"], wanted["parallel.offload"]):
        fixed, why = changed, f"{why}: experts in the host's memory (parallel.offload=experts) are not reshaped"
    for field in fixed:
        raise ConfigError(
            f"{path}: the checkpoint was written at {field}={stored.get(field)}, this job has "
            f"{field}={wanted.get(field)}; {why}"
        )
    return bool(changed)
