"""Checkpoint folders: DeepSpeed's sharded state, each rank's generators, and a small JSON that says what it is.

`save` fills a folder that belongs to this rank; the launcher publishes it (Ray's storage merges the ranks' folders).
The JSON is written by rank 0 and read before anything is loaded, so that a layout that does not fit is an error with
both layouts in it and not a shape mismatch deep inside DeepSpeed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tidegate import __version__
from tidegate.config import ConfigError, diff, flatten
from tidegate.model.decoder import ModelConfig
from tidegate.parallel import collectives
from tidegate.parallel.engine import Engine
from tidegate.train.job import Job

__all__ = ["Position", "load", "save"]

_ABOUT = "tidegate.json"


class Position(NamedTuple):
    """Where a run is; everything but weights, controllers, optimizer state and generators."""

    step: int
    """Finished optimizer steps."""
    tokens: int
    """Tokens trained on."""
    data: dict[str, Any]
    """`TrainLoader.state_dict`."""
    spikes: list[float]
    """`LossSpikes.state`."""


def save(folder: Path, engine: Engine, job: Job, position: Position) -> None:
    """Write this rank's part of a checkpoint into `folder`; every rank must call it."""
    folder.mkdir(parents=True, exist_ok=True)
    engine.save(folder, position._asdict())
    torch.save(_generators(), folder / _generator_file())
    if collectives.rank() == 0:
        about = {
            "version": __version__,
            "step": position.step,
            "tokens": position.tokens,
            "layout": _layout(job),
            "model": job.model.model_dump(mode="json"),
        }
        (folder / _ABOUT).write_text(json.dumps(about, indent=2), encoding="utf-8")


def load(folder: Path, engine: Engine, job: Job) -> Position:
    """Restore engine and generators from a checkpoint of the same layout; every rank must call it.

    Raises:
        ConfigError: the folder holds no checkpoint, or one of another layout or model.
    """
    about = _about(folder)
    model = ModelConfig.model_validate(about["model"])  # fills in fields that are younger than the checkpoint
    older = {"parallel.offload": "none"}  # of checkpoints from before there was a choice
    stored = older | about["layout"] | {f"model.{field}": value for field, value in flatten(model).items()}
    wanted = _layout(job) | {f"model.{field}": value for field, value in flatten(job.model).items()}
    for field in diff(stored, wanted):
        raise ConfigError(
            f"{folder}: the checkpoint was written at {field}={stored.get(field)}, this job has "
            f"{field}={wanted.get(field)}; resume with the checkpoint's"
        )
    state = engine.load(folder)
    generators = torch.load(folder / _generator_file(), weights_only=True)
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators and engine.device.type == "cuda":
        torch.cuda.set_rng_state(generators["cuda"])
    return Position(**state)


def _about(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{folder}: not a Tidegate checkpoint ({error})") from error


def _layout(job: Job) -> dict[str, Any]:
    return {
        "resources.workers": job.resources.workers,
        "parallel.expert": job.parallel.expert,
        "parallel.zero_stage": job.parallel.zero_stage,
        "parallel.offload": job.parallel.offload,
        "train.precision": job.train.precision,
    }


def _generator_file() -> str:
    return f"generators_rank_{collectives.rank():05d}.pt"


def _generators() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
