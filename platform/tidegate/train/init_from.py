"""`train.init_from`: whose weights a new run begins with, and whether they are its model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tidegate.config import ConfigError, diff, flatten
from tidegate.model.decoder import DenseConfig, ModelConfig
from tidegate.model.moe import MoEConfig
from tidegate.model.upcycle import Upcycled, upcycling_problem
from tidegate.model.weights import Weights
from tidegate.train.export import damaged_files, open_export
from tidegate.train.job import Job

__all__ = ["check_init_from", "starting_weights"]

_FREE = ("init_std", "attention.qk_clip", "ffn.router.quantile", "attention.rope_theta", "attention.yarn")
"""Fields, and those below them, that do not change what a model consists of, nor what it computes with its weights; but
for positions, which a run on longer sequences stretches on purpose."""


def check_init_from(job: Job) -> None:
    """What `starting_weights` will find, and that every file is what was exported; reads all of them.

    Raises:
        ConfigError: see there; a file's content is not what its manifest says.
    """
    if starting_weights(job) is None:
        return
    folder = Path(str(job.train.init_from))
    problems = damaged_files(folder)
    if problems:
        raise ConfigError(f"train.init_from={folder}: {problems[0]}; copy or export it again")


def starting_weights(job: Job) -> Weights | None:
    """The weights that a new run of the job begins with; None: it draws them. Contents are read where they are used.

    Raises:
        ConfigError: the folder holds no model or another one, or a dense one that cannot become the job's mixture.
    """
    if job.train.init_from is None:
        return None
    folder = Path(job.train.init_from)
    name = f"train.init_from={folder}"
    model, weights = open_export(folder)
    upcycles = isinstance(model.ffn, DenseConfig) and isinstance(job.model.ffn, MoEConfig)
    _refuse_another(name, model, job.model, ("ffn",) if upcycles else ())
    if isinstance(model.ffn, DenseConfig) and isinstance(job.model.ffn, MoEConfig):
        problem = upcycling_problem(model.ffn, job.model.ffn)
        if problem:
            raise ConfigError(f"{name} holds a dense model: {problem}")
        return Upcycled(weights, job.model, job.train.upcycle_noise, job.train.seed)
    if job.train.upcycle_noise > 0:
        raise ConfigError(f"train.upcycle_noise={job.train.upcycle_noise}, but {name} has experts already; set it to 0")
    return weights


def _refuse_another(name: str, found: ModelConfig, wanted: ModelConfig, besides: tuple[str, ...]) -> None:
    there, here = flatten(found), flatten(wanted)
    fields = [field for field in diff(there, here) if not _below(field, _FREE + besides)]
    if fields:
        shown: list[Any] = [f"model.{f}={there.get(f, '-')} (the job has {here.get(f, '-')})" for f in sorted(fields)]
        raise ConfigError(f"{name} holds a model with {', '.join(shown)}; set the job's to them")


def _below(field: str, tops: tuple[str, ...]) -> bool:
    return any(field == top or field.startswith(f"{top}.") for top in tops)
