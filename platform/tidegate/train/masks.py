"""`train.mask`: a safetensors file of masks over single weights, a bool tensor a matrix, under the decoder's names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tidegate.config import ConfigError
from tidegate.model.masks import prunable
from tidegate.model.weights import ALL, Spec, Weights
from tidegate.train.job import Job
from tidegate.train.storage import sync_folder

__all__ = ["MaskFile", "check_mask", "held_masks", "write_masks"]

_KEPT = "kept"


class MaskFile(Weights):
    """Masks by name; contents are read where they are used.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
            parts = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118 - not a mapping
            self._kept = int((self._file.metadata() or {})[_KEPT])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ConfigError(f"train.mask={path}: cannot be read as a file of masks ({error})") from error
        other = [name for name, part in parts.items() if part.get_dtype() != "BOOL"]
        if other:
            raise ConfigError(f"train.mask={path}: {other[0]} is {parts[other[0]].get_dtype()}, not BOOL: no mask")
        self._specs = {name: Spec(tuple(part.get_shape()), torch.bool) for name, part in parts.items()}

    @property
    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    @property
    def kept(self) -> int:
        """Weights that are kept, as the file says."""
        return self._kept

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name) if rows == ALL else self._file.get_slice(name)[rows]
        return tensor

    def problem(self) -> str | None:
        """Whether another number of weights is kept than was written; reads everything."""
        found = sum(int(self.read(name).sum()) for name in self._specs)
        return None if found == self._kept else f"keeps {found} weights, but {self._kept} were written"


def held_masks(job: Job) -> MaskFile | None:
    """The job's masks, which fit its model.

    Raises:
        ConfigError: see `MaskFile`; or a mask is of no matrix that can be pruned, or of another shape.
    """
    if job.train.mask is None:
        return None
    masks = MaskFile(Path(job.train.mask))
    wanted = prunable(job.model, ("attention", "ffn", "experts"))
    for name, spec in masks.specs.items():
        if wanted.get(name) != spec.shape:
            there = f"of shape {list(wanted[name])} there" if name in wanted else "not to be pruned there"
            raise ConfigError(
                f"train.mask={masks.path}: masks {name} {list(spec.shape)}, which is {there}; the masks are of another "
                "model"
            )
    return masks


def check_mask(job: Job) -> None:
    """What `held_masks` will find, and that the file is what was written; reads all of it.

    Raises:
        ConfigError: see there.
    """
    masks = held_masks(job)
    problem = masks.problem() if masks else None
    if problem:
        raise ConfigError(f"train.mask={job.train.mask}: {problem}; write it again")


def write_masks(path: Path, masks: Mapping[str, torch.Tensor]) -> None:
    """A file that is there whole or not at all."""
    kept = sum(int(mask.sum()) for mask in masks.values())
    partial = path.with_name(f".{path.name}.partial")
    save_file(dict(masks), partial, metadata={_KEPT: str(kept)})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)
